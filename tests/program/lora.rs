//! `wan-train lora …` on the LoRAs and the DiT of the demo.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use tempfile::TempDir;
use wan_train::checkpoint::LoraFile;
use wan_train::fsio::{write_safetensors, TensorOut};

use super::mistakes::refused;
use super::{find, text, wan_train, Bench};

/// Two checkpoints of one run, and the DiT they adapt.
pub struct Trained {
    dir: TempDir,
}

impl Trained {
    pub fn get() -> &'static Trained {
        static MADE: OnceLock<Trained> = OnceLock::new();
        MADE.get_or_init(|| {
            let bench = Bench::new();
            let out = bench.run("", &["--epochs", "2", "--save_every", "1", "--alpha", "8"]);
            assert!(out.status.success(), "{}", text(&out));
            let dir = tempfile::tempdir().unwrap();
            let loras = bench.outputs(".safetensors");
            assert_eq!(loras.len(), 2);
            for (file, name) in loras.iter().zip(["one", "two"]) {
                std::fs::copy(file, dir.path().join(format!("{name}.safetensors"))).unwrap();
            }
            std::fs::copy(bench.path("base/models/demo_dit.safetensors"), dir.path().join("dit.safetensors")).unwrap();
            Trained { dir }
        })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// A folder for what is written, and the program in the folder of what is read.
pub struct Desk {
    out: TempDir,
}

impl Desk {
    pub fn new() -> Self {
        Self { out: tempfile::tempdir().unwrap() }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.out.path().join(name)
    }

    /// Words that start with `@` are files of the desk.
    pub fn run(&self, words: &[&str]) -> Output {
        let place = |w: &&str| match w.strip_prefix('@') {
            Some(name) => self.at(name).to_string_lossy().into_owned(),
            None => w.to_string(),
        };
        let words: Vec<String> = words.iter().map(place).collect();
        wan_train(Trained::get().dir.path()).arg("lora").args(words).output().unwrap()
    }

    pub fn ok(&self, words: &[&str]) -> String {
        let out = self.run(words);
        let said = text(&out);
        assert!(out.status.success(), "{said}");
        said
    }
}

pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The update of every module, at strength 1.
pub fn deltas(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = LoraFile::open(path).unwrap();
    let of = |m: &str| values(&file.module(m).unwrap().unwrap().delta().unwrap());
    file.modules().map(|m| (m.to_owned(), of(m))).collect()
}

fn norm(v: impl Iterator<Item = f32>) -> f64 {
    v.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

/// ‖a − b‖ / ‖b‖ over all modules.
pub fn distance(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>) -> f64 {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let off = |k: &String| norm(a[k].iter().zip(&b[k]).map(|(x, y)| x - y)).powi(2);
    a.keys().map(off).sum::<f64>().sqrt() / norm(b.values().flatten().copied())
}

/// What ComfyUI makes of a file: its generic map knows a module as `diffusion_model.<name>` and as `lora_unet_<name>`
/// with underscores; the factors are `lora_A`/`lora_B` or `lora_down`/`lora_up`; an absent alpha means scale 1; a key it
/// does not know is only logged, so any such key is a failure here. Gives each module's scale.
pub fn comfy_loads(path: &Path, dit: &Path) -> BTreeMap<String, f64> {
    let modules: BTreeSet<String> =
        tensors(dit).into_keys().filter_map(|k| k.strip_suffix(".weight").map(str::to_owned)).collect();
    let file = tensors(path);
    let mut taken = BTreeSet::new();
    let mut scales = BTreeMap::new();
    for module in &modules {
        for name in [format!("diffusion_model.{module}"), format!("lora_unet_{}", module.replace('.', "_"))] {
            for (down, up) in [(".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")] {
                let (down, up) = (format!("{name}{down}"), format!("{name}{up}"));
                let (Some(a), Some(b)) = (file.get(&down), file.get(&up)) else { continue };
                assert_eq!(a.dims()[0], b.dims()[1], "{module}");
                let alpha = format!("{name}.alpha");
                let scale = file.get(&alpha).map_or(1.0, |t| f64::from(values(t)[0]) / a.dims()[0] as f64);
                taken.extend([down, up, alpha]);
                assert!(scales.insert(module.clone(), scale).is_none(), "{module} twice");
            }
        }
    }
    let lost: Vec<&String> = file.keys().filter(|k| !taken.contains(*k)).collect();
    assert!(lost.is_empty(), "lora key not loaded: {lost:?}");
    scales
}

fn all_loaded(path: &Path) {
    assert_eq!(comfy_loads(path, &Trained::get().path("dit.safetensors")).len(), 30);
}

#[test]
fn info_says_what_a_file_holds() {
    let desk = Desk::new();
    let said = desk.ok(&["info", "one.safetensors", "--modules"]);
    for word in ["comfyui form", "30 in 3 blocks", "30 LoRA", "rank:      16", "alpha:     8", "scale:     0.5", "F32"]
    {
        assert!(said.to_lowercase().contains(&word.to_lowercase()), "`{word}` is not in:\n{said}");
    }
    assert!(said.contains("blocks.2.ffn.2") && said.contains("ss_network_dim"), "{said}");
    let json: serde_json::Value = serde_json::from_str(&desk.ok(&["info", "one.safetensors", "--json"])).unwrap();
    assert_eq!(json["modules"].as_array().unwrap().len(), 30);
    let update = deltas(&Trained::get().path("one.safetensors"));
    for module in json["modules"].as_array().unwrap() {
        let want = norm(update[module["module"].as_str().unwrap()].iter().copied());
        assert!((module["norm"].as_f64().unwrap() - want).abs() < 1e-4 * want, "{module}");
    }
}

#[test]
fn conversions_go_round_without_loss() {
    let desk = Desk::new();
    desk.ok(&["convert", "one.safetensors", "--to", "kohya", "--out", "@k.safetensors"]);
    desk.ok(&["convert", "@k.safetensors", "--to", "comfyui", "--out", "@c.safetensors"]);
    let original = Trained::get().path("one.safetensors");
    let same = |a: &Path, b: &Path| {
        let (a, b) = (tensors(a), tensors(b));
        assert_eq!(a.keys().collect::<BTreeSet<_>>(), b.keys().collect::<BTreeSet<_>>());
        a.iter().for_each(|(k, t)| assert!(values(t) == values(&b[k]) && t.dtype() == b[k].dtype(), "{k}"));
    };
    same(&original, &desk.at("c.safetensors"));
    all_loaded(&desk.at("k.safetensors"));
    all_loaded(&desk.at("c.safetensors"));
    // The diffusers form has no alpha: one half goes into the factors, exactly, and the update stays to the bit.
    desk.ok(&["convert", "one.safetensors", "--to", "diffusers", "-o", "@d.safetensors"]);
    let keys: BTreeSet<String> = tensors(&desk.at("d.safetensors")).into_keys().collect();
    assert!(keys.contains("transformer.blocks.0.attn1.to_out.0.lora_A.weight") && keys.len() == 60, "{keys:?}");
    assert!(desk.ok(&["info", "@d.safetensors"]).contains("diffusers form"));
    desk.ok(&["convert", "@d.safetensors", "--to", "kohya", "--out", "@dk.safetensors"]);
    desk.ok(&["convert", "@dk.safetensors", "--to", "diffusers", "--out", "@dd.safetensors"]);
    same(&desk.at("d.safetensors"), &desk.at("dd.safetensors"));
    assert_eq!(deltas(&desk.at("dk.safetensors")), deltas(&original));
    all_loaded(&desk.at("dk.safetensors"));
}

#[test]
fn merged_updates_are_the_weighted_sum() {
    let desk = Desk::new();
    let (one, two) = (deltas(&Trained::get().path("one.safetensors")), deltas(&Trained::get().path("two.safetensors")));
    let sum = |a: f32, b: f32| -> BTreeMap<String, Vec<f32>> {
        one.iter().map(|(k, v)| (k.clone(), v.iter().zip(&two[k]).map(|(x, y)| a * x + b * y).collect())).collect()
    };
    let said = desk.ok(&[
        "merge",
        "one.safetensors",
        "two.safetensors",
        "--weights",
        "0.25",
        "-1.5",
        "--out",
        "@m.safetensors",
    ]);
    assert!(said.contains("wrote"), "{said}");
    let want = sum(0.25, -1.5);
    assert!(distance(&deltas(&desk.at("m.safetensors")), &want) < 1e-6);
    all_loaded(&desk.at("m.safetensors"));
    let info = desk.ok(&["info", "@m.safetensors"]);
    assert!(info.contains("rank:      32") && info.contains("one.safetensors x 0.25"), "{info}");
    // Brought down to rank 8, by the same amount that is said.
    let said = desk.ok(&[
        "merge",
        "one.safetensors",
        "two.safetensors",
        "--weights",
        "0.25",
        "-1.5",
        "--dim",
        "8",
        "--out",
        "@s.safetensors",
    ]);
    let lost: f64 = said.split("; ").nth(1).and_then(|s| s.split(' ').next()).unwrap().parse().unwrap();
    let off = 100.0 * distance(&deltas(&desk.at("s.safetensors")), &want);
    assert!((lost - off).abs() < 0.01, "{lost} {off}\n{said}");
    all_loaded(&desk.at("s.safetensors"));
}

#[test]
fn a_lora_merged_into_a_dit_is_found_in_the_difference() {
    let desk = Desk::new();
    let said = desk.ok(&[
        "merge",
        "two.safetensors",
        "--weights",
        "2",
        "--dit",
        "dit.safetensors",
        "--out",
        "@dit.safetensors",
    ]);
    assert!(said.contains("30 tensors of"), "{said}");
    let (before, after) = (tensors(&Trained::get().path("dit.safetensors")), tensors(&desk.at("dit.safetensors")));
    assert_eq!(before.len(), after.len());
    let update = deltas(&Trained::get().path("two.safetensors"));
    for (key, t) in &before {
        let (old, new) = (values(t), values(&after[key]));
        assert_eq!(t.dtype(), after[key].dtype());
        match key.strip_suffix(".weight").and_then(|m| update.get(m)) {
            None => assert!(old == new, "{key} is touched by nothing"),
            Some(delta) => {
                let half_step = if t.dtype() == DType::F32 { 1e-6 } else { 1.0 / 128.0 };
                let near = |((o, n), d): ((&f32, &f32), &f32)| (n - o - 2.0 * d).abs() <= half_step * n.abs().max(1e-3);
                assert!(old.iter().zip(&new).zip(delta).all(near), "{key}");
            }
        }
    }
    // In a model of 16 bits the rounding of the sum is part of the difference; in one of 32 it is the LoRA.
    let wide = |from: &Path, to: &Path| {
        let outs =
            tensors(from).iter().map(|(k, t)| TensorOut::of(k, &t.to_dtype(DType::F32).unwrap()).unwrap()).collect();
        write_safetensors(to, outs, &BTreeMap::new()).unwrap();
    };
    wide(&Trained::get().path("dit.safetensors"), &desk.at("base32.safetensors"));
    desk.ok(&["merge", "two.safetensors", "--dit", "@base32.safetensors", "--out", "@tuned32.safetensors"]);
    let said = desk.ok(&[
        "extract",
        "--base",
        "@base32.safetensors",
        "--tuned",
        "@tuned32.safetensors",
        "--dim",
        "16",
        "--out",
        "@e.safetensors",
    ]);
    assert!(said.contains("30 modules of rank 16"), "{said}");
    let got = deltas(&desk.at("e.safetensors"));
    let off = distance(&got, &update);
    assert!(off < 0.02, "{off}\n{said}");
    all_loaded(&desk.at("e.safetensors"));
}

#[test]
fn resizing_keeps_the_most_and_says_what_is_lost() {
    let desk = Desk::new();
    let whole = deltas(&Trained::get().path("one.safetensors"));
    let mut last = f64::INFINITY;
    for dim in ["2", "6", "16", "40"] {
        let name = format!("@r{dim}.safetensors");
        let said = desk.ok(&["resize", "one.safetensors", "--dim", dim, "--out", &name]);
        let path = desk.at(&name[1..]);
        let off = 100.0 * distance(&deltas(&path), &whole);
        let lost: f64 = said.split("; ").nth(1).and_then(|s| s.split(' ').next()).unwrap().parse().unwrap();
        assert!((lost - off).abs() < 0.01 && off <= last, "{lost} {off}\n{said}");
        last = off;
        all_loaded(&path);
    }
    assert!(last < 1e-3, "the full rank loses nothing: {last} %");
    let said =
        desk.ok(&["resize", "one.safetensors", "--dim", "16", "--dynamic", "sv_fro=0.9", "--out", "@d.safetensors"]);
    let off = distance(&deltas(&desk.at("d.safetensors")), &whole);
    assert!(off <= (1.0f64 - 0.81).sqrt() + 1e-6, "{off}\n{said}");
    let info = desk.ok(&["info", "@d.safetensors"]);
    assert!(info.contains("Dynamic"), "{info}");
    let half =
        desk.ok(&["resize", "one.safetensors", "--dim", "4", "--save_precision", "bf16", "--out", "@h.safetensors"]);
    assert!(half.contains("wrote") && tensors(&desk.at("h.safetensors")).values().all(|t| t.dtype() == DType::BF16));
}

#[test]
fn averages_follow_the_old_tool() {
    let desk = Desk::new();
    let (one, two) =
        (tensors(&Trained::get().path("one.safetensors")), tensors(&Trained::get().path("two.safetensors")));
    desk.ok(&["ema", "one.safetensors", "two.safetensors", "--no_sort", "--beta", "0.75", "--out", "@e.safetensors"]);
    let got = tensors(&desk.at("e.safetensors"));
    assert_eq!(got.len(), one.len());
    for (key, t) in &got {
        let (a, b) = (values(&one[key]), values(&two[key]));
        let near = |((g, a), b): ((f32, f32), f32)| (g - (0.75 * a + 0.25 * b)).abs() <= 1e-6 * a.abs().max(1.0);
        assert!(values(t).into_iter().zip(a).zip(b).all(near), "{key}");
    }
    all_loaded(&desk.at("e.safetensors"));
    // Two files under the power function: the first has no part, and the file times decide the order.
    let touch = |name: &str, seconds: u64| {
        let file = std::fs::File::options().write(true).open(desk.at(name)).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds)).unwrap();
    };
    for (name, seconds) in [("one.safetensors", 2000), ("two.safetensors", 1000)] {
        std::fs::copy(Trained::get().path(name), desk.at(name)).unwrap();
        touch(name, seconds);
    }
    desk.ok(&["ema", "@one.safetensors", "@two.safetensors", "--sigma_rel", "0.2", "--out", "@p.safetensors"]);
    let got = tensors(&desk.at("p.safetensors"));
    assert!(got.iter().all(|(k, t)| values(t) == values(&one[k])), "the newer file alone");
}

#[test]
fn mistakes_are_named() {
    let desk = Desk::new();
    let out = &["--out", "@x.safetensors"];
    let with = |words: &[&str]| desk.run(&[words, out].concat());
    refused(&desk.run(&["info", "nowhere.safetensors"]), 1, &["nowhere.safetensors", "does not exist"]);
    refused(&desk.run(&["info", "dit.safetensors"]), 1, &["dit.safetensors", "LoRA"]);
    let bytes = std::fs::read(Trained::get().path("one.safetensors")).unwrap();
    std::fs::write(desk.at("torn.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    refused(&desk.run(&["info", "@torn.safetensors"]), 1, &["torn.safetensors"]);
    std::fs::write(desk.at("empty.safetensors"), b"").unwrap();
    refused(&with(&["resize", "@empty.safetensors", "--dim", "4"]), 1, &["empty.safetensors"]);
    // Half a module.
    let mut half: Vec<TensorOut> =
        tensors(&Trained::get().path("one.safetensors")).iter().map(|(k, t)| TensorOut::of(k, t).unwrap()).collect();
    half.retain(|t| !t.name.ends_with("blocks.1.ffn.0.lora_B.weight"));
    write_safetensors(&desk.at("half.safetensors"), half, &BTreeMap::new()).unwrap();
    refused(&with(&["convert", "@half.safetensors", "--to", "kohya"]), 1, &["blocks.1.ffn.0", "hint:"]);
    // A few MB that stand for more than any machine holds.
    let enormous = [("lokr_w1", [900, 900]), ("lokr_w2", [900, 900])].map(|(part, shape)| {
        let zeros = Tensor::zeros(&shape, DType::F32, &Device::Cpu).unwrap();
        TensorOut::of(format!("diffusion_model.blocks.0.ffn.0.{part}"), &zeros).unwrap()
    });
    write_safetensors(&desk.at("enormous.safetensors"), enormous.into(), &BTreeMap::new()).unwrap();
    let words = ["enormous.safetensors", "blocks.0.ffn.0", "810000 x 810000", "hint:"];
    refused(&desk.run(&["info", "@enormous.safetensors"]), 1, &words);
    refused(&with(&["resize", "@enormous.safetensors", "--dim", "4"]), 1, &words);
    // Whole differences have no place in these.
    let diff =
        TensorOut::of("diffusion_model.blocks.0.norm3.diff", &Tensor::ones(4, DType::F32, &Device::Cpu).unwrap());
    write_safetensors(&desk.at("diff.safetensors"), vec![diff.unwrap()], &BTreeMap::new()).unwrap();
    refused(&with(&["resize", "@diff.safetensors", "--dim", "4"]), 1, &["blocks.0.norm3.weight", "hint:"]);
    refused(&with(&["convert", "@diff.safetensors", "--to", "diffusers"]), 1, &["diffusers"]);

    refused(
        &with(&["merge", "one.safetensors", "two.safetensors", "--weights", "1", "2", "3"]),
        2,
        &["3 weights", "2 files"],
    );
    refused(&with(&["merge", "one.safetensors", "--dim", "4", "--dynamic", "half"]), 2, &["half", "sv_ratio=20"]);
    refused(&with(&["merge", "one.safetensors", "--dit", "dit.safetensors", "--dim", "4"]), 2, &["--dim"]);
    refused(&with(&["merge", "one.safetensors", "--dit", "two.safetensors"]), 1, &["two.safetensors", "no Wan DiT"]);
    let foreign = TensorOut::of(
        "diffusion_model.blocks.9.ffn.0.lora_A.weight",
        &Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap(),
    )
    .unwrap();
    let up =
        TensorOut { name: "diffusion_model.blocks.9.ffn.0.lora_B.weight".into(), shape: vec![4, 2], ..foreign.clone() };
    write_safetensors(&desk.at("far.safetensors"), vec![foreign, up], &BTreeMap::new()).unwrap();
    refused(&with(&["merge", "@far.safetensors", "--dit", "dit.safetensors"]), 1, &["blocks.9.ffn.0", "hint:"]);
    let wide = ["merge", "one.safetensors", "--dit", "dit.safetensors", "--save_precision", "fp32"];
    refused(&with(&wide), 2, &["dit.safetensors", "no fp8 model", "hint:"]);
    refused(&with(&["ema", "one.safetensors", "@far.safetensors"]), 1, &["far.safetensors", "averaged"]);
    refused(&with(&["ema", "one.safetensors", "two.safetensors", "--sigma_rel", "3"]), 2, &["sigma_rel"]);
    refused(&with(&["ema", "one.safetensors", "two.safetensors", "--beta", "1.5"]), 2, &["beta"]);
    refused(
        &with(&["extract", "--base", "dit.safetensors", "--tuned", "dit.safetensors", "--dim", "4"]),
        1,
        &["no linear", "differs"],
    );
    refused(
        &with(&["extract", "--base", "dit.safetensors", "--tuned", "one.safetensors", "--dim", "4"]),
        1,
        &["one.safetensors"],
    );

    // Outputs: never an input, never an existing file unasked, never half of one.
    refused(
        &desk.run(&["convert", "@half.safetensors", "--to", "kohya", "--out", "@half.safetensors"]),
        2,
        &["written over"],
    );
    std::fs::write(desk.at("there.safetensors"), b"mine").unwrap();
    let there = ["resize", "one.safetensors", "--dim", "4", "--out", "@there.safetensors"];
    refused(&desk.run(&there), 2, &["exists", "--overwrite"]);
    assert_eq!(std::fs::read(desk.at("there.safetensors")).unwrap(), b"mine");
    desk.ok(&[&there[..], &["--overwrite"]].concat());
    refused(
        &desk.run(&["resize", "one.safetensors", "--dim", "4", "--out", "@there.safetensors/x"]),
        1,
        &["there.safetensors"],
    );
    refused(&desk.run(&["resize", "one.safetensors", "--dim", "4", "--out", "@."]), 2, &["directory"]);
    for words in [
        &["resize", "one.safetensors", "--dim", "0"][..],
        &["frobnicate"],
        &["convert", "one.safetensors", "--to", "gguf"],
    ] {
        let out = with(words);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out));
    }
    assert!(!desk.at("x.safetensors").exists());
    assert!(find(desk.out.path(), ".wtmp").is_empty());
}
