//! One transformer block, both passes. Backward is forward read upwards.
//!
//! ```text
//! x1  = x  + gate_sa · o(attention(rope(norm(q h1)), rope(norm(k h1)), v h1))     h1 = norm1(x) modulated
//! x2  = x1 + o(attention(norm(q h3), norm(k ctx), v ctx) [+ the same over image rows])   h3 = norm3(x1)
//! out = x2 + gate_ffn · ffn_2(gelu(ffn_0 h2))                                     h2 = norm2(x2) modulated
//! ```
//! Every tensor is written (`=`); only the adapters' gradients are accumulated, in the sink.

use candle_core::{DType, Tensor};
use wan_kernels::gelu::{ActivationArgs, GeluTanh, GeluTanhBackward, GeluTanhBackwardArgs};
use wan_kernels::Exec;

use super::embed::TimeEmbedding;
use super::pieces::{norm_only, ContextWeights};
use super::probe::Probe;
use super::saved::{AttnOut, BlockSaved, Kept, Products};
use super::{BlockPlan, BlockWeights, GradSink, Numerics};
use crate::adapter::Adapters;
use crate::arch::WanArch;
use crate::linear::add;
use crate::Result;

/// What every block of one pass reads.
pub(super) struct Context {
    pub time: TimeEmbedding,
    /// `[l, h/2]`
    pub cos_lk: Tensor,
    pub sin_lk: Tensor,
    /// Text rows `[b, m, d]`.
    pub text_bmd: Tensor,
    /// Image rows `[b, m, d]`.
    pub image_bmd: Option<Tensor>,
}

/// One block at work: it owns nothing but its place.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub index: usize,
    pub exec: &'a Exec,
    pub arch: &'a WanArch,
    pub numerics: &'a Numerics,
    pub cx: &'a Context,
    pub adapters: &'a dyn Adapters,
}

/// Order of the modulation vectors.
const SHIFT_SA: usize = 0;
const SCALE_SA: usize = 1;
const GATE_SA: usize = 2;
const SHIFT_FFN: usize = 3;
const SCALE_FFN: usize = 4;
const GATE_FFN: usize = 5;

impl Block<'_> {
    /// `x` `[b, l, d]` to the block's output; nothing is kept.
    pub fn predict(&self, w: &BlockWeights, x_bld: &Tensor, probe: &mut Probe) -> Result<Tensor> {
        let (products, x2_bld) = self.products(w, x_bld, None, probe)?;
        Ok(self.feed_forward_end(w, &products, &x2_bld, probe)?.0)
    }

    /// The same, keeping what `plan` says.
    pub fn forward(&self, w: &BlockWeights, x_bld: Tensor, plan: BlockPlan) -> Result<(Tensor, BlockSaved)> {
        let mut probe = Probe::off();
        let (mut products, x2_bld) = self.products(w, &x_bld, None, &mut probe)?;
        let (out_bld, h) = self.feed_forward_end(w, &products, &x2_bld, &mut probe)?;
        products.ffn_2_h = h;
        Ok((out_bld, BlockSaved::new(x_bld, products, plan)?))
    }

    /// Everything up to the first feed-forward product, and the stream `x2` before the feed-forward part.
    /// `attn`: the self-attention, where it was kept.
    fn products(
        &self,
        w: &BlockWeights,
        x_bld: &Tensor,
        attn: Option<AttnOut>,
        probe: &mut Probe,
    ) -> Result<(Products, Tensor)> {
        let mods = self.cx.time.modulation(&w.modulation)?;
        let (sa, cross) = (&w.self_attn, &w.cross_attn);

        let h1_bld = self.modulated(x_bld, &mods, SHIFT_SA, SCALE_SA)?;
        let q = self.linear("self_attn.q", &sa.q, &h1_bld)?;
        let k = self.linear("self_attn.k", &sa.k, &h1_bld)?;
        let v = self.linear("self_attn.v", &sa.v, &h1_bld)?;
        drop(h1_bld);
        if probe.is_on() {
            let i = self.index;
            probe.see_in_block(i, "modulation_plus_e0", &mods.of_first_token()?)?;
            let norm1 = norm_only(self.exec, x_bld, &mods.get(SHIFT_SA)?, self.arch.eps, DType::F32)?;
            probe.see_in_block(i, "norm1", &norm1)?;
            probe.see_in_block(i, "self_attn.q_linear", &q.y)?;
            probe.see_in_block(i, "self_attn.q_normed", &self.rms(&q.y, &sa.norm_q)?)?;
            probe.see_in_block(i, "self_attn.k_normed", &self.rms(&k.y, &sa.norm_k)?)?;
            probe.see(&format!("rope_applied_block{i}_q"), &self.rope(&q.y, &sa.norm_q)?)?;
        }
        let attn = match attn {
            Some(attn) => attn,
            None => self.attend(&self.rope(&q.y, &sa.norm_q)?, &self.rope(&k.y, &sa.norm_k)?, &self.heads(&v.y)?)?,
        };
        let o = self.linear("self_attn.o", &sa.o, &self.tokens(&attn.o_blnh)?)?;
        probe.see_in_block(self.index, "self_attn_out", &o.y)?;
        let x1_bld = self.gated(x_bld, &o.y, &mods.get(GATE_SA)?)?;

        let h3_bld = self.norm3(w, &x1_bld)?;
        probe.see_in_block(self.index, "norm3", &h3_bld)?;
        let cross_q = self.linear("cross_attn.q", &cross.q, &h3_bld)?;
        drop(h3_bld);
        let cq_blnh = self.heads(&self.rms(&cross_q.y, &cross.norm_q)?)?;
        let text = self.key_value(&ContextWeights::text(w), &cq_blnh, &self.cx.text_bmd)?;
        let image = match (ContextWeights::image(w), &self.cx.image_bmd) {
            (Some(weights), Some(rows)) => Some(self.key_value(&weights, &cq_blnh, rows)?),
            _ => None,
        };
        drop(cq_blnh);
        let cross_o = self.linear("cross_attn.o", &cross.o, &self.cross_sum(&text, image.as_ref())?)?;
        probe.see_in_block(self.index, "cross_attn_out", &cross_o.y)?;
        let x2_bld = self.added(&x1_bld, &cross_o.y)?;

        let h2_bld = self.modulated(&x2_bld, &mods, SHIFT_FFN, SCALE_FFN)?;
        let ffn_0 = self.linear("ffn.0", &w.ffn_0, &h2_bld)?;
        let products = Products { q, k, v, attn, o, cross_q, text, image, cross_o, ffn_0, ffn_2_h: None };
        Ok((products, x2_bld))
    }

    /// From the first feed-forward product to the block's output; also the low-rank activation of `ffn.2`.
    fn feed_forward_end(
        &self,
        w: &BlockWeights,
        p: &Products,
        x2_bld: &Tensor,
        probe: &mut Probe,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let g_blf = self.exec.run::<GeluTanh>(&ActivationArgs { x: &p.ffn_0.y })?;
        let ffn_2 = self.linear("ffn.2", &w.ffn_2, &g_blf)?;
        probe.see_in_block(self.index, "ffn_out", &ffn_2.y)?;
        let gate = self.cx.time.modulation(&w.modulation)?.get(GATE_FFN)?;
        let out_bld = self.gated(x2_bld, &ffn_2.y, &gate)?;
        probe.see_in_block(self.index, "out", &out_bld)?;
        Ok((out_bld, ffn_2.h))
    }

    /// `dout` to `dx`, both `[b, l, d]` of the residual stream; `None` where no trained parameter lies below.
    /// Adapter gradients go to the sink on the way.
    pub fn backward(
        &self,
        w: &BlockWeights,
        saved: BlockSaved,
        dout_bld: Tensor,
        need_dx: bool,
        sink: &mut dyn GradSink,
    ) -> Result<Option<Tensor>> {
        let BlockSaved { x_bld, kept } = saved.brought_to(self.exec.device())?;
        let mut probe = Probe::off();
        let p = match kept {
            Kept::All(products) => *products,
            Kept::Attention(attn) => self.products(w, &x_bld, Some(attn), &mut probe)?.0,
            Kept::Nothing => self.products(w, &x_bld, None, &mut probe)?.0,
        };
        let mods = self.cx.time.modulation(&w.modulation)?;
        let x1_bld = self.gated(&x_bld, &p.o.y, &mods.get(GATE_SA)?)?;
        let x2_bld = self.added(&x1_bld, &p.cross_o.y)?;

        // out = x2 + gate · ffn_2(gelu(ffn_0(h2)))
        let df2_bld = self.gate_backward(&dout_bld, &mods.get(GATE_FFN)?)?;
        let g_blf = self.exec.run::<GeluTanh>(&ActivationArgs { x: &p.ffn_0.y })?;
        let dg_blf = self.linear_backward("ffn.2", &w.ffn_2, &g_blf, p.ffn_2_h.as_ref(), &df2_bld, sink)?;
        drop((g_blf, df2_bld));
        let df0_blf = self.exec.run::<GeluTanhBackward>(&GeluTanhBackwardArgs { x: &p.ffn_0.y, dy: &dg_blf })?;
        drop(dg_blf);
        let h2_bld = self.modulated(&x2_bld, &mods, SHIFT_FFN, SCALE_FFN)?;
        let dh2_bld = self.linear_backward("ffn.0", &w.ffn_0, &h2_bld, p.ffn_0.h.as_ref(), &df0_blf, sink)?;
        drop((df0_blf, h2_bld, p.ffn_0));
        let dx2_bld = self.modulated_backward(&x2_bld, &mods, SCALE_FFN, &dh2_bld, &dout_bld)?;
        drop((x2_bld, dh2_bld, dout_bld));

        // x2 = x1 + o(attention(q(h3), text) + attention(q(h3), image))
        let cross = &w.cross_attn;
        let co_bld = self.cross_sum(&p.text, p.image.as_ref())?;
        let dcross_bld = dx2_bld.to_dtype(self.exec.compute())?;
        let dco_bld =
            self.linear_backward("cross_attn.o", &cross.o, &co_bld, p.cross_o.h.as_ref(), &dcross_bld, sink)?;
        drop((co_bld, dcross_bld, p.cross_o));
        let cq_blnh = self.heads(&self.rms(&p.cross_q.y, &cross.norm_q)?)?;
        let dco_blnh = self.heads(&dco_bld)?;
        let text_bmd = &self.cx.text_bmd;
        let mut dcq_blnh =
            self.key_value_backward(&ContextWeights::text(w), p.text, &cq_blnh, text_bmd, &dco_blnh, sink)?;
        if let (Some(weights), Some(rows), Some(saved)) = (ContextWeights::image(w), &self.cx.image_bmd, p.image) {
            let share = self.key_value_backward(&weights, saved, &cq_blnh, rows, &dco_blnh, sink)?;
            dcq_blnh = add(self.exec, &dcq_blnh, &share)?;
        }
        drop((cq_blnh, dco_blnh, dco_bld));
        let dcq_bld = self.rms_backward(&p.cross_q.y, &cross.norm_q, &dcq_blnh.flatten_from(2)?)?;
        drop(dcq_blnh);
        let h3_bld = self.norm3(w, &x1_bld)?;
        let dh3_bld = self.linear_backward("cross_attn.q", &cross.q, &h3_bld, p.cross_q.h.as_ref(), &dcq_bld, sink)?;
        drop((h3_bld, dcq_bld, p.cross_q));
        let dx1_bld = self.norm3_backward(w, &x1_bld, &dh3_bld, &dx2_bld)?;
        drop((x1_bld, dx2_bld, dh3_bld));

        // x1 = x + gate · o(attention(rope q, rope k, v))
        let sa = &w.self_attn;
        let da_bld = self.gate_backward(&dx1_bld, &mods.get(GATE_SA)?)?;
        let o_bld = self.tokens(&p.attn.o_blnh)?;
        let do_bld = self.linear_backward("self_attn.o", &sa.o, &o_bld, p.o.h.as_ref(), &da_bld, sink)?;
        drop((da_bld, o_bld, p.o));
        let (q_blnh, k_blnh, v_blnh) =
            (self.rope(&p.q.y, &sa.norm_q)?, self.rope(&p.k.y, &sa.norm_k)?, self.heads(&p.v.y)?);
        let d = self.attend_backward([&q_blnh, &k_blnh, &v_blnh], &p.attn, &self.heads(&do_bld)?)?;
        drop((q_blnh, k_blnh, v_blnh, do_bld, p.attn));
        let dq_bld = self.rope_backward(&p.q.y, &sa.norm_q, &d.dq_blnh)?;
        let dk_bld = self.rope_backward(&p.k.y, &sa.norm_k, &d.dk_bmnh)?;
        let dv_bld = d.dv_bmnh.flatten_from(2)?;
        let h1_bld = self.modulated(&x_bld, &mods, SHIFT_SA, SCALE_SA)?;
        let branches = [
            ("self_attn.q", &sa.q, p.q.h, dq_bld),
            ("self_attn.k", &sa.k, p.k.h, dk_bld),
            ("self_attn.v", &sa.v, p.v.h, dv_bld),
        ];
        if !need_dx {
            for (name, frozen, h, dy_bld) in branches {
                self.site(name, frozen, &h1_bld)?.backward_params(&h1_bld, h.as_ref(), &dy_bld, sink)?;
            }
            return Ok(None);
        }
        let mut dh1_bld: Option<Tensor> = None;
        for (name, frozen, h, dy_bld) in branches {
            let share = self.linear_backward(name, frozen, &h1_bld, h.as_ref(), &dy_bld, sink)?;
            dh1_bld = Some(match dh1_bld {
                Some(sum) => add(self.exec, &sum, &share)?,
                None => share,
            });
        }
        drop(h1_bld);
        dh1_bld.map(|dh1_bld| self.modulated_backward(&x_bld, &mods, SCALE_SA, &dh1_bld, &dx1_bld)).transpose()
    }
}
