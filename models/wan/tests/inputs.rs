//! What the model refuses, and with which words; architectures from shapes and from configuration files.

use candle_core::{DType, Device, Tensor};
use wan_kernels::Exec;

use crate::adapter::NoAdapters;
use crate::arch::{ClipArch, ModelConfig, NotInShapes, Role, Shapes, WanArch, TASKS};
use crate::golden::model;
use crate::keys;
use crate::linear::Weight;
use crate::wan::{random_weights, BlockWeights, Numerics, Timesteps, WanInputs, WanWeights};
use crate::Error;

fn config(task: &str) -> ModelConfig {
    let path = format!("{}/../configs/models/{task}.toml", env!("CARGO_MANIFEST_DIR"));
    ModelConfig::from_toml(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn shapes(arch: &WanArch) -> Shapes {
    keys::expected(arch).into_iter().map(|k| (k.key, k.shape)).collect()
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn every_task_has_numbers_that_its_own_shapes_confirm() {
    for task in TASKS {
        let config = config(task);
        assert_eq!(config.task, task);
        let arch = &config.arch;
        let shapes = shapes(arch);
        arch.agrees_with(&shapes).unwrap();
        let rest = NotInShapes { num_heads: Some(arch.num_heads), text_len: Some(arch.text_len), eps: Some(arch.eps) };
        let seen = WanArch { per_token_time: arch.per_token_time, ..WanArch::from_shapes(&shapes, rest).unwrap() };
        assert_eq!(&seen, arch, "{task}");
        match task {
            "demo" => assert_eq!(arch.describe_task(), None),
            _ => {
                assert!(arch.describe_task().unwrap().split([',', ' ']).any(|t| t == task), "{task}");
                assert_eq!(arch.head_dim(), 128);
                assert!(config.file(Role::Vae, None).is_some() && config.file(Role::T5, None).is_some());
            }
        }
        assert_eq!(config.experts.is_some(), task.contains("A14B"));
        assert_eq!(config.file(Role::DitHigh, None).is_some(), config.experts.is_some());
    }
}

#[test]
fn parameters_are_counted_as_published() {
    let billions = |task: &str| {
        let count: usize = keys::expected(&config(task).arch).iter().map(|k| k.shape.iter().product::<usize>()).sum();
        (count as f64 / 1e7).round() / 100.0
    };
    assert_eq!(billions("t2v-14B"), 14.29);
    assert_eq!(billions("i2v-14B"), 16.39);
    assert_eq!(billions("i2v-A14B"), 14.29);
    assert_eq!(billions("t2v-1.3B"), 1.42);
}

#[test]
fn weights_of_another_task_are_named() {
    let of = |task: &str| shapes(&config(task).arch);
    let says = |task: &str, weights: &Shapes| config(task).arch.agrees_with(weights).unwrap_err().to_string();
    let text = says("t2v-A14B", &of("i2v-A14B"));
    assert!(text.contains("input channels 36 (the task has 16)") && text.contains("look like i2v-A14B"), "{text}");
    let text = says("i2v-A14B", &of("i2v-14B"));
    assert!(text.contains("an image embedding that the task has not") && text.ends_with("look like i2v-14B"), "{text}");
    let text = says("i2v-14B", &of("i2v-A14B"));
    assert!(text.contains("no image embedding where the task needs one"), "{text}");
    let text = says("i2v-14B", &of("flf2v-14B"));
    assert!(text.contains("look like flf2v-14B"), "{text}");
    assert!(says("t2v-14B", &of("demo")).contains("look like no published task"));
    config("t2v-14B").arch.agrees_with(&of("t2v-A14B")).unwrap();

    let vae: Shapes = [("encoder.conv1.weight".to_string(), vec![96, 3, 3, 3, 3])].into();
    assert!(says("t2v-14B", &vae).contains("not the weights of a Wan DiT"));
}

#[test]
fn configurations_with_mistakes_are_refused() {
    let text = std::fs::read_to_string(format!("{}/../configs/models/demo.toml", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let fails = |from: &str, to: &str| ModelConfig::from_toml(&text.replacen(from, to, 1)).unwrap_err().to_string();
    assert!(fails("ffn_dim", "ffn_dimm").contains("ffn_dimm"));
    assert!(fails("num_heads = 3", "num_heads = 5").contains("does not make 5 heads"));
    assert!(fails("out_dim = 16", "out_dim = 12").contains("channels of the VAE"));
    assert!(fails("patch = [1, 2, 2]", "patch = [0, 2, 2]").contains("zero side"));
}

fn tiny(clip: Option<ClipArch>) -> WanArch {
    WanArch { dim: 24, ffn_dim: 20, num_layers: 1, in_dim: 20, text_dim: 6, text_len: 8, clip, ..config("demo").arch }
}

fn good(arch: &WanArch) -> WanInputs {
    WanInputs {
        x: zeros(&[1, 16, 2, 4, 6]),
        t: Timesteps::PerSample(vec![1.0]),
        context: vec![zeros(&[3, 6])],
        y: Some(zeros(&[1, 4, 2, 4, 6])),
        clip_fea: arch.blank_clip(1, &Device::Cpu).unwrap(),
        f_indices: None,
    }
}

#[test]
fn inputs_that_do_not_fit_are_refused_with_their_shapes() {
    let arch = tiny(None);
    let (model, blocks) = model(&arch, &random_weights(&arch, 1).unwrap(), Numerics::default());
    let run = |inputs: &WanInputs| model.predict(&Exec::cpu(), inputs, &NoAdapters, &blocks, None);
    assert_eq!(run(&good(&arch)).unwrap().dims(), [1, 16, 2, 4, 6]);
    let base = good(&arch);
    for (bad, words) in [
        (WanInputs { x: zeros(&[16, 2, 4, 6]), ..base.clone() }, "expected [B, C, F, H, W]"),
        (WanInputs { x: zeros(&[1, 16, 2, 5, 6]), ..base.clone() }, "does not divide into patches"),
        (WanInputs { y: None, ..base.clone() }, "16 latent and 0 conditioning channels, the model takes 16 and 4"),
        (WanInputs { y: Some(zeros(&[1, 4, 1, 4, 6])), ..base.clone() }, "conditioning [1, 4, 1, 4, 6]"),
        (WanInputs { t: Timesteps::PerSample(vec![1.0, 2.0]), ..base.clone() }, "timesteps for 2 samples"),
        (WanInputs { t: Timesteps::PerToken(vec![vec![1.0; 5]]), ..base.clone() }, "5 timesteps for 12 tokens"),
        (WanInputs { context: vec![], ..base.clone() }, "0 prompts for 1 latents"),
        (WanInputs { context: vec![zeros(&[9, 6])], ..base.clone() }, "expected at most [8, 6]"),
        (WanInputs { context: vec![zeros(&[3, 7])], ..base.clone() }, "expected at most [8, 6]"),
        (WanInputs { clip_fea: Some(zeros(&[1, 257, 4])), ..base.clone() }, "takes none"),
        (WanInputs { f_indices: Some(vec![0]), ..base.clone() }, "1 frame indices for 2 latent frames"),
    ] {
        let text = run(&bad).unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn image_features_are_demanded_and_measured() {
    let arch = tiny(Some(ClipArch { dim: 4, tokens: 257, images: 2 }));
    let (model, blocks) = model(&arch, &random_weights(&arch, 1).unwrap(), Numerics::default());
    let run = |inputs: &WanInputs| model.predict(&Exec::cpu(), inputs, &NoAdapters, &blocks, None);
    let base = good(&arch);
    run(&base).unwrap();
    let missing = run(&WanInputs { clip_fea: None, ..base.clone() }).unwrap_err().to_string();
    assert!(missing.contains("none were given"), "{missing}");
    let one = run(&WanInputs { clip_fea: Some(zeros(&[1, 257, 4])), ..base }).unwrap_err().to_string();
    assert!(one.contains("expected [2, 257, 4]"), "{one}");
}

#[test]
fn frame_indices_move_frames_in_time() {
    let arch = tiny(None);
    let (model, blocks) = model(&arch, &random_weights(&arch, 1).unwrap(), Numerics::default());
    let mut inputs = good(&arch);
    inputs.x = Tensor::arange(0f32, 768., &Device::Cpu).unwrap().reshape((1, 16, 2, 4, 6)).unwrap().sin().unwrap();
    let run = |f: Option<Vec<usize>>| {
        let inputs = WanInputs { f_indices: f, ..inputs.clone() };
        let pred = model.predict(&Exec::cpu(), &inputs, &NoAdapters, &blocks, None).unwrap();
        pred.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(run(None), run(Some(vec![0, 1])));
    assert_ne!(run(None), run(Some(vec![0, 7])));
}

#[test]
fn weights_of_the_wrong_shape_or_kind_are_named() {
    let arch = tiny(None);
    let tensors = random_weights(&arch, 1).unwrap();
    let load = |change: &dyn Fn(&str, Tensor) -> Weight| {
        let mut get = |key: &str| Ok(change(key, tensors[key].clone()));
        let rest = WanWeights::from_getter(&arch, &mut get).map(|_| ());
        rest.and_then(|()| BlockWeights::from_getter(&arch, 0, &mut get).map(|_| ()))
    };
    load(&|_, t| Weight::Dense(t)).unwrap();
    let shape = load(&|key, t| match key {
        "blocks.0.ffn.2.weight" => Weight::Dense(t.t().unwrap()),
        _ => Weight::Dense(t),
    });
    assert!(matches!(shape, Err(Error::WeightShape { key, .. }) if key == "blocks.0.ffn.2.weight"));
    let quantised = load(&|key, t| match key {
        "head.modulation" => Weight::cast(zeros(&[2, 2]).to_dtype(DType::U8).unwrap()).unwrap(),
        _ => Weight::Dense(t),
    });
    assert!(quantised.is_err());
    let mut missing = |key: &str| Err(Error::MissingWeight { model: "wan", key: key.to_string() });
    let text = BlockWeights::from_getter(&arch, 0, &mut missing).unwrap_err().to_string();
    assert_eq!(text, "wan: weight blocks.0.self_attn.q.weight is missing");
}
