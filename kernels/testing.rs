//! What the ops' tests share.
