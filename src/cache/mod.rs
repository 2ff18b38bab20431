//! What is computed once per item and kept beside it: latents and caption embeddings, each with the recipe it was
//! made by. `names`, `format`: the files. `index`: what training reads.

pub mod format;
pub mod index;
pub mod names;
