use crate::golden_support::golden_dir;
use crate::loader::user_error;
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use wan_models::adapter::{Adapter, Kind};
use wan_train::checkpoint::{convert, save_dtype, write_lora, Convert, Form, LoraFile, ModuleOut};

const CPU: Device = Device::Cpu;

fn golden(name: &str) -> std::path::PathBuf {
    golden_dir().join(name)
}

fn body(bytes: &[u8]) -> &[u8] {
    &bytes[8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize..]
}

/// The modules of a file, as a trainer would hand them over.
fn modules(path: &Path) -> Vec<ModuleOut> {
    let file = LoraFile::open(path).unwrap();
    let names: Vec<String> = file.modules().map(str::to_owned).collect();
    names
        .iter()
        .map(|n| {
            let m = file.module(n).unwrap().unwrap();
            ModuleOut::of(n, &m.to_adapter().unwrap(), m.alpha.unwrap())
        })
        .collect()
}

fn metadata(path: &Path) -> BTreeMap<String, String> {
    let bytes = std::fs::read(path).unwrap();
    let (_, m) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    m.metadata().clone().unwrap_or_default().into_iter().collect()
}

fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &CPU).unwrap()
}

fn f32s(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn the_recorded_file_comes_out_with_its_bytes_and_hashes() {
    let want_path = golden("03_lora_d4a2.saved_bf16.safetensors");
    let want = std::fs::read(&want_path).unwrap();
    let mut meta = metadata(&want_path);
    let (hash, short) = (meta.remove("sshs_model_hash").unwrap(), meta.remove("sshs_legacy_hash").unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ours.safetensors");
    let from = modules(&golden("03_lora_d4a2.network.safetensors"));
    write_lora(&path, &from, Form::Kohya, DType::BF16, meta.clone()).unwrap();
    let ours = std::fs::read(&path).unwrap();
    assert!(body(&ours) == body(&want), "bodies differ");
    assert_eq!(ours.len(), want.len());
    let got = metadata(&path);
    assert_eq!((&got["sshs_model_hash"], &got["sshs_legacy_hash"]), (&hash, &short));
    assert_eq!(got, metadata(&want_path));
    let keys =
        |p: &Path| tensors(p).into_iter().map(|(k, t)| (k, (t.dtype(), t.dims().to_vec()))).collect::<BTreeMap<_, _>>();
    assert_eq!(keys(&path), keys(&want_path));
    let again = dir.path().join("again.safetensors");
    write_lora(&again, &from, Form::Kohya, DType::BF16, meta).unwrap();
    assert!(std::fs::read(&again).unwrap() == ours, "equal input must give equal bytes");
}

#[test]
fn every_kind_survives_both_forms_and_all_precisions() {
    let dir = tempfile::tempdir().unwrap();
    for (name, kind) in [("03_lora_d4a2", "lora"), ("03_loha_d3", "loha"), ("03_lokr_d4", "lokr")] {
        let source = golden(&format!("{name}.network.safetensors"));
        let from = modules(&source);
        for (form, precision) in [(Form::Comfy, None), (Form::Kohya, Some("fp16")), (Form::Comfy, Some("bf16"))] {
            let path = dir.path().join("x.safetensors");
            let dtype = save_dtype(precision).unwrap();
            write_lora(&path, &from, form, dtype, BTreeMap::new()).unwrap();
            let file = LoraFile::open(&path).unwrap();
            assert_eq!((file.form(), file.len()), (form, from.len()), "{name}");
            assert!(matches!(
                (file.kind().unwrap(), kind),
                (Kind::Lora, "lora") | (Kind::Loha, "loha") | (Kind::Lokr { .. }, "lokr")
            ));
            assert!(tensors(&path).values().all(|t| t.dtype() == dtype), "alpha is cast too");
            for m in &from {
                let back = file.module(&m.site).unwrap().unwrap();
                assert_eq!(back.alpha, Some(m.alpha));
                for (suffix, t) in &m.params {
                    let want = t.to_dtype(dtype).unwrap();
                    assert_eq!(f32s(&back.factors[suffix]), f32s(&want), "{name} {} {suffix}", m.site);
                }
            }
        }
    }
}

#[test]
fn comfy_names_are_those_that_comfy_loads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    write_lora(&path, &modules(&golden("03_lora_d4a2.network.safetensors")), Form::Comfy, DType::F32, BTreeMap::new())
        .unwrap();
    let all = tensors(&path);
    assert_eq!(all.len(), 90);
    for (suffix, dims) in [("lora_A.weight", vec![4, 96]), ("lora_B.weight", vec![96, 4]), ("alpha", vec![])] {
        assert_eq!(all[&format!("diffusion_model.blocks.0.self_attn.q.{suffix}")].dims(), dims);
    }
}

/// Scale of a factored LoKr and LoHa, and the LoKr of two full matrices: as recorded.
#[test]
fn scales_follow_alpha_and_rank() {
    for (name, module) in
        [("03_lora_d4a2", "blocks.0.ffn.0"), ("03_loha_d3", "blocks.0.ffn.0"), ("03_lokr_d4", "blocks.0.ffn.0")]
    {
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(golden(&format!("{name}.json"))).unwrap()).unwrap();
        let file = LoraFile::open(&golden(&format!("{name}.network.safetensors"))).unwrap();
        assert_eq!(file.len(), json["n_modules"].as_u64().unwrap() as usize);
        let m = file.module(module).unwrap().unwrap();
        let want = match m.rank() {
            Some(r) => json["network_alpha"].as_f64().unwrap() / r as f64,
            None => 1.0,
        };
        assert_eq!(m.scale(), want, "{name}");
        let scale = match m.to_adapter().unwrap() {
            Adapter::Lora(a) => a.scale,
            Adapter::Loha(a) => a.scale,
            Adapter::Lokr(a) => a.scale,
        };
        assert_eq!(scale, want, "{name}");
    }
}

#[test]
fn conversions_go_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    for name in ["03_lora_d4a2", "03_loha_d3", "03_lokr_d4"] {
        let source = golden(&format!("{name}.network.safetensors"));
        convert(&source, &at("comfy"), Convert { form: Form::Comfy, fold_alpha: false }).unwrap();
        convert(&at("comfy"), &at("kohya"), Convert { form: Form::Kohya, fold_alpha: false }).unwrap();
        let (want, got) = (tensors(&source), tensors(&at("kohya")));
        assert_eq!(want.len(), got.len());
        for (k, t) in &want {
            assert_eq!(f32s(&got[k]), f32s(t), "{name} {k}");
        }
    }
    // The old converter's way: sqrt(alpha / rank) into both factors, no alpha. The product is the same.
    let source = golden("03_lora_d4a2.network.safetensors");
    convert(&source, &at("folded"), Convert { form: Form::Comfy, fold_alpha: true }).unwrap();
    assert!(tensors(&at("folded")).keys().all(|k| !k.ends_with("alpha")));
    let (a, b) = (LoraFile::open(&source).unwrap(), LoraFile::open(&at("folded")).unwrap());
    let delta = |f: &LoraFile| f32s(&f.module("blocks.2.cross_attn.v").unwrap().unwrap().delta().unwrap());
    let down = f32s(&tensors(&source)["lora_unet_blocks_0_ffn_0.lora_down.weight"]);
    let folded = f32s(&tensors(&at("folded"))["diffusion_model.blocks.0.ffn.0.lora_A.weight"]);
    assert!(down.iter().zip(&folded).all(|(x, y)| (x * 0.5f32.sqrt() - y).abs() < 1e-6));
    assert!(delta(&a).iter().zip(delta(&b)).all(|(x, y)| (x - y).abs() < 1e-5));
    // Kohya's readers need an alpha: the rank, which means scale 1.
    convert(&at("folded"), &at("back"), Convert { form: Form::Kohya, fold_alpha: false }).unwrap();
    assert_eq!(f32s(&tensors(&at("back"))["lora_unet_blocks_0_ffn_0.alpha"]), [4.0]);
    // Metadata goes along, hashes are made anew.
    let saved = golden("03_lora_d4a2.saved_bf16.safetensors");
    convert(&saved, &at("meta"), Convert::default()).unwrap();
    let (was, is) = (metadata(&saved), metadata(&at("meta")));
    assert_eq!(was["ss_network_dim"], is["ss_network_dim"]);
    assert_eq!(is["sshs_model_hash"].len(), 64);
}

#[test]
fn whole_differences_are_kept_or_refused_but_never_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("diff.safetensors");
    let t = |k: &str| wan_train::fsio::TensorOut::of(k, &Tensor::ones((1, 6, 8), DType::F32, &CPU).unwrap()).unwrap();
    let outs = vec![
        t("diffusion_model.blocks.0.modulation.diff"),
        t("diffusion_model.blocks.0.norm3.diff"),
        t("blocks.0.ffn.0.diff_b"),
    ];
    wan_train::fsio::write_safetensors(&path, outs, &BTreeMap::new()).unwrap();
    let out = dir.path().join("out.safetensors");
    convert(&path, &out, Convert::default()).unwrap();
    let mut keys: Vec<String> = tensors(&out).into_keys().collect();
    keys.sort();
    assert_eq!(
        keys,
        [
            "diffusion_model.blocks.0.ffn.0.diff_b",
            "diffusion_model.blocks.0.modulation.diff",
            "diffusion_model.blocks.0.norm3.diff"
        ]
    );
    let err = user_error(convert(&path, &out, Convert { form: Form::Kohya, fold_alpha: false }));
    assert!(err.contains("kohya's form has no name"), "{err}");
}

#[test]
fn numbers_that_do_not_survive_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let module = |v: f32| ModuleOut {
        site: "blocks.0.ffn.0".into(),
        params: vec![
            ("lora_down.weight", Tensor::full(v, (2, 3), &CPU).unwrap()),
            ("lora_up.weight", Tensor::ones((4, 2), DType::F32, &CPU).unwrap()),
        ],
        alpha: 2.0,
    };
    let err = user_error(write_lora(&path, &[module(1e6)], Form::Comfy, DType::F16, BTreeMap::new()));
    assert!(err.contains("too large for fp16") && err.contains("blocks.0.ffn.0"), "{err}");
    let err = user_error(write_lora(&path, &[module(f32::NAN)], Form::Comfy, DType::F32, BTreeMap::new()));
    assert!(err.contains("not a number"), "{err}");
    assert!(!path.exists());
    write_lora(&path, &[module(1e6)], Form::Comfy, DType::BF16, BTreeMap::new()).unwrap();
    assert!(user_error(save_dtype(Some("int3"))).contains("int3"));
}
