//! `wan-train lora merge --dit` and `lora extract` on models in fp8.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use float8::F8E4M3;
use safetensors::Dtype;
use wan_train::fsio::{write_safetensors, TensorOut};

use super::lora::{deltas, distance, tensors, values, Desk, Trained};
use super::mistakes::refused;

/// How a file keeps its matrices.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    /// Codes that are the values.
    Plain,
    /// ComfyUI's older form: `scale_weight`, a marker, activation scales.
    Scaled,
    /// Its newer one: `weight_scale` without a dimension, JSON beside each layer and in the header.
    Noted,
    /// A scale for every 64 weights, or for every row of other widths.
    Blocks,
}

const FORMS: [Form; 4] = [Form::Plain, Form::Scaled, Form::Noted, Form::Blocks];

/// A model in fp8.
struct Coded {
    outs: Vec<TensorOut<'static>>,
    metadata: BTreeMap<String, String>,
    /// What every matrix of a block stands for, and the coarsest step between two codes.
    decoded: BTreeMap<String, (Vec<f32>, f32)>,
}

impl Coded {
    /// The demo's DiT with every matrix of a block in fp8, the rest in `rest`.
    fn of(form: Form, rest: DType) -> Self {
        let mut coded = Coded { outs: Vec::new(), metadata: BTreeMap::new(), decoded: BTreeMap::new() };
        for (key, t) in tensors(&Trained::get().path("dit.safetensors")) {
            match t.rank() == 2 && key.starts_with("blocks.") && key.ends_with(".weight") {
                true => coded.matrix(&key, &t, form),
                false => coded.outs.push(TensorOut::of(key, &t.to_dtype(rest).unwrap()).unwrap()),
            }
        }
        let bytes = |name: &str, dtype, data: Vec<u8>| TensorOut {
            name: name.into(),
            dtype,
            shape: vec![data.len()],
            data: data.into(),
        };
        match form {
            Form::Scaled => coded.outs.push(bytes("scaled_fp8", Dtype::F8_E4M3, vec![0; 2])),
            Form::Noted => {
                let note = br#"{"format": "float8_e4m3fn"}"#.to_vec();
                coded.outs.push(bytes("blocks.0.ffn.0.comfy_quant", Dtype::U8, note));
                let about = r#"{"layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}}"#;
                coded.metadata.insert("_quantization_metadata".into(), about.into());
            }
            Form::Plain | Form::Blocks => {}
        }
        coded.metadata.insert("title".into(), "kept".into());
        coded
    }

    fn matrix(&mut self, key: &str, t: &Tensor, form: Form) {
        let (weights, width) = (values(t), t.dims()[1]);
        let group = match form {
            Form::Blocks if width % 64 == 0 => 64,
            Form::Blocks => width,
            _ => weights.len(),
        };
        let scale_of = |w: &[f32]| match form {
            Form::Plain => 1.0,
            _ => w.iter().fold(0f32, |max, x| max.max(x.abs())) / 448.0,
        };
        let scales: Vec<f32> = weights.chunks(group).map(scale_of).collect();
        let code = |(i, w): (usize, &f32)| F8E4M3::from_f32(w / scales[i / group]);
        let codes: Vec<F8E4M3> = weights.iter().enumerate().map(code).collect();
        let value = |(i, c): (usize, &F8E4M3)| c.to_f32() * scales[i / group];
        let coarsest = scales.iter().fold(0f32, |max, s| max.max(*s));
        self.decoded.insert(key.into(), (codes.iter().enumerate().map(value).collect(), coarsest));
        self.outs.push(TensorOut {
            name: key.into(),
            dtype: Dtype::F8_E4M3,
            shape: t.dims().to_vec(),
            data: codes.iter().map(|c| c.to_bits()).collect(),
        });
        let module = key.strip_suffix(".weight").unwrap();
        let scale = |dims: &[usize]| Tensor::from_vec(scales.clone(), dims, &Device::Cpu).unwrap();
        let (suffix, scale) = match form {
            Form::Plain => return,
            Form::Scaled => ("scale_weight", scale(&[1])),
            Form::Noted => ("weight_scale", scale(&[])),
            Form::Blocks if group == width => ("scale_weight", scale(&[t.dims()[0], 1])),
            Form::Blocks => ("scale_weight", scale(&[t.dims()[0], width / 64, 1])),
        };
        self.outs.push(TensorOut::of(format!("{module}.{suffix}"), &scale).unwrap());
        if form == Form::Scaled {
            let one = Tensor::new(&[1f32], &Device::Cpu).unwrap();
            self.outs.push(TensorOut::of(format!("{module}.scale_input"), &one).unwrap());
        }
    }

    fn write(self, path: &Path) {
        write_safetensors(path, self.outs, &self.metadata).unwrap();
    }

    /// A tensor of the file, to spoil it.
    fn at(&mut self, name: &str) -> &mut TensorOut<'static> {
        self.outs.iter_mut().find(|t| t.name == name).unwrap()
    }

    fn without(mut self, name: &str) -> Self {
        self.outs.retain(|t| t.name != name);
        self
    }
}

fn header(path: &Path) -> serde_json::Value {
    let bytes = std::fs::read(path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    serde_json::from_slice(&bytes[8..8 + n]).unwrap()
}

/// Units of the last place at 1.
fn unit(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 2f32.powi(-10),
        DType::BF16 => 2f32.powi(-7),
        _ => 2f32.powi(-23),
    }
}

#[test]
fn a_lora_is_added_to_what_an_fp8_model_stands_for() {
    let desk = Desk::new();
    let merge = ["merge", "two.safetensors", "--weights", "2", "--overwrite"];
    let merged = |dit: &str, more: &[&str]| {
        let said = desk.ok(&[&merge[..], &["--dit", dit, "--out", "@m.safetensors"], more].concat());
        assert!(said.contains("30 tensors of"), "{said}");
        tensors(&desk.at("m.safetensors"))
    };
    let update = deltas(&Trained::get().path("two.safetensors"));
    let original = tensors(&Trained::get().path("dit.safetensors"));
    let sixteen = merged("dit.safetensors", &[]);
    for form in FORMS {
        // The rest of the file says which 16 bits are meant, unless the user does.
        for (rest, more, want) in [
            (DType::F16, &[][..], DType::F16),
            (DType::BF16, &[][..], DType::BF16),
            (DType::F32, &["--save_precision", "fp16"][..], DType::F16),
            (DType::F16, &["--save_precision", "fp32"][..], DType::F32),
        ] {
            let coded = Coded::of(form, rest);
            let decoded = coded.decoded.clone();
            coded.write(&desk.at("fp8.safetensors"));
            let got = merged("@fp8.safetensors", more);
            // No scale, marker or note is left over: the file is a plain model now, and says so in its header.
            assert_eq!(got.len(), original.len(), "{form:?}");
            let metadata = header(&desk.at("m.safetensors"))["__metadata__"].clone();
            assert!(metadata.get("_quantization_metadata").is_none() && metadata["title"] == "kept", "{metadata}");
            assert!(metadata["wan_train.merged"].as_str().unwrap().contains("two.safetensors"), "{metadata}");
            for (key, t) in &original {
                let Some((base, scale)) = decoded.get(key) else {
                    assert_eq!(got[key].dtype(), rest, "{key}");
                    assert!(values(&got[key]) == values(&t.to_dtype(rest).unwrap()), "{key} is touched by nothing");
                    continue;
                };
                assert_eq!(got[key].dtype(), want, "{form:?} {key}");
                let (got, sixteen, old) = (values(&got[key]), values(&sixteen[key]), values(t));
                for (i, d) in update[key.strip_suffix(".weight").unwrap()].iter().enumerate() {
                    let sum = base[i] + 2.0 * d;
                    // One rounding of the sum, where fp16 is subnormal below 2^-14.
                    let rounding = unit(want) * sum.abs().max(2f32.powi(-14)) + 1e-7;
                    assert!((got[i] - sum).abs() <= rounding, "{form:?} {key}: {} {sum}", got[i]);
                    // Against the 16-bit model: half a step of e4m3, and a rounding each.
                    let step = (old[i].abs() / 16.0).max(scale / 1024.0);
                    let near = 1.01 * step + rounding + unit(t.dtype()) * sixteen[i].abs().max(1e-3);
                    assert!((got[i] - sixteen[i]).abs() <= near, "{form:?} {key}: {} {}", got[i], sixteen[i]);
                }
            }
        }
    }
}

#[test]
fn differences_from_an_fp8_model_are_those_from_its_values() {
    let desk = Desk::new();
    let extract = |base: &str, tuned: &str, out: &str| {
        let said = desk.ok(&["extract", "--base", base, "--tuned", tuned, "--dim", "16", "--out", out]);
        assert!(said.contains("30 modules of rank"), "{said}");
        deltas(&desk.at(&out[1..]))
    };
    let update = deltas(&Trained::get().path("two.safetensors"));
    for form in FORMS {
        let coded = Coded::of(form, DType::F32);
        let mut wide = Coded { outs: Vec::new(), metadata: BTreeMap::new(), decoded: coded.decoded.clone() };
        for t in coded.outs.iter().filter(|t| t.dtype == Dtype::F32 && !t.name.contains("scale_")) {
            wide.outs.push(t.clone());
        }
        for (key, t) in tensors(&Trained::get().path("dit.safetensors")) {
            if let Some((values, _)) = coded.decoded.get(&key) {
                let t = Tensor::from_vec(values.clone(), t.dims(), &Device::Cpu).unwrap();
                wide.outs.push(TensorOut::of(key, &t).unwrap());
            }
        }
        wide.outs.retain(|t| !t.name.ends_with("_scale"));
        wide.write(&desk.at("wide.safetensors"));
        coded.write(&desk.at("fp8.safetensors"));
        let merge = ["merge", "two.safetensors", "--save_precision", "fp32", "--overwrite"];
        desk.ok(&[&merge[..], &["--dit", "@fp8.safetensors", "--out", "@tuned.safetensors"]].concat());
        let name = |what: &str| format!("@{form:?}-{what}.safetensors");
        let from_fp8 = extract("@fp8.safetensors", "@tuned.safetensors", &name("fp8"));
        assert_eq!(from_fp8, extract("@wide.safetensors", "@tuned.safetensors", &name("wide")), "{form:?}");
        assert!(distance(&from_fp8, &update) < 0.02, "{form:?}");
    }
    // A model against itself in another form: the rounding to fp8 is all there is.
    Coded::of(Form::Scaled, DType::F32).write(&desk.at("fp8.safetensors"));
    let noise = extract("@fp8.safetensors", "dit.safetensors", "@noise.safetensors");
    let (old, size) =
        (tensors(&Trained::get().path("dit.safetensors")), |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>());
    for (module, delta) in &noise {
        let share = (size(delta) / size(&values(&old[&format!("{module}.weight")]))).sqrt();
        assert!(share > 0.0 && share < 1.0 / 16.0, "{module}: {share}");
    }
}

#[test]
fn fp8_files_that_make_no_sense_are_refused() {
    const WEIGHT: &str = "blocks.1.ffn.0.weight";
    const SCALE: &str = "blocks.1.ffn.0.scale_weight";
    let desk = Desk::new();
    let mut number = 0;
    let mut wrong = |coded: Coded, words: &[&str]| {
        number += 1;
        let name = format!("@{number}.safetensors");
        coded.write(&desk.at(&name[1..]));
        let all = [&[&name[1..]], words].concat();
        let merge = ["merge", "two.safetensors", "--dit", &name, "--out", "@x.safetensors"];
        refused(&desk.run(&merge), 1, &all);
        let extract =
            ["extract", "--base", &name, "--tuned", "dit.safetensors", "--dim", "4", "--out", "@x.safetensors"];
        refused(&desk.run(&extract), 1, &all);
    };
    let scaled = || Coded::of(Form::Scaled, DType::F16);
    wrong(scaled().without(SCALE), &[WEIGHT, "without a scale", "hint:"]);
    let mut other = scaled();
    (other.at(SCALE).shape, other.at(SCALE).data) = (vec![2, 3], vec![0u8; 24].into());
    wrong(other, &[SCALE, "[2, 3]"]);
    let mut wide = scaled();
    let [o, i] = wide.at(WEIGHT).shape[..] else { panic!() };
    (wide.at(WEIGHT).dtype, wide.at(WEIGHT).data) = (Dtype::F16, vec![0u8; 2 * o * i].into());
    wrong(wide, &[SCALE, "no fp8 weight"]);
    wrong(scaled().without(WEIGHT), &[SCALE, "no fp8 weight"]);
    let mut integers = Coded::of(Form::Plain, DType::F16);
    integers.at(WEIGHT).dtype = Dtype::I8;
    wrong(integers, &[WEIGHT, "I8", "fp16, bf16 or fp8"]);
    let mut noted = Coded::of(Form::Noted, DType::F16);
    let note = br#"{"format": "nvfp4"}"#.to_vec();
    (noted.at("blocks.0.ffn.0.comfy_quant").shape, noted.at("blocks.0.ffn.0.comfy_quant").data) =
        (vec![note.len()], note.into());
    wrong(noted, &["nvfp4"]);
    let mut twice = scaled();
    let mut again = twice.at(WEIGHT).clone();
    again.name = format!("diffusion_model.{WEIGHT}");
    twice.outs.push(again);
    wrong(twice, &["mean the same tensor"]);
    // Not a number, in a matrix.
    let mut nan = scaled();
    nan.at(WEIGHT).data.to_mut()[3] = 0x7f;
    nan.write(&desk.at("nan.safetensors"));
    let merge = ["merge", "two.safetensors", "--dit", "@nan.safetensors", "--out", "@x.safetensors"];
    refused(&desk.run(&merge), 1, &[WEIGHT, "finite"]);
    let extract = ["extract", "--base", "@nan.safetensors", "--tuned", "dit.safetensors", "--dim", "4"];
    refused(&desk.run(&[&extract[..], &["--out", "@x.safetensors"]].concat()), 1, &[WEIGHT, "finite"]);
    assert!(!desk.at("x.safetensors").exists());
}
