//! Torn, truncated and malicious files: an error that names the file, never a panic, never a huge allocation.

use super::torch_file::{archive, global, pickle, text, torch_file, zip, Stored};
use super::{put, raw_safetensors, user_error};
use candle_core::{DType, Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use wan_train::checkpoint::LoraFile;
use wan_train::loader::{merge_map, Source};

#[test]
fn each_way_of_being_no_model_has_its_own_words() {
    let dir = tempfile::tempdir().unwrap();
    let huge = [&(1u64 << 60).to_le_bytes()[..], b"{}"].concat();
    let long = [&1000u64.to_le_bytes()[..], b"{\"a\":1}"].concat();
    let entry = |e: &str| raw_safetensors(&format!("{{\"w\":{e}}}"), &[0; 8]);
    let two = |a: &str, b: &str| raw_safetensors(&format!("{{\"a\":{a},\"b\":{b}}}"), &[0; 8]);
    let f2 = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "it is empty (0 bytes)"),
        ("zero", vec![0], "too few for a model"),
        ("zeros", vec![0; 4096], "neither a safetensors nor a torch file"),
        ("html", b"<!DOCTYPE html><html>".to_vec(), "web page"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid".to_vec(), "git lfs pull"),
        ("gguf", b"GGUF\x03\0\0\0\0\0\0\0".to_vec(), "GGUF"),
        ("oldtorch", vec![0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9], "before 1.6"),
        ("huge", huge, "header claims 1152921504606846976 bytes"),
        ("long", long, "header claims 1000 bytes, the file has 15"),
        (
            "nonutf8",
            {
                let mut b = raw_safetensors("{\"aaaa\":1}", &[]);
                b[11] = 0xff;
                b
            },
            "not UTF-8",
        ),
        ("json", raw_safetensors("{\"a\":", &[]), "not valid JSON"),
        ("nested", raw_safetensors(&format!("{{\"a\":{}", "[".repeat(100_000)), &[]), "not valid JSON"),
        ("entry", entry("{\"dtype\":\"F32\"}"), "header entry of w does not parse"),
        ("negative", entry(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#), "header entry of w"),
        ("dtype", entry(r#"{"dtype":"F99","shape":[2],"data_offsets":[0,8]}"#), "unknown dtype F99"),
        ("shape", entry(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#), "does not fit its 0..8"),
        ("overflow", entry(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}"#), "does not fit"),
        ("backwards", entry(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), "does not fit"),
        ("beyond", entry(r#"{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#), "it is cut off"),
        (
            "far",
            entry(r#"{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}"#),
            "does not fit",
        ),
        ("overlap", two(f2, f2), "b overlaps a"),
        (
            "gap",
            two(
                r#"{"dtype":"U8","shape":[2],"data_offsets":[0,2]}"#,
                r#"{"dtype":"U8","shape":[2],"data_offsets":[6,8]}"#,
            ),
            "4 bytes between a and b",
        ),
        ("tail", entry(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#), "4 bytes follow"),
        ("meta", raw_safetensors("{\"__metadata__\":{\"a\":1}}", &[]), "not a map of strings"),
        ("zip", zip(&[("word/document.xml".into(), b"x".to_vec())]), "no data.pkl"),
    ];
    for (name, bytes, words) in cases {
        let path = put(dir.path(), &format!("{name}.safetensors"), &bytes);
        let err = user_error(Source::open(&path));
        assert!(err.contains(words) && err.contains(name) && err.contains("hint:"), "{name}: {err}");
    }
    let err = user_error(Source::open(&dir.path().join("absent.safetensors")));
    assert!(err.contains("absent.safetensors does not exist"), "{err}");
}

/// The pickle inside an otherwise sound torch file.
fn with_pickle(p: Vec<u8>) -> Vec<u8> {
    archive(p, vec![vec![0; 64]])
}

#[test]
fn pickles_made_to_hurt_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    // Depth: a tuple in a tuple, a million times; dropping it would overflow the stack.
    let deep = [b"\x80\x02N".as_slice(), &[0x85; 1_000_000], b"."].concat();
    // Size: each line doubles the object before it.
    let mut laughs = b"\x80\x02Nq\x00".to_vec();
    for i in 0..200u8 {
        laughs.extend([b'h', i, b'h', i, 0x86, b'q', i + 1]);
    }
    laughs.push(b'.');
    // The same through copies of one large list.
    let mut copies = b"\x80\x02](".to_vec();
    copies.extend([b'N'; 60_000]);
    copies.push(b'e');
    for i in 0..255u8 {
        copies.extend([b'q', i]);
    }
    copies.push(b'.');
    let long_int = b"\x80\x02\x8a\xff".iter().copied().chain([0xff; 255]).chain(*b".").collect::<Vec<u8>>();
    let mut few = b"\x80\x02}(".to_vec();
    text(&mut few, "w");
    global(&mut few, "torch._utils", "_rebuild_tensor_v2");
    few.extend(b")Ru.");
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("deep", deep, "nests deeper"),
        ("laughs", laughs, "pickle"),
        ("copies", copies, "more than 4000000 objects"),
        ("longint", long_int, "integer of 255 bytes"),
        ("string", b"\x80\x02X\xff\xff\xff\xff.".to_vec(), "cut off"),
        ("underflow", b"\x80\x02R.".to_vec(), "empty stack"),
        ("mark", b"\x80\x02t.".to_vec(), "lacks a mark"),
        ("memo", b"\x80\x02h\x07.".to_vec(), "never stored"),
        ("opcode", b"\x80\x02\x93.".to_vec(), "instruction 0x93"),
        ("protocol", b"\x80\x04.".to_vec(), "protocol 4"),
        ("nothing", b"\x80\x02.".to_vec(), "empty"),
        ("list", b"\x80\x02].".to_vec(), "no table of tensors"),
        ("dict", b"\x80\x02}.".to_vec(), "holds no tensors"),
        (
            "object",
            {
                let mut p = b"\x80\x02".to_vec();
                global(&mut p, "my", "Model");
                p.extend(b")R.");
                p
            },
            "whole program object",
        ),
        ("few", few, "too few arguments"),
    ];
    for (name, p, words) in cases {
        let path = put(dir.path(), &format!("{name}.pth"), &with_pickle(p));
        let err = user_error(Source::open(&path));
        assert!(err.contains(words) && err.contains(name), "{name}: {err}");
        assert!(err.len() < 600, "{name}: {} characters", err.len());
    }
}

#[test]
fn torch_tensors_must_fit_their_storage() {
    let dir = tempfile::tempdir().unwrap();
    let sound = || Stored::f32("w", &[2, 3], &[0.0; 6]);
    let cases = [
        ("large", Stored { shape: vec![60_000, 60_000], stride: vec![60_000, 1], ..sound() }),
        ("offset", Stored { offset: 1, ..sound() }),
        ("repeated", Stored { shape: vec![60_000, 60_000], stride: vec![0, 0], ..sound() }),
        ("strides", Stored { stride: vec![1], ..sound() }),
        ("class", Stored { class: "ComplexFloatStorage", ..sound() }),
    ];
    for (name, t) in cases {
        let path = put(dir.path(), &format!("{name}.pth"), &torch_file(&[t]));
        let err = user_error(Source::open(&path));
        assert!(err.contains("w: ") && err.contains(name), "{name}: {err}");
    }
    let lacks = archive(pickle(&[sound()]), vec![]);
    assert!(user_error(Source::open(&put(dir.path(), "lacks.pth", &lacks))).contains("archive lacks archive/data/0"));
}

/// Opens a damaged file and reads what it offers. Damage in the data alone goes unnoticed, as in every reader of these
/// formats; whatever is noticed is an error for the user with the path in it.
fn survive(path: &std::path::Path) -> bool {
    let outcome = Source::open(path).and_then(|s| {
        for key in s.keys() {
            assert!(s.byte_len(key).unwrap() <= 1 << 16);
            s.read(key, &Device::Cpu)?;
        }
        Ok(())
    });
    match outcome {
        Ok(()) => true,
        Err(e) => {
            assert!(format!("{e:#}").contains(path.file_name().unwrap().to_str().unwrap()), "{e:#}");
            false
        }
    }
}

/// A fresh file each time: some file systems flush to disk when a file is truncated and rewritten.
fn rewrite(path: &std::path::Path, bytes: &[u8]) {
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn random_cuts_and_flips_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let torch = torch_file(&[
        Stored::f32("dense", &[2, 3, 4], &values),
        Stored { offset: 4, stride: vec![1, 2], ..Stored::f32("transposed", &[2, 3], &values) },
        Stored { class: "HalfStorage", ..Stored::f32("half", &[8], &values) },
    ]);
    let header = r#"{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]},"c":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[24,28]}}"#;
    let safetensors = raw_safetensors(header, &[7; 28]);
    let mut rng = StdRng::seed_from_u64(7);
    for (name, sound) in [("m.pth", torch), ("m.safetensors", safetensors)] {
        let path = put(dir.path(), name, &sound);
        assert!(survive(&path), "{name} is sound");
        let mut refused = 0;
        for cut in 0..sound.len() {
            rewrite(&path, &sound[..cut]);
            refused += usize::from(!survive(&path));
        }
        assert!(refused * 10 >= sound.len() * 9, "{name}: {refused} of {} cuts refused", sound.len());
        for _ in 0..10_000 {
            let mut bytes = sound.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = match rng.random_range(0..3) {
                    0 => bytes[at] ^ (1 << rng.random_range(0..8)),
                    1 => 0xff,
                    _ => rng.random(),
                };
            }
            rewrite(&path, &bytes);
            survive(&path);
        }
    }
}

#[test]
fn small_factors_of_enormous_matrices_are_refused() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F16, &Device::Cpu).unwrap();
    type Factors = Vec<(&'static str, &'static [usize])>;
    let files: [(&str, Factors); 4] = [
        ("lora", vec![("lora_A.weight", &[1, 500_000]), ("lora_B.weight", &[500_000, 1])]),
        (
            "loha",
            vec![
                ("hada_w1_a", &[500_000, 1]),
                ("hada_w1_b", &[1, 500_000]),
                ("hada_w2_a", &[500_000, 1]),
                ("hada_w2_b", &[1, 500_000]),
            ],
        ),
        (
            "second",
            vec![
                ("hada_w1_a", &[4, 1]),
                ("hada_w1_b", &[1, 4]),
                ("hada_w2_a", &[500_000, 1]),
                ("hada_w2_b", &[1, 500_000]),
            ],
        ),
        ("lokr", vec![("lokr_w1", &[900, 900]), ("lokr_w2", &[900, 900])]),
    ];
    for (name, factors) in files {
        let site = "diffusion_model.blocks.0.self_attn.q";
        let tensors = factors.into_iter().map(|(part, shape)| (format!("{site}.{part}"), zeros(shape))).collect();
        let lora = LoraFile::from_tensors(name, tensors, false).unwrap();
        let said = user_error(lora.module("blocks.0.self_attn.q"));
        assert!(said.contains("which no model has") && said.contains(name), "{said}");
        // Nor does it get so far when it is merged.
        let mut base = BTreeMap::from([("blocks.0.self_attn.q.weight".to_owned(), zeros(&[4, 4]))]);
        assert!(user_error(merge_map(&mut base, lora, 1.0)).contains("which no model has"));
    }
}

#[test]
fn products_of_two_shapes_are_refused() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F16, &Device::Cpu).unwrap();
    let factors = [("hada_w1_a", [4, 2]), ("hada_w1_b", [2, 4]), ("hada_w2_a", [4, 2]), ("hada_w2_b", [2, 5])];
    let tensors = factors.map(|(part, shape)| (format!("diffusion_model.blocks.0.ffn.0.{part}"), zeros(&shape)));
    let lora = LoraFile::from_tensors("uneven", tensors.into_iter().collect(), false).unwrap();
    let said = user_error(lora.module("blocks.0.ffn.0"));
    assert!(said.contains("[4, 4] and [4, 5]") && said.contains("uneven"), "{said}");
}
