//! Files read through a mapping and by position: the same bytes, and errors for files that are cut meanwhile.

use super::{put, raw_safetensors, user_error};
use std::path::{Path, PathBuf};
use wan_train::loader::{Reading, Source};

const WAYS: [Reading; 2] = [Reading::Mapped, Reading::Positional];

/// Bytes that differ from page to page and within each.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Codes of the given lengths, one tensor after the other, and all of them together.
fn file(dir: &Path, lengths: &[(&str, usize)]) -> (PathBuf, Vec<u8>) {
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, len) in lengths {
        let entry = serde_json::json!({"dtype": "U8", "shape": [len], "data_offsets": [at, at + len]});
        header.insert((*name).into(), entry);
        at += len;
    }
    let body = noise(at);
    (put(dir, "m.safetensors", &raw_safetensors(&serde_json::Value::Object(header).to_string(), &body)), body)
}

#[test]
fn local_files_are_mapped_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = file(dir.path(), &[("a", 10)]);
    assert_eq!(Source::open(&path).unwrap().is_mapped(), cfg!(target_os = "linux"));
    assert!(!Source::open_by(&path, Reading::Positional).unwrap().is_mapped());
}

/// Pieces that begin and end anywhere, longer than what is copied at a time, taken by several threads at once.
#[test]
fn any_piece_of_a_large_tensor_is_the_same_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let (small, large) = (1_000_003, (40 << 20) + 5);
    let (path, body) = file(dir.path(), &[("small", small), ("large", large), ("last", 3)]);
    for way in WAYS {
        let source = Source::open_by(&path, way).unwrap();
        assert!(source.bytes("small").unwrap() == body[..small], "{way:?}");
        assert!(source.bytes("large").unwrap() == body[small..small + large], "{way:?}");
        assert_eq!(source.bytes("last").unwrap(), body[small + large..], "{way:?}");
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (source, want) = (&source, &body[small..small + large]);
                scope.spawn(move || {
                    let lengths = [1, 4095, 4097, 70_001, 17 << 20];
                    for (i, len) in lengths.into_iter().enumerate() {
                        let at = (thread * 5_000_011 + i * 777_777) % (large - len);
                        let mut out = vec![0u8; len];
                        source.read_part("large", at, &mut out).unwrap();
                        assert!(out == want[at..at + len], "{way:?}: {len} bytes at {at}");
                    }
                });
            }
        });
    }
}

#[test]
fn tensors_that_a_cut_has_left_whole_are_read_and_the_others_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    for way in WAYS {
        let (path, body) = file(dir.path(), &[("a whole", 10_000), ("b cut", 30_000_000), ("c beyond", 100_000)]);
        let source = Source::open_by(&path, way).unwrap();
        let start = path.metadata().unwrap().len() - body.len() as u64;
        let cut = |len: u64| std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
        // Within the second of two pieces, and within a page.
        cut(start + 10_000 + 20_000_001);
        assert!(source.bytes("a whole").unwrap() == body[..10_000]);
        let mut out = vec![0u8; 20_000_001];
        source.read_part("b cut", 0, &mut out).unwrap();
        assert!(out == body[10_000..][..out.len()], "{way:?}");
        for name in ["b cut", "c beyond"] {
            let err = user_error(source.bytes(name));
            assert!(err.contains("m.safetensors") && err.contains("ended early"), "{way:?} {name}: {err}");
        }
        cut(0);
        assert!(user_error(source.bytes("a whole")).contains("ended early"), "{way:?}");
    }
}
