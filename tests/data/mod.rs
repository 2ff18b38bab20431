//! The data path: reference numbers, then real files of every kind, then everything that can be wrong with them.

mod golden;
