//! One transformer block, both passes. Backward is forward read upwards.
//!
//! ```text
//! x1  = x  + gate_sa · o(attention(rope(norm(q h1)), rope(norm(k h1)), v h1))     h1 = norm1(x) modulated
//! x2  = x1 + o(attention(norm(q h3), norm(k ctx), v ctx) [+ the same over image rows])   h3 = norm3(x1)
//! out = x2 + gate_ffn · ffn_2(gelu(ffn_0 h2))                                     h2 = norm2(x2) modulated
//! ```
//! Every tensor is written (`=`); only the adapters' gradients are accumulated, in the sink.

use candle_core::{DType, Tensor};
use wan_kernels::gelu::{ActivationArgs, GeluTanh};
use wan_kernels::norm::NormedGrads;
use wan_kernels::Exec;

use super::embed::{Modulation, Text, TimeEmbedding};
use super::pieces::{norm_only, ContextWeights};
use super::probe::Probe;
use super::saved::{AttnOut, BlockSaved, CrossAttention, FeedForward, Kept, Products, SelfAttention, Stored};
use super::{BlockPlan, BlockWeights, GradSink, Numerics, SavePolicy};
use crate::adapter::Adapters;
use crate::arch::WanArch;
use crate::linear::{add, LinearOut};
use crate::siblings::{Siblings, SiblingsOut};
use crate::Result;

/// What every block of one pass reads.
pub(super) struct Context {
    pub time: TimeEmbedding,
    /// `[l, h/2]`
    pub cos_lk: Tensor,
    pub sin_lk: Tensor,
    pub text: Text,
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

/// The residual stream around cross-attention, as backward begins: what of it takes no work of its own to have.
enum Stream {
    /// Before it, and what it adds.
    Before { x1_bld: Tensor, cross_bld: Tensor },
    /// Behind it; what was before is made again when it is needed.
    Behind { x2_bld: Tensor },
}

impl Block<'_> {
    /// `x` `[b, l, d]` to the block's output; nothing is kept.
    pub fn predict(&self, w: &BlockWeights, x_bld: &Tensor, probe: &mut Probe) -> Result<Tensor> {
        let mods = self.cx.time.modulation(self.exec, &w.modulation)?;
        let (_, x1_bld, h3_bld) = self.self_attention(w, &mods, x_bld, None, probe)?;
        let (_, cross_bld) = self.cross_attention(w, h3_bld, probe)?;
        let (x2_bld, h2_bld) = self.added_modulated(&x1_bld, &cross_bld, &mods, SHIFT_FFN, SCALE_FFN)?;
        drop((x1_bld, cross_bld));
        let ffn = self.feed_forward(w, h2_bld)?;
        Ok(self.feed_forward_end(w, &mods, &ffn, &x2_bld, probe)?.0)
    }

    /// The same, keeping what `plan` says; whatever it does not keep is dropped as early as in `predict`.
    pub fn forward(&self, w: &BlockWeights, x_bld: Tensor, plan: BlockPlan) -> Result<(Tensor, Stored)> {
        let mut probe = Probe::off();
        let mods = self.cx.time.modulation(self.exec, &w.modulation)?;
        let all = plan.keep == SavePolicy::KeepAll;
        let (self_attn, x1_bld, h3_bld) = self.self_attention(w, &mods, &x_bld, None, &mut probe)?;
        let (whole, attn) = match plan.keep {
            SavePolicy::KeepAll => (Some(self_attn), None),
            SavePolicy::KeepAttention => (None, Some(self_attn.attn)),
            SavePolicy::Recompute => (None, None),
        };
        let (cross_attn, cross_bld) = self.cross_attention(w, h3_bld, &mut probe)?;
        let cross_attn = all.then_some(cross_attn);
        let (x2_bld, h2_bld) = self.added_modulated(&x1_bld, &cross_bld, &mods, SHIFT_FFN, SCALE_FFN)?;
        drop(x1_bld);
        let cross_bld = all.then_some(cross_bld);
        let mut ffn = self.feed_forward(w, h2_bld)?;
        let (out_bld, h) = self.feed_forward_end(w, &mods, &ffn, &x2_bld, &mut probe)?;
        drop(x2_bld);
        ffn.second_h = h;
        let kept = match (whole, cross_attn, cross_bld) {
            (Some(self_attn), Some(cross_attn), Some(cross_bld)) => {
                Kept::All(Box::new(Products { self_attn, cross_attn, cross_bld, ffn }))
            }
            _ => attn.map_or(Kept::Nothing, Kept::Attention),
        };
        Ok((out_bld, Stored::new(BlockSaved { x_bld, kept }, self.exec, plan.home)?))
    }

    /// The self-attention part, the stream after it and that normed for cross-attention. `attn`: its attention, where it
    /// was kept; queries, keys and values are then left for later.
    fn self_attention(
        &self,
        w: &BlockWeights,
        mods: &Modulation,
        x_bld: &Tensor,
        attn: Option<AttnOut>,
        probe: &mut Probe,
    ) -> Result<(SelfAttention, Tensor, Tensor)> {
        let sa = &w.self_attn;
        let (qkv, attn) = match attn {
            Some(attn) => (None, attn),
            None => {
                let h1_bld = self.modulated(x_bld, mods, SHIFT_SA, SCALE_SA)?;
                let qkv = self.qkv(w, &h1_bld)?.forward(&h1_bld)?;
                drop(h1_bld);
                let [q, k, v] = &qkv.ys;
                if probe.is_on() {
                    let i = self.index;
                    probe.see_in_block(i, "modulation_plus_e0", &mods.of_first_token()?)?;
                    let norm1 = norm_only(self.exec, x_bld, &mods.get(SHIFT_SA)?, self.arch.eps, DType::F32)?;
                    probe.see_in_block(i, "norm1", &norm1)?;
                    probe.see_in_block(i, "self_attn.q_linear", q)?;
                    probe.see_in_block(i, "self_attn.q_normed", &self.rms(q, &sa.norm_q)?)?;
                    probe.see_in_block(i, "self_attn.k_normed", &self.rms(k, &sa.norm_k)?)?;
                    probe.see(&format!("rope_applied_block{i}_q"), &self.rope(q, &sa.norm_q)?)?;
                }
                let [q_blnh, k_blnh, v_blnh] = self.rotated(w, [q, k, v])?;
                let attn = self.attend_to_tokens([&q_blnh, &k_blnh, &v_blnh])?;
                (Some(qkv), attn)
            }
        };
        let o = self.linear("self_attn.o", &sa.o, &self.tokens(&attn.o_blnh)?)?;
        probe.see_in_block(self.index, "self_attn_out", &o.y)?;
        let (x1_bld, h3_bld) = self.gated_norm3(w, x_bld, &o.y, &mods.get(GATE_SA)?)?;
        Ok((SelfAttention { qkv, attn, o }, x1_bld, h3_bld))
    }

    /// The linears that make queries, keys and values, for an input like `h1`.
    fn qkv<'b>(&'b self, w: &'b BlockWeights, h1_bld: &Tensor) -> Result<Siblings<'b, 3>> {
        let sa = &w.self_attn;
        Ok(Siblings {
            sites: [
                self.site("self_attn.q", &sa.q, h1_bld)?,
                self.site("self_attn.k", &sa.k, h1_bld)?,
                self.site("self_attn.v", &sa.v, h1_bld)?,
            ],
        })
    }

    /// Queries, keys and values as attention reads them, `[b, l, n, h]`.
    fn rotated(&self, w: &BlockWeights, [q_bld, k_bld, v_bld]: [&Tensor; 3]) -> Result<[Tensor; 3]> {
        let sa = &w.self_attn;
        Ok([self.rope(q_bld, &sa.norm_q)?, self.rope(k_bld, &sa.norm_k)?, self.heads(v_bld)?])
    }

    /// The cross-attention part, and what it adds to the stream.
    fn cross_attention(&self, w: &BlockWeights, h3_bld: Tensor, probe: &mut Probe) -> Result<(CrossAttention, Tensor)> {
        let cross = &w.cross_attn;
        probe.see_in_block(self.index, "norm3", &h3_bld)?;
        let q = self.linear("cross_attn.q", &cross.q, &h3_bld)?;
        drop(h3_bld);
        let cq_blnh = self.heads(&self.rms(&q.y, &cross.norm_q)?)?;
        let Text { rows_bmd, last_stands_for } = &self.cx.text;
        let text = self.key_value(&ContextWeights::text(w), &cq_blnh, rows_bmd, *last_stands_for)?;
        let image = match (ContextWeights::image(w), &self.cx.image_bmd) {
            (Some(weights), Some(rows)) => Some(self.key_value(&weights, &cq_blnh, rows, 1)?),
            _ => None,
        };
        drop(cq_blnh);
        let o = self.linear("cross_attn.o", &cross.o, &self.cross_sum(&text, image.as_ref())?)?;
        probe.see_in_block(self.index, "cross_attn_out", &o.y)?;
        Ok((CrossAttention { q, text, image, o_h: o.h }, o.y))
    }

    /// The first product of the feed-forward part.
    fn feed_forward(&self, w: &BlockWeights, h2_bld: Tensor) -> Result<FeedForward> {
        Ok(FeedForward { first: self.linear("ffn.0", &w.ffn_0, &h2_bld)?, second_h: None })
    }

    /// From there to the block's output; also the low-rank activation of `ffn.2`.
    fn feed_forward_end(
        &self,
        w: &BlockWeights,
        mods: &Modulation,
        ffn: &FeedForward,
        x2_bld: &Tensor,
        probe: &mut Probe,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (g_blf, rounded) = w.ffn_2.gelu(self.exec, &ffn.first.y)?;
        let second = self.site("ffn.2", &w.ffn_2, &g_blf)?.forward_rounded(&g_blf, rounded.as_ref())?;
        drop((g_blf, rounded));
        probe.see_in_block(self.index, "ffn_out", &second.y)?;
        let out_bld = self.gated(x2_bld, &second.y, &mods.get(GATE_FFN)?)?;
        probe.see_in_block(self.index, "out", &out_bld)?;
        Ok((out_bld, second.h))
    }

    /// `dout` to `dx`, both `[b, l, d]` of the residual stream; `None` where no trained parameter lies below.
    /// Adapter gradients go to the sink on the way. `past_peak` is called once the widest part is behind: there is
    /// room then for what the next block needs.
    pub fn backward(
        &self,
        w: &BlockWeights,
        saved: BlockSaved,
        dout_bld: Tensor,
        need_dx: bool,
        sink: &mut dyn GradSink,
        past_peak: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Tensor>> {
        let BlockSaved { x_bld, kept } = saved;
        let mods = self.cx.time.modulation(self.exec, &w.modulation)?;
        let (self_attn, cross_attn, stream, ffn) = match kept {
            Kept::All(products) => {
                let Products { self_attn, cross_attn, cross_bld, ffn } = *products;
                let x1_bld = self.gated(&x_bld, &self_attn.o.y, &mods.get(GATE_SA)?)?;
                (self_attn, cross_attn, Stream::Before { x1_bld, cross_bld }, ffn)
            }
            Kept::Attention(attn) => self.again(w, &mods, &x_bld, Some(attn))?,
            Kept::Nothing => self.again(w, &mods, &x_bld, None)?,
        };

        // out = x2 + gate · ffn_2(gelu(ffn_0(h2)))
        let FeedForward { first: LinearOut { y: f0_blf, h: f0_h }, second_h } = ffn;
        let df2_bld = self.gate_backward(&dout_bld, &mods.get(GATE_FFN)?)?;
        let g_blf = self.exec.run::<GeluTanh>(&ActivationArgs { x: &f0_blf })?;
        let dg_blf = self.linear_backward("ffn.2", &w.ffn_2, &g_blf, second_h.as_ref(), &df2_bld, sink)?;
        drop((g_blf, df2_bld, second_h));
        let (df0_blf, rounded) = w.ffn_0.gelu_backward(self.exec, &f0_blf, &dg_blf)?;
        drop((dg_blf, f0_blf));
        let (x1_bld, x2_bld, h2_bld) = match stream {
            Stream::Before { x1_bld, cross_bld } => {
                let (x2_bld, h2_bld) = self.added_modulated(&x1_bld, &cross_bld, &mods, SHIFT_FFN, SCALE_FFN)?;
                (Some(x1_bld), x2_bld, h2_bld)
            }
            Stream::Behind { x2_bld } => {
                let h2_bld = self.modulated(&x2_bld, &mods, SHIFT_FFN, SCALE_FFN)?;
                (None, x2_bld, h2_bld)
            }
        };
        let ffn_0 = self.site("ffn.0", &w.ffn_0, &h2_bld)?;
        let dh2_bld = ffn_0.backward_rounded(&h2_bld, f0_h.as_ref(), &df0_blf, rounded.as_ref(), None, sink)?;
        drop((df0_blf, rounded, h2_bld, f0_h));
        past_peak()?;
        let NormedGrads { dx_bld: dx2_bld, dbranch_bld: dcross_bld } =
            self.added_modulated_backward(&x2_bld, &mods, [SHIFT_FFN, SCALE_FFN], &dh2_bld, &dout_bld)?;
        drop((x2_bld, dh2_bld, dout_bld));

        // x2 = x1 + o(attention(q(h3), text) + attention(q(h3), image))
        let cross = &w.cross_attn;
        let CrossAttention { q: LinearOut { y: cq_bld, h: cq_h }, text, image, o_h } = cross_attn;
        let co_bld = self.cross_sum(&text, image.as_ref())?;
        let dco_bld = self.linear_backward("cross_attn.o", &cross.o, &co_bld, o_h.as_ref(), &dcross_bld, sink)?;
        drop((co_bld, dcross_bld, o_h));
        let cq_blnh = self.heads(&self.rms(&cq_bld, &cross.norm_q)?)?;
        let dco_blnh = self.heads(&dco_bld)?;
        let Text { rows_bmd, last_stands_for } = &self.cx.text;
        let rows = (rows_bmd, *last_stands_for);
        let mut dcq_blnh = self.key_value_backward(&ContextWeights::text(w), text, &cq_blnh, rows, &dco_blnh, sink)?;
        if let (Some(weights), Some(rows), Some(saved)) = (ContextWeights::image(w), &self.cx.image_bmd, image) {
            let share = self.key_value_backward(&weights, saved, &cq_blnh, (rows, 1), &dco_blnh, sink)?;
            dcq_blnh = add(self.exec, &dcq_blnh, &share)?;
        }
        drop((cq_blnh, dco_blnh, dco_bld));
        let dcq_bld = self.rms_backward(&cq_bld, &cross.norm_q, &dcq_blnh.flatten_from(2)?)?;
        drop((dcq_blnh, cq_bld));
        let SelfAttention { qkv, attn, o } = self_attn;
        let x1_bld = match x1_bld {
            Some(x1_bld) => x1_bld,
            None => self.gated(&x_bld, &o.y, &mods.get(GATE_SA)?)?,
        };
        let o_h = o.h;
        drop(o.y);
        let h3_bld = self.norm3(w, &x1_bld)?;
        let dh3_bld = self.linear_backward("cross_attn.q", &cross.q, &h3_bld, cq_h.as_ref(), &dcq_bld, sink)?;
        drop((h3_bld, dcq_bld, cq_h));
        let NormedGrads { dx_bld: dx1_bld, dbranch_bld: da_bld } =
            self.gated_norm3_backward(w, &x1_bld, &mods.get(GATE_SA)?, &dh3_bld, &dx2_bld)?;
        drop((x1_bld, dx2_bld, dh3_bld));

        // x1 = x + gate · o(attention(rope q, rope k, v))
        let sa = &w.self_attn;
        let o_bld = self.tokens(&attn.o_blnh)?;
        let do_bld = self.linear_backward("self_attn.o", &sa.o, &o_bld, o_h.as_ref(), &da_bld, sink)?;
        drop((da_bld, o_bld, o_h));
        let h1_bld = self.modulated(&x_bld, &mods, SHIFT_SA, SCALE_SA)?;
        let branches = self.qkv(w, &h1_bld)?;
        let SiblingsOut { ys: [q_bld, k_bld, v_bld], low } = match qkv {
            Some(qkv) => qkv,
            None => branches.forward(&h1_bld)?,
        };
        let rotated = self.rotated(w, [&q_bld, &k_bld, &v_bld])?;
        let d = self.attend_backward(rotated.each_ref(), 1, &attn, &self.heads(&do_bld)?)?;
        drop((rotated, do_bld, attn, v_bld));
        let dq_bld = self.rope_backward(&q_bld, &sa.norm_q, &d.dq_blnh)?;
        let dk_bld = self.rope_backward(&k_bld, &sa.norm_k, &d.dk_bmnh)?;
        let dv_bld = d.dv_bmnh.flatten_from(2)?;
        drop((q_bld, k_bld, d));
        let dh1_bld = branches.backward(&h1_bld, low, [dq_bld, dk_bld, dv_bld], need_dx, sink)?;
        drop(h1_bld);
        dh1_bld.map(|dh1_bld| self.modulated_backward(&x_bld, &mods, SCALE_SA, &dh1_bld, &dx1_bld)).transpose()
    }

    /// The block's parts computed a second time, and the stream before the feed-forward part. The same operations on
    /// the same inputs as in forward give the same bits.
    fn again(
        &self,
        w: &BlockWeights,
        mods: &Modulation,
        x_bld: &Tensor,
        attn: Option<AttnOut>,
    ) -> Result<(SelfAttention, CrossAttention, Stream, FeedForward)> {
        let mut probe = Probe::off();
        let (self_attn, x1_bld, h3_bld) = self.self_attention(w, mods, x_bld, attn, &mut probe)?;
        let (cross_attn, cross_bld) = self.cross_attention(w, h3_bld, &mut probe)?;
        let (x2_bld, h2_bld) = self.added_modulated(&x1_bld, &cross_bld, mods, SHIFT_FFN, SCALE_FFN)?;
        drop((x1_bld, cross_bld));
        let ffn = self.feed_forward(w, h2_bld)?;
        Ok((self_attn, cross_attn, Stream::Behind { x2_bld }, ffn))
    }
}
