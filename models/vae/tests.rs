use super::*;
use candle_core::Device;
use std::collections::HashMap;
use std::path::PathBuf;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");

type Tensors = HashMap<String, Tensor>;

fn tensors(name: &str) -> Tensors {
    candle_core::safetensors::load(PathBuf::from(GOLDEN).join(format!("{name}.safetensors")), &Device::Cpu).unwrap()
}

fn json(name: &str) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(PathBuf::from(GOLDEN).join(format!("{name}.json"))).unwrap()).unwrap()
}

/// Every VAE case of the reference numbers: file stem without extension.
fn golden_vaes() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(GOLDEN)
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().into_string().unwrap().strip_suffix(".json").map(str::to_owned))
        .filter(|n| n.starts_with("05_"))
        .collect();
    names.sort();
    assert!(names.len() >= 2);
    names
}

fn getter(weights: &Tensors) -> impl FnMut(&str) -> Result<Tensor> + '_ {
    |key| weights.get(key).cloned().ok_or_else(|| Error::MissingWeight { model: MODEL, key: key.to_owned() })
}

fn stats(name: &str) -> (Vec<f32>, Vec<f32>) {
    let j = json(name);
    let list = |k: &str| j[k].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    (list("latent_mean"), list("latent_std"))
}

fn golden_vae(name: &str, opts: VaeOptions) -> Vae {
    let (mean, std) = stats(name);
    let arch = VaeArch::from_official(&json(name)["config"], mean, std).unwrap();
    let weights = tensors(&format!("{name}.weights"));
    let mut get = getter(&weights);
    Vae::load(arch, &Exec::cpu(), opts, &mut get).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let d = values(got).iter().zip(values(want)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{what}: max abs {d:.2e}");
    assert!(d <= tolerance, "{what}: {d} > {tolerance}");
}

/// Root of the mean squared difference.
fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let (a, b) = (values(a), values(b));
    (a.iter().zip(&b).map(|(x, y)| (x - y).powi(2)).sum::<f32>() / a.len() as f32).sqrt()
}

fn clip(arch: &VaeArch, frames: usize, h: usize, w: usize, seed: u64) -> Tensor {
    let side = arch.spatial_stride();
    let v = random::seeded(seed, "clip", &[1, 3, frames, h * side, w * side], 0.0, 0.4).unwrap();
    v.clamp(-1.0, 1.0).unwrap()
}

/// A VAE small enough to run in milliseconds.
fn tiny(kind: VaeKind) -> VaeArch {
    let full = if kind == VaeKind::Wan21 { VaeArch::wan21() } else { VaeArch::wan22() };
    VaeArch { base_dim: 4, dec_dim: 4, z_dim: 3, latent_mean: vec![0.1; 3], latent_std: vec![2.0; 3], ..full }
}

fn tiny_vae(kind: VaeKind, opts: VaeOptions) -> Vae {
    let arch = tiny(kind);
    let weights: Tensors = random_vae(&arch, 7).unwrap().into_iter().collect();
    let mut get = getter(&weights);
    Vae::load(arch, &Exec::cpu(), opts, &mut get).unwrap()
}

const KINDS: [VaeKind; 2] = [VaeKind::Wan21, VaeKind::Wan22];

#[test]
fn golden_encode_decode_and_trace() {
    for name in golden_vaes() {
        let vae = golden_vae(&name, VaeOptions::default());
        let io = tensors(&format!("{name}.io"));
        let mut seen = 0;
        for case in json(&name)["cases"].as_array().unwrap() {
            let i = &case["idx"];
            if case["kind"] == "encode" {
                let video = vae.pixels(&io[&format!("enc{i}.video_u8")].unsqueeze(0).unwrap()).unwrap();
                let mut encoder = Encoder::new(&vae).unwrap();
                encoder.push(&video).unwrap();
                let got = encoder.finish().unwrap();
                assert_eq!(got.surplus_frames, 0);
                close(
                    &format!("{name} enc{i} mean"),
                    &got.mean.squeeze(0).unwrap(),
                    &io[&format!("enc{i}.mu_raw")],
                    1e-4,
                );
                close(&format!("{name} enc{i}"), &got.latent.squeeze(0).unwrap(), &io[&format!("enc{i}.latent")], 1e-4);
            } else {
                let latent = io[&format!("dec{i}.latent")].unsqueeze(0).unwrap();
                let got = vae.decode_unclamped(&latent).unwrap().squeeze(0).unwrap();
                close(&format!("{name} dec{i}"), &got, &io[&format!("dec{i}.video_unclamped")], 1e-4);
                let clamped = vae.decode(&latent).unwrap().squeeze(0).unwrap();
                assert_eq!(values(&clamped), values(&got.clamp(-1.0, 1.0).unwrap()));
            }
            seen += 1;
        }
        assert!(seen > 0);

        let frame = io["enc0.video_u8"].narrow(1, 0, 1).unwrap().unsqueeze(0).unwrap();
        let mut left: Vec<&String> = io.keys().filter(|k| k.starts_with("trace_enc0_frame0.")).collect();
        let mut encoder = Encoder::new(&vae).unwrap();
        let mut check = |stage: &str, t: &Tensor| {
            let key = format!("trace_enc0_frame0.{stage}");
            close(&format!("{name} {key}"), &t.squeeze(0)?, &io[&key], 1e-4);
            left.retain(|k| **k != key);
            Ok(())
        };
        encoder.push_traced(&vae.pixels(&frame).unwrap(), &mut check).unwrap();
        assert!(left.is_empty(), "{name}: stages never reached: {left:?}");
    }
}

#[test]
fn golden_latent_caches() {
    let j = json("13_cache");
    let io = tensors("13_latent_cache");
    let name = j["vae"].as_str().unwrap();
    let (exact, bf16) = (golden_vae(name, VaeOptions::default()), golden_vae(name, VaeOptions::compat(DType::BF16)));
    for case in j["latent_cases"].as_array().unwrap() {
        let (i, dtype) = (&case["case"], case["vae_dtype"].as_str().unwrap());
        let vae = if dtype == "float32" { &exact } else { &bf16 };
        let u8 = io[&format!("case{i}.frames_u8_fhwc")].permute((3, 0, 1, 2)).unwrap().unsqueeze(0).unwrap();
        let video = vae.pixels(&u8.contiguous().unwrap()).unwrap();
        for key in case["cache_keys"].as_array().unwrap() {
            let key = key.as_str().unwrap();
            let got = if key.starts_with("latents_image") {
                vae.first_frame_condition(&video.narrow(2, 0, 1).unwrap(), video.dim(2).unwrap()).unwrap()
            } else {
                vae.encode(&video).unwrap()
            };
            let want = &io[&format!("case{i}.{dtype}.{key}")];
            let got = got.squeeze(0).unwrap();
            assert_eq!(got.dtype(), want.dtype());
            if dtype == "float32" {
                close(&format!("case{i} {key}"), &got, want, 1e-4);
                continue;
            }
            // Roundings fall elsewhere when sums run in another order, so the two 16-bit answers differ; ours must be
            // as near to the exact latent as theirs (the twice rule).
            let exact = exact.encode(&exact.pixels(&u8.contiguous().unwrap()).unwrap()).unwrap().squeeze(0).unwrap();
            let (ours, theirs) = (distance(&got, &exact), distance(want, &exact));
            println!(
                "case{i} {key}: distance to fp32 {ours:.2e}, recorded {theirs:.2e}, between {:.2e}",
                distance(&got, want)
            );
            assert!(ours <= 2.0 * theirs);
        }
    }
}

#[test]
fn sizes_are_read_off_a_checkpoint() {
    for name in golden_vaes() {
        let weights = tensors(&format!("{name}.weights"));
        let (mean, std) = stats(&name);
        let shape = |key: &str| weights.get(key).map(|t| t.dims().to_vec());
        let inferred = VaeArch::infer(&shape).unwrap().with_latent_stats(mean.clone(), std.clone()).unwrap();
        assert_eq!(inferred, VaeArch::from_official(&json(&name)["config"], mean, std).unwrap());
    }
    for kind in KINDS {
        let arch =
            VaeArch { res_blocks: 1, dim_mult: vec![1, 2, 2], temporal_downsample: vec![true, false], ..tiny(kind) };
        let weights = random_vae(&arch, 1).unwrap();
        let shape = |key: &str| weights.get(key).map(|t| t.dims().to_vec());
        let stats = (arch.latent_mean.clone(), arch.latent_std.clone());
        assert_eq!(VaeArch::infer(&shape).unwrap().with_latent_stats(stats.0, stats.1).unwrap(), arch);
        // Without the decoder, as an encoder-only file has it.
        let shape = |key: &str| weights.get(key).filter(|_| !key.starts_with("decoder")).map(|t| t.dims().to_vec());
        assert_eq!(VaeArch::infer(&shape).unwrap().base_dim, 4);
    }
    let e = VaeArch::infer(&|_| None).unwrap_err().to_string();
    assert!(e.contains("encoder.conv1.weight"), "{e}");
}

#[test]
fn released_sizes_and_statistics() {
    let (a, b) = (VaeArch::wan21(), VaeArch::wan22());
    assert_eq!((a.base_dim, a.dec_dim, a.z_dim, a.spatial_stride(), a.temporal_stride()), (96, 96, 16, 8, 4));
    assert_eq!((b.base_dim, b.dec_dim, b.z_dim, b.spatial_stride(), b.temporal_stride()), (160, 256, 48, 16, 4));
    assert_eq!((a.latent_frames(21), a.pixel_frames(6), a.latent_frames(24), a.latent_frames(0)), (6, 21, 6, 0));
    for (name, arch) in [("05_vae21", a), ("05_vae22", b)] {
        // The recorded deviations went through their inverse in fp32.
        let (mean, std) = stats(name);
        assert_eq!(mean, arch.latent_mean);
        assert!(std.iter().zip(&arch.latent_std).all(|(a, b)| (a - b).abs() <= 1e-6 * b));
    }
}

#[test]
fn wrong_numbers_are_refused() {
    let refused = |a: VaeArch| a.validate().unwrap_err().to_string();
    assert!(refused(VaeArch { z_dim: 4, ..VaeArch::wan21() }).contains("latent_mean has 16 values, z_dim is 4"));
    assert!(refused(VaeArch { temporal_downsample: vec![true], ..VaeArch::wan21() }).contains("4 levels need 3"));
    assert!(refused(VaeArch { dim_mult: vec![1, 2, 4, 5], ..VaeArch::wan22() }).contains("decoder level 1"));
    assert!(refused(VaeArch { dec_dim: 3, dim_mult: vec![1, 2, 3, 3], ..VaeArch::wan21() }).contains("halves"));
    let e = VaeArch::from_toml("kind = \"2.1\"\nbase = 3").unwrap_err().to_string();
    assert!(e.contains("base"), "{e}");
}

#[test]
fn weights_of_another_size_and_missing_ones_are_named() {
    let arch = tiny(VaeKind::Wan21);
    let mut weights: Tensors = random_vae(&arch, 1).unwrap().into_iter().collect();
    let wide = VaeArch { base_dim: 6, ..arch.clone() };
    let e = Vae::load(wide, &Exec::cpu(), VaeOptions::default(), &mut getter(&weights)).err().unwrap().to_string();
    assert!(e.contains("encoder.conv1.weight has shape [4, 3, 3, 3, 3], expected [6, 3, 3, 3, 3]"), "{e}");
    weights.remove("decoder.conv1.bias");
    let e = Vae::load(arch.clone(), &Exec::cpu(), VaeOptions::default(), &mut getter(&weights)).err().unwrap();
    assert!(e.to_string().contains("decoder.conv1.bias"), "{e}");
    let vae = Vae::load(arch, &Exec::cpu(), VaeOptions::default().encoder_only(), &mut getter(&weights)).unwrap();
    assert!(vae.decode(&Tensor::zeros((1, 3, 1, 2, 2), DType::F32, &Device::Cpu).unwrap()).is_err());
}

#[test]
fn the_cut_of_a_clip_changes_no_bit() {
    for kind in KINDS {
        let by_one = tiny_vae(kind, VaeOptions::default());
        let by_chunk = tiny_vae(kind, VaeOptions { frames_per_step: 4, ..VaeOptions::default() });
        let by_three = tiny_vae(kind, VaeOptions { frames_per_step: 3, ..VaeOptions::default() });
        let video = clip(by_one.arch(), 9, 2, 3, 1);
        let whole = values(&by_one.encode(&video).unwrap());
        assert_eq!(whole, values(&by_chunk.encode(&video).unwrap()));
        assert_eq!(whole, values(&by_three.encode(&video).unwrap()));
        for pieces in [vec![1, 4, 4], vec![2, 1, 6], vec![1; 9]] {
            let mut encoder = Encoder::new(&by_one).unwrap();
            let mut at = 0;
            for n in pieces {
                encoder.push(&video.narrow(2, at, n).unwrap()).unwrap();
                at += n;
            }
            assert_eq!(whole, values(&encoder.finish().unwrap().latent));
        }
        let latent = by_one.encode(&video).unwrap();
        let pixels = values(&by_one.decode_unclamped(&latent).unwrap());
        assert_eq!(pixels, values(&by_chunk.decode_unclamped(&latent).unwrap()));
        let mut decoder = Decoder::new(&by_one).unwrap();
        let mut parts = decoder.push(&latent.narrow(2, 0, 2).unwrap()).unwrap();
        parts.extend(decoder.push(&latent.narrow(2, 2, 1).unwrap()).unwrap());
        assert_eq!(pixels, values(&Tensor::cat(&parts, 2).unwrap()));
    }
}

#[test]
fn nothing_looks_ahead_and_the_first_latent_frame_is_the_first_picture() {
    for kind in KINDS {
        let vae = tiny_vae(kind, VaeOptions::default());
        let video = clip(vae.arch(), 9, 2, 2, 2);
        let latent = vae.encode(&video).unwrap();
        let frames = |t: &Tensor, n| values(&t.narrow(2, 0, n).unwrap().contiguous().unwrap());
        let still = vae.encode(&video.narrow(2, 0, 1).unwrap()).unwrap();
        assert_eq!(values(&still), frames(&latent, 1));
        assert_eq!(values(&vae.encode(&video.narrow(2, 0, 5).unwrap()).unwrap()), frames(&latent, 2));
        let pixels = vae.decode_unclamped(&latent).unwrap();
        assert_eq!(pixels.dims(), video.dims());
        assert_eq!(values(&vae.decode_unclamped(&still).unwrap()), frames(&pixels, 1));
        // The frames do differ: causality is not constancy.
        assert_ne!(values(&latent.narrow(2, 0, 1).unwrap()), values(&latent.narrow(2, 1, 1).unwrap()));
    }
}

#[test]
fn a_batch_is_its_clips() {
    for kind in KINDS {
        let vae = tiny_vae(kind, VaeOptions::default());
        let (a, b) = (clip(vae.arch(), 5, 1, 2, 3), clip(vae.arch(), 5, 1, 2, 4));
        let both = vae.encode(&Tensor::cat(&[&a, &b], 0).unwrap()).unwrap();
        let each = Tensor::cat(&[vae.encode(&a).unwrap(), vae.encode(&b).unwrap()], 0).unwrap();
        close("encoded", &both, &each, 1e-6);
        let each = Tensor::cat(&[0, 1].map(|i| vae.decode(&both.narrow(0, i, 1).unwrap()).unwrap()), 0).unwrap();
        close("decoded", &vae.decode(&both).unwrap(), &each, 1e-6);
    }
}

#[test]
fn what_cannot_be_encoded_is_said() {
    let vae = tiny_vae(VaeKind::Wan21, VaeOptions::default());
    let zeros = |shape: [usize; 5]| Tensor::zeros(&shape[..], DType::F32, &Device::Cpu).unwrap();
    let refused = |shape| vae.encode(&zeros(shape)).unwrap_err().to_string();
    assert!(refused([1, 3, 1, 16, 20]).contains("20x16 pixels: both sides must be multiples of 8"));
    assert!(refused([1, 3, 0, 16, 16]).contains("no frames"));
    assert!(refused([1, 4, 1, 16, 16]).contains("[1, 4, 1, 16, 16]"));
    assert!(refused([1, 3, 7, 16, 16]).contains("7 frames are not 1 + a multiple of 4: the last 2 would be lost"));
    let mut encoder = Encoder::new(&vae).unwrap();
    encoder.push(&zeros([1, 3, 7, 16, 16])).unwrap();
    assert!(encoder.push(&zeros([1, 3, 1, 16, 24])).is_err());
    let encoded = encoder.finish().unwrap();
    assert_eq!((encoded.surplus_frames, encoded.latent.dim(2).unwrap()), (2, 2));
    assert!(vae.decode(&zeros([1, 4, 1, 2, 2])).unwrap_err().to_string().contains("[batch, 3, frames"));
    assert!(vae.decode(&zeros([1, 3, 0, 2, 2])).is_err());
    assert!(vae.condition(&zeros([1, 3, 1, 16, 16]), None, 6).is_err());
}

#[test]
fn random_weights_give_latents_one_can_train_on() {
    for kind in KINDS {
        for seed in [1, 2] {
            let full = if kind == VaeKind::Wan21 { VaeArch::wan21() } else { VaeArch::wan22() };
            let arch = VaeArch { base_dim: 8, dec_dim: 8, ..full };
            let weights: Tensors = random_vae(&arch, seed).unwrap().into_iter().collect();
            let vae = Vae::load(arch, &Exec::cpu(), VaeOptions::default(), &mut getter(&weights)).unwrap();
            let latent = vae.encode(&clip(vae.arch(), 5, 2, 2, seed)).unwrap();
            let v = values(&latent);
            let mean = v.iter().sum::<f32>() / v.len() as f32;
            let std = (v.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / v.len() as f32).sqrt();
            println!("{kind:?} seed {seed}: latent mean {mean:.3} std {std:.3}");
            assert!(mean.abs() < 0.3 && (0.4..2.0).contains(&std), "mean {mean}, std {std}");
            let pixels = values(&vae.decode_unclamped(&latent).unwrap());
            assert!(pixels.iter().all(|p| p.is_finite() && p.abs() < 20.0));
            // The same seed gives the same weights, another seed others.
            let again = random_vae(vae.arch(), seed).unwrap();
            assert!(again.iter().all(|(k, t)| values(t) == values(&weights[k])));
            assert_ne!(
                values(&random_vae(vae.arch(), seed + 9).unwrap()["conv2.weight"]),
                values(&weights["conv2.weight"])
            );
        }
    }
}

#[test]
fn sixteen_bit_stays_near_and_rounds_what_it_reads() {
    let exact = tiny_vae(VaeKind::Wan21, VaeOptions::default());
    let compat = tiny_vae(VaeKind::Wan21, VaeOptions::compat(DType::BF16));
    let plain = tiny_vae(VaeKind::Wan21, VaeOptions { compute: DType::BF16, ..VaeOptions::default() });
    let u8 = Tensor::arange(0u8, 192, &Device::Cpu).unwrap().reshape((1, 3, 1, 8, 8)).unwrap();
    let (full, rounded) = (exact.pixels(&u8).unwrap(), compat.pixels(&u8).unwrap());
    assert_eq!((full.dtype(), rounded.dtype()), (DType::F32, DType::BF16));
    assert_ne!(values(&full), values(&rounded));
    assert_eq!(values(&plain.pixels(&u8).unwrap()), values(&full));
    let a = exact.encode(&full).unwrap();
    let b = compat.encode(&rounded).unwrap();
    let c = plain.encode(&full).unwrap();
    assert_eq!((b.dtype(), c.dtype()), (DType::BF16, DType::F32));
    close("compat", &a, &b, 0.1);
    close("bf16", &a, &c, 0.1);
}

/// Not run by default: half a minute. Prints time and peak memory of encoding a 720p clip.
#[test]
#[ignore = "slow; run alone, with --ignored --nocapture"]
fn a_720p_clip_stays_under_its_memory_limit() {
    wan_kernels::heap::map_large_buffers();
    let dim = std::env::var("VAE_BASE_DIM").ok().and_then(|v| v.parse().ok()).unwrap_or(16);
    let arch = VaeArch { base_dim: dim, dec_dim: dim, ..VaeArch::wan21() };
    let weights: Tensors = random_vae(&arch, 1).unwrap().into_iter().collect();
    let opts = VaeOptions::default().encoder_only();
    let vae = Vae::load(arch, &Exec::cpu(), opts, &mut getter(&weights)).unwrap();
    let mut encoder = Encoder::new(&vae).unwrap();
    let start = std::time::Instant::now();
    let frame = Tensor::arange(0u32, 3 * 720 * 1280, &Device::Cpu).unwrap().reshape((1, 3, 1, 720, 1280)).unwrap();
    for i in 0..21u32 {
        let byte = (frame.affine(0.37, i as f64 * 3.1).unwrap().to_dtype(DType::F32).unwrap() / 255.0).unwrap();
        let byte = ((&byte - byte.floor().unwrap()).unwrap() * 255.0).unwrap().to_dtype(DType::U8).unwrap();
        encoder.push(&vae.pixels(&byte).unwrap()).unwrap();
    }
    let latent = encoder.finish().unwrap().latent;
    assert_eq!(latent.dims(), [1, 16, 6, 90, 160]);
    let seconds = start.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    let peak_kb: usize = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("base dim {dim}: 21 frames of 1280x720 in {seconds:.1} s, peak {} MB", peak_kb / 1000);
    assert!(peak_kb < 1_300_000, "{peak_kb} kB leave no room for the rest of the program under 1.5 GB");
}
