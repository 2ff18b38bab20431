use super::torch_file::{archive, global, pickle, text, torch_file, Stored};
use super::{put, user_error};
use crate::golden_support::golden_dir;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use wan_train::fsio::{write_safetensors, TensorOut};
use wan_train::loader::{Reading, Source};

const CPU: Device = Device::Cpu;

/// The file through a mapping, and by position.
fn both_ways(path: &std::path::Path) -> [Source; 2] {
    [Reading::Mapped, Reading::Positional].map(|reading| Source::open_by(path, reading).unwrap())
}

fn write(path: &std::path::Path, tensors: &[(&str, Tensor)]) {
    let outs = tensors.iter().map(|(n, t)| TensorOut::of(*n, t).unwrap()).collect();
    write_safetensors(path, outs, &BTreeMap::new()).unwrap();
}

#[test]
fn every_tensor_reads_as_candle_reads_it() {
    for name in ["01_dit_t2v_b.weights", "10_resize_pixels", "06_umt5.io", "04_fp8_matrices"] {
        let path = golden_dir().join(format!("{name}.safetensors"));
        let sources = both_ways(&path);
        let want = candle_core::safetensors::load(&path, &CPU).unwrap();
        assert!(sources.iter().all(|source| source.keys().count() == want.len()));
        for (key, want) in want {
            for source in &sources {
                let got = source.read(&key, &CPU).unwrap();
                assert_eq!((got.dtype(), got.dims()), (want.dtype(), want.dims()), "{key}");
                let (a, b) = (TensorOut::of("", &got).unwrap(), TensorOut::of("", &want).unwrap());
                assert!(a.data == b.data, "{name} {key}");
                assert_eq!(source.bytes(&key).unwrap(), b.data.as_ref(), "{key}");
            }
        }
    }
}

#[test]
fn eight_bit_floats_keep_every_code() {
    let dir = tempfile::tempdir().unwrap();
    let codes: Vec<u8> = (0..=255).collect();
    let floats: Vec<float8::F8E4M3> = codes.iter().map(|c| float8::F8E4M3::from_bits(*c)).collect();
    let path = dir.path().join("fp8.safetensors");
    write(&path, &[("w", Tensor::from_vec(floats, (16, 16), &CPU).unwrap())]);
    for source in both_ways(&path) {
        assert_eq!(source.read("w", &CPU).unwrap().dtype(), DType::F8E4M3);
        assert_eq!(source.bytes("w").unwrap(), codes);
    }
}

#[test]
fn any_shard_brings_the_others_and_a_missing_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let part = |i: usize| dir.path().join(format!("model-{i:05}-of-00003.safetensors"));
    for i in 1..=3 {
        write(&part(i), &[(format!("t{i}").as_str(), Tensor::full(i as f32, 2, &CPU).unwrap())]);
    }
    let index = r#"{"metadata":{},"weight_map":{"t1":"model-00001-of-00003.safetensors",
        "t2":"model-00002-of-00003.safetensors","t3":"model-00003-of-00003.safetensors"}}"#;
    let index = put(dir.path(), "model.safetensors.index.json", index.as_bytes());
    for path in [part(2), index, dir.path().to_path_buf()] {
        let source = Source::open(&path).unwrap();
        assert_eq!(source.keys().collect::<Vec<_>>(), ["t1", "t2", "t3"], "{}", path.display());
        assert_eq!(source.read("t3", &CPU).unwrap().to_vec1::<f32>().unwrap(), [3.0, 3.0]);
        assert_eq!(source.files().count(), 3);
    }
    std::fs::remove_file(part(3)).unwrap();
    let err = user_error(Source::open(&part(1)));
    assert!(err.contains("model-00003-of-00003.safetensors is missing"), "{err}");
}

#[test]
fn a_directory_must_hold_one_model() {
    let dir = tempfile::tempdir().unwrap();
    assert!(user_error(Source::open(dir.path())).contains("without a .safetensors file"));
    write(&dir.path().join("a.safetensors"), &[("t", Tensor::zeros(1, DType::F32, &CPU).unwrap())]);
    assert!(Source::open(dir.path()).unwrap().contains("t"));
    write(&dir.path().join("b.safetensors"), &[("t", Tensor::zeros(1, DType::F32, &CPU).unwrap())]);
    let err = user_error(Source::open(dir.path()));
    assert!(err.contains("2 models") && err.contains("a.safetensors, b.safetensors"), "{err}");
}

#[test]
fn an_index_may_not_lead_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let path = put(dir.path(), "m.safetensors.index.json", br#"{"weight_map":{"a":"../../etc/passwd"}}"#);
    assert!(user_error(Source::open(&path)).contains("not in its own directory"));
}

#[test]
fn what_a_file_is_comes_from_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let x = Tensor::new(&[1f32, 2.0], &CPU).unwrap();
    let disguised = dir.path().join("umt5.pth");
    write(&disguised, &[("x", x)]);
    let source = Source::open(&disguised).unwrap();
    assert_eq!(source.read("x", &CPU).unwrap().to_vec1::<f32>().unwrap(), [1.0, 2.0]);
    assert!(source.notes()[0].contains("safetensors file in spite of its ending"), "{:?}", source.notes());

    let torch = put(dir.path(), "vae.safetensors", &torch_file(&[Stored::f32("x", &[2], &[3.0, 4.0])]));
    let source = Source::open(&torch).unwrap();
    assert_eq!(source.read("x", &CPU).unwrap().to_vec1::<f32>().unwrap(), [3.0, 4.0]);
    assert!(source.notes()[0].contains("torch file"));
}

#[test]
fn torch_tensors_of_all_kinds() {
    let dir = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let halves: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    let tensors = [
        Stored::f32("dense", &[2, 3, 4], &values),
        // Columns are neighbours: the transpose of a 3 x 2 matrix that starts at element 4.
        Stored { offset: 4, stride: vec![1, 2], ..Stored::f32("transposed", &[2, 3], &values) },
        Stored { class: "BFloat16Storage", data: halves, ..Stored::f32("half", &[2], &[]) },
        Stored { class: "LongStorage", data: 7i64.to_le_bytes().to_vec(), ..Stored::f32("scalar", &[], &[]) },
        Stored::f32("empty", &[0, 5], &[]),
    ];
    let path = put(dir.path(), "m.pth", &torch_file(&tensors));
    for source in both_ways(&path) {
        assert!(source.notes().is_empty());
        let dense = source.read("dense", &CPU).unwrap();
        assert_eq!(dense.dims(), [2, 3, 4]);
        assert_eq!(dense.flatten_all().unwrap().to_vec1::<f32>().unwrap(), values);
        assert_eq!(
            source.read("transposed", &CPU).unwrap().to_vec2::<f32>().unwrap(),
            [[4.0, 6.0, 8.0], [5.0, 7.0, 9.0]]
        );
        let half = source.read("half", &CPU).unwrap();
        assert_eq!(half.dtype(), DType::BF16);
        assert_eq!(half.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(), [1.5, -2.0]);
        assert_eq!(source.scalar("scalar").unwrap(), Some(7.0));
        assert_eq!(source.read("empty", &CPU).unwrap().dims(), [0, 5]);
    }
    // candle's own reader agrees on the dense one.
    let all = candle_core::pickle::read_all(&path).unwrap();
    let theirs = &all.iter().find(|(n, _)| n == "dense").unwrap().1;
    assert_eq!(theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap(), values);
}

#[test]
fn a_nested_state_dict_is_found_and_calls_in_it_are_never_made() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [Stored::f32("w", &[2], &[5.0, 6.0])];
    let inner = pickle(&tensors);
    let inner = &inner[2..inner.len() - 1]; // without protocol and stop
    let mut p = vec![0x80, 2];
    p.extend(b"}(");
    text(&mut p, "harmful");
    global(&mut p, "posix", "system");
    text(&mut p, "touch /tmp/wan-train-was-here");
    p.extend(b"\x85R"); // a tuple of one, call
    text(&mut p, "state_dict");
    p.extend(inner);
    p.extend(b"u.");
    let path = put(dir.path(), "m.ckpt", &archive(p, vec![tensors[0].data.clone()]));
    let source = Source::open(&path).unwrap();
    assert_eq!(source.keys().collect::<Vec<_>>(), ["w"]);
    assert_eq!(source.read("w", &CPU).unwrap().to_vec1::<f32>().unwrap(), [5.0, 6.0]);
    assert!(!std::path::Path::new("/tmp/wan-train-was-here").exists());
}

/// A state dict as `module.state_dict()` is saved: an ordered dict with attributes (`_metadata`), globals and strings
/// that are stored once and referred to, a parameter, and two tensors in one storage.
#[test]
fn references_parameters_and_attributes_of_a_real_state_dict() {
    let dir = tempfile::tempdir().unwrap();
    let mut p = vec![0x80, 2];
    global(&mut p, "collections", "OrderedDict");
    p.extend(b"q\x00)Rq\x01("); // memo 0: the class; memo 1: the dict
    text(&mut p, "w");
    global(&mut p, "torch._utils", "_rebuild_tensor_v2");
    p.extend(b"q\x02((");
    text(&mut p, "storage");
    p.extend(b"q\x03");
    global(&mut p, "torch", "FloatStorage");
    p.extend(b"q\x04");
    text(&mut p, "0");
    text(&mut p, "cpu");
    p.extend(b"q\x05K\x06tq\x06QK\x00K\x02K\x03\x86K\x03K\x01\x86\x89h\x00)Rtq\x07R"); // memo 6: the storage's id
    text(&mut p, "parameter");
    global(&mut p, "torch._utils", "_rebuild_parameter");
    p.extend(b"(h\x02(h\x06QK\x02K\x02\x85K\x01\x85\x89h\x00)RtR\x88h\x00)RtR"); // the same storage, from 2 on
    p.extend(b"u}("); // set both; the attributes of the ordered dict
    text(&mut p, "_metadata");
    p.extend(b"h\x00)Rub.");
    let values: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let path = put(dir.path(), "m.pth", &archive(p, vec![values]));
    let source = Source::open(&path).unwrap();
    assert_eq!(source.keys().collect::<Vec<_>>(), ["parameter", "w"]);
    assert_eq!(source.read("w", &CPU).unwrap().to_vec2::<f32>().unwrap(), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
    assert_eq!(source.read("parameter", &CPU).unwrap().to_vec1::<f32>().unwrap(), [2.0, 3.0]);
}

#[test]
fn rows_and_pieces_equal_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..35).map(|i| i as f32 * 0.5 - 4.0).collect();
    let table = Tensor::from_vec(values.clone(), (7, 5), &CPU).unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let path = dir.path().join("t.safetensors");
        write(&path, &[("t", table.to_dtype(dtype).unwrap())]);
        for source in both_ways(&path) {
            let rows = source.read_rows("t", &[6, 0, 6], &CPU).unwrap();
            assert_eq!(rows.dtype(), dtype);
            let rows = rows.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(rows, [&values[30..35], &values[0..5], &values[30..35]]);
            assert_eq!(source.read_rows("t", &[], &CPU).unwrap().dims(), [0, 5]);
            assert!(user_error(source.read_rows("t", &[7], &CPU)).contains("7 rows; row 7"));
            let mut seen = Vec::new();
            let done = source.for_each_piece("t", 8, &mut |first, part| {
                assert_eq!(first, seen.len());
                seen.extend_from_slice(part);
                Ok(())
            });
            assert!(done.unwrap());
            assert_eq!(seen, values);
        }
    }
    let path = dir.path().join("ids.safetensors");
    write(&path, &[("t", Tensor::new(&[1i64], &CPU).unwrap())]);
    assert!(!Source::open(&path).unwrap().for_each_piece("t", 8, &mut |_, _| panic!("called")).unwrap());
}

#[test]
fn e5m2_widens_to_fp16_exactly() {
    let dir = tempfile::tempdir().unwrap();
    // 1.0, -2.5, the smallest subnormal, infinity
    let codes = [0x3c, 0xc1, 0x01, 0x7c];
    let header = r#"{"w":{"dtype":"F8_E5M2","shape":[4],"data_offsets":[0,4]}}"#;
    let path = put(dir.path(), "w.safetensors", &super::raw_safetensors(header, &codes));
    for source in both_ways(&path) {
        let w = source.read("w", &CPU).unwrap();
        assert_eq!(w.dtype(), DType::F16);
        let got = w.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(got, [1.0, -2.5, 2f32.powi(-16), f32::INFINITY]);
    }
}
