use super::torch_file::{torch_file, Stored};
use super::{put, user_error};
use crate::golden_support::golden_dir;
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use wan_models::umt5::official_key;
use wan_train::fsio::{write_safetensors, TensorOut};
use wan_train::loader::{clip_name, vae_name, Keyed, Reading};

const CPU: Device = Device::Cpu;

fn write(path: &Path, tensors: &HashMap<String, Tensor>) {
    let outs = tensors.iter().map(|(n, t)| TensorOut::of(n, t).unwrap()).collect();
    write_safetensors(path, outs, &BTreeMap::new()).unwrap();
}

fn bytes(t: &Tensor) -> Vec<u8> {
    TensorOut::of("t", t).unwrap().data.into_owned()
}

#[test]
fn each_model_is_found_under_any_prefix_and_only_its_own_keys_are_taken() {
    let dir = tempfile::tempdir().unwrap();
    type Name = fn(&str) -> Option<String>;
    let cases: [(&str, &str, &str, Name); 4] = [
        ("05_vae21", "the VAE", "first_stage_model.", vae_name),
        ("05_vae22", "the VAE", "vae.", vae_name),
        ("06_umt5", "the text encoder", "text_encoders.umt5xxl.transformer.", official_key),
        ("08_clip_vision", "the CLIP vision tower", "clip_vision.", clip_name),
    ];
    for (file, what, prefix, name) in cases {
        let official = golden_dir().join(format!("{file}.weights.safetensors"));
        let tensors = candle_core::safetensors::load(&official, &CPU).unwrap();
        let mut wrapped: HashMap<String, Tensor> =
            tensors.iter().map(|(k, t)| (format!("{prefix}{k}"), t.clone())).collect();
        wrapped.insert("someone.elses.weight".into(), Tensor::zeros(2, DType::F32, &CPU).unwrap());
        let path = dir.path().join("wrapped.safetensors");
        write(&path, &wrapped);
        for path in [&official, &path] {
            let keyed = Keyed::open(path, Reading::Mapped, what, name).unwrap();
            assert_eq!(keyed.keys().count(), tensors.len(), "{file}");
            for (key, want) in &tensors {
                assert_eq!(keyed.shape(key).as_deref(), Some(want.dims()), "{file} {key}");
                assert_eq!(bytes(&keyed.get(key, &CPU).unwrap()), bytes(want), "{file} {key}");
            }
            assert!(keyed.try_get("absent", &CPU).unwrap().is_none());
            let err = user_error(keyed.get("absent", &CPU));
            assert!(err.contains("absent is missing") && err.contains(what), "{err}");
        }
    }
    let lora = golden_dir().join("03_lora_d4a2.network.safetensors");
    let err = user_error(Keyed::open(&lora, Reading::Mapped, "the VAE", vae_name));
    assert!(err.contains("cannot be used as the VAE: it has none of its tensors"), "{err}");
}

#[test]
fn a_torch_file_gives_a_vae_its_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let path = put(
        dir.path(),
        "Wan2.1_VAE.pth",
        &torch_file(&[
            Stored::f32("encoder.conv1.weight", &[2, 1], &[1.0, 2.0]),
            Stored::f32("conv2.bias", &[1], &[3.0]),
        ]),
    );
    let keyed = Keyed::open(&path, Reading::Mapped, "the VAE", vae_name).unwrap();
    assert_eq!(keyed.get("conv2.bias", &CPU).unwrap().to_vec1::<f32>().unwrap(), [3.0]);
}

#[test]
fn scaled_text_encoders_give_their_numbers_and_tied_tables_count_once() {
    let dir = tempfile::tempdir().unwrap();
    let f8 = |codes: &[u8]| {
        let v: Vec<_> = codes.iter().map(|c| float8::F8E4M3::from_bits(*c)).collect();
        Tensor::from_vec(v, (2, codes.len() / 2), &CPU).unwrap()
    };
    let table = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &CPU).unwrap();
    let q = "encoder.block.0.layer.0.SelfAttention.q";
    let tensors = HashMap::from([
        ("shared.weight".to_string(), table.clone()),
        ("encoder.embed_tokens.weight".into(), table),
        // 1.0, 2.0, -1.0, 0.5
        (format!("{q}.weight"), f8(&[0x38, 0x40, 0xb8, 0x30])),
        (format!("{q}.scale_weight"), Tensor::new(&[0.25f32], &CPU).unwrap()),
        (format!("{q}.scale_input"), Tensor::new(&[9f32], &CPU).unwrap()),
        ("scaled_fp8".into(), f8(&[0, 0])),
        ("spiece_model".into(), Tensor::new(&[1u8, 2], &CPU).unwrap()),
    ]);
    let path = dir.path().join("umt5_xxl_fp8_e4m3fn_scaled.safetensors");
    write(&path, &tensors);
    let keyed = Keyed::open(&path, Reading::Mapped, "the text encoder", official_key).unwrap();
    assert_eq!(keyed.keys().collect::<Vec<_>>(), ["blocks.0.attn.q.weight", "token_embedding.weight"]);
    let got = keyed.get("blocks.0.attn.q.weight", &CPU).unwrap();
    assert_eq!(got.to_vec2::<f32>().unwrap(), [[0.25, 0.5], [-0.25, 0.125]]);
    let rows = keyed.rows("token_embedding.weight", &[2, 0], &CPU).unwrap();
    assert_eq!(rows.to_vec2::<f32>().unwrap(), [[5.0, 6.0], [1.0, 2.0]]);
    assert_eq!(keyed.rows("blocks.0.attn.q.weight", &[1], &CPU).unwrap().to_vec2::<f32>().unwrap(), [[-0.25, 0.125]]);
}
