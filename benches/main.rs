//! What the CPU path costs: `cargo bench`. Cards are measured by `wan-train bench`, which needs no cargo there.

use candle_core::{Device, Tensor};
use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use std::hint::black_box;
use std::io::Write;
use std::time::Instant;
use wan_kernels::Exec;
use wan_models::arch::ModelConfig;
use wan_models::wan::{random_weights, Numerics, SavePlan, SavePolicy, Timesteps, WanInputs, WanModel, WanWeights};
use wan_train::adapter::{AdapterParams, Grads, NetworkSpec};
use wan_train::config::registry;
use wan_train::data::resize;
#[cfg(feature = "video")]
use wan_train::data::video::Reader;
use wan_train::loader::{Reading, Source};
use wan_train::optim::{Optimizer, OptimizerSpec};
use wan_train::tokenizer::UmT5Tokenizer;

/// Forward, backward and AdamW of the demo's DiT with a LoRA of rank 8, on one clip of 144 tokens.
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
    let params = AdapterParams::new(NetworkSpec::lora(8, 8.0), config.arch.sites(), 1, &Device::Cpu).unwrap();
    let mut grads = Grads::new(params.layout().clone(), &Device::Cpu).unwrap();
    let adamw = OptimizerSpec::parse("adamw", &[]).unwrap();
    let mut optimizer = Optimizer::on(adamw, params.layout(), &Device::Cpu).unwrap();
    let mut group = c.benchmark_group("demo DiT");
    group.sample_size(10);
    for (name, policy) in [("keep all", SavePolicy::KeepAll), ("recompute", SavePolicy::Recompute)] {
        let plan = SavePlan::uniform(policy);
        group.bench_function(name, |b| {
            b.iter(|| {
                let (pred, saved) = model.forward(&exec, &inputs, &params, &blocks, &plan).unwrap();
                model.backward(&exec, &params, &blocks, saved, &pred, &mut grads).unwrap();
                optimizer.step(params.layout(), params.master(), grads.flat(), 1e-4, 1e-4, 1.0).unwrap();
                grads.clear().unwrap();
            })
        });
    }
    group.finish();
}

/// The demo's clip, every frame as RGB.
#[cfg(feature = "video")]
fn decode(c: &mut Criterion) {
    let (_, clip) = registry::files_under("demo/videos").into_iter().find(|(path, _)| path.ends_with(".mp4")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("clip.mp4");
    std::fs::write(&path, clip).unwrap();
    c.bench_function("decode the demo's clip", |b| {
        b.iter(|| {
            let mut reader = Reader::open(&path, true, true).unwrap();
            let mut frames = 0;
            while reader.advance().unwrap().is_some() {
                black_box(reader.picture().unwrap());
                frames += 1;
            }
            assert!(frames > 0);
        })
    });
}

#[cfg(not(feature = "video"))]
fn decode(_c: &mut Criterion) {}

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

/// A checkpoint of 1 GiB in the page cache, both ways: piece by piece into memory that is used again, as for a card, and
/// tensor by tensor into memory of its own, as for the CPU. The rate is that of all threads together.
fn reading(c: &mut Criterion) {
    const TENSORS: usize = 16;
    const TENSOR: usize = 64 << 20;
    const PIECE: usize = 16 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let mut header = serde_json::Map::new();
    for i in 0..TENSORS {
        let at = [i * TENSOR, (i + 1) * TENSOR];
        header.insert(i.to_string(), serde_json::json!({"dtype": "U8", "shape": [TENSOR], "data_offsets": at}));
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let values: Vec<u8> = (0..TENSOR).map(|i| (i / 251) as u8).collect();
    (0..TENSORS).for_each(|_| file.write_all(&values).unwrap());
    drop((file, values));

    let sources = [Reading::Mapped, Reading::Positional].map(|reading| Source::open_by(&path, reading).unwrap());
    let read = |source: &Source, threads: usize, fresh: bool| {
        let clock = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                scope.spawn(move || {
                    let mut buffer = vec![1u8; PIECE];
                    for key in (thread..TENSORS).step_by(threads).map(|i| i.to_string()) {
                        if fresh {
                            black_box(source.bytes(&key).unwrap());
                            continue;
                        }
                        for at in (0..TENSOR).step_by(PIECE) {
                            source.read_part(&key, at, &mut buffer).unwrap();
                        }
                    }
                });
            }
        });
        clock.elapsed()
    };
    for (threads, fresh) in [(1, false), (2, false), (8, false), (1, true)] {
        let to = if fresh { "fresh memory" } else { "one buffer" };
        let mut group = c.benchmark_group(format!("read 1 GiB to {to}, {threads} threads"));
        group.sample_size(10).throughput(Throughput::Bytes((TENSORS * TENSOR) as u64));
        for (name, own, other) in [("mapped", 0, 1), ("by position", 1, 0)] {
            group.bench_function(name, |b| {
                b.iter_custom(|n| {
                    (0..n)
                        .map(|_| {
                            let took = read(&sources[own], threads, fresh);
                            // The other way runs in between, so that both are measured on the same machine.
                            read(&sources[other], threads, fresh);
                            took
                        })
                        .sum()
                })
            });
        }
        group.finish();
    }
}

criterion_group!(benches, step, decode, resizing, tokenizer, reading);
criterion_main!(benches);
