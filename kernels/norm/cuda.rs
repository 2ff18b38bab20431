//! The norms' kernels, see `norm.cu`.

use candle_core::{DType, Tensor};

use super::rows::{self, Rows};
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

/// Whether a kernel takes rows of `d` (and heads of `h`).
pub(super) fn fits(d: usize, h: Option<usize>) -> bool {
    d.is_multiple_of(8) && d <= rows::WIDEST && h.is_none_or(|h| h.is_multiple_of(8))
}

/// A branch that joins `x` before the norm, by its gate [b, d] or [b, l, d] where it has one.
pub(super) struct Branch<'a> {
    pub gate: Option<&'a Tensor>,
    /// Forward: the branch, like `x`.
    pub joins: Option<&'a Tensor>,
    /// Where forward writes the sum, and backward the branch's gradient.
    pub written: &'a Tensor,
}

/// `wan::Branch`, and what it points to.
fn branch_arg(op: &'static str, x: &Tensor, branch: Option<Branch<'_>>) -> Result<([Option<View>; 2], Arg)> {
    let Some(Branch { gate, joins, written }) = branch else { return Ok(([None, None], Arg::longs(&[]))) };
    let view = |t: Option<&Tensor>| t.map(|t| View::new(op, t)).transpose();
    let (gate, joins, span) = (view(gate)?, view(joins)?, gate.map_or(1, |gate| span(x, gate)));
    let [first, second] = [&gate, &joins].map(|v| (Arg::optional(v.as_ref()), 2));
    let arg = Arg::join(&[first, second, (Arg::tensor(&View::new(op, written)?), 2), (Arg::i32(span), 1)]);
    Ok(([gate, joins], arg))
}

/// Rows that share one vector: 0 for all.
fn span(x: &Tensor, a: &Tensor) -> usize {
    match (x.rank(), a.rank()) {
        (3, 2) => x.dims()[1],
        (3, 3) => 1,
        _ => 0,
    }
}

/// The launch that goes through `rows`, with as many blocks as the kernels' registers are bounded for.
fn launch(gpu: &Gpu, rows: usize, through: &Rows) -> Launch {
    let blocks = rows.min(gpu.card().processors * (640 / through.threads).max(1));
    Launch { grid: (blocks as u32, 1, 1), block: through.threads as u32, shared: through.shared }
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

/// `shape` is that of the result, whose elements are those of `x`. A `branch` goes with [`Kind::Layer`].
#[allow(clippy::too_many_arguments)]
pub(super) fn forward(
    op: &'static str,
    gpu: &Gpu,
    x: &Tensor,
    a: &Tensor,
    kind: Kind<'_>,
    branch: Option<Branch<'_>>,
    eps: f64,
    (out, shape): (DType, &[usize]),
) -> Result<Tensor> {
    let name = branch.as_ref().map_or(kind.name(), |_| "residual");
    let joins = branch.as_ref().and_then(|b| b.joins).map(Tensor::dtype);
    let (_joining, branch) = branch_arg(op, x, branch)?;
    let d = x.dims()[x.rank() - 1];
    let rows = x.elem_count() / d;
    let through = Rows::new(d, [Some(x.dtype()), joins]);
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
        branch,
        Arg::tensor(&View::new(op, &y)?),
        Arg::i32(rows),
        Arg::i32(d),
        Arg::f32(eps as f32),
        Arg::i32(through.stages),
    ];
    gpu.launch("norm/norm", &format!("{name}_fwd_{}", through.threads), launch(gpu, rows, &through), &args)?;
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
    branch: Option<Branch<'_>>,
    eps: f64,
    out: DType,
) -> Result<Tensor> {
    let name = branch.as_ref().map_or(kind.name(), |_| "residual");
    let (_joining, branch) = branch_arg(op, x, branch)?;
    let d = x.dims()[x.rank() - 1];
    let rows = x.elem_count() / d;
    let through = Rows::new(d, [Some(x), Some(dy), dres].map(|t| t.map(Tensor::dtype)));
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
        branch,
        Arg::tensor(&View::new(op, &dx)?),
        Arg::i32(rows),
        Arg::i32(d),
        Arg::f32(eps as f32),
        Arg::i32(through.stages),
    ];
    gpu.launch("norm/norm", &format!("{name}_bwd_{}", through.threads), launch(gpu, rows, &through), &args)?;
    Ok(dx)
}
