use super::user_error;
use crate::golden_support::golden_dir;
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use wan_train::checkpoint::{Form, LoraFile};
use wan_train::loader::{merge_into, merge_map, LoraMerge};

type Tensors = BTreeMap<String, Tensor>;

fn part(all: &Tensors, prefix: &str) -> Tensors {
    all.iter().filter_map(|(k, t)| Some((k.strip_prefix(prefix)?.to_owned(), t.clone()))).collect()
}

fn f32s(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Distance in units of the last place of fp16.
fn ulps(a: &Tensor, b: &Tensor) -> i32 {
    let bits = |t: &Tensor| {
        let ordered = |b: u16| if b & 0x8000 != 0 { -i32::from(b & 0x7fff) } else { i32::from(b) };
        t.flatten_all()
            .unwrap()
            .to_vec1::<half::f16>()
            .unwrap()
            .iter()
            .map(|v| ordered(v.to_bits()))
            .collect::<Vec<_>>()
    };
    bits(a).iter().zip(bits(b)).map(|(x, y)| (x - y).abs()).max().unwrap_or(0)
}

struct Case {
    base: Tensors,
    lora: Tensors,
    merged: Tensors,
    strength: f64,
    returned: bool,
}

fn case(style: &str) -> Case {
    let file = golden_dir().join(format!("11_merge_{style}"));
    let all: Tensors =
        candle_core::safetensors::load(file.with_extension("safetensors"), &Device::Cpu).unwrap().into_iter().collect();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file.with_extension("json")).unwrap()).unwrap();
    Case {
        base: part(&all, "base."),
        lora: part(&all, "lora."),
        merged: part(&all, "merged."),
        strength: json["strength"].as_f64().unwrap(),
        returned: json["returned"].as_bool().unwrap(),
    }
}

#[test]
fn recorded_merges_come_out_the_same_and_leave_the_rest_alone() {
    for style in ["native", "noalpha", "kohya_unmapped"] {
        let c = case(style);
        for compat in [true, false] {
            let lora = LoraFile::from_tensors(style, c.lora.clone(), compat).unwrap();
            let mapped = lora.len();
            let mut ours = c.base.clone();
            let changed = merge_map(&mut ours, lora, c.strength).unwrap();
            if compat {
                assert_eq!(changed > 0, c.returned, "{style}");
                assert_eq!(changed, c.merged.len(), "{style}");
            } else {
                // Nothing is lost on spelling: kohya names are merged too.
                assert_eq!((changed, mapped), (20, 20), "{style}");
            }
            for (key, got) in &ours {
                assert_eq!(got.dtype(), DType::F16);
                match c.merged.get(key) {
                    // The fp32 sum may differ in its last bit by the order of additions: one unit of fp16 at most.
                    Some(want) => assert!(ulps(got, want) <= 1, "{style} {key}: {} ulps", ulps(got, want)),
                    None if compat => assert_eq!(f32s(got), f32s(&c.base[key]), "{style} {key}"),
                    None => {}
                }
            }
        }
    }
}

#[test]
fn merged_weights_equal_the_recorded_bits_nearly_everywhere() {
    let c = case("native");
    let lora = LoraFile::from_tensors("native", c.lora.clone(), true).unwrap();
    let mut ours = c.base.clone();
    merge_map(&mut ours, lora, c.strength).unwrap();
    let (mut equal, mut all) = (0, 0);
    for (key, want) in &c.merged {
        for (a, b) in f32s(&ours[key]).iter().zip(f32s(want)) {
            equal += usize::from(*a == b);
            all += 1;
        }
    }
    assert!(equal * 1000 >= all * 999, "{equal} of {all} equal");
}

/// A LoRA for one module in every method, with its ΔW by plain loops.
fn methods() -> Vec<(Tensors, Vec<f32>)> {
    let d = &Device::Cpu;
    let m = |rows: usize, cols: usize, start: f32| {
        Tensor::from_vec((0..rows * cols).map(|i| start + i as f32 * 0.25).collect::<Vec<f32>>(), (rows, cols), d)
            .unwrap()
    };
    let site = "diffusion_model.blocks.0.ffn.0";
    let named = |parts: Vec<(&str, Tensor)>| -> Tensors {
        parts.into_iter().map(|(s, t)| (format!("{site}.{s}"), t)).collect()
    };
    let mul = |a: &Tensor, b: &Tensor| -> Vec<Vec<f32>> {
        let (a, b) = (a.to_vec2::<f32>().unwrap(), b.to_vec2::<f32>().unwrap());
        let dot = |row: &Vec<f32>, j: usize| row.iter().zip(&b).map(|(x, r)| x * r[j]).sum::<f32>();
        a.iter().map(|row| (0..b[0].len()).map(|j| dot(row, j)).collect()).collect()
    };
    let alpha = Tensor::new(1f32, d).unwrap();
    // W is [4, 6], rank 2, alpha 1: scale 0.5.
    let (down, up) = (m(2, 6, -1.0), m(4, 2, 0.5));
    let lora: Vec<f32> = mul(&up, &down).concat().iter().map(|v| v * 0.5).collect();
    let (a1, b1, a2, b2) = (m(4, 2, 0.0), m(2, 6, -2.0), m(4, 2, 1.0), m(2, 6, 0.25));
    let loha: Vec<f32> = mul(&a1, &b1).concat().iter().zip(mul(&a2, &b2).concat()).map(|(x, y)| x * y * 0.5).collect();
    let (w1, w2a, w2b) = (m(2, 2, -0.5), m(2, 2, 1.0), m(2, 3, 0.0));
    let (v1, v2) = (w1.to_vec2::<f32>().unwrap(), mul(&w2a, &w2b));
    let kron = |f: f32| -> Vec<f32> {
        let (v1, v2) = (&v1, &v2);
        (0..4).flat_map(|o| (0..6).map(move |i| f * v1[o / 2][i / 3] * v2[o % 2][i % 3])).collect()
    };
    let full = Tensor::new(v2.clone(), d).unwrap();
    vec![
        (named(vec![("lora_A.weight", down), ("lora_B.weight", up), ("alpha", alpha.clone())]), lora),
        (
            named(vec![
                ("hada_w1_a", a1),
                ("hada_w1_b", b1),
                ("hada_w2_a", a2),
                ("hada_w2_b", b2),
                ("alpha", alpha.clone()),
            ]),
            loha,
        ),
        (
            named(vec![("lokr_w1", w1.clone()), ("lokr_w2_a", w2a), ("lokr_w2_b", w2b), ("alpha", alpha.clone())]),
            kron(0.5),
        ),
        // Two full matrices have no rank: the stored alpha has no effect.
        (named(vec![("lokr_w1", w1), ("lokr_w2", full.clone()), ("alpha", alpha)]), kron(1.0)),
        (named(vec![("diff", m(4, 6, 3.0))]), f32s(&m(4, 6, 3.0))),
    ]
}

#[test]
fn every_method_adds_what_its_definition_says() {
    let base = Tensor::zeros((4, 6), DType::F32, &Device::Cpu).unwrap();
    for (i, (tensors, want)) in methods().into_iter().enumerate() {
        let file = LoraFile::from_tensors("m", tensors, false).unwrap();
        let merges = [LoraMerge { file, strength: 2.0 }];
        let got = f32s(&merge_into(&base, "blocks.0.ffn.0.weight", &merges).unwrap().unwrap());
        for (g, w) in got.iter().zip(&want) {
            assert!((g - 2.0 * w).abs() < 1e-4, "method {i}: {got:?} instead of twice {want:?}");
        }
        assert!(merge_into(&base, "blocks.1.ffn.0.weight", &merges).unwrap().is_none());
    }
}

#[test]
fn an_adapter_made_from_a_file_multiplies_as_the_file_says() {
    for (tensors, want) in methods().into_iter().take(4) {
        let file = LoraFile::from_tensors("m", tensors, false).unwrap();
        let module = file.module("blocks.0.ffn.0").unwrap().unwrap();
        module.to_adapter().unwrap();
        let delta = f32s(&module.delta().unwrap());
        assert!(delta.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-4), "{delta:?} {want:?}");
    }
}

#[test]
fn several_loras_are_summed_before_rounding() {
    let d = &Device::Cpu;
    // bf16 keeps eight bits: 256 + 1 rounds to 256, 256 + 2 does not.
    let base = Tensor::full(256f32, (1, 1), d).unwrap().to_dtype(DType::BF16).unwrap();
    let one = || {
        let t = BTreeMap::from([("blocks.0.ffn.0.diff".to_string(), Tensor::full(1f32, (1, 1), d).unwrap())]);
        LoraMerge { file: LoraFile::from_tensors("one", t, false).unwrap(), strength: 1.0 }
    };
    let key = "blocks.0.ffn.0.weight";
    assert_eq!(f32s(&merge_into(&base, key, &[one()]).unwrap().unwrap()), [256.0]);
    assert_eq!(f32s(&merge_into(&base, key, &[one(), one()]).unwrap().unwrap()), [258.0]);
}

#[test]
fn a_lora_that_does_not_fit_is_refused_with_names() {
    let d = &Device::Cpu;
    let zeros = |r: usize, c: usize| Tensor::zeros((r, c), DType::F32, d).unwrap();
    let pair = |m: &str| vec![(format!("{m}.lora_A.weight"), zeros(2, 6)), (format!("{m}.lora_B.weight"), zeros(4, 2))];
    let file = |t: Vec<(String, Tensor)>| LoraFile::from_tensors("my.safetensors", t.into_iter().collect(), false);

    let merge = LoraMerge { file: file(pair("blocks.0.cross_attn.k_img")).unwrap(), strength: 1.0 };
    let err = user_error(merge.check(&BTreeSet::from(["blocks.0.ffn.0.weight"])));
    assert!(err.contains("my.safetensors") && err.contains("blocks.0.cross_attn.k_img.weight"), "{err}");

    let merge = LoraMerge { file: file(pair("blocks.0.ffn.0")).unwrap(), strength: 1.0 };
    merge.check(&BTreeSet::from(["blocks.0.ffn.0.weight"])).unwrap();
    let err = user_error(merge_into(&zeros(5, 6), "blocks.0.ffn.0.weight", &[merge]));
    assert!(err.contains("[4, 6]") && err.contains("[5, 6]"), "{err}");

    let err = user_error(file(vec![("lora_te_text.lora_down.weight".into(), zeros(2, 6))]));
    assert!(err.contains("1 of its key is not known") || err.contains("lora_te_text"), "{err}");
    let err = user_error(file(pair("blocks.0.ffn.0").into_iter().take(1).collect()));
    assert!(err.contains("blocks.0.ffn.0 has only blocks.0.ffn.0.lora_A.weight"), "{err}");
    let err = user_error(file([pair("blocks.0.ffn.0"), pair("diffusion_model.blocks.0.ffn.0")].concat()));
    assert!(err.contains("mean the same tensor"), "{err}");
    let err = user_error(file(vec![("blocks.0.ffn.0.dora_scale".into(), zeros(4, 1))]));
    assert!(err.contains("DoRA"), "{err}");
    let mut bad = pair("blocks.0.ffn.0");
    bad[1].1 = zeros(4, 3);
    let err = user_error(file(bad).unwrap().module("blocks.0.ffn.0"));
    assert!(err.contains("do not multiply"), "{err}");
    assert_eq!(file(pair("lora_unet_blocks_0_ffn_0")).unwrap().form(), Form::Kohya);
}
