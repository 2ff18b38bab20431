//! What one block keeps between forward and backward, by policy.

use candle_core::{Device, Tensor};

use super::{BlockPlan, Home, SavePolicy};
use crate::linear::LinearOut;
use crate::Result;

/// Output and log-sum-exp of one attention.
pub(super) struct AttnOut {
    /// `[b, l, n, h]`
    pub o_blnh: Tensor,
    /// `[b, n, l]` fp32
    pub lse_bnl: Tensor,
}

/// The results of a block's matrix products and attentions. Norms, rotation, GELU and gates are single passes over
/// these and are applied again in backward, which halves what "keep all" keeps.
pub(super) struct Products {
    pub q: LinearOut,
    pub k: LinearOut,
    pub v: LinearOut,
    pub attn: AttnOut,
    pub o: LinearOut,
    pub cross_q: LinearOut,
    pub text: KeyValue,
    pub image: Option<KeyValue>,
    pub cross_o: LinearOut,
    pub ffn_0: LinearOut,
    /// The low-rank activation of `ffn.2`; its output is not needed. Not computed when the block is computed again.
    pub ffn_2_h: Option<Tensor>,
}

/// Keys, values and attention over one kind of context.
pub(super) struct KeyValue {
    pub k: LinearOut,
    pub v: LinearOut,
    pub attn: AttnOut,
}

/// One block between its passes.
pub(super) struct BlockSaved {
    /// The block's input, `[b, l, d]`.
    pub x_bld: Tensor,
    pub kept: Kept,
}

pub(super) enum Kept {
    Nothing,
    Attention(AttnOut),
    All(Box<Products>),
}

impl BlockSaved {
    /// Drops what the policy does not keep, and moves the rest to where it waits.
    pub fn new(x_bld: Tensor, products: Products, plan: BlockPlan) -> Result<Self> {
        let kept = match plan.keep {
            SavePolicy::Recompute => Kept::Nothing,
            SavePolicy::KeepAttention => Kept::Attention(products.attn),
            SavePolicy::KeepAll => Kept::All(Box::new(products)),
        };
        let saved = Self { x_bld, kept };
        match plan.home {
            Home::Device => Ok(saved),
            Home::Host => saved.brought_to(&Device::Cpu),
        }
    }

    /// Where it already is, nothing is copied.
    pub fn brought_to(self, device: &Device) -> Result<Self> {
        let kept = match self.kept {
            Kept::Nothing => Kept::Nothing,
            Kept::Attention(attn) => Kept::Attention(attn.to_device(device)?),
            Kept::All(products) => Kept::All(Box::new(products.to_device(device)?)),
        };
        Ok(Self { x_bld: self.x_bld.to_device(device)?, kept })
    }
}

impl BlockSaved {
    /// Bytes of what is kept; a plan's prices are held against it.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let linear = |l: &LinearOut| size(&l.y) + l.h.as_ref().map_or(0, size);
        let attention = |a: &AttnOut| size(&a.o_blnh) + size(&a.lse_bnl);
        let cross = |c: &KeyValue| linear(&c.k) + linear(&c.v) + attention(&c.attn);
        let kept = match &self.kept {
            Kept::Nothing => 0,
            Kept::Attention(attn) => attention(attn),
            Kept::All(p) => {
                let linears = [&p.q, &p.k, &p.v, &p.o, &p.cross_q, &p.cross_o, &p.ffn_0].map(linear);
                linears.iter().sum::<usize>()
                    + attention(&p.attn)
                    + cross(&p.text)
                    + p.image.as_ref().map_or(0, cross)
                    + p.ffn_2_h.as_ref().map_or(0, size)
            }
        };
        size(&self.x_bld) + kept
    }
}

impl AttnOut {
    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { o_blnh: self.o_blnh.to_device(device)?, lse_bnl: self.lse_bnl.to_device(device)? })
    }
}

impl KeyValue {
    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { k: moved(&self.k, device)?, v: moved(&self.v, device)?, attn: self.attn.to_device(device)? })
    }
}

impl Products {
    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            q: moved(&self.q, device)?,
            k: moved(&self.k, device)?,
            v: moved(&self.v, device)?,
            attn: self.attn.to_device(device)?,
            o: moved(&self.o, device)?,
            cross_q: moved(&self.cross_q, device)?,
            text: self.text.to_device(device)?,
            image: self.image.as_ref().map(|i| i.to_device(device)).transpose()?,
            cross_o: moved(&self.cross_o, device)?,
            ffn_0: moved(&self.ffn_0, device)?,
            ffn_2_h: self.ffn_2_h.as_ref().map(|h| h.to_device(device)).transpose()?,
        })
    }
}

fn moved(l: &LinearOut, device: &Device) -> Result<LinearOut> {
    let h = l.h.as_ref().map(|h| h.to_device(device)).transpose()?;
    Ok(LinearOut { y: l.y.to_device(device)?, h })
}
