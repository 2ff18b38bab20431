//! What the model is given, task by task, and where compatibility changes it.

use candle_core::{DType, Device, Tensor};
use wan_kernels::Exec;
use wan_models::arch::{ClipArch, Conditioning, WanArch};
use wan_models::wan::Timesteps;
use wan_train::config::RunConfig;
use wan_train::train::order::{self, BatchPlan};
use wan_train::train::{loss, Assembler, Batch, TrainSettings};

use super::support::{arch, data, model_config, normal, settings_for, Synthetic};

fn assemble(
    arch: &WanArch,
    conditioning: Conditioning,
    items: &Synthetic,
    exec: &Exec,
    change: impl FnOnce(&mut RunConfig),
) -> anyhow::Result<Batch> {
    let settings: TrainSettings = settings_for(&model_config(arch.clone(), conditioning), change);
    let plan: BatchPlan = order::epoch(&items.buckets, 5, 1, settings.timesteps.buckets).remove(0);
    Assembler { settings: &settings, arch, items, exec }.assemble(&plan, 1)
}

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn text_to_video_mixes_latents_and_noise() {
    let items = data(0, 2, 2);
    let batch = assemble(&arch(), Conditioning::None, &items, &Exec::cpu(), |_| {}).unwrap();
    assert_eq!(batch.inputs.x.dims(), [2, 16, 2, 4, 6]);
    let (x, l, n) = (values(&batch.inputs.x), values(&batch.latents), values(&batch.noise));
    let per = x.len() / 2;
    for i in 0..x.len() {
        let s = batch.timesteps[i / per].sigma;
        assert!((x[i] - ((1.0 - s) * l[i] + s * n[i])).abs() < 1e-6);
    }
    let Timesteps::PerSample(t) = &batch.inputs.t else { panic!("one timestep a sample") };
    assert!(t.iter().zip(&batch.timesteps).all(|(t, s)| *t == s.t && s.t == 1000.0 * s.sigma));
    assert!(batch.inputs.y.is_none() && batch.inputs.clip_fea.is_none() && batch.weight_b.is_none());
    // The noise is standard normal.
    let mean = n.iter().sum::<f32>() / n.len() as f32;
    let var = n.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n.len() as f32;
    assert!(mean.abs() < 0.1 && (var - 1.0).abs() < 0.15, "{mean} {var}");
}

#[test]
fn compat_differs_in_the_timestep_the_noise_and_the_rounding_of_sigma_mode() {
    let items = data(0, 2, 2);
    let run = |exec: &Exec, sampling: &str, compat: bool| {
        assemble(&arch(), Conditioning::None, &items, exec, |c| {
            c.timestep_sampling = sampling.into();
            c.musubi_compat = compat;
        })
        .unwrap()
    };
    let cpu = Exec::cpu();
    let (ours, old) = (run(&cpu, "shift", false), run(&cpu, "shift", true));
    for (a, b) in ours.timesteps.iter().zip(&old.timesteps) {
        assert_eq!(a.sigma, b.sigma);
        assert!((b.t - a.t - 1.0).abs() < 1e-3);
    }
    assert_ne!(values(&ours.noise), values(&old.noise));
    let rounded = values(&ours.noise.to_dtype(DType::BF16).unwrap());
    assert_eq!(values(&old.noise), rounded, "the old tool's noise is ours in the dtype of the cache");

    // In sigma mode the mixing share is rounded to the compute dtype, the timestep is not.
    let half = Exec::Reference { device: Device::Cpu, compute: DType::BF16 };
    let old = run(&half, "sigma", true);
    let share = |b: &Batch, i: usize| {
        // x = (1-s) l + s n, solved for s where noise and latent differ most.
        let (x, l, n) = (values(&b.inputs.x), values(&b.latents), values(&b.noise));
        let per = x.len() / 2;
        let at =
            (i * per..(i + 1) * per).max_by(|a, c| (n[*a] - l[*a]).abs().total_cmp(&(n[*c] - l[*c]).abs())).unwrap();
        (x[at] - l[at]) / (n[at] - l[at])
    };
    for i in 0..2 {
        let exact = old.timesteps[i].sigma;
        let bf16 = f32::from(half::bf16::from_f32(exact));
        assert_eq!(old.timesteps[i].t, exact * 1000.0);
        assert!((share(&old, i) - bf16).abs() < 1e-5, "{} {bf16} {exact}", share(&old, i));
    }
    let ours = run(&half, "sigma", false);
    assert!((0..2).all(|i| (share(&ours, i) - ours.timesteps[i].sigma).abs() < 1e-5));
}

#[test]
fn image_to_video_gets_its_first_frame_and_clip_features() {
    let arch = WanArch { in_dim: 36, clip: Some(ClipArch { dim: 10, tokens: 4, images: 1 }), ..arch() };
    let mut items = data(0, 2, 2);
    let run = |items: &Synthetic| assemble(&arch, Conditioning::FirstFrame, items, &Exec::cpu(), |_| {});
    let error = run(&items).err().unwrap().to_string();
    assert!(error.contains("item") && error.contains("first-frame") && error.contains("hint"), "{error}");
    for (i, item) in items.items.iter_mut().enumerate() {
        item.latents_image = Some(normal(100 + i as u32, &[20, 2, 4, 6], DType::BF16));
    }
    let error = run(&items).err().unwrap().to_string();
    assert!(error.contains("CLIP features"), "{error}");
    for (i, item) in items.items.iter_mut().enumerate() {
        item.clip = Some(normal(200 + i as u32, &[4, 10], DType::F16));
    }
    let batch = run(&items).unwrap();
    assert_eq!(batch.inputs.y.as_ref().unwrap().dims(), [2, 20, 2, 4, 6]);
    assert_eq!(batch.inputs.clip_fea.as_ref().unwrap().dims(), [2, 4, 10]);
    // Every sample has its own conditioning, in the order of the batch.
    for (at, item) in batch.items.iter().enumerate() {
        let y = batch.inputs.y.as_ref().unwrap().get(at).unwrap();
        assert_eq!(values(&y), values(items.items[*item].latents_image.as_ref().unwrap()));
    }
    items.items[0].clip = Some(normal(300, &[5, 10], DType::F16));
    items.items[1].clip = items.items[0].clip.clone();
    assert!(run(&items).err().unwrap().to_string().contains("5x10"));
}

#[test]
fn fun_control_gets_control_and_first_frame_latents() {
    let arch = WanArch { in_dim: 48, ..arch() };
    let mut items = data(0, 1, 1);
    items.items[0].control = Some(normal(50, &[16, 2, 4, 6], DType::BF16));
    items.items[0].latents_image = Some(normal(51, &[20, 2, 4, 6], DType::BF16));
    let y = |conditioning| {
        assemble(&arch, conditioning, &items, &Exec::cpu(), |_| {}).unwrap().inputs.y.unwrap().get(0).unwrap()
    };
    let control = values(items.items[0].control.as_ref().unwrap());
    let text = y(Conditioning::Control);
    assert_eq!(values(&text.narrow(0, 0, 16).unwrap()), control);
    assert!(values(&text.narrow(0, 16, 16).unwrap()).iter().all(|v| *v == 0.0));
    let image = y(Conditioning::ControlFirstFrame);
    assert_eq!(values(&image.narrow(0, 0, 16).unwrap()), control);
    // Where the model takes CLIP features and the text task has none, they are zeros; the old tool gives none.
    let with_clip = WanArch { clip: Some(ClipArch { dim: 10, tokens: 4, images: 1 }), ..arch.clone() };
    let clip = |compat: bool| {
        let run = |c: &mut RunConfig| c.musubi_compat = compat;
        assemble(&with_clip, Conditioning::Control, &items, &Exec::cpu(), run).unwrap().inputs.clip_fea
    };
    let zeros = clip(false).unwrap();
    assert!(zeros.dims() == [1, 4, 10] && values(&zeros).iter().all(|v| *v == 0.0));
    assert!(clip(true).is_none());
    let frames = image.narrow(0, 16, 16).unwrap();
    let want = items.items[0].latents_image.as_ref().unwrap().narrow(0, 4, 16).unwrap();
    assert_eq!(values(&frames.narrow(1, 0, 1).unwrap()), values(&want.narrow(1, 0, 1).unwrap()));
    assert!(values(&frames.narrow(1, 1, 1).unwrap()).iter().all(|v| *v == 0.0));
}

#[test]
fn a_clean_first_frame_has_timestep_zero_and_no_loss() {
    let arch = WanArch { per_token_time: true, ..arch() };
    let exec = Exec::cpu();
    let batch = assemble(&arch, Conditioning::CleanFirstFrame, &data(0, 2, 2), &exec, |_| {}).unwrap();
    assert!(batch.clean_first_frame);
    let first = |t: &Tensor| values(&t.narrow(2, 0, 1).unwrap());
    assert_eq!(first(&batch.inputs.x), first(&batch.latents));
    let rest = |t: &Tensor| values(&t.narrow(2, 1, 1).unwrap());
    assert_ne!(rest(&batch.inputs.x), rest(&batch.latents));
    let Timesteps::PerToken(t) = &batch.inputs.t else { panic!("one timestep a token") };
    // Two frames of 2x3 tokens.
    for (t, sample) in t.iter().zip(&batch.timesteps) {
        assert!(t[..6].iter().all(|t| *t == 0.0) && t[6..].iter().all(|t| *t == sample.t) && t.len() == 12);
    }
    let pred = normal(70, &[2, 16, 2, 4, 6], DType::F32);
    let out = loss::flow(&exec, &batch, &pred, 1.0).unwrap();
    assert!(first(&out.dpred).iter().all(|g| *g == 0.0) && rest(&out.dpred).iter().all(|g| *g != 0.0));
    let (p, l, n) = (rest(&pred), rest(&batch.latents), rest(&batch.noise));
    let want = (0..p.len()).map(|i| f64::from(p[i] - (n[i] - l[i])).powi(2)).sum::<f64>() / p.len() as f64;
    assert!((f64::from(out.mean) - want).abs() < 1e-5);
    // A picture has no other frame: it trains as text to image.
    let still = assemble(&arch, Conditioning::CleanFirstFrame, &data(2, 0, 2), &exec, |_| {}).unwrap();
    assert!(!still.clean_first_frame && matches!(still.inputs.t, Timesteps::PerSample(_)));
}

#[test]
fn loss_weights_scale_each_sample() {
    let exec = Exec::cpu();
    let run = |scheme: &str| {
        assemble(&arch(), Conditioning::None, &data(0, 2, 2), &exec, |c| c.weighting_scheme = scheme.into()).unwrap()
    };
    let (plain, weighted) = (run("none"), run("cosmap"));
    let pred = normal(70, &[2, 16, 2, 4, 6], DType::F32);
    let a = loss::flow(&exec, &plain, &pred, 1.0).unwrap();
    let b = loss::flow(&exec, &weighted, &pred, 0.5).unwrap();
    let per = a.dpred.elem_count() / 2;
    let (da, db) = (values(&a.dpred), values(&b.dpred));
    for i in 0..2 {
        let s = plain.timesteps[i].sigma;
        let w = 2.0 / (std::f32::consts::PI * (1.0 - 2.0 * s + 2.0 * s * s));
        assert!((b.per_sample[i] / a.per_sample[i] / w - 1.0).abs() < 1e-5);
        assert!((db[i * per] / da[i * per] / (0.5 * w) - 1.0).abs() < 1e-4);
    }
}

#[test]
fn latents_of_another_vae_and_unequal_sizes_are_refused() {
    let mut items = data(0, 2, 2);
    items.items[0].latents = normal(1, &[16, 2, 4, 8], DType::BF16);
    let error = format!("{:#}", assemble(&arch(), Conditioning::None, &items, &Exec::cpu(), |_| {}).err().unwrap());
    assert!(error.contains("different shapes") && error.contains("item0"), "{error}");
    let mut items = data(1, 0, 1);
    items.items[0].latents = normal(1, &[48, 1, 4, 4], DType::BF16);
    let error = assemble(&arch(), Conditioning::None, &items, &Exec::cpu(), |_| {}).err().unwrap().to_string();
    assert!(error.contains("48 channels") && error.contains("another VAE"), "{error}");
}

#[test]
fn one_frame_caches_tell_the_model_where_their_frames_stand() {
    let mut items = data(0, 2, 2);
    items.items.iter_mut().for_each(|i| i.positions = Some(vec![0, 5]));
    let run = |items: &_, compat: bool| {
        assemble(&arch(), Conditioning::None, items, &Exec::cpu(), |c| c.musubi_compat = compat)
    };
    assert_eq!(run(&items, false).unwrap().inputs.f_indices, Some(vec![0, 5]));
    assert_eq!(run(&items, true).unwrap().inputs.f_indices, None, "the old tool counts from 0");
    assert_eq!(run(&data(0, 2, 2), false).unwrap().inputs.f_indices, None);
    items.items[1].positions = Some(vec![0, 6]);
    let error = format!("{:#}", run(&items, false).map(drop).unwrap_err());
    assert!(error.contains("item0") && error.contains("item1") && error.contains("--recache"), "{error}");
}
