use super::*;
use crate::golden;
use std::collections::HashMap;

fn getter(weights: &HashMap<String, Tensor>) -> impl FnMut(&str) -> Result<Option<Tensor>> + '_ {
    |key| Ok(weights.get(key).cloned())
}

fn load(arch: &ClipArch, storage: DType, weights: &HashMap<String, Tensor>) -> Result<ClipVision> {
    ClipVision::load(arch.clone(), &Device::Cpu, storage, &mut getter(weights))
}

fn tiny() -> ClipArch {
    ClipArch { image_size: 28, patch_size: 14, dim: 32, mlp_dim: 48, num_heads: 2, num_layers: 3, norm_eps: 1e-5 }
}

fn random(arch: &ClipArch) -> HashMap<String, Tensor> {
    random_clip(arch, 5).unwrap().into_iter().collect()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let d = values(got).iter().zip(values(want)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{what}: max abs {d:.2e}");
    assert!(d <= tolerance, "{what}: {d} > {tolerance}");
}

/// `[b,3,h,w]` of a wave, in [-1,1].
fn picture(h: usize, w: usize) -> Tensor {
    let v: Vec<f32> = (0..3 * h * w).map(|i| (i as f32 * 0.37).sin()).collect();
    Tensor::from_vec(v, (1, 3, h, w), &Device::Cpu).unwrap()
}

/// The same weights under the names of `clip_vision_h`.
fn renamed(arch: &ClipArch, weights: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let mut out = HashMap::new();
    for (key, t) in weights {
        let keys = Names::Hf.keys(key.strip_prefix("visual.").unwrap());
        for (i, part) in keys.iter().enumerate() {
            let rows = t.dim(0).unwrap() / keys.len();
            let t = t.narrow(0, i * rows, rows).unwrap();
            // There the class token is one vector and positions are a matrix.
            let t = match part.as_str() {
                k if k.ends_with("class_embedding") => t.flatten_all().unwrap(),
                k if k.ends_with("position_embedding.weight") => t.reshape((arch.tokens(), arch.dim)).unwrap(),
                _ => t,
            };
            out.insert(part.clone(), t.contiguous().unwrap());
        }
    }
    out
}

#[test]
fn golden_towers() {
    for name in golden::cases(&["08_"]) {
        let json = golden::json(&format!("{name}.json"));
        let weights = golden::tensors(&format!("{name}.weights.safetensors"));
        let io = golden::tensors(&format!("{name}.io.safetensors"));
        let arch = ClipArch::from_official(&json["config"]).unwrap();
        let clip = load(&arch, DType::F32, &weights).unwrap();
        for case in json["cases"].as_array().unwrap() {
            let i = &case["i"];
            let u8 = io[&format!("img{i}.u8")].unsqueeze(0).unwrap();
            let pixels = clip.preprocess(&crate::vae::pixels(&u8, DType::F32).unwrap()).unwrap();
            let mut seen = 0;
            let mut check = |stage: &str, got: Tensor| {
                if let Some(want) = io.get(&format!("img{i}.{stage}")) {
                    close(&format!("{name} img{i}.{stage}"), &got.squeeze(0).unwrap(), want, 1e-4);
                    seen += 1;
                }
            };
            check("preprocessed", pixels.clone());
            check("after_pre_norm", clip.embed(&pixels).unwrap());
            check("penultimate", clip.penultimate(&pixels).unwrap());
            check("full_depth", clip.full_depth(&pixels).unwrap());
            assert!(seen >= 2, "{name} img{i}");
        }
    }
}

#[test]
fn sizes_are_read_off_a_checkpoint_of_either_spelling() {
    for name in golden::cases(&["08_"]) {
        let arch = ClipArch::from_official(&golden::json(&format!("{name}.json"))["config"]).unwrap();
        let weights = golden::tensors(&format!("{name}.weights.safetensors"));
        let shape = |key: &str| weights.get(key).map(|t| t.dims().to_vec());
        assert_eq!(ClipArch::infer(&shape, Some(arch.num_heads)).unwrap(), arch);
    }
    let arch = tiny();
    let weights = renamed(&arch, &random(&arch));
    let shape = |key: &str| weights.get(key).map(|t| t.dims().to_vec());
    assert_eq!(ClipArch::infer(&shape, Some(2)).unwrap(), arch);
    assert!(ClipArch::infer(&shape, None).unwrap_err().to_string().contains("width of 32"));
    let e = ClipArch::infer(&|_| None, None).unwrap_err().to_string();
    assert!(e.contains("vision_model.embeddings.patch_embedding.weight"), "{e}");
    // ViT-H says its heads by its width.
    let vit_h = ClipArch::vit_h14();
    let shape = |key: &str| match key {
        "visual.patch_embedding.weight" => Some(vec![1280, 3, 14, 14]),
        "visual.pos_embedding" => Some(vec![1, 257, 1280]),
        "visual.transformer.0.mlp.0.weight" => Some(vec![5120, 1280]),
        _ => key.ends_with("norm1.weight").then(|| vec![1280]).filter(|_| !key.contains(".32.")),
    };
    assert_eq!(ClipArch::infer(&shape, None).unwrap(), vit_h);
}

#[test]
fn both_spellings_are_the_same_tower() {
    let arch = tiny();
    let weights = random(&arch);
    let official = load(&arch, DType::F32, &weights).unwrap().encode(&picture(40, 30)).unwrap();
    let hf = load(&arch, DType::F32, &renamed(&arch, &weights)).unwrap().encode(&picture(40, 30)).unwrap();
    assert_eq!(official.dims(), [1, 5, 32]);
    assert_eq!(values(&official), values(&hf));
}

#[test]
fn sixteen_bit_storage_computes_in_fp32() {
    let arch = tiny();
    let weights = random(&arch);
    let exact = load(&arch, DType::F32, &weights).unwrap().encode(&picture(28, 28)).unwrap();
    // Every random weight is exact in bf16: storing it so changes nothing.
    let bf16 = load(&arch, DType::BF16, &weights).unwrap().encode(&picture(28, 28)).unwrap();
    assert_eq!(values(&exact), values(&bf16));
    // Off that grid, rounding each matrix to sixteen bit shows, by no more than its eleven bits would.
    let off = weights.into_iter().map(|(k, t)| (k, (t * 1.0003).unwrap())).collect();
    let exact = load(&arch, DType::F32, &off).unwrap().encode(&picture(28, 28)).unwrap();
    let f16 = load(&arch, DType::F16, &off).unwrap().encode(&picture(28, 28)).unwrap();
    assert_eq!(f16.dtype(), DType::F32);
    assert_ne!(values(&f16), values(&exact));
    close("f16", &f16, &exact, 1e-2);
}

#[test]
fn resizing_repeats_edges_and_keeps_flat_pictures_flat() {
    let arch = tiny();
    let clip = load(&arch, DType::F32, &random(&arch)).unwrap();
    for (h, w) in [(7, 93), (28, 28), (200, 11)] {
        let grey = Tensor::full(0.2f32, (2, 3, h, w), &Device::Cpu).unwrap();
        let got = clip.preprocess(&grey).unwrap();
        assert_eq!(got.dims(), [2, 3, 28, 28]);
        for (c, want) in [(0.6f32 - 0.48145466) / 0.26862954, (0.6 - 0.4578275) / 0.261_302_6].into_iter().enumerate() {
            let v = values(&got.narrow(1, c, 1).unwrap().contiguous().unwrap());
            assert!(v.iter().all(|x| (x - want).abs() < 1e-5), "{h}x{w}");
        }
    }
    assert!(clip.preprocess(&Tensor::zeros((1, 1, 4, 4), DType::F32, &Device::Cpu).unwrap()).is_err());
    assert!(clip.embed(&picture(27, 28)).unwrap_err().to_string().contains("[batch, 3, 28, 28]"));
}

#[test]
fn the_textual_tower_is_never_asked_for_and_a_missing_tensor_is_named() {
    let arch = tiny();
    let mut weights = random(&arch);
    let mut asked = Vec::new();
    let mut get = |key: &str| {
        asked.push(key.to_owned());
        Ok(weights.get(key).cloned())
    };
    ClipVision::load(arch.clone(), &Device::Cpu, DType::F32, &mut get).unwrap();
    assert!(asked.iter().all(|k| k.starts_with("visual.")));
    weights.remove("visual.transformer.1.mlp.2.bias");
    let e = load(&arch, DType::F32, &weights).err().unwrap().to_string();
    assert!(e.contains("visual.transformer.1.mlp.2.bias is missing"), "{e}");
    let wide = ClipArch { mlp_dim: 50, ..arch };
    let e = load(&wide, DType::F32, &weights).err().unwrap().to_string();
    assert!(e.contains("has shape [48, 32], expected [50, 32]"), "{e}");
}

#[test]
fn wrong_numbers_are_refused() {
    let refused = |a: ClipArch| a.validate().unwrap_err().to_string();
    assert!(refused(ClipArch { num_heads: 3, ..tiny() }).contains("3 heads"));
    assert!(refused(ClipArch { image_size: 30, ..tiny() }).contains("patches of 14"));
    assert!(refused(ClipArch { num_layers: 0, ..tiny() }).contains("0 layers"));
    let mut config = golden::json("08_clip_vision.json")["config"].clone();
    config["activation"] = "quick_gelu".into();
    assert!(ClipArch::from_official(&config).unwrap_err().to_string().contains("GELU"));
}
