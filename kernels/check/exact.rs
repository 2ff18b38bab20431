//! Kernels that have to give the definition's bits, or sums of codes that are exact.

use candle_core::{DType, Device, Tensor};

use super::{distance, norms, values, Row};
use crate::gelu::{ActivationArgs, GeluTanh, GeluTanhBackward, GeluTanhBackwardArgs};
use crate::gpu::{Gpu, KernelsOf::*};
use crate::int8::{LinearInt8, LinearInt8Args, LinearInt8Backward, LinearInt8BackwardArgs};
use crate::linear::{eight, LinearEight, LinearEightArgs, LinearEightBackward, LinearEightBackwardArgs};
use crate::patchify::{Patchify, PatchifyArgs, Unpatchify, UnpatchifyArgs, UnpatchifyBackward, UnpatchifyBackwardArgs};
use crate::philox::{stream, Philox};
use crate::{fp8, int8, lora_delta, Exec, Result};

/// A row that is right only if every bit is.
pub(super) fn bits(op: &str, case: &str, got: &Tensor, want: &Tensor) -> Result<Row> {
    let (got, want) = (values(got)?, values(want)?);
    let same = got.len() == want.len() && got.iter().zip(&want).all(|(g, w)| g.to_bits() == w.to_bits());
    Ok(Row { op: op.into(), case: case.into(), error: distance(&got, &want), naive: 0.0, right: same })
}

/// What moves data or works on codes must give the reference's bits.
pub(super) fn all(gpu: &Gpu) -> Result<Vec<Row>> {
    let (cpu, card, mut rows) = (Exec::cpu(), gpu.device(), Vec::new());
    let exec = Exec::Cuda { gpu: gpu.clone(), device: gpu.device(), compute: DType::BF16 };
    let normal = |seed, shape: &[usize]| Philox::new(seed, stream::INIT, 0, 0).normal(shape, &Device::Cpu);
    for dtype in [DType::F32, DType::BF16] {
        let patch = [1, 2, 2];
        let x = normal(1, &[2, 16, 3, 6, 10])?.to_dtype(dtype)?;
        let on_card = x.to_device(&card)?;
        let run = |exec: &Exec, x: &Tensor| exec.run::<Patchify>(&PatchifyArgs { x_bcfyx: x, patch });
        let tokens = run(&cpu, &x)?;
        rows.push(bits("patchify", &format!("{dtype:?}"), &run(&exec, &on_card)?, &tokens)?);
        let run = |exec: &Exec, tokens: &Tensor| {
            exec.run::<Unpatchify>(&UnpatchifyArgs { tokens_bld: tokens, grid: [3, 3, 5], patch })
        };
        rows.push(bits(
            "unpatchify",
            &format!("{dtype:?}"),
            &run(&exec, &tokens.to_device(&card)?)?,
            &run(&cpu, &tokens)?,
        )?);
        let run =
            |exec: &Exec, x: &Tensor| exec.run::<UnpatchifyBackward>(&UnpatchifyBackwardArgs { dx_bcfyx: x, patch });
        rows.push(bits("unpatchify_backward", &format!("{dtype:?}"), &run(&exec, &on_card)?, &run(&cpu, &x)?)?);
    }
    for (granularity, shape) in [
        (fp8::Granularity::Block, [33, 128]),
        (fp8::Granularity::Channel, [7, 100]),
        (fp8::Granularity::Tensor, [5, 64]),
    ] {
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            let case = format!("{granularity:?} {dtype:?}");
            let w = (normal(3, &shape)? * 1e-2)?.to_dtype(dtype)?;
            let want = fp8::Weight::quantize(&w, granularity)?;
            let got = fp8::Weight::quantize(&w.to_device(&card)?, granularity)?;
            rows.push(bits("fp8_quantize codes", &case, got.codes_oi(), want.codes_oi())?);
            rows.push(bits("fp8_quantize scales", &case, got.scale(), want.scale())?);
            rows.push(bits("fp8_dequantize", &case, &got.dequantize()?, &want.dequantize()?)?);
        }
    }
    for [o, r, i] in [[1, 1, 1], [65, 42, 130], [300, 7, 97], [512, 64, 1536]] {
        let (up, down) = (normal(6, &[o, r])?, normal(7, &[r, i])?);
        let got = lora_delta::delta(&up.to_device(&card)?, &down.to_device(&card)?)?;
        rows.push(bits("lora_delta", &format!("[{o}, {r}] x [{r}, {i}]"), &got, &lora_delta::delta(&up, &down)?)?);
    }
    for n in [1, 5, 4097, 1 << 20] {
        let philox = Philox::new(0x1234_5678_9abc, stream::NOISE, 7, n as u32);
        let (got, want) = (philox.normal(&[n], &card)?, philox.normal(&[n], &Device::Cpu)?);
        rows.push(bits("philox", &n.to_string(), &got, &want)?);
    }
    offload(&exec, &mut rows)?;
    norms::one_pass(&exec, &mut rows)?;
    if gpu.card().capability >= (8, 9) {
        eight(gpu, &exec, &mut rows)?;
    }
    int8(gpu, &exec, &mut rows)?;
    Ok(rows)
}

/// int8 weights to the same bits, and products to the definition's with the same codes: sums are exact here and fp32
/// there. Where the library multiplies, the kernel that other cards run is checked as well.
fn int8(gpu: &Gpu, exec: &Exec, rows: &mut Vec<Row>) -> Result<()> {
    for (l, i, o) in [(1, 64, 64), (97, 192, 320), (1025, 5120, 1536), (33, 8960, 640), (300, 128, 13824)] {
        let normal = |seed, shape: &[usize], dtype| -> Result<Tensor> {
            Ok(Philox::new(seed, stream::INIT, 0, 0).normal(shape, &Device::Cpu)?.to_dtype(dtype)?)
        };
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let weight_oi = (normal(4, &[o, i], dtype)? * 0.02)?;
            let weight = int8::Weight::quantize(&weight_oi)?;
            let case = format!("[{l}, {i}] x [{o}, {i}], {dtype:?}");
            let on_card = int8::Weight::quantize(&weight_oi.to_device(exec.device())?)?;
            rows.push(bits("int8_quantize codes", &case, on_card.codes_oi(), weight.codes_oi())?);
            rows.push(bits("int8_quantize scales", &case, on_card.scales_2o(), weight.scales_2o())?);
            let (x, dy, bias) = (normal(1, &[l, i], dtype)?, normal(2, &[l, o], dtype)?, normal(3, &[o], dtype)?);
            let bases = [normal(5, &[l, o], dtype)?, normal(6, &[l, i], dtype)?];
            let run = |exec: &Exec, weight: &int8::Weight, out| -> Result<[Tensor; 4]> {
                let on = |t: &Tensor| t.to_device(exec.device());
                let (x, dy, bias) = (&on(&x)?, &on(&dy)?, &on(&bias)?);
                // A copy: the sum is written over it.
                let bases = [on(&bases[0].copy()?)?, on(&bases[1].copy()?)?].map(Some);
                let shared = int8::round(exec, x)?;
                let forward = |base: Option<Tensor>| {
                    let rounded = shared.as_ref().filter(|_| base.is_some());
                    exec.run::<LinearInt8>(&LinearInt8Args { x, rounded, weight, bias_o: Some(bias), base, out })
                };
                let backward = |base| exec.run::<LinearInt8Backward>(&LinearInt8BackwardArgs { dy, weight, base, out });
                let [base_o, base_i] = bases;
                Ok([forward(None)?, backward(None)?, forward(base_o)?, backward(base_i)?])
            };
            let want = run(&Exec::cpu(), &weight, DType::F32)?;
            for card in if gpu.hopper() { &[ThisCard, Sm86][..] } else { &[ThisCard] } {
                gpu.use_kernels_of(*card);
                let by_library = gpu.hopper();
                let got = run(exec, &on_card, dtype);
                gpu.use_kernels_of(ThisCard);
                let naive = match dtype {
                    DType::BF16 => 2e-3,
                    DType::F16 => 2.5e-4,
                    _ => 1e-6,
                };
                for (op, (got, want)) in INT8.iter().zip(got?.iter().zip(&want)) {
                    let error = distance(&values(got)?, &values(want)?);
                    let case = format!("{case}{}", if by_library { "" } else { ", mma.sync" });
                    rows.push(Row { op: op.to_string(), case, error, naive, right: error < 2.0 * naive });
                }
            }
        }
    }
    Ok(())
}

/// What is checked of each: without an addition, and with one and an input rounded beforehand.
const INT8: [&str; 4] = ["linear_int8", "linear_int8_backward", "linear_int8, onto", "linear_int8_backward, onto"];
const EIGHT: [&str; 4] = ["linear_eight", "linear_eight_backward", "linear_eight, onto", "linear_eight_backward, onto"];

/// 8-bit products against the definition, which rounds to the same codes: only sums and the last rounding differ. fp8
/// tensor cores keep 14 bits of a sum.
fn eight(gpu: &Gpu, exec: &Exec, rows: &mut Vec<Row>) -> Result<()> {
    for (l, i, o) in [(1, 64, 16), (97, 192, 80), (1025, 5120, 1536), (33, 8960, 640)] {
        let normal = |seed, shape: &[usize]| -> Result<Tensor> {
            let t = Philox::new(seed, stream::INIT, 0, 0).normal(shape, &Device::Cpu)?;
            Ok(t.to_dtype(DType::BF16)?)
        };
        for granularity in [fp8::Granularity::Block, fp8::Granularity::Channel, fp8::Granularity::Tensor] {
            let (x, dy, bias) = (normal(1, &[l, i])?, normal(2, &[l, o])?, normal(3, &[o])?);
            let weight = fp8::Weight::quantize(&(normal(4, &[o, i])? * 0.02)?, granularity)?;
            let bases = [normal(5, &[l, o])?, normal(6, &[l, i])?];
            let run = |exec: &Exec, out| -> Result<[Tensor; 4]> {
                let on = |t: &Tensor| t.to_device(exec.device());
                let weight = &eight::by_rows(&weight.to_device(exec.device())?)?;
                let (x, dy, bias) = (&on(&x)?, &on(&dy)?, &on(&bias)?);
                // A copy: the sum is written over it.
                let bases = [on(&bases[0].copy()?)?, on(&bases[1].copy()?)?].map(Some);
                let shared = eight::round(exec, x)?;
                let forward = |base: Option<Tensor>| {
                    let rounded = shared.as_ref().filter(|_| base.is_some());
                    exec.run::<LinearEight>(&LinearEightArgs { x, rounded, weight, bias_o: Some(bias), base, out })
                };
                let backward = |base| {
                    exec.run::<LinearEightBackward>(&LinearEightBackwardArgs { dy, rounded: None, weight, base, out })
                };
                let [base_o, base_i] = bases;
                Ok([forward(None)?, backward(None)?, forward(base_o)?, backward(base_i)?])
            };
            let want = run(&Exec::cpu(), DType::F32)?;
            // As the library scales, and as our kernel does behind it, on cards where it cannot.
            for later in [false, true] {
                gpu.use_kernels_of(if later { Sm86 } else { ThisCard });
                let got = run(exec, DType::BF16);
                gpu.use_kernels_of(ThisCard);
                let case =
                    format!("[{l}, {i}] x [{o}, {i}], {granularity:?}{}", if later { ", scaled later" } else { "" });
                for (op, (got, want)) in EIGHT.iter().zip(got?.iter().zip(&want)) {
                    let (error, case) = (distance(&values(got)?, &values(want)?), case.clone());
                    rows.push(Row { op: op.to_string(), case, error, naive: 2e-3, right: error < 4e-3 });
                }
            }
            let weight = &eight::by_rows(&weight.to_device(exec.device())?)?;
            gelu_rounded(exec, [&normal(7, &[l, i])?, &normal(8, &[l, o])?, &dy], weight, rows)?;
        }
    }
    Ok(())
}

/// Activations that come with their rounded rows: the bits of one after the other.
fn gelu_rounded(exec: &Exec, inputs: [&Tensor; 3], weight: &fp8::Weight, rows: &mut Vec<Row>) -> Result<()> {
    let [wide, x, dy] = inputs;
    let (wide, x, dy) = (&wide.to_device(exec.device())?, &x.to_device(exec.device())?, &dy.to_device(exec.device())?);
    let case = format!("{:?}", weight.shape());
    let both = [
        (exec.run::<GeluTanh>(&ActivationArgs { x: wide })?, eight::gelu(exec, wide)?, None),
        (
            exec.run::<GeluTanhBackward>(&GeluTanhBackwardArgs { x, dy })?,
            eight::gelu_backward(exec, x, dy, weight)?,
            Some(weight),
        ),
    ];
    for (op, (want, got, weight)) in ["linear_eight after gelu", "linear_eight_backward after gelu"].iter().zip(both) {
        let rounded = eight::round_for(exec, &want, weight)?;
        let Some(((got, got_rounded), rounded)) = got.zip(rounded) else { continue };
        rows.push(bits(op, &case, &got, &want)?);
        rows.push(bits(&format!("{op}, codes"), &case, &got_rounded.codes, &rounded.codes)?);
        rows.push(bits(&format!("{op}, scales"), &case, &got_rounded.scales, &rounded.scales)?);
    }
    Ok(())
}

/// Tensors through host memory and back, several at a time, in the order of backward; twice, so that slabs are reused.
fn offload(exec: &Exec, rows: &mut Vec<Row>) -> Result<()> {
    for round in 0..2 {
        let mut waiting = Vec::new();
        for index in 0..5usize {
            let shapes = [vec![1000 * (index + 1), 33], vec![1], vec![7, 5, 3]];
            let make = |(part, shape): (usize, &Vec<usize>)| {
                let philox = Philox::new(11, round, index as u32, part as u32);
                let dtype = [DType::F32, DType::BF16, DType::F16][part];
                Ok(philox.normal(shape, &Device::Cpu)?.to_dtype(dtype)?)
            };
            let want = shapes.iter().enumerate().map(make).collect::<Result<Vec<_>>>()?;
            let sent = want.iter().map(|t| Ok(t.to_device(exec.device())?)).collect::<Result<Vec<_>>>()?;
            waiting.push((want, exec.offload(sent)?));
            if index == 3 {
                exec.settle_offloads()?;
            }
        }
        while let Some((want, away)) = waiting.pop() {
            if let Some((_, next)) = waiting.last_mut() {
                next.prefetch()?;
            }
            for (got, want) in away.restore()?.iter().zip(&want) {
                rows.push(bits("offload", &format!("{:?} {:?}", want.dims(), want.dtype()), got, want)?);
            }
        }
    }
    Ok(())
}
