//! What one block keeps between forward and backward, by policy, and where it waits.

use candle_core::{DType, Device, Tensor};
use wan_kernels::offload::Offloaded;
use wan_kernels::Exec;

use super::Home;
use crate::linear::LinearOut;
use crate::siblings::SiblingsOut;
use crate::Result;

/// Output and log-sum-exp of one attention.
pub(super) struct AttnOut {
    /// `[b, l, n, h]`
    pub o_blnh: Tensor,
    /// `[b, n, l]` fp32
    pub lse_bnl: Tensor,
}

/// The self-attention part. Norms, rotation, GELU and gates are single passes over the products here and below, and
/// are applied again in backward, which halves what "keep all" keeps.
pub(super) struct SelfAttention {
    /// Outputs of q, k and v; missing where attention was kept: backward then needs them last, and makes them then.
    pub qkv: Option<SiblingsOut<3>>,
    pub attn: AttnOut,
    pub o: LinearOut,
}

/// The cross-attention part.
pub(super) struct CrossAttention {
    pub q: LinearOut,
    pub text: KeyValue,
    pub image: Option<KeyValue>,
    /// The low-rank activation of the output linear.
    pub o_h: Option<Tensor>,
}

/// Keys, values and attention over one kind of context.
pub(super) struct KeyValue {
    pub k: LinearOut,
    pub v: LinearOut,
    pub attn: AttnOut,
}

/// The feed-forward part.
pub(super) struct FeedForward {
    pub first: LinearOut,
    /// The low-rank activation of `ffn.2`; its output is not needed. Not computed when the block is computed again.
    pub second_h: Option<Tensor>,
}

/// The results of all matrix products and attentions of a block.
pub(super) struct Products {
    pub self_attn: SelfAttention,
    pub cross_attn: CrossAttention,
    /// The output of cross-attention's last linear, `[b, l, d]`.
    pub cross_bld: Tensor,
    pub ffn: FeedForward,
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

/// What is saved of one block, until backward wants it.
pub(super) enum Stored {
    Here(BlockSaved),
    Away(Away),
}

/// Saved tensors in host memory.
pub(super) struct Away {
    /// What goes where: placeholders in the order of the tensors.
    form: BlockSaved,
    tensors: Offloaded,
    bytes: usize,
}

impl Stored {
    /// Moves what is saved to where it waits; the computing does not wait for that.
    pub fn new(saved: BlockSaved, exec: &Exec, home: Home) -> Result<Self> {
        if home == Home::Device {
            exec.settle_offloads()?;
            return Ok(Stored::Here(saved));
        }
        let (bytes, placeholder) = (saved.bytes(), Tensor::zeros((), DType::U8, &Device::Cpu)?);
        let mut tensors = Vec::new();
        let form = saved.map(&mut |t| {
            tensors.push(t.clone());
            Ok(placeholder.clone())
        })?;
        drop(saved);
        Ok(Stored::Away(Away { form, tensors: exec.offload(tensors)?, bytes }))
    }

    /// Starts bringing it back beside the computing.
    pub fn prefetch(&mut self) -> Result<()> {
        match self {
            Stored::Here(_) => Ok(()),
            Stored::Away(away) => Ok(away.tensors.prefetch()?),
        }
    }

    /// What was saved, on the computing device.
    pub fn restore(self) -> Result<BlockSaved> {
        match self {
            Stored::Here(saved) => Ok(saved),
            Stored::Away(Away { form, tensors, .. }) => {
                let mut tensors = tensors.restore()?.into_iter();
                form.map(&mut |placeholder| Ok(tensors.next().unwrap_or_else(|| placeholder.clone())))
            }
        }
    }

    /// Bytes of what is kept; a plan's prices are held against it.
    pub fn bytes(&self) -> usize {
        match self {
            Stored::Here(saved) => saved.bytes(),
            Stored::Away(away) => away.bytes,
        }
    }
}

type Change<'a> = &'a mut dyn FnMut(&Tensor) -> Result<Tensor>;

impl BlockSaved {
    /// The same with every tensor put through `f`, in an order that depends on the structure alone.
    fn map(&self, f: Change) -> Result<Self> {
        let x_bld = f(&self.x_bld)?;
        let kept = match &self.kept {
            Kept::Nothing => Kept::Nothing,
            Kept::Attention(attn) => Kept::Attention(attn.map(f)?),
            Kept::All(products) => Kept::All(Box::new(products.map(f)?)),
        };
        Ok(Self { x_bld, kept })
    }

    fn bytes(&self) -> usize {
        let mut bytes = 0;
        let counted = self.map(&mut |t| {
            bytes += t.elem_count() * t.dtype().size_in_bytes();
            Ok(t.clone())
        });
        debug_assert!(counted.is_ok(), "counting cannot fail");
        bytes
    }
}

impl AttnOut {
    fn map(&self, f: Change) -> Result<Self> {
        Ok(Self { o_blnh: f(&self.o_blnh)?, lse_bnl: f(&self.lse_bnl)? })
    }
}

impl KeyValue {
    fn map(&self, f: Change) -> Result<Self> {
        Ok(Self { k: mapped(&self.k, f)?, v: mapped(&self.v, f)?, attn: self.attn.map(f)? })
    }
}

impl Products {
    fn map(&self, f: Change) -> Result<Self> {
        let Self { self_attn, cross_attn, cross_bld, ffn } = self;
        let qkv = self_attn.qkv.as_ref().map(|qkv| qkv.map(f)).transpose()?;
        let self_attn = SelfAttention { qkv, attn: self_attn.attn.map(f)?, o: mapped(&self_attn.o, f)? };
        let cross_attn = CrossAttention {
            q: mapped(&cross_attn.q, f)?,
            text: cross_attn.text.map(f)?,
            image: cross_attn.image.as_ref().map(|i| i.map(f)).transpose()?,
            o_h: cross_attn.o_h.as_ref().map(&mut *f).transpose()?,
        };
        let cross_bld = f(cross_bld)?;
        let ffn =
            FeedForward { first: mapped(&ffn.first, f)?, second_h: ffn.second_h.as_ref().map(&mut *f).transpose()? };
        Ok(Self { self_attn, cross_attn, cross_bld, ffn })
    }
}

fn mapped(l: &LinearOut, f: Change) -> Result<LinearOut> {
    Ok(LinearOut { y: f(&l.y)?, h: l.h.as_ref().map(f).transpose()? })
}
