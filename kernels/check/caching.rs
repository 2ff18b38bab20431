//! What the VAE and the text encoder are made of.

use candle_core::Tensor;

use super::{Checker, HALVES};
use crate::conv3d::{frames, interleave, planes, prepare};
use crate::conv3d::{CausalConv3d, CausalConv3dArgs, ChannelNorm, ChannelNormArgs};
use crate::dense_attention::{DenseAttention, DenseAttentionArgs};
use crate::gelu::{GeluTanhGate, GeluTanhGateArgs};
use crate::Result;

pub(super) fn all(c: &mut Checker<'_>) -> Result<()> {
    convolutions(c, "causal_conv3d")?;
    norms(c)?;
    attention(c)
}

/// Channels, frames, rows, columns, output channels; the kernel; what came before.
struct Case {
    x: [usize; 5],
    o: usize,
    k: [usize; 3],
    past: usize,
    pad_front: usize,
    pad: (usize, usize),
    stride: [usize; 3],
    up: bool,
}

pub(super) fn convolutions(c: &mut Checker<'_>, op: &'static str) -> Result<()> {
    let same = |x, o, past| Case { x, o, k: [3; 3], past, pad_front: 2, pad: (1, 1), stride: [1; 3], up: false };
    let flat = |x, o| Case { k: [1, 3, 3], pad_front: 0, ..same(x, o, 0) };
    for case in [
        same([1, 96, 1, 17, 33], 96, 0),
        same([1, 96, 4, 16, 16], 192, 2),
        same([2, 6, 2, 9, 35], 12, 1),
        same([1, 3, 4, 21, 19], 96, 2),
        same([1, 16, 1, 5, 7], 384, 2),
        same([1, 64, 1, 1, 1], 3, 2),
        Case { pad: (0, 1), stride: [1, 2, 2], ..flat([1, 96, 2, 34, 50], 96) },
        Case { pad: (0, 1), stride: [1, 2, 2], ..flat([2, 6, 1, 10, 14], 6) },
        Case { up: true, ..flat([1, 64, 2, 9, 13], 32) },
        Case { k: [3, 1, 1], pad: (0, 0), pad_front: 1, stride: [2, 1, 1], ..same([1, 96, 4, 9, 17], 96, 1) },
        Case { k: [3, 1, 1], pad: (0, 0), ..same([1, 48, 1, 9, 17], 96, 2) },
        Case { k: [1; 3], pad: (0, 0), pad_front: 0, ..same([1, 96, 2, 7, 9], 192, 0) },
        Case { k: [1; 3], pad: (0, 0), pad_front: 0, ..same([1, 12, 2, 7, 9], 36, 0) },
    ] {
        let [b, ch, f, y, x] = case.x;
        let name = format!("{:?} to {} by {:?}, step {:?}", case.x, case.o, case.k, case.stride);
        c.run(op, &name, HALVES, &|p| {
            let taps = ch * case.k.iter().product::<usize>();
            let weight = (p.normal(1, &[case.o, ch, case.k[0], case.k[1], case.k[2]])? * (taps as f64).powf(-0.5))?;
            let weight = weight.to_dtype(p.rounded)?.to_dtype(p.held)?;
            let (bias, input) = (p.normal(2, &[case.o])?, p.normal(3, &[b, ch, f, y, x])?);
            let past = (0..case.past).map(|i| p.normal(4 + i as u64, &[b, ch, 1, y, x])).collect::<Result<Vec<_>>>()?;
            let args = CausalConv3dArgs {
                x: &input,
                weight: &prepare(&p.exec, &weight)?,
                bias: Some(&bias),
                past: &past,
                pad_front: case.pad_front,
                pad_y: case.pad,
                pad_x: case.pad,
                stride: case.stride,
                up: case.up,
                add: None,
            };
            let y = p.exec.run::<CausalConv3d>(&args)?;
            // Behind the first call input, past and addition lie channels-last.
            let add = p.exec.run::<CausalConv3d>(&CausalConv3dArgs { bias: None, ..args })?;
            let sum = p.exec.run::<CausalConv3d>(&CausalConv3dArgs { add: Some(&add), ..args })?;
            let moved = planes(&frames(&y, y.dim(2)? - 1, 1)?)?;
            Ok(vec![planes(&y)?, sum, moved])
        })?;
    }
    c.run("interleave", "[1, 64, 3, 5, 7]", HALVES, &|p| {
        let (x, gamma) = (p.normal(1, &[1, 64, 3, 5, 7])?, p.normal(2, &[64])?);
        let x = p.exec.run::<ChannelNorm>(&ChannelNormArgs { x: &x, gamma: &gamma, silu: false })?;
        Ok(vec![interleave(&x)?])
    })
}

fn norms(c: &mut Checker<'_>) -> Result<()> {
    for shape in [[1, 96, 2, 7, 11], [2, 6, 1, 5, 3], [1, 192, 1, 9, 4], [1, 384, 1, 3, 5], [1, 640, 1, 2, 3]] {
        c.run("channel_norm", &format!("{shape:?}"), HALVES, &|p| {
            let (x, gamma) = (p.normal(1, &shape)?, p.normal(2, &[shape[1]])?);
            let run = |x: &Tensor, silu| p.exec.run::<ChannelNorm>(&ChannelNormArgs { x, gamma: &gamma, silu });
            let once = run(&x, true)?;
            Ok(vec![run(&x, false)?, run(&once, true)?, once])
        })?;
    }
    Ok(())
}

fn attention(c: &mut Checker<'_>) -> Result<()> {
    for (b, l, m, n, h) in [(1, 97, 97, 1, 384), (2, 33, 33, 4, 16), (1, 130, 61, 3, 64), (1, 2, 1500, 2, 24)] {
        c.run("dense_attention", &format!("[{b}, {l}, {n}, {h}] x {m}"), HALVES, &|p| {
            let (q, kv) = (p.normal(1, &[b, l, n * h])?, p.normal(2, &[b, m, 2 * n * h])?);
            let bias = p.full(3, &[n, 2 * l.max(m) + 1])?;
            let (k, v) = (kv.narrow(2, 0, n * h)?, kv.narrow(2, n * h, n * h)?);
            let run = |bias_nr| {
                let (q_bld, k_bmd, v_bmd, scale) = (&q, &k, &v, (h as f64).powf(-0.5));
                let args = DenseAttentionArgs { q_bld, k_bmd, v_bmd, heads: n, scale, bias_nr, out: p.held };
                p.exec.run::<DenseAttention>(&args)
            };
            Ok(vec![run(None)?, run(Some(&bias))?])
        })?;
    }
    c.run("gelu_tanh_gate", "[3, 77]", HALVES, &|p| {
        let (gate, x) = (p.normal(1, &[3, 77])?, p.normal(2, &[3, 77])?);
        Ok(vec![p.exec.run::<GeluTanhGate>(&GeluTanhGateArgs { gate: &gate, x: &x })?])
    })
}
