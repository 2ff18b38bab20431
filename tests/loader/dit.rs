use super::{hollow, published, put, user_error};
use crate::golden_support::golden_dir;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use wan_models::arch::{NotInShapes, WanArch};
use wan_models::keys;
use wan_models::linear::{Frozen, Weight};
use wan_models::wan::{BlockWeights, WanWeights};
use wan_train::checkpoint::LoraFile;
use wan_train::fsio::{write_safetensors, TensorOut};
use wan_train::loader::{check_precision, load_dit_by_block, DitTable, Fp8, LoadOptions, LoraMerge, Progress, Source};

const CPU: Device = Device::Cpu;
type Tensors = BTreeMap<String, Tensor>;

pub(super) fn golden(name: &str) -> (PathBuf, Tensors, WanArch) {
    let path = golden_dir().join(format!("{name}.weights.safetensors"));
    let tensors: Tensors = candle_core::safetensors::load(&path, &CPU).unwrap().into_iter().collect();
    let arch = arch_of(&tensors);
    (path, tensors, arch)
}

fn arch_of(tensors: &Tensors) -> WanArch {
    let shapes = tensors.iter().map(|(k, t)| (k.clone(), t.dims().to_vec())).collect();
    WanArch::from_shapes(&shapes, NotInShapes::default()).unwrap()
}

fn write(path: &Path, tensors: &Tensors) {
    let outs = tensors.iter().map(|(n, t)| TensorOut::of(n, t).unwrap()).collect();
    write_safetensors(path, outs, &BTreeMap::new()).unwrap();
}

pub(super) fn load(path: &Path, options: &LoadOptions<'_>) -> anyhow::Result<(WanWeights, Vec<BlockWeights>)> {
    load_from(&Source::open(path)?, options, &mut |_| {})
}

fn load_from(
    source: &Source,
    options: &LoadOptions<'_>,
    progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<(WanWeights, Vec<BlockWeights>)> {
    let mut blocks = Vec::new();
    let rest = load_dit_by_block(source, options, progress, &mut |index, block| {
        assert_eq!(index, blocks.len());
        blocks.push(block);
        Ok(())
    })?;
    Ok((rest, blocks))
}

pub(super) fn bytes(t: &Tensor) -> Vec<u8> {
    TensorOut::of("t", t).unwrap().data.into_owned()
}

/// The one element of a tensor.
fn number(t: &Tensor) -> f32 {
    let all = t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(all.len(), 1);
    all[0]
}

fn dense(w: &Weight) -> &Tensor {
    match w {
        Weight::Dense(t) => t,
        other => panic!("not dense: {other:?}"),
    }
}

/// Modules of a block with their linears.
pub(super) fn linears(i: usize, b: &BlockWeights) -> Vec<(String, &Frozen)> {
    let names = match b.cross_attn.image.is_some() {
        true => vec![
            "self_attn.q",
            "self_attn.k",
            "self_attn.v",
            "self_attn.o",
            "cross_attn.q",
            "cross_attn.k",
            "cross_attn.v",
            "cross_attn.o",
            "cross_attn.k_img",
            "cross_attn.v_img",
            "ffn.0",
            "ffn.2",
        ],
        false => vec![
            "self_attn.q",
            "self_attn.k",
            "self_attn.v",
            "self_attn.o",
            "cross_attn.q",
            "cross_attn.k",
            "cross_attn.v",
            "cross_attn.o",
            "ffn.0",
            "ffn.2",
        ],
    };
    names.into_iter().map(|n| format!("blocks.{i}.{n}")).zip(b.linears()).collect()
}

/// Every tensor of a loaded model equals that of the table, bit for bit.
fn assert_equal(loaded: &(WanWeights, Vec<BlockWeights>), want: &Tensors) {
    let (rest, blocks) = loaded;
    for (i, b) in blocks.iter().enumerate() {
        for (name, l) in linears(i, b) {
            assert_eq!(bytes(dense(&l.weight)), bytes(&want[&format!("{name}.weight")]), "{name}");
            assert_eq!(bytes(l.bias.as_ref().unwrap()), bytes(&want[&format!("{name}.bias")]), "{name}");
        }
        let at = |n: &str| bytes(&want[&format!("blocks.{i}.{n}")]);
        assert_eq!(bytes(&b.modulation), at("modulation"));
        assert_eq!(bytes(&b.norm3.weight), at("norm3.weight"));
        assert_eq!(bytes(&b.self_attn.norm_q), at("self_attn.norm_q.weight"));
        assert_eq!(bytes(&b.cross_attn.norm_k), at("cross_attn.norm_k.weight"));
    }
    for (l, name) in [
        (&rest.patch_embedding, "patch_embedding"),
        (&rest.text_in, "text_embedding.0"),
        (&rest.text_out, "text_embedding.2"),
        (&rest.time_in, "time_embedding.0"),
        (&rest.time_out, "time_embedding.2"),
        (&rest.time_projection, "time_projection.1"),
        (&rest.head.linear, "head.head"),
    ] {
        assert_eq!(bytes(dense(&l.weight)), bytes(&want[&format!("{name}.weight")]), "{name}");
    }
    assert_eq!(bytes(&rest.head.modulation), bytes(&want["head.modulation"]));
}

/// The spelling of the diffusers port.
fn diffusers(key: &str) -> String {
    let mut k = key.to_owned();
    if k.starts_with("blocks.") {
        for (ours, theirs) in [
            ("self_attn.norm", "attn1.norm"),
            ("cross_attn.norm_k_img", "attn2.norm_added_k"),
            ("cross_attn.norm", "attn2.norm"),
            ("self_attn.o.", "attn1.to_out.0."),
            ("cross_attn.o.", "attn2.to_out.0."),
            ("cross_attn.k_img", "attn2.add_k_proj"),
            ("cross_attn.v_img", "attn2.add_v_proj"),
            ("self_attn.", "attn1.to_"),
            ("cross_attn.", "attn2.to_"),
            ("norm3", "norm2"),
            ("ffn.0", "ffn.net.0.proj"),
            ("ffn.2", "ffn.net.2"),
            ("modulation", "scale_shift_table"),
        ] {
            if k.contains(ours) {
                k = k.replacen(ours, theirs, 1);
                break;
            }
        }
        return k;
    }
    for (ours, theirs) in [
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
        ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
        ("head.head", "proj_out"),
        ("head.modulation", "scale_shift_table"),
    ] {
        k = k.replacen(ours, theirs, 1);
    }
    k
}

#[test]
fn every_packaging_of_the_same_weights_loads_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["01_dit_t2v_b", "02_dit_i2v_21", "02_dit_flf2v_21"] {
        let (path, tensors, arch) = golden(name);
        let options = LoadOptions::new(&arch, "demo");
        let mut seen = Vec::new();
        let loaded = load_from(&Source::open(&path).unwrap(), &options, &mut |p: Progress| seen.push(p)).unwrap();
        assert_equal(&loaded, &tensors);
        assert!(seen.windows(2).all(|w| w[0].done < w[1].done));
        assert_eq!(seen.last().unwrap().done, seen[0].total);

        let renamed = |f: &dyn Fn(&str) -> String| tensors.iter().map(|(k, t)| (f(k), t.clone())).collect::<Tensors>();
        let packagings: [(&str, Tensors); 4] = [
            ("comfy", renamed(&|k| format!("model.diffusion_model.{k}"))),
            ("kijai", renamed(&|k| format!("diffusion_model.{k}"))),
            ("diffusers", renamed(&diffusers)),
            ("combined", {
                let mut t = renamed(&|k| format!("model.diffusion_model.{k}"));
                t.insert("first_stage_model.encoder.conv1.weight".into(), Tensor::zeros(3, DType::F32, &CPU).unwrap());
                t
            }),
        ];
        for (packaging, tensors_there) in packagings {
            let path = dir.path().join(format!("{name}-{packaging}.safetensors"));
            write(&path, &tensors_there);
            assert_equal(&load(&path, &options).unwrap_or_else(|e| panic!("{packaging}: {e:#}")), &tensors);
        }
        let notes = DitTable::new(
            &Source::open(&dir.path().join(format!("{name}-combined.safetensors"))).unwrap(),
            &arch,
            "demo",
        )
        .unwrap();
        assert!(notes.notes()[0].contains("1 tensors outside the DiT were passed over"), "{:?}", notes.notes());
    }
}

#[test]
fn block_scaled_codes_are_the_recorded_ones() {
    let dir = tempfile::tempdir().unwrap();
    let (_, tensors, arch) = golden("01_dit_t2v_22");
    let fp32: Tensors = tensors.iter().map(|(k, t)| (k.clone(), t.to_dtype(DType::F32).unwrap())).collect();
    let path = dir.path().join("fp32.safetensors");
    write(&path, &fp32);
    let want = candle_core::safetensors::load(golden_dir().join("04_fp8_dit.safetensors"), &CPU).unwrap();
    let options = LoadOptions { fp8: Fp8::Scaled, ..LoadOptions::new(&arch, "demo") };
    let (rest, blocks) = load(&path, &options).unwrap();
    let mut compared = 0;
    for (i, b) in blocks.iter().enumerate() {
        for (name, l) in linears(i, b) {
            let Weight::Fp8(w) = &l.weight else { panic!("{name} is not scaled") };
            let (q, scale) = (w.codes_oi(), w.scale());
            if let Some(codes) = want.get(&format!("q_u8.{name}")) {
                assert_eq!(bytes(q), bytes(codes), "{name}");
                assert_eq!(bytes(scale), bytes(&want[&format!("scale.{name}")]), "{name}");
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 4);
    // Outside the blocks nothing is quantised.
    assert_eq!(bytes(dense(&rest.time_projection.weight)), bytes(&fp32["time_projection.1.weight"]));
}

/// e4m3 codes of a tensor divided by `scale`.
fn codes(t: &Tensor, scale: f32) -> Tensor {
    let v: Vec<f32> = t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let f8: Vec<float8::F8E4M3> =
        v.iter().map(|x| float8::F8E4M3::from_bits(wan_kernels::fp8::codec::encode(x / scale))).collect();
    Tensor::from_vec(f8, t.dims(), &CPU).unwrap()
}

/// A file in ComfyUI's scaled form (old or new names) and the values it stands for.
pub(super) fn scaled_file(
    dir: &Path,
    tensors: &Tensors,
    new_names: bool,
) -> (PathBuf, BTreeMap<String, (Vec<u8>, f32)>) {
    let mut out = Tensors::new();
    let mut values = BTreeMap::new();
    let prefix = "model.diffusion_model.";
    for (i, (key, t)) in tensors.iter().enumerate() {
        let module = key.strip_suffix(".weight");
        match module.filter(|_| keys::is_quantisable(key) || key == "time_embedding.0.weight") {
            Some(module) => {
                let scale = 0.001 + 0.0001 * i as f32;
                let q = codes(t, scale);
                values.insert(key.clone(), (bytes(&q), scale));
                out.insert(format!("{prefix}{key}"), q);
                let suffix = if new_names { "weight_scale" } else { "scale_weight" };
                let scale = match new_names {
                    true => Tensor::new(scale, &CPU).unwrap(),
                    false => Tensor::new(&[scale], &CPU).unwrap(),
                };
                out.insert(format!("{prefix}{module}.{suffix}"), scale);
                if new_names {
                    let quant = br#"{"format": "float8_e4m3fn"}"#.to_vec();
                    let n = quant.len();
                    out.insert(format!("{prefix}{module}.comfy_quant"), Tensor::from_vec(quant, n, &CPU).unwrap());
                } else {
                    out.insert(format!("{prefix}{module}.scale_input"), Tensor::new(&[1f32], &CPU).unwrap());
                }
            }
            None => drop(out.insert(format!("{prefix}{key}"), t.to_dtype(DType::F16).unwrap())),
        }
    }
    if !new_names {
        let marker = Tensor::from_vec(vec![float8::F8E4M3::from_f32(0.0); 2], 2, &CPU).unwrap();
        out.insert(format!("{prefix}scaled_fp8"), marker);
    }
    let path = dir.join(format!("scaled-{new_names}.safetensors"));
    write(&path, &out);
    (path, values)
}

#[test]
fn scaled_fp8_files_are_used_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let (_, tensors, arch) = golden("01_dit_t2v_b");
    for new_names in [false, true] {
        let (path, values) = scaled_file(dir.path(), &tensors, new_names);
        for fp8 in [Fp8::Keep, Fp8::Scaled] {
            let (rest, blocks) = load(&path, &LoadOptions { fp8, ..LoadOptions::new(&arch, "demo") }).unwrap();
            for (i, b) in blocks.iter().enumerate() {
                for (name, l) in linears(i, b) {
                    let (want_codes, want_scale) = &values[&format!("{name}.weight")];
                    let Weight::Fp8(w) = &l.weight else { panic!("{name} is not scaled") };
                    let (q, scale) = (w.codes_oi(), w.scale());
                    assert_eq!(&bytes(q), want_codes, "{name}");
                    assert_eq!(number(scale), *want_scale, "{name}");
                }
                assert_eq!(b.modulation.dtype(), DType::F16);
            }
            // A scaled matrix outside the blocks becomes dense: its numbers, in the 16-bit dtype asked for.
            let got = dense(&rest.time_in.weight);
            assert_eq!(got.dtype(), DType::BF16);
            let (q, s) = &values["time_embedding.0.weight"];
            let want: Vec<f32> =
                q.iter().map(|c| half::bf16::from_f32(wan_kernels::fp8::codec::decode(*c) * s).to_f32()).collect();
            let got: Vec<f32> = got.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(got, want);
        }
    }
}

#[test]
fn another_quantisation_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut tensors, arch) = golden("01_dit_t2v_b");
    let quant = br#"{"format": "nvfp4"}"#.to_vec();
    let n = quant.len();
    tensors.insert("blocks.0.ffn.0.comfy_quant".into(), Tensor::from_vec(quant, n, &CPU).unwrap());
    let path = dir.path().join("m.safetensors");
    write(&path, &tensors);
    let err = user_error(load(&path, &LoadOptions::new(&arch, "demo")));
    assert!(err.contains("nvfp4") && err.contains("m.safetensors"), "{err}");
}

#[test]
fn scales_of_an_unknown_layout_are_refused_with_the_tensor_named() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut tensors, arch) = golden("01_dit_t2v_b");
    let key = "blocks.1.ffn.0.weight";
    tensors.insert(key.into(), codes(&tensors[key], 1.0));
    tensors.insert("blocks.1.ffn.0.scale_weight".into(), Tensor::ones((2, 3), DType::F32, &CPU).unwrap());
    let path = dir.path().join("odd.safetensors");
    write(&path, &tensors);
    let err = format!("{:#}", load(&path, &LoadOptions::new(&arch, "demo")).unwrap_err());
    assert!(err.contains(key) && err.contains("odd.safetensors") && err.contains("[2, 3]"), "{err}");
}

#[test]
fn plain_fp8_files_keep_their_codes_and_widen_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (_, tensors, arch) = golden("01_dit_t2v_b");
    let cast: Tensors = tensors.iter().map(|(k, t)| (k.clone(), codes(t, 1.0))).collect();
    let path = dir.path().join("fp8.safetensors");
    write(&path, &cast);
    let (rest, blocks) = load(&path, &LoadOptions::new(&arch, "demo")).unwrap();
    let Weight::Fp8(w) = &blocks[2].ffn_2.weight else { panic!("not kept as codes") };
    let (q, scale) = (w.codes_oi(), w.scale());
    assert_eq!(bytes(q), bytes(&cast["blocks.2.ffn.2.weight"]));
    assert_eq!(number(scale), 1.0);
    let values = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(blocks[0].modulation.dtype(), DType::BF16);
    assert_eq!(values(&blocks[0].modulation), values(&cast["blocks.0.modulation"]));
    assert_eq!(values(dense(&rest.text_in.weight)), values(&cast["text_embedding.0.weight"]));
}

#[test]
fn the_lossy_cast_of_compatibility_mode_touches_everything() {
    let (path, tensors, arch) = golden("01_dit_t2v_b");
    let options = LoadOptions { fp8: Fp8::Cast, ..LoadOptions::new(&arch, "demo") };
    let (rest, blocks) = load(&path, &options).unwrap();
    let Weight::Fp8(w) = &blocks[0].self_attn.q.weight else { panic!("not cast") };
    assert_eq!(number(w.scale()), 1.0);
    assert_eq!(bytes(w.codes_oi()), bytes(&codes(&tensors["blocks.0.self_attn.q.weight"], 1.0)));
    assert!(matches!(rest.time_in.weight, Weight::Fp8(_)));
    let values = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let norm = &tensors["blocks.0.norm3.weight"];
    assert_eq!(values(&blocks[0].norm3.weight), values(&codes(norm, 1.0)));
    assert_ne!(values(&blocks[0].norm3.weight), values(norm));
}

#[test]
fn loras_are_merged_before_quantisation() {
    let dir = tempfile::tempdir().unwrap();
    let (path, tensors, arch) = golden("01_dit_t2v_b");
    let lora_path = golden_dir().join("03_lora_d4a2.network.safetensors");
    let merges = || vec![LoraMerge { file: LoraFile::open(&lora_path).unwrap(), strength: 0.8 }];

    let mut merged = tensors.clone();
    let changed = wan_train::loader::merge_map(&mut merged, LoraFile::open(&lora_path).unwrap(), 0.8).unwrap();
    assert_eq!(changed, 30);
    assert_ne!(bytes(&merged["blocks.0.ffn.0.weight"]), bytes(&tensors["blocks.0.ffn.0.weight"]));
    let options = LoadOptions { merges: merges(), ..LoadOptions::new(&arch, "demo") };
    assert_equal(&load(&path, &options).unwrap(), &merged);

    let merged_path = dir.path().join("merged.safetensors");
    write(&merged_path, &merged);
    let scaled = |path: &Path, merges| {
        load(path, &LoadOptions { merges, fp8: Fp8::Scaled, ..LoadOptions::new(&arch, "demo") }).unwrap().1
    };
    for (a, b) in scaled(&path, merges()).iter().zip(scaled(&merged_path, vec![])) {
        for (x, y) in a.linears().iter().zip(b.linears()) {
            let (Weight::Fp8(x), Weight::Fp8(y)) = (&x.weight, &y.weight) else { panic!("not scaled") };
            assert_eq!((bytes(x.codes_oi()), bytes(x.scale())), (bytes(y.codes_oi()), bytes(y.scale())));
        }
    }

    // Prefixes of the base do not matter to the merge; into fp8 codes it is done in full precision.
    let (scaled_path, values) = scaled_file(dir.path(), &tensors, false);
    let options = LoadOptions { merges: merges(), ..LoadOptions::new(&arch, "demo") };
    let (_, blocks) = load(&scaled_path, &options).unwrap();
    let file = LoraFile::open(&lora_path).unwrap();
    let delta = file.module("blocks.1.ffn.2").unwrap().unwrap().delta().unwrap().flatten_all().unwrap();
    let (q, s) = &values["blocks.1.ffn.2.weight"];
    let got = dense(&blocks[1].ffn_2.weight).to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    for ((c, d), g) in q.iter().zip(delta.to_vec1::<f32>().unwrap()).zip(got.to_vec1::<f32>().unwrap()) {
        // One rounding to bf16, behind the sum.
        let want = wan_kernels::fp8::codec::decode(*c) * s + 0.8 * d;
        assert!((g - want).abs() <= want.abs() * 1.01 / 256.0 + 1e-9, "{g} {want}");
    }
}

#[test]
fn weights_of_another_task_are_named_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("t2v-A14B", "i2v-A14B", "look like i2v-A14B"),
        ("i2v-A14B", "t2v-A14B", "look like t2v-A14B"),
        ("i2v-14B", "i2v-A14B", "look like i2v-A14B"),
        ("i2v-A14B", "i2v-14B", "look like i2v-14B"),
        ("t2v-14B", "t2v-1.3B", "look like t2v-1.3B"),
        ("i2v-14B", "flf2v-14B", "look like flf2v-14B"),
        ("t2v-A14B", "ti2v-5B", "look like ti2v-5B"),
    ];
    for (task, held, words) in cases {
        let path = dir.path().join(format!("{held}.safetensors"));
        hollow(&path, &published(held), "F16", 2);
        let source = Source::open(&path).unwrap();
        DitTable::new(&source, &published(held), held).unwrap();
        let err = user_error(DitTable::new(&source, &published(task), task));
        assert!(err.contains(words) && err.contains(&format!("cannot be used for {task}")), "{task}: {err}");
        assert!(err.contains(&format!("{held}.safetensors")) && err.contains("hint: choose the task"), "{err}");
    }
}

#[test]
fn incomplete_and_foreign_models_are_described_in_few_words() {
    let dir = tempfile::tempdir().unwrap();
    let (_, sound, arch) = golden("01_dit_t2v_b");
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::BF16, &CPU).unwrap();
    let edit = |f: &dyn Fn(&mut Tensors)| {
        let mut t = sound.clone();
        f(&mut t);
        t
    };
    let cases: Vec<(&str, Tensors, &str)> = vec![
        (
            "missing",
            edit(&|t| t.retain(|k, _| !k.ends_with("ffn.0.bias"))),
            "3 tensors are missing: blocks.0-2.ffn.0.bias (3)",
        ),
        ("one", edit(&|t| drop(t.remove("head.modulation"))), "1 tensors are missing: head.modulation"),
        (
            "shape",
            edit(&|t| drop(t.insert("blocks.1.norm3.bias".into(), zeros(&[95])))),
            "blocks.1.norm3.bias has the shape [95], it should be [96]",
        ),
        (
            "extra",
            edit(&|t| drop(t.insert("blocks.1.cross_attn.k_img.weight".into(), zeros(&[96, 96])))),
            "1 tensors too many: blocks.1.cross_attn.k_img.weight",
        ),
        (
            "vace",
            edit(&|t| {
                for i in 0..8 {
                    t.insert(format!("vace_blocks.{i}.after_proj.weight"), zeros(&[96, 96]));
                }
            }),
            "8 tensors that no Wan DiT has: vace_blocks.0-7.after_proj.weight (8)",
        ),
        (
            "twice",
            edit(&|t| drop(t.insert("diffusion_model.head.modulation".into(), zeros(&[1, 2, 96])))),
            "mean the same tensor",
        ),
        ("depth", edit(&|t| t.retain(|k, _| !k.starts_with("blocks.2."))), "layers 2 (the task has 3)"),
    ];
    for (name, tensors, words) in cases {
        let path = dir.path().join(format!("{name}.safetensors"));
        write(&path, &tensors);
        let err = user_error(load(&path, &LoadOptions::new(&arch, "demo")));
        assert!(err.contains(words) && err.contains(name), "{name}: {err}");
    }
    for (file, words) in [
        ("03_lora_d4a2.network.safetensors", "it is a LoRA"),
        ("05_vae21.weights.safetensors", "it is a VAE"),
        ("06_umt5.weights.safetensors", "it is a text encoder"),
        ("08_clip_vision.weights.safetensors", "it is a CLIP model"),
        ("12_samplers.safetensors", "it is not a Wan DiT"),
    ] {
        let err = user_error(load(&golden_dir().join(file), &LoadOptions::new(&arch, "demo")));
        assert!(err.contains(words), "{file}: {err}");
    }
}

#[test]
fn a_file_cut_short_while_in_use_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _, arch) = golden("01_dit_t2v_b");
    let copy = put(dir.path(), "m.safetensors", &std::fs::read(path).unwrap());
    let source = Source::open(&copy).unwrap();
    std::fs::OpenOptions::new().write(true).open(&copy).unwrap().set_len(100_000).unwrap();
    let err = user_error(load_from(&source, &LoadOptions::new(&arch, "demo"), &mut |_| {}));
    assert!(err.contains("m.safetensors") && err.contains("ended early"), "{err}");
}

#[test]
fn sixteen_bit_kinds_that_differ_are_noted_and_refused_in_compatibility_mode() {
    let (path, _, _) = golden("01_dit_t2v_b");
    let source = Source::open(&path).unwrap();
    assert_eq!(check_precision(&source, "bf16", true).unwrap(), None);
    assert_eq!(check_precision(&source, "no", true).unwrap(), None);
    assert!(check_precision(&source, "fp16", false).unwrap().unwrap().contains("bf16 checkpoint"));
    assert!(user_error(check_precision(&source, "fp16", true)).contains("--mixed_precision is fp16"));
}
