//! The form of cache files: as recorded from the old trainer, and when they are damaged.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use wan_train::cache::format::{self, FormatError, LatentInfo, LatentTensors};
use wan_train::cache::index::{load_context, load_latents};

use crate::golden_support::golden_dir;

fn golden() -> (Value, BTreeMap<String, Tensor>) {
    let json = serde_json::from_slice(&fs::read(golden_dir().join("13_cache.json")).unwrap()).unwrap();
    let (_, tensors) = format::read_tensors(&golden_dir().join("13_latent_cache.safetensors")).unwrap();
    (json, tensors)
}

fn metadata_of(value: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Every recorded case, written by us from the recorded numbers: names, dtypes, metadata and bytes.
#[test]
fn latent_files_have_the_recorded_form() {
    let dir = tempfile::tempdir().unwrap();
    let (json, recorded) = golden();
    for case in json["latent_cases"].as_array().unwrap() {
        let (n, dtype) = (case["case"].as_u64().unwrap(), case["vae_dtype"].as_str().unwrap());
        let prefix = format!("case{n}.{dtype}.");
        let of_case: BTreeMap<String, Tensor> =
            recorded.iter().filter_map(|(k, t)| k.strip_prefix(&prefix).map(|k| (k.to_string(), t.clone()))).collect();
        let find = |kind: &str| {
            let of_kind = |key: &str| {
                let rest = key.strip_prefix(kind).and_then(|k| k.strip_prefix('_'));
                rest.is_some_and(|r| r.starts_with(|c: char| c.is_ascii_digit()))
            };
            of_case.iter().find(|(k, _)| of_kind(k)).map(|(_, t)| t.clone())
        };
        let tensors = LatentTensors {
            latents: find("latents").unwrap(),
            latents_image: find("latents_image"),
            latents_control: None,
            clip: None,
            positions: None,
        };
        let named = tensors.named().unwrap();
        let keys: Vec<&str> = case["cache_keys"].as_array().unwrap().iter().map(|k| k.as_str().unwrap()).collect();
        assert_eq!(named.keys().map(String::as_str).collect::<Vec<_>>(), keys);

        let (w, h) = (case["W"].as_u64().unwrap() as usize, case["H"].as_u64().unwrap() as usize);
        let metadata = format::latent_metadata(w, h, Some(case["frames"].as_u64().unwrap() as usize));
        assert_eq!(metadata, metadata_of(&case["metadata"]));

        let path = dir.path().join(format!("case{n}_{dtype}.safetensors"));
        fs::write(&path, format::to_bytes(&named, &metadata).unwrap()).unwrap();
        let header = format::read_header(&path).unwrap();
        assert_eq!(header.metadata, metadata);
        let info = LatentInfo::from_header(&header).unwrap();
        assert_eq!(info.image, case["i2v"].as_bool().unwrap());
        let back = load_latents(&path).unwrap();
        assert_eq!(back.latents.dtype(), tensors.latents.dtype());
        assert_eq!(bits(&back.latents), bits(&tensors.latents));
        assert_eq!(back.latents_image.as_ref().map(bits), tensors.latents_image.as_ref().map(bits));
    }
}

fn bits(t: &Tensor) -> Vec<u8> {
    safetensors::View::data(&t).to_vec()
}

#[test]
fn caption_files_have_the_recorded_form() {
    let (json, _) = golden();
    let (key, form) = json["text_cache"]["keys"].as_object().unwrap().iter().next().unwrap();
    let shape: Vec<usize> = serde_json::from_value(form[0].clone()).unwrap();
    let context = Tensor::ones(shape.as_slice(), DType::BF16, &Device::Cpu).unwrap();
    let caption = json["text_cache"]["metadata"]["caption1"].as_str().unwrap();
    let (metadata, tensors) = format::merge_text(None, &context, format::text_metadata(caption)).unwrap();
    assert_eq!(tensors.keys().collect::<Vec<_>>(), [key]);
    assert_eq!(metadata, metadata_of(&json["text_cache"]["metadata"]));
}

/// Tensors of other encoders stay; ours replaces its predecessor of another dtype, as does the caption.
#[test]
fn a_caption_file_is_merged_into() {
    let cpu = Device::Cpu;
    let old = BTreeMap::from([
        ("varlen_t5_float16".to_string(), Tensor::zeros((3, 4), DType::F16, &cpu).unwrap()),
        ("varlen_other_bfloat16".to_string(), Tensor::ones((2, 4), DType::BF16, &cpu).unwrap()),
    ]);
    let mut metadata = format::text_metadata("before");
    metadata.insert("note".into(), "kept".into());
    let context = Tensor::ones((5, 4), DType::BF16, &cpu).unwrap();
    let (metadata, tensors) =
        format::merge_text(Some((metadata, old)), &context, format::text_metadata("after")).unwrap();
    assert_eq!(tensors.keys().collect::<Vec<_>>(), ["varlen_other_bfloat16", "varlen_t5_bfloat16"]);
    assert_eq!(tensors["varlen_t5_bfloat16"].dims(), [5, 4]);
    assert_eq!((metadata["caption1"].as_str(), metadata["note"].as_str()), ("after", "kept"));
}

/// A whole latent file with every kind of tensor.
fn full_file(latents: Tensor) -> (Vec<u8>, LatentTensors) {
    let (c, f, h, w) = latents.dims4().unwrap();
    let ones = |channels: usize| Tensor::ones((channels, f, h, w), latents.dtype(), &Device::Cpu).unwrap();
    let tensors = LatentTensors {
        latents_image: Some(ones(c + 4)),
        latents_control: Some(ones(c)),
        clip: Some(Tensor::ones((3, 5), DType::F32, &Device::Cpu).unwrap()),
        positions: Some(Tensor::new(&[0i32, 7], &Device::Cpu).unwrap()),
        latents,
    };
    let bytes = format::to_bytes(&tensors.named().unwrap(), &format::latent_metadata(32, 16, Some(5))).unwrap();
    (bytes, tensors)
}

fn plain_latents() -> Tensor {
    Tensor::arange(0f32, 32.0, &Device::Cpu).unwrap().reshape((4, 2, 2, 2)).unwrap()
}

#[test]
fn every_kind_of_tensor_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let (bytes, tensors) = full_file(plain_latents().to_dtype(DType::BF16).unwrap());
    fs::write(&path, bytes).unwrap();
    let names: Vec<String> = format::read_header(&path).unwrap().tensors.into_keys().collect();
    assert_eq!(
        names,
        [
            "clip_bfloat16",
            "f_indices_int32",
            "latents_2x2x2_bfloat16",
            "latents_control_2x2x2_bfloat16",
            "latents_image_2x2x2_bfloat16"
        ]
    );
    let back = load_latents(&path).unwrap();
    assert_eq!(bits(&back.latents), bits(&tensors.latents));
    assert_eq!(back.latents_control.unwrap().dims(), [4, 2, 2, 2]);
    assert_eq!(back.positions.unwrap().to_vec1::<i32>().unwrap(), [0, 7]);
    let clip = back.clip.unwrap();
    assert_eq!((clip.dtype(), clip.dims()), (DType::F16, &[3, 5][..]), "CLIP features are fp16 under any name");
}

/// Reads a file in every way the program does; the point is that it returns.
fn read_somehow(path: &Path) -> Result<(), String> {
    let header = format::read_header(path).map_err(|e| e.to_string())?;
    LatentInfo::from_header(&header).map_err(|e| e.to_string())?;
    load_latents(path).map_err(|e| format!("{e:#}"))?;
    Ok(())
}

#[test]
fn a_file_cut_off_anywhere_is_torn() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let (bytes, _) = full_file(plain_latents());
    for length in (0..bytes.len()).step_by(7) {
        fs::write(&path, &bytes[..length]).unwrap();
        assert!(matches!(format::read_header(&path), Err(FormatError::Torn(_))), "cut at {length}");
        assert!(load_latents(&path).is_err());
    }
    let mut longer = bytes.clone();
    longer.push(0);
    fs::write(&path, &longer).unwrap();
    assert!(matches!(format::read_header(&path), Err(FormatError::Torn(_))));
    assert!(format::read_header(&dir.path().join("absent")).unwrap_err().is_missing());
}

/// Flipped bits either leave a readable file or give an error; they never panic, and a damaged header never asks for
/// more memory than the file has bytes.
#[test]
fn a_file_with_flipped_bits_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let (bytes, _) = full_file(plain_latents());
    let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut refused = 0;
    for at in 0..header_end {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&path, &damaged).unwrap();
        refused += usize::from(read_somehow(&path).is_err());
    }
    assert!(refused > header_end / 3, "{refused} of {header_end} refused");
}

#[test]
fn contradictions_are_refused_with_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let cpu = Device::Cpu;
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &cpu).unwrap();
    let lat = || zeros(&[4, 2, 2, 2], DType::F32);
    let cases: Vec<(Vec<(&str, Tensor)>, &str)> = vec![
        (vec![("something", lat())], "no tensor latents_FxHxW_dtype"),
        (vec![("latents_2x2x3_float32", lat())], "latents_2x2x3_float32 has shape [4, 2, 2, 2]"),
        (vec![("latents_2x2x2_float32", zeros(&[4, 2, 2], DType::F32))], "wanted [c,F,h,w]"),
        (vec![("latents_2x2x2_float32", lat()), ("latents_2x2x2_bfloat16", lat())], "twice"),
        (
            vec![("latents_2x2x2_float32", lat()), ("latents_image_2x2x2_float32", lat())],
            "latents_image_2x2x2_float32 has shape [4, 2, 2, 2]",
        ),
        (vec![("latents_2x2x2_float32", zeros(&[4, 2, 2, 2], DType::I64))], "16- or 32-bit float"),
        (vec![("latents_0x2x2_float32", zeros(&[4, 0, 2, 2], DType::F32))], "has shape [4, 0, 2, 2]"),
        (vec![("latents_2x2x2_float32", lat()), ("clip_float32", zeros(&[5], DType::F16))], "wanted [tokens,width]"),
    ];
    for (tensors, expected) in cases {
        let named = tensors.into_iter().map(|(k, t)| (k.to_string(), t)).collect();
        fs::write(&path, format::to_bytes(&named, &format::latent_metadata(16, 16, None)).unwrap()).unwrap();
        let error = read_somehow(&path).unwrap_err();
        assert!(error.contains(expected), "{error}\nshould say {expected}");
    }
}

#[test]
fn numbers_that_are_not_finite_are_refused_not_zeroed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    for (dtype, value) in [(DType::F32, f32::NAN), (DType::BF16, f32::INFINITY), (DType::F16, f32::NEG_INFINITY)] {
        let mut values = vec![0.5f32; 32];
        values[17] = value;
        let latents = Tensor::from_vec(values, (4, 2, 2, 2), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let (bytes, _) = full_file(latents);
        fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", load_latents(&path).unwrap_err());
        assert!(error.contains("not finite") && error.contains("element 17"), "{error}");
        assert!(error.contains("a.safetensors"), "{error}");
    }
    let context = Tensor::new(&[[f32::NAN]], &Device::Cpu).unwrap();
    let (metadata, tensors) = format::merge_text(None, &context, format::text_metadata("x")).unwrap();
    fs::write(&path, format::to_bytes(&tensors, &metadata).unwrap()).unwrap();
    assert!(format!("{:#}", load_context(&path).unwrap_err()).contains("not finite"));
}
