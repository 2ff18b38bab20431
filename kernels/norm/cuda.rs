//! The norms' kernels: one block a row, see `norm.cu`.

use candle_core::{DType, Tensor};

use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::Result;

/// What follows the normalised value.
pub(super) enum Kind<'a> {
    /// LayerNorm, `xhat·(one + a) + b`.
    Layer {
        one: f32,
        b: Option<&'a Tensor>,
    },
    Rms,
    /// RMSNorm and rotation by `cos` and `sin` [l, h/2].
    RmsRope {
        cos_lk: &'a Tensor,
        sin_lk: &'a Tensor,
    },
}

/// Chunks of 1024 values that a forward kernel holds a row in. Backward kernels hold it in two chunks of twice as many
/// threads as that.
const CHUNKS: [usize; 5] = [1, 2, 3, 5, 8];

/// Whether a kernel takes rows of `d` (and heads of `h`).
pub(super) fn fits(d: usize, h: Option<usize>) -> bool {
    d.is_multiple_of(8) && d <= 1024 * CHUNKS[4] && h.is_none_or(|h| h.is_multiple_of(8))
}

/// Rows that share one vector: 0 for all.
fn span(x: &Tensor, a: &Tensor) -> usize {
    match (x.rank(), a.rank()) {
        (3, 2) => x.dims()[1],
        (3, 3) => 1,
        _ => 0,
    }
}

fn chunks(d: usize) -> usize {
    CHUNKS.into_iter().find(|c| c * 1024 >= d).unwrap_or(CHUNKS[4])
}

struct Rotary([Option<View>; 2], [usize; 2]);

impl Kind<'_> {
    fn name(&self) -> &'static str {
        match self {
            Kind::Layer { .. } => "layer",
            Kind::Rms => "rms",
            Kind::RmsRope { .. } => "rms_rope",
        }
    }

    fn one(&self) -> f32 {
        match self {
            Kind::Layer { one, .. } => *one,
            _ => 0.0,
        }
    }

    fn rotary(&self, op: &'static str) -> Result<Rotary> {
        match self {
            Kind::RmsRope { cos_lk, sin_lk } => {
                let (l, half) = cos_lk.dims2()?;
                Ok(Rotary([Some(View::new(op, cos_lk)?), Some(View::new(op, sin_lk)?)], [l, half]))
            }
            _ => Ok(Rotary([None, None], [1, 4])),
        }
    }
}

impl Rotary {
    fn arg(&self) -> Arg {
        let address = |v: &Option<View>| v.as_ref().map_or(0, |v| v.address);
        Arg::pointers(&[address(&self.0[0]), address(&self.0[1])], &[self.1[0] as u32, self.1[1] as u32])
    }
}

/// `shape` is that of the result, whose elements are those of `x`.
pub(super) fn forward(
    op: &'static str,
    gpu: &Gpu,
    x: &Tensor,
    a: &Tensor,
    kind: Kind<'_>,
    eps: f64,
    (out, shape): (DType, &[usize]),
) -> Result<Tensor> {
    let d = x.dims()[x.rank() - 1];
    let rows = x.elem_count() / d;
    let y = gpu.empty(shape, out)?;
    let (x_view, a_view) = (View::new(op, x)?, View::new(op, a)?);
    let b_view = match kind {
        Kind::Layer { b: Some(b), .. } => Some(View::new(op, b)?),
        _ => None,
    };
    let rotary = kind.rotary(op)?;
    let args = [
        Arg::tensor(&x_view),
        Arg::tensor(&a_view),
        Arg::optional(b_view.as_ref()),
        Arg::i32(span(x, a)),
        Arg::f32(kind.one()),
        rotary.arg(),
        Arg::tensor(&View::new(op, &y)?),
        Arg::i32(d),
        Arg::f32(eps as f32),
    ];
    let name = format!("{}_fwd_{}", kind.name(), chunks(d));
    gpu.launch("norm/norm", &name, Launch::blocks((rows, 1, 1), 128), &args)?;
    Ok(y)
}

#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    op: &'static str,
    gpu: &Gpu,
    x: &Tensor,
    a: &Tensor,
    kind: Kind<'_>,
    dy: &Tensor,
    dres: Option<&Tensor>,
    eps: f64,
    out: DType,
) -> Result<Tensor> {
    let d = x.dims()[x.rank() - 1];
    let rows = x.elem_count() / d;
    let dx = gpu.empty(x.shape(), out)?;
    let (x_view, a_view, dy_view) = (View::new(op, x)?, View::new(op, a)?, View::new(op, dy)?);
    let dres_view = dres.map(|t| View::new(op, t)).transpose()?;
    let rotary = kind.rotary(op)?;
    let args = [
        Arg::tensor(&x_view),
        Arg::tensor(&a_view),
        Arg::i32(span(x, a)),
        Arg::f32(kind.one()),
        rotary.arg(),
        Arg::tensor(&dy_view),
        Arg::optional(dres_view.as_ref()),
        Arg::tensor(&View::new(op, &dx)?),
        Arg::i32(d),
        Arg::f32(eps as f32),
    ];
    let threads = 64 * chunks(d);
    let name = format!("{}_bwd_{threads}", kind.name());
    gpu.launch("norm/norm", &name, Launch::blocks((rows, 1, 1), threads as u32), &args)?;
    Ok(dx)
}
