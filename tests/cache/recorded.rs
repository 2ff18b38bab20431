//! Whole files against those the old trainer made of the same frames with the same VAE.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use serde_json::Value;
use wan_kernels::Exec;
use wan_models::vae::{Vae, VaeArch, VaeOptions};
use wan_train::cache::{
    cache_latents, format, index::load_latents, CacheOptions, LatentGeometry, LatentModels, Lazy, Survey,
};
use wan_train::data::{scan, DataOptions, DatasetConfig};
use wan_train::report::Silent;

use crate::golden_support::golden_dir;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

/// Writes recorded frames [F,H,W,3] as pictures without loss.
fn write_frames(dir: &Path, frames: &Tensor) -> usize {
    fs::create_dir_all(dir).unwrap();
    let (n, h, w, _) = frames.dims4().unwrap();
    for i in 0..n {
        let pixels = frames.get(i).unwrap().flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let image = RgbImage::from_raw(w as u32, h as u32, pixels).unwrap();
        image.save(dir.join(format!("{i:03}.png"))).unwrap();
    }
    n
}

fn f32s(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn max_abs(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    f32s(a).iter().zip(f32s(b)).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn latent_files_are_those_of_the_old_trainer() {
    let dir = tempfile::tempdir().unwrap();
    let record = json(&golden_dir().join("13_cache.json"));
    let vae_name = record["vae"].as_str().unwrap();
    let vae_json = json(&golden_dir().join(format!("{vae_name}.json")));
    let (mean, std) = (floats(&vae_json["latent_mean"]), floats(&vae_json["latent_std"]));
    let arch = VaeArch::from_official(&vae_json["config"], mean, std).unwrap();
    let (_, weights) = format::read_tensors(&golden_dir().join(format!("{vae_name}.weights.safetensors"))).unwrap();
    let (_, recorded) = format::read_tensors(&golden_dir().join("13_latent_cache.safetensors")).unwrap();

    for (i, case) in record["latent_cases"].as_array().unwrap().iter().enumerate() {
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let (w, h) = (number("W"), number("H"));
        let root = dir.path().join(format!("run{i}"));
        let frames = write_frames(&root.join("clip"), &recorded[&format!("case{}.frames_u8_fhwc", number("case"))]);
        assert_eq!(frames, number("frames"));
        let line = serde_json::json!({"video_path": root.join("clip"), "caption": "a caption"});
        fs::write(root.join("videos.jsonl"), line.to_string()).unwrap();
        let config = format!(
            "[general]\nresolution = [{w}, {h}]\n[[datasets]]\nvideo_jsonl_file = \"{0}/videos.jsonl\"\n\
             cache_directory = \"{0}/cache\"\ntarget_frames = [{frames}]\n",
            root.display()
        );
        fs::write(root.join("dataset.toml"), config).unwrap();

        let rounded = case["vae_dtype"] == "bfloat16";
        let options = CacheOptions {
            vae_dtype: if rounded { DType::BF16 } else { DType::F32 },
            i2v: case["i2v"].as_bool().unwrap(),
            musubi_compat: rounded,
            ..CacheOptions::new(LatentGeometry::from(&arch))
        };
        let vae_options = if rounded { VaeOptions::compat(DType::BF16) } else { VaeOptions::default() };
        let load = || {
            let mut get = |k: &str| Ok(weights[k].to_dtype(DType::F32)?);
            Ok(Vae::load(arch.clone(), &Exec::cpu(), vae_options.encoder_only(), &mut get)?)
        };
        let data = DataOptions::default();
        let config = DatasetConfig::load(&root.join("dataset.toml"), &data).unwrap();
        let mut survey = Survey::take(&config, &scan(&config, &data).unwrap().items, &options).unwrap();
        let vae = Lazy { fingerprint: vae_name.into(), load: Box::new(load) };
        let models = LatentModels { vae, wide_vae: None, clip: None, decoders: 1 };
        cache_latents(&mut survey, models, &Exec::cpu(), &Silent, &AtomicBool::new(false)).unwrap();

        let path = root.join("cache").join(format!("clip_00000-{frames:03}_{w:04}x{h:04}_wan.safetensors"));
        let header = format::read_header(&path).unwrap();
        let keys: Vec<&str> = case["cache_keys"].as_array().unwrap().iter().map(|k| k.as_str().unwrap()).collect();
        assert_eq!(header.tensors.keys().map(String::as_str).collect::<Vec<_>>(), keys);
        let mut metadata = header.metadata.clone();
        assert!(metadata.remove(format::RECIPE_KEY).is_some());
        let expected: BTreeMap<String, String> = serde_json::from_value(case["metadata"].clone()).unwrap();
        assert_eq!(metadata, expected);

        let prefix = format!("case{}.{}.", number("case"), case["vae_dtype"].as_str().unwrap());
        let made = load_latents(&path).unwrap();
        let find = |kind: &str| &recorded[&format!("{prefix}{}", keys.iter().find(|k| is_kind(k, kind)).unwrap())];
        // fp32: the sums of another order. bf16: the old trainer rounds after every operation.
        let tolerance = if rounded { 4e-2 } else { 1e-4 };
        let error = max_abs(&made.latents, find("latents"));
        println!("{prefix}latents: {error:e}");
        assert!(error <= tolerance, "{prefix}latents: {error}");
        if let Some(image) = &made.latents_image {
            let wanted = find("latents_image");
            let error = max_abs(image, wanted);
            println!("{prefix}latents_image: {error:e}");
            assert!(error <= tolerance, "{prefix}latents_image: {error}");
            let mask = |t: &Tensor| f32s(&t.narrow(0, 0, 4).unwrap().to_device(&Device::Cpu).unwrap());
            assert_eq!(mask(image), mask(wanted), "the mask is exact");
        }
    }
}

fn is_kind(key: &str, kind: &str) -> bool {
    let rest = key.strip_prefix(kind).and_then(|k| k.strip_prefix('_'));
    rest.is_some_and(|r| r.starts_with(|c: char| c.is_ascii_digit()))
}
