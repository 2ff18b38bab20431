//! Where the reference numbers are, for every test of this binary.

use std::path::PathBuf;

/// The directory of reference numbers that travels with the repository.
pub fn golden_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"))
}

#[test]
fn the_reference_numbers_are_present() {
    let index = std::fs::read_to_string(golden_dir().join("INDEX.md")).unwrap();
    assert!(index.contains("01_dit_t2v_a"));
}
