//! What is computed before the first block: patches, timesteps, text, image features. All of it is frozen and nothing
//! upstream of it is trained, so there is no backward here.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use wan_kernels::gate_residual::{GateResidual, GateResidualArgs};
use wan_kernels::gelu::{ActivationArgs, GeluErf, GeluTanh, Silu};
use wan_kernels::norm::{LayerNorm, LayerNormArgs};
use wan_kernels::patchify::{Patchify, PatchifyArgs};
use wan_kernels::Exec;

use super::probe::Probe;
use super::{ImgEmbWeights, NormAffine, Timesteps, WanInputs, WanWeights};
use crate::arch::WanArch;
use crate::Result;

/// Epsilon of the two norms around the image projection (not the model's).
const IMG_EMB_EPS: f64 = 1e-5;

/// Latent and conditioning channels to tokens `[B, L, dim]` of the residual stream.
pub(super) fn patches(
    exec: &Exec,
    arch: &WanArch,
    w: &WanWeights,
    inputs: &WanInputs,
    stream: DType,
    probe: &mut Probe,
) -> Result<Tensor> {
    let x_bcfyx = match &inputs.y {
        Some(y) => Tensor::cat(&[&inputs.x.to_dtype(DType::F32)?, &y.to_dtype(DType::F32)?], 1)?,
        None => inputs.x.clone(),
    };
    let patches_bli = exec.run::<Patchify>(&PatchifyArgs { x_bcfyx: &x_bcfyx, patch: arch.patch })?;
    let x_bld = w.patch_embedding.forward(exec, &patches_bli, None, stream)?;
    if probe.is_on() {
        let (_, _, f, h, w) = x_bcfyx.dims5()?;
        let [gf, gh, gw] = arch.grid([f, h, w])?;
        let (b, _, d) = x_bld.dims3()?;
        probe.see("patch_embedding_conv", &x_bld.transpose(1, 2)?.reshape((b, d, gf, gh, gw))?)?;
    }
    Ok(x_bld)
}

/// The timestep as the blocks and the head use it. One row per distinct timestep: never expanded per token in memory.
pub(super) struct TimeEmbedding {
    /// `[u, dim]` fp32, for the head.
    e_ud: Tensor,
    /// `[6, u, dim]` fp32, for the blocks.
    e0_6ud: Tensor,
    /// As many ones.
    ones_6ud: Tensor,
    /// Which row each token takes, u32 `[b·l]`; without it, row b belongs to sample b.
    rows: Option<TokenRows>,
}

struct TokenRows {
    row_of_token: Tensor,
    b: usize,
    l: usize,
}

impl TimeEmbedding {
    /// `full` is the executor in fp32: this part is never rounded.
    pub fn new(full: &Exec, arch: &WanArch, w: &WanWeights, t: &Timesteps, probe: &mut Probe) -> Result<Self> {
        let (distinct, rows) = distinct_timesteps(t, full.device())?;
        let sin_uf = sinusoid(&distinct, arch.freq_dim, full.device())?;
        let silu = |x: &Tensor| full.run::<Silu>(&ActivationArgs { x });
        let hidden_ud = silu(&w.time_in.forward(full, &sin_uf, None, DType::F32)?)?;
        let e_ud = w.time_out.forward(full, &hidden_ud, None, DType::F32)?;
        let flat_u6d = w.time_projection.forward(full, &silu(&e_ud)?, None, DType::F32)?;
        let e0_6ud = flat_u6d.reshape((distinct.len(), 6, arch.dim))?.transpose(0, 1)?.contiguous()?;
        let ones_6ud = Tensor::from_vec(vec![1f32; e0_6ud.elem_count()], e0_6ud.shape(), full.device())?;
        let this = Self { e_ud, e0_6ud, ones_6ud, rows };
        if probe.is_on() {
            probe.see("sinusoidal_t", &this.of_first_token(&sin_uf)?)?;
            probe.see("time_embedding_e", &this.of_first_token(&this.e_ud)?)?;
            probe.see("time_projection_flat", &this.of_first_token(&flat_u6d)?)?;
        }
        Ok(this)
    }

    /// Learned offsets `[1, n, dim]` plus this timestep's, n = 6 for a block: `[n, u, dim]` fp32.
    pub fn modulation(&self, exec: &Exec, learned_1nd: &Tensor) -> Result<Modulation<'_>> {
        let learned_nd = learned_1nd.squeeze(0)?;
        let n = learned_nd.dim(0)?;
        let time_nud = match n {
            6 => self.e0_6ud.clone(),
            // The head has one vector of the timestep for both of its rows.
            _ => Tensor::stack(&vec![&self.e_ud; n], 0)?,
        };
        // A learned row is the same for all timesteps: time + learned · 1.
        let rows_nud = exec.run::<GateResidual>(&GateResidualArgs {
            x_bld: &time_nud,
            y_bld: &self.ones_6ud.narrow(0, 0, n)?,
            gate: &learned_nd,
            out: DType::F32,
        })?;
        Ok(Modulation { time: self, rows_nud })
    }

    /// Rows of `[u, d]` as samples or tokens see them: `[b, d]` or `[b, l, d]`.
    fn spread(&self, v_ud: &Tensor) -> Result<Tensor> {
        match &self.rows {
            None => Ok(v_ud.clone()),
            Some(TokenRows { row_of_token, b, l }) => {
                Ok(v_ud.index_select(row_of_token, 0)?.reshape((*b, *l, v_ud.dim(1)?))?)
            }
        }
    }

    /// The row of each sample's first token, `[b, d]`: what the reference shows.
    fn of_first_token(&self, v_ud: &Tensor) -> Result<Tensor> {
        match &self.rows {
            None => Ok(v_ud.clone()),
            Some(TokenRows { row_of_token, b, l }) => {
                let first_b = row_of_token.reshape((*b, *l))?.narrow(1, 0, 1)?.contiguous()?.flatten_all()?;
                Ok(v_ud.index_select(&first_b, 0)?)
            }
        }
    }
}

/// Shift, scale and gate vectors of one block (or shift and scale of the head).
pub(super) struct Modulation<'a> {
    time: &'a TimeEmbedding,
    rows_nud: Tensor,
}

impl Modulation<'_> {
    /// The i-th vector, `[b, d]`, or `[b, l, d]` where tokens have their own timesteps.
    pub fn get(&self, i: usize) -> Result<Tensor> {
        self.time.spread(&self.rows_nud.get(i)?)
    }

    /// All vectors of each sample's first token, `[b, n, d]`.
    pub fn of_first_token(&self) -> Result<Tensor> {
        let n = self.rows_nud.dim(0)?;
        let each: Result<Vec<_>> = (0..n).map(|i| self.time.of_first_token(&self.rows_nud.get(i)?)).collect();
        Ok(Tensor::stack(&each?, 1)?)
    }
}

/// Per token only few timesteps differ (0 for a clean frame, t for the rest): each is embedded once.
fn distinct_timesteps(t: &Timesteps, device: &Device) -> Result<(Vec<f32>, Option<TokenRows>)> {
    let samples = match t {
        Timesteps::PerSample(t) => return Ok((t.clone(), None)),
        Timesteps::PerToken(samples) => samples,
    };
    let mut row_of = HashMap::new();
    let mut distinct = Vec::new();
    let mut row_of_token = Vec::new();
    for &t in samples.iter().flatten() {
        let row = *row_of.entry(t.to_bits()).or_insert_with(|| {
            distinct.push(t);
            distinct.len() as u32 - 1
        });
        row_of_token.push(row);
    }
    let (b, l) = (samples.len(), samples.first().map_or(0, Vec::len));
    let row_of_token = Tensor::from_vec(row_of_token, b * l, device)?;
    Ok((distinct, Some(TokenRows { row_of_token, b, l })))
}

/// `[cos(t·f_k), sin(t·f_k)]`, f_k = 10000^(−k/half), in f64, stored in fp32: `[u, freq_dim]`.
fn sinusoid(t: &[f32], freq_dim: usize, device: &Device) -> Result<Tensor> {
    let half = freq_dim / 2;
    let mut rows = Vec::with_capacity(t.len() * freq_dim);
    for &t in t {
        let angle = |k: usize| f64::from(t) * 10_000f64.powf(-(k as f64) / half as f64);
        rows.extend((0..half).map(|k| angle(k).cos() as f32));
        rows.extend((0..half).map(|k| angle(k).sin() as f32));
    }
    Ok(Tensor::from_vec(rows, (t.len(), freq_dim), device)?)
}

/// Embedded prompts: `[B, m, dim]` in the compute dtype.
#[derive(Clone)]
pub(super) struct Text {
    pub rows_bmd: Tensor,
    /// How many rows the last one of every prompt stands for.
    pub last_stands_for: usize,
}

/// Prompts, padded with zero rows to `text_len` and only then embedded, so that padding is not zero in the model; it is
/// attended to like text. All rows of padding stay equal through every block, so with `fold` one stands for those behind
/// the longest prompt: the same sums, with a quarter of the keys for a prompt of usual length.
pub(super) fn text(
    exec: &Exec,
    arch: &WanArch,
    w: &WanWeights,
    context: &[Tensor],
    fold: bool,
    probe: &mut Probe,
) -> Result<Text> {
    let compute = exec.compute();
    let longest = context.iter().map(|sample_ld| sample_ld.dim(0)).try_fold(0, |most, l| l.map(|l| most.max(l)))?;
    let padded = if fold { arch.text_len.min(longest + 1) } else { arch.text_len };
    let last_stands_for = arch.text_len - padded + 1;
    let mut samples = Vec::with_capacity(context.len());
    for sample_ld in context {
        let sample_ld = sample_ld.to_device(exec.device())?.to_dtype(compute)?;
        let rows = sample_ld.dim(0)?;
        samples.push(sample_ld.pad_with_zeros(0, 0, padded - rows)?);
    }
    let padded_bmd = Tensor::stack(&samples, 0)?;
    let hidden_bmd = w.text_in.forward(exec, &padded_bmd, None, compute)?;
    let hidden_bmd = exec.run::<GeluTanh>(&ActivationArgs { x: &hidden_bmd })?;
    let rows_bmd = w.text_out.forward(exec, &hidden_bmd, None, compute)?;
    if probe.is_on() {
        let last = rows_bmd.narrow(1, padded - 1, 1)?;
        let all = [vec![rows_bmd.clone()], vec![last; last_stands_for - 1]].concat();
        probe.see("text_embedding", &Tensor::cat(&all, 1)?)?;
    }
    Ok(Text { rows_bmd, last_stands_for })
}

/// CLIP features `[B · images, tokens, clip_dim]` to `[B, images · tokens, dim]` in the compute dtype.
pub(super) fn image(
    exec: &Exec,
    w: &ImgEmbWeights,
    clip_fea: &Tensor,
    batch: usize,
    probe: &mut Probe,
) -> Result<Tensor> {
    let compute = exec.compute();
    let (all, tokens, width) = clip_fea.dims3()?;
    let mut x_bmd = clip_fea.to_dtype(DType::F32)?.reshape((batch, all / batch * tokens, width))?;
    if let Some(pos) = &w.emb_pos {
        x_bmd = x_bmd.broadcast_add(&pos.to_dtype(DType::F32)?)?;
    }
    let norm = |x: &Tensor, n: &NormAffine| {
        let args = LayerNormArgs { x, weight_d: &n.weight, bias_d: &n.bias, eps: IMG_EMB_EPS, out: compute };
        exec.run::<LayerNorm>(&args)
    };
    let x_bmd = w.fc_in.forward(exec, &norm(&x_bmd, &w.norm_in)?, None, compute)?;
    let x_bmd = exec.run::<GeluErf>(&ActivationArgs { x: &x_bmd })?;
    let image_bmd = norm(&w.fc_out.forward(exec, &x_bmd, None, compute)?, &w.norm_out)?;
    probe.see("img_emb", &image_bmd)?;
    Ok(image_bmd)
}
