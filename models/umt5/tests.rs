use std::collections::HashMap;

use candle_core::{DType, Device, IndexOp, Tensor};

use super::*;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/");

fn golden() -> (HashMap<String, Tensor>, HashMap<String, Tensor>) {
    let load = |name: &str| candle_core::safetensors::load(format!("{GOLDEN}{name}"), &Device::Cpu).unwrap();
    (load("06_umt5.weights.safetensors"), load("06_umt5.io.safetensors"))
}

fn worst(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.dims(), want.dims());
    (got.to_dtype(DType::F32).unwrap() - want)
        .unwrap()
        .abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .max(0)
        .unwrap()
        .to_scalar()
        .unwrap()
}

fn relative_l2(got: &Tensor, want: &Tensor) -> f64 {
    let sum = |t: &Tensor| f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
    (sum(&(got.to_dtype(DType::F32).unwrap() - want).unwrap()) / sum(want)).sqrt()
}

#[test]
fn golden_outputs_traces_and_contexts() {
    let (weights, io) = golden();
    let encoder = Umt5::new(Box::new(weights), Umt5Options::default()).unwrap();
    let mut seen = 0;
    let out = encoder
        .encode_traced(&io["ids"], &io["mask"], &mut |name, t| {
            if let Some(want) = io.get(&format!("trace_row0.{name}")) {
                let row0 = t.i(..1)?;
                let row0 = match name.ends_with("pos_bias") {
                    true => row0.i((.., .., ..want.dim(2)?, ..want.dim(3)?))?.contiguous()?,
                    false => row0,
                };
                assert!(worst(&row0, want) < 1e-4, "{name}: {}", worst(&row0, want));
                seen += 1;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(seen, 4);
    assert!(worst(&out, &io["output"]) < 1e-4);

    let ids = io["ids"].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
    let prompts: Vec<&[u32]> = (0..3).map(|b| &ids[b][..io[&format!("context.{b}")].dim(0).unwrap()]).collect();
    for (b, context) in encoder.contexts(&prompts).unwrap().iter().enumerate() {
        let diff = worst(context, &io[&format!("context.{b}")]);
        assert!(diff < 1e-4, "context.{b}: {diff}");
    }
}

#[test]
fn golden_buckets() {
    let (_, io) = golden();
    for (pos, bucket) in [("rel_pos", "rel_bucket"), ("rel_pos_far", "rel_bucket_far")] {
        let pos = io[pos].to_vec1::<i64>().unwrap();
        let want = io[bucket].to_vec1::<i64>().unwrap();
        let got: Vec<i64> = pos.iter().map(|p| i64::from(relative_bucket(*p, 32, 128))).collect();
        assert_eq!(got, want);
    }
}

#[test]
fn streaming_changes_nothing() {
    let (weights, _) = golden();
    let resident = Umt5::new(Box::new(weights.clone()), Umt5Options::default()).unwrap();
    let streamed =
        Umt5::new(Box::new(weights), Umt5Options { residence: Residence::Source, ..Default::default() }).unwrap();
    let prompts = [vec![5u32, 9, 200, 1], vec![1]];
    let (a, b) = (resident.contexts(&prompts).unwrap(), streamed.contexts(&prompts).unwrap());
    for (a, b) in a.iter().zip(&b) {
        assert_eq!(a.to_vec2::<f32>().unwrap(), b.to_vec2::<f32>().unwrap());
    }
}

#[test]
fn bf16_and_fp8_stay_near() {
    let (weights, io) = golden();
    let error = |compute, storage| {
        let options = Umt5Options { exec: Exec::cpu().with_compute(compute), storage, ..Default::default() };
        let out = Umt5::new(Box::new(weights.clone()), options).unwrap().encode(&io["ids"], &io["mask"]).unwrap();
        assert_eq!(out.dtype(), compute);
        relative_l2(&out, &io["output"])
    };
    // bf16 keeps 8 bits, e4m3 4: a few units of rounding each; the unscaled cast also rounds norms and tables.
    let bf16 = error(DType::BF16, Storage::AsStored);
    let fp8 = error(DType::F32, Storage::Fp8);
    let cast = error(DType::F32, Storage::Fp8Cast);
    assert!(bf16 > 1e-4 && bf16 < 2e-2, "bf16 {bf16}");
    assert!(fp8 > 1e-3 && fp8 < 6e-2, "fp8 {fp8}");
    assert!(cast > fp8 && cast < 0.15, "cast {cast}");
}

#[test]
fn sizes_come_from_shapes_and_contradictions_are_named() {
    let (weights, _) = golden();
    let config = Umt5Config::from_shapes(&weights).unwrap();
    assert_eq!((config.vocab, config.dim, config.dim_ffn, config.heads, config.layers), (512, 64, 128, 4, 2));

    let mut missing = weights.clone();
    missing.remove("blocks.1.ffn.fc2.weight");
    let error = Umt5Config::from_shapes(&missing).unwrap_err().to_string();
    assert!(error.contains("blocks.1.ffn.fc2.weight"), "{error}");

    let mut wrong = weights;
    wrong.insert("blocks.1.norm1.weight".into(), Tensor::ones(63, DType::F32, &Device::Cpu).unwrap());
    let error = Umt5Config::from_shapes(&wrong).unwrap_err().to_string();
    assert!(error.contains("[63]") && error.contains("[64]"), "{error}");
}

#[test]
fn bad_tokens_are_refused() {
    let (weights, _) = golden();
    let encoder = Umt5::new(Box::new(weights), Umt5Options::default()).unwrap();
    assert!(encoder.context(&[512]).unwrap_err().to_string().contains("512"));
    assert!(encoder.context(&[]).is_err());
}

#[test]
fn random_weights_make_a_working_encoder() {
    let config =
        Umt5Config { vocab: 300, dim: 32, dim_attn: 24, dim_ffn: 48, heads: 3, layers: 3, ..Umt5Config::xxl() };
    for shared_bias in [false, true] {
        let config = Umt5Config { shared_bias, ..config.clone() };
        let weights = random::weights(&config, 7, DType::BF16).unwrap();
        assert_eq!(Umt5Config::from_shapes(&weights).unwrap(), config);
        let again = random::weights(&config, 7, DType::BF16).unwrap();
        let other = random::weights(&config, 8, DType::BF16).unwrap();
        let flat = |w: &HashMap<String, Tensor>| {
            w["blocks.2.attn.q.weight"].to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(flat(&weights), flat(&again));
        assert_ne!(flat(&weights), flat(&other));
        let std = (flat(&weights).iter().map(|v| v * v).sum::<f32>() / (24.0 * 32.0)).sqrt() * 32f32.sqrt();
        assert!((std - 1.0).abs() < 0.15, "matrix std {std}");

        let encoder = Umt5::new(Box::new(weights), Umt5Options::default()).unwrap();
        let cat = encoder.context(&[20, 30, 1]).unwrap();
        let dog = encoder.context(&[20, 31, 1]).unwrap();
        assert_eq!(cat.dims(), &[3, 32]);
        // Attention carries the changed word to the other rows.
        assert!(worst(&cat.i(0).unwrap(), &dog.i(0).unwrap()) > 1e-3);
    }
}

/// The path of the cards, run in the definitions of its ops.
#[test]
fn packed_rows_give_the_same_numbers() {
    let (weights, io) = golden();
    let run = |exec: Exec, packed: bool, storage| {
        let options = Umt5Options { exec, storage, ..Default::default() };
        let mut encoder = Umt5::new(Box::new(weights.clone()), options).unwrap();
        encoder.packed = packed;
        let padded = encoder.encode(&io["ids"], &io["mask"]).unwrap().to_dtype(DType::F32).unwrap();
        (padded, encoder.contexts(&[vec![5u32, 9, 200, 1], vec![1], vec![7, 1]]).unwrap())
    };
    let (padded, contexts) = run(Exec::cpu(), true, Storage::AsStored);
    let (_, plain) = run(Exec::cpu(), false, Storage::AsStored);
    assert!(worst(&padded, &io["output"]) < 1e-4);
    for (got, want) in contexts.iter().zip(&plain) {
        assert_eq!(got.dims(), want.dims());
        assert!(worst(got, want) < 1e-4);
    }
    let (fp8_packed, _) = run(Exec::cpu(), true, Storage::Fp8);
    let (fp8, _) = run(Exec::cpu(), false, Storage::Fp8);
    assert!(worst(&fp8_packed, &fp8) < 1e-4);
    // With operands in bf16 and the stream in fp32 it is nearer to the definition than bf16 throughout.
    let bf16 = Exec::cpu().with_compute(DType::BF16);
    let near = relative_l2(&run(bf16.clone(), true, Storage::AsStored).0, &io["output"]);
    let naive = relative_l2(&run(bf16, false, Storage::AsStored).0, &io["output"]);
    assert!(near < naive && near > 1e-4, "{near} against {naive}");
}

#[test]
fn a_mask_with_holes_is_refused() {
    let mask = Tensor::new(&[[1u32, 1, 0], [1, 0, 1]], &Device::Cpu).unwrap();
    assert!(super::packed::Segment::padded(&mask).unwrap_err().to_string().contains("prompt 1"));
}
