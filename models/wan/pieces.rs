//! The pieces of a block, each forward with its backward, with dtypes and rounding settled here: products and
//! attention in the compute dtype, the residual stream in its own.

use candle_core::{DType, Tensor};
use wan_kernels::attention::{Attention, AttentionArgs, AttentionBackward, AttentionBackwardArgs, AttentionGrads};
use wan_kernels::fast_attention::{self, FastAttention};
use wan_kernels::gate_residual::{
    GateResidual, GateResidualArgs, GateResidualBackward, GateResidualBackwardArgs, Residual, ResidualArgs,
};
use wan_kernels::norm::{
    After, LayerNorm, LayerNormArgs, LayerNormModulate, LayerNormModulateArgs, LayerNormModulateBackward,
    LayerNormModulateBackwardArgs, Normed, NormedGrads, ResidualNorm, ResidualNormArgs, ResidualNormBackward,
    ResidualNormBackwardArgs, RmsNorm, RmsNormArgs, RmsNormBackward, RmsNormBackwardArgs, RmsNormRope, RmsNormRopeArgs,
    RmsNormRopeBackward, RmsNormRopeBackwardArgs,
};
use wan_kernels::Exec;

use super::block::Block;
use super::embed::Modulation;
use super::saved::{AttnOut, KeyValue};
use super::{BlockWeights, GradSink, Numerics};
use crate::adapter::Active;
use crate::linear::{Frozen, LinearOut, Site};
use crate::Result;

/// `LayerNorm(x)·(1 + scale) + shift` in `out`; `shift` and `scale` `[b, d]` or `[b, l, d]`. The old tool rounds the
/// norm's output in between; the backward is the same for both: rounding passes the gradient through.
pub(super) fn norm_modulate(
    exec: &Exec,
    numerics: &Numerics,
    x_bld: &Tensor,
    [shift, scale]: [&Tensor; 2],
    eps: f64,
    out: DType,
) -> Result<Tensor> {
    if !numerics.round_norms || exec.compute() == DType::F32 {
        return Ok(exec.run::<LayerNormModulate>(&LayerNormModulateArgs { x_bld, shift, scale, eps, out })?);
    }
    let rounded_bld = norm_only(exec, x_bld, shift, eps, exec.compute())?.to_dtype(DType::F32)?;
    let over_tokens = |v: &Tensor| if v.rank() == 2 { v.unsqueeze(1) } else { Ok(v.clone()) };
    let scaled_bld = rounded_bld.broadcast_mul(&(over_tokens(scale)? + 1.0)?)?;
    Ok(scaled_bld.broadcast_add(&over_tokens(shift)?)?.to_dtype(out)?)
}

/// `LayerNorm(x)` alone; `like` gives the shape of a modulation vector.
pub(super) fn norm_only(exec: &Exec, x_bld: &Tensor, like: &Tensor, eps: f64, out: DType) -> Result<Tensor> {
    let zero = like.zeros_like()?;
    Ok(exec.run::<LayerNormModulate>(&LayerNormModulateArgs { x_bld, shift: &zero, scale: &zero, eps, out })?)
}

/// Linears.
impl<'a> Block<'a> {
    /// The linear `name` of this block with its adapter, for an input like `x`.
    pub(super) fn site<'b>(&'b self, name: &str, frozen: &'b Frozen, x_bli: &Tensor) -> Result<Site<'b>> {
        let name = format!("blocks.{}.{name}", self.index);
        Ok(Site { exec: self.exec, frozen, adapter: Active::find(self.adapters, &name, x_bli)? })
    }

    pub(super) fn linear(&self, name: &str, frozen: &Frozen, x_bli: &Tensor) -> Result<LinearOut> {
        self.site(name, frozen, x_bli)?.forward(x_bli)
    }

    /// `dx`; the adapter's gradients go to the sink.
    pub(super) fn linear_backward(
        &self,
        name: &str,
        frozen: &Frozen,
        x_bli: &Tensor,
        h: Option<&Tensor>,
        dy_blo: &Tensor,
        sink: &mut dyn GradSink,
    ) -> Result<Tensor> {
        self.site(name, frozen, x_bli)?.backward(x_bli, h, dy_blo, None, sink)
    }
}

/// Norms and the residual stream.
impl Block<'_> {
    /// Dtype of the residual stream.
    fn stream(&self) -> DType {
        self.numerics.residual.dtype(self.exec.compute())
    }

    /// `LayerNorm(x)·(1 + scale) + shift`, in the compute dtype.
    pub(super) fn modulated(&self, x_bld: &Tensor, mods: &Modulation, shift: usize, scale: usize) -> Result<Tensor> {
        let vectors = [&mods.get(shift)?, &mods.get(scale)?];
        norm_modulate(self.exec, self.numerics, x_bld, vectors, self.arch.eps, self.exec.compute())
    }

    /// The norm's `dx` plus the gradient that reaches `x` by the stream.
    pub(super) fn modulated_backward(
        &self,
        x_bld: &Tensor,
        mods: &Modulation,
        scale: usize,
        dy_bld: &Tensor,
        dstream_bld: &Tensor,
    ) -> Result<Tensor> {
        Ok(self.exec.run::<LayerNormModulateBackward>(&LayerNormModulateBackwardArgs {
            x_bld,
            scale: &mods.get(scale)?,
            dy_bld,
            dres_bld: Some(dstream_bld),
            eps: self.arch.eps,
            out: self.stream(),
        })?)
    }

    /// The affine norm before cross-attention, in the compute dtype.
    pub(super) fn norm3(&self, w: &BlockWeights, x: &Tensor) -> Result<Tensor> {
        let (weight_d, bias_d) = (&w.norm3.weight, &w.norm3.bias);
        let args = LayerNormArgs { x, weight_d, bias_d, eps: self.arch.eps, out: self.exec.compute() };
        Ok(self.exec.run::<LayerNorm>(&args)?)
    }

    /// `x + gate·y`, in the stream's dtype, and [`Block::norm3`] of that.
    pub(super) fn gated_norm3(
        &self,
        w: &BlockWeights,
        x_bld: &Tensor,
        y_bld: &Tensor,
        gate: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let after = After::Affine { weight_d: &w.norm3.weight, bias_d: &w.norm3.bias };
        self.residual_norm(x_bld, y_bld, Some(gate), after)
    }

    /// Gradients of `x` and `y`, from that of the norm and the one that reaches the sum `x1` by the stream.
    pub(super) fn gated_norm3_backward(
        &self,
        w: &BlockWeights,
        x1_bld: &Tensor,
        gate: &Tensor,
        dy_bld: &Tensor,
        dstream_bld: &Tensor,
    ) -> Result<NormedGrads> {
        let after = After::Affine { weight_d: &w.norm3.weight, bias_d: &w.norm3.bias };
        self.residual_norm_backward(x1_bld, Some(gate), after, dy_bld, dstream_bld)
    }

    /// `x + y`, in the stream's dtype, and [`Block::modulated`] of that.
    pub(super) fn added_modulated(
        &self,
        x_bld: &Tensor,
        y_bld: &Tensor,
        mods: &Modulation,
        shift: usize,
        scale: usize,
    ) -> Result<(Tensor, Tensor)> {
        if self.numerics.round_norms {
            let sum_bld = self.added(x_bld, y_bld)?;
            let h_bld = self.modulated(&sum_bld, mods, shift, scale)?;
            return Ok((sum_bld, h_bld));
        }
        let after = After::Modulation { shift: &mods.get(shift)?, scale: &mods.get(scale)? };
        self.residual_norm(x_bld, y_bld, None, after)
    }

    /// Gradients of `x` and `y`, from that of the norm and the one that reaches the sum `x2` by the stream.
    pub(super) fn added_modulated_backward(
        &self,
        x2_bld: &Tensor,
        mods: &Modulation,
        [shift, scale]: [usize; 2],
        dy_bld: &Tensor,
        dstream_bld: &Tensor,
    ) -> Result<NormedGrads> {
        let after = After::Modulation { shift: &mods.get(shift)?, scale: &mods.get(scale)? };
        self.residual_norm_backward(x2_bld, None, after, dy_bld, dstream_bld)
    }

    fn residual_norm(
        &self,
        x_bld: &Tensor,
        branch_bld: &Tensor,
        gate: Option<&Tensor>,
        after: After<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let (stream, out) = (self.stream(), self.exec.compute());
        let args = ResidualNormArgs { x_bld, branch_bld, gate, after, eps: self.arch.eps, stream, out };
        let Normed { sum_bld, y_bld } = self.exec.run::<ResidualNorm>(&args)?;
        Ok((sum_bld, y_bld))
    }

    fn residual_norm_backward(
        &self,
        sum_bld: &Tensor,
        gate: Option<&Tensor>,
        after: After<'_>,
        dy_bld: &Tensor,
        dsum_bld: &Tensor,
    ) -> Result<NormedGrads> {
        let (eps, stream, out) = (self.arch.eps, self.stream(), self.exec.compute());
        let args = ResidualNormBackwardArgs { sum_bld, gate, after, dy_bld, dsum_bld, eps, stream, out };
        Ok(self.exec.run::<ResidualNormBackward>(&args)?)
    }

    /// `x + gate·y`, in the stream's dtype.
    pub(super) fn gated(&self, x_bld: &Tensor, y_bld: &Tensor, gate: &Tensor) -> Result<Tensor> {
        Ok(self.exec.run::<GateResidual>(&GateResidualArgs { x_bld, y_bld, gate, out: self.stream() })?)
    }

    /// `dy = gate·dout`, in the compute dtype.
    pub(super) fn gate_backward(&self, dout_bld: &Tensor, gate: &Tensor) -> Result<Tensor> {
        let args = GateResidualBackwardArgs { dout_bld, gate, out: self.exec.compute() };
        Ok(self.exec.run::<GateResidualBackward>(&args)?)
    }

    /// `x + y`, in the stream's dtype.
    pub(super) fn added(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(self.exec.run::<Residual>(&ResidualArgs { x, y, out: self.stream() })?)
    }

    /// RMSNorm over the full width, before heads are split.
    pub(super) fn rms(&self, x: &Tensor, weight_d: &Tensor) -> Result<Tensor> {
        let args = RmsNormArgs { x, weight_d, eps: self.arch.eps, out: self.exec.compute() };
        Ok(self.exec.run::<RmsNorm>(&args)?)
    }

    pub(super) fn rms_backward(&self, x: &Tensor, weight_d: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let args = RmsNormBackwardArgs { x, weight_d, dy, eps: self.arch.eps, out: self.exec.compute() };
        Ok(self.exec.run::<RmsNormBackward>(&args)?)
    }

    /// RMSNorm, then rotation by position: `[b, l, d]` to `[b, l, n, h]`.
    pub(super) fn rope(&self, x_bld: &Tensor, weight_d: &Tensor) -> Result<Tensor> {
        Ok(self.exec.run::<RmsNormRope>(&RmsNormRopeArgs {
            x_bld,
            weight_d,
            cos_lk: &self.cx.cos_lk,
            sin_lk: &self.cx.sin_lk,
            eps: self.arch.eps,
            out: self.exec.compute(),
        })?)
    }

    pub(super) fn rope_backward(&self, x_bld: &Tensor, weight_d: &Tensor, dy_blnh: &Tensor) -> Result<Tensor> {
        Ok(self.exec.run::<RmsNormRopeBackward>(&RmsNormRopeBackwardArgs {
            x_bld,
            weight_d,
            cos_lk: &self.cx.cos_lk,
            sin_lk: &self.cx.sin_lk,
            dy_blnh,
            eps: self.arch.eps,
            out: self.exec.compute(),
        })?)
    }
}

/// Attention.
impl Block<'_> {
    /// `[b, l, d]` to `[b, l, n, h]`.
    pub(super) fn heads(&self, x_bld: &Tensor) -> Result<Tensor> {
        let (b, l, _) = x_bld.dims3()?;
        Ok(x_bld.reshape((b, l, self.arch.num_heads, self.arch.head_dim()))?)
    }

    /// `[b, l, n, h]` to `[b, l, d]` in the compute dtype.
    pub(super) fn tokens(&self, x_blnh: &Tensor) -> Result<Tensor> {
        Ok(x_blnh.flatten_from(2)?.to_dtype(self.exec.compute())?)
    }

    /// To the dtype attention reads and writes, where it is not the compute dtype.
    fn rounded(&self, t: &Tensor) -> Result<Tensor> {
        Ok(t.to_dtype(self.numerics.attention.unwrap_or(self.exec.compute()))?)
    }

    /// `last_stands_for`: how many equal keys and values the last one is.
    pub(super) fn attend(&self, [q_blnh, k_bmnh, v_bmnh]: [&Tensor; 3], last_stands_for: usize) -> Result<AttnOut> {
        let (q, k, v) = (self.rounded(q_blnh)?, self.rounded(k_bmnh)?, self.rounded(v_bmnh)?);
        let args = AttentionArgs { q_blnh: &q, k_bmnh: &k, v_bmnh: &v, last_stands_for };
        let out = self.exec.run::<Attention>(&args)?;
        Ok(AttnOut { o_blnh: out.o_blnh, lse_bnl: out.lse_bnl })
    }

    /// The same among a model's own tokens, in 8 bits where that is wanted and pays.
    pub(super) fn attend_to_tokens(&self, qkv_blnh: [&Tensor; 3]) -> Result<AttnOut> {
        if !self.numerics.fast_attention || !fast_attention::pays(self.exec, qkv_blnh[0].dim(1)?) {
            return self.attend(qkv_blnh, 1);
        }
        let [q, k, v] = qkv_blnh.map(|t_blnh| self.rounded(t_blnh));
        let args = AttentionArgs { q_blnh: &q?, k_bmnh: &k?, v_bmnh: &v?, last_stands_for: 1 };
        let out = self.exec.run::<FastAttention>(&args)?;
        Ok(AttnOut { o_blnh: out.o_blnh, lse_bnl: out.lse_bnl })
    }

    /// `dq`, `dk`, `dv` in the compute dtype.
    pub(super) fn attend_backward(
        &self,
        [q_blnh, k_bmnh, v_bmnh]: [&Tensor; 3],
        last_stands_for: usize,
        saved: &AttnOut,
        do_blnh: &Tensor,
    ) -> Result<AttentionGrads> {
        let (q, k, v) = (self.rounded(q_blnh)?, self.rounded(k_bmnh)?, self.rounded(v_bmnh)?);
        let grads = self.exec.run::<AttentionBackward>(&AttentionBackwardArgs {
            q_blnh: &q,
            k_bmnh: &k,
            v_bmnh: &v,
            o_blnh: &saved.o_blnh,
            lse_bnl: &saved.lse_bnl,
            do_blnh: &self.rounded(do_blnh)?,
            last_stands_for,
        })?;
        let compute = self.exec.compute();
        Ok(AttentionGrads {
            dq_blnh: grads.dq_blnh.to_dtype(compute)?,
            dk_bmnh: grads.dk_bmnh.to_dtype(compute)?,
            dv_bmnh: grads.dv_bmnh.to_dtype(compute)?,
        })
    }

    /// Keys and values of context rows, and attention of `q` over them.
    pub(super) fn key_value(
        &self,
        w: &ContextWeights,
        q_blnh: &Tensor,
        rows_bmd: &Tensor,
        last_stands_for: usize,
    ) -> Result<KeyValue> {
        let k = self.linear(w.k_name, w.k, rows_bmd)?;
        let v = self.linear(w.v_name, w.v, rows_bmd)?;
        let k_bmnh = self.heads(&self.rms(&k.y, w.norm_k)?)?;
        let attn = self.attend([q_blnh, &k_bmnh, &self.heads(&v.y)?], last_stands_for)?;
        Ok(KeyValue { k, v, attn })
    }

    /// `dq`; the adapters of keys and values hand their gradients to the sink. The context itself gets none.
    pub(super) fn key_value_backward(
        &self,
        w: &ContextWeights,
        saved: KeyValue,
        q_blnh: &Tensor,
        (rows_bmd, last_stands_for): (&Tensor, usize),
        do_blnh: &Tensor,
        sink: &mut dyn GradSink,
    ) -> Result<Tensor> {
        let KeyValue { k, v, attn } = saved;
        let k_bmnh = self.heads(&self.rms(&k.y, w.norm_k)?)?;
        let d = self.attend_backward([q_blnh, &k_bmnh, &self.heads(&v.y)?], last_stands_for, &attn, do_blnh)?;
        let dv_bmd = d.dv_bmnh.flatten_from(2)?;
        self.site(w.v_name, w.v, rows_bmd)?.backward_params(rows_bmd, v.h.as_ref(), &dv_bmd, sink)?;
        let dk_bmd = self.rms_backward(&k.y, w.norm_k, &d.dk_bmnh.flatten_from(2)?)?;
        self.site(w.k_name, w.k, rows_bmd)?.backward_params(rows_bmd, k.h.as_ref(), &dk_bmd, sink)?;
        Ok(d.dq_blnh)
    }

    /// What enters the output linear of cross-attention: attention over the text, plus that over the image.
    pub(super) fn cross_sum(&self, text: &KeyValue, image: Option<&KeyValue>) -> Result<Tensor> {
        let text_bld = self.tokens(&text.attn.o_blnh)?;
        match image {
            Some(image) => crate::linear::add(self.exec, &text_bld, &self.tokens(&image.attn.o_blnh)?),
            None => Ok(text_bld),
        }
    }
}

/// The weights through which one kind of context enters a block.
pub(super) struct ContextWeights<'a> {
    pub k_name: &'static str,
    pub v_name: &'static str,
    pub k: &'a Frozen,
    pub v: &'a Frozen,
    pub norm_k: &'a Tensor,
}

impl<'a> ContextWeights<'a> {
    pub fn text(w: &'a BlockWeights) -> Self {
        let c = &w.cross_attn;
        Self { k_name: "cross_attn.k", v_name: "cross_attn.v", k: &c.k, v: &c.v, norm_k: &c.norm_k }
    }

    pub fn image(w: &'a BlockWeights) -> Option<Self> {
        let i = w.cross_attn.image.as_ref()?;
        Some(Self { k_name: "cross_attn.k_img", v_name: "cross_attn.v_img", k: &i.k, v: &i.v, norm_k: &i.norm_k })
    }
}
