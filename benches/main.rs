//! What the CPU path costs: `cargo bench`. Cards are measured by `wan-train bench`, which needs no cargo there.

use candle_core::{Device, Tensor};
use criterion::{criterion_group, criterion_main, Criterion};
use std::hint::black_box;
use wan_kernels::Exec;
use wan_models::adapter::NoAdapters;
use wan_models::arch::ModelConfig;
use wan_models::wan::{random_weights, Numerics, SavePlan, SavePolicy, Timesteps, WanInputs, WanModel, WanWeights};
use wan_train::config::registry;
use wan_train::data::resize;
use wan_train::tokenizer::UmT5Tokenizer;

/// Forward and backward of the demo's DiT on one clip of 144 tokens.
fn step(c: &mut Criterion) {
    let config = ModelConfig::from_toml(registry::text("models/demo.toml").unwrap()).unwrap();
    let tensors = random_weights(&config.arch, 1).unwrap();
    let (rest, blocks) = WanWeights::from_tensors(&config.arch, &tensors).unwrap();
    let model = WanModel::new(config.arch.clone(), rest, Numerics::default()).unwrap();
    let exec = Exec::cpu();
    let x = Tensor::randn(0f32, 1.0, (1, 16, 3, 12, 16), &Device::Cpu).unwrap();
    let context = Tensor::randn(0f32, 1.0, (24, config.arch.text_dim), &Device::Cpu).unwrap();
    let inputs = WanInputs {
        x,
        t: Timesteps::PerSample(vec![500.0]),
        context: vec![context],
        y: None,
        clip_fea: None,
        f_indices: None,
    };
    let mut group = c.benchmark_group("demo DiT");
    group.sample_size(10);
    for (name, policy) in [("keep all", SavePolicy::KeepAll), ("recompute", SavePolicy::Recompute)] {
        let plan = SavePlan::uniform(policy);
        group.bench_function(name, |b| {
            b.iter(|| {
                let (pred, saved) = model.forward(&exec, &inputs, &NoAdapters, &blocks, &plan).unwrap();
                model.backward(&exec, &NoAdapters, &blocks, saved, &pred, &mut Nowhere).unwrap();
            })
        });
    }
    group.finish();
}

/// Gradients that nobody wants.
struct Nowhere;

impl wan_models::wan::GradSink for Nowhere {
    fn add(&mut self, _site: &str, _param: &'static str, _grad: &Tensor) -> wan_models::Result<()> {
        Ok(())
    }
}

/// One 1280x720 picture to a bucket: shrinking and enlarging.
fn resizing(c: &mut Criterion) {
    let picture = image::RgbImage::from_fn(1280, 720, |x, y| image::Rgb([x as u8, y as u8, (x * y) as u8]));
    c.bench_function("shrink 1280x720 to 832x480", |b| {
        b.iter(|| resize::to_bucket(black_box(picture.clone()), (832, 480)))
    });
    c.bench_function("enlarge 1280x720 to 1472x832", |b| {
        b.iter(|| resize::to_bucket(black_box(picture.clone()), (1472, 832)))
    });
}

/// A caption of a hundred words, cleaned and encoded.
fn tokenizer(c: &mut Criterion) {
    let tokenizer = UmT5Tokenizer::embedded().unwrap();
    let caption = "A tabby cat with green eyes looks past the camera, close up, soft indoor light. ".repeat(7);
    c.bench_function("tokenize 105 words", |b| b.iter(|| tokenizer.encode(black_box(&caption)).unwrap()));
}

criterion_group!(benches, step, resizing, tokenizer);
criterion_main!(benches);
