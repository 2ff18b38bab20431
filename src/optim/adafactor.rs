//! Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) in the arithmetic of the `transformers` library, which the old
//! trainer uses: a second moment kept as one mean per row and per column instead of one number per weight. Written in
//! plain tensor operations, so it runs wherever masters and gradients lie, and nothing is read back.
//!
//! One step over a matrix `p_oi` with gradient `g_oi`, counting `t` from 1:
//! `β = 1 − t^decay_rate`, `s = g² + eps1`, `row_o ← β·row + (1 − β)·mean_i s`, `col_i ← β·col + (1 − β)·mean_o s`,
//! `u = g / √(row/mean(row) · col)`, `u ← u / max(1, rms(u)/clip)`, `u ← lr_t·u`, then with a first moment
//! `m ← β1·m + (1 − β1)·u`, `u = m`; `p ← p − lr_t·wd·p − u`.
//! `lr_t` is the given rate, or with `relative_step` `min(1e-2, 1/√t)` (`1e-6·t` in place of `1e-2` with `warmup_init`);
//! with `scale_parameter` it is multiplied by `max(eps2, rms(p))`.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};

use super::Buffers;
use crate::adapter::params::{Layout, Param};
use crate::adapter::{add_assign, Flat};
use crate::error::UserError;
use crate::kwargs::KwArgs;

/// What stays the same over a run; defaults are the library's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adafactor {
    /// Added to squared gradients.
    pub eps1: f64,
    /// Least scale of a parameter.
    pub eps2: f64,
    pub clip_threshold: f64,
    pub decay_rate: f64,
    /// Keeps a first moment where given.
    pub beta1: Option<f64>,
    pub weight_decay: f64,
    pub scale_parameter: bool,
    /// The optimizer sets its own rates; the given one is not used.
    pub relative_step: bool,
    pub warmup_init: bool,
}

impl Default for Adafactor {
    fn default() -> Self {
        Self {
            eps1: 1e-30,
            eps2: 1e-3,
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            weight_decay: 0.0,
            scale_parameter: true,
            relative_step: true,
            warmup_init: false,
        }
    }
}

impl Adafactor {
    pub(super) fn parse(args: &mut KwArgs) -> Result<Self, UserError> {
        let mut a = Self::default();
        if let Some(eps) = args.take_numbers("eps")? {
            match eps[..] {
                [eps1, eps2] if eps1 > 0.0 && eps2 > 0.0 => (a.eps1, a.eps2) = (eps1, eps2),
                _ => return Err(args.error("eps", "must be two positive numbers, such as (1e-30, 1e-3)")),
            }
        }
        let mut number = |key: &'static str, to: &mut f64, good: fn(f64) -> bool, what: &str| {
            if let Some(v) = args.take_f64(key)? {
                *to = v;
            }
            match good(*to) {
                true => Ok(()),
                false => Err(args.error(key, what)),
            }
        };
        number("clip_threshold", &mut a.clip_threshold, |v| v > 0.0, "must be positive")?;
        number("decay_rate", &mut a.decay_rate, |v| v < 0.0, "must be negative, such as -0.8")?;
        number("weight_decay", &mut a.weight_decay, |v| v >= 0.0, "must not be negative")?;
        a.beta1 = args.take_f64("beta1")?;
        if a.beta1.is_some_and(|b| !(0.0..1.0).contains(&b)) {
            return Err(args.error("beta1", "must lie in 0..1"));
        }
        for (key, to) in [
            ("scale_parameter", &mut a.scale_parameter),
            ("relative_step", &mut a.relative_step),
            ("warmup_init", &mut a.warmup_init),
        ] {
            if let Some(v) = args.take_bool(key)? {
                *to = v;
            }
        }
        if a.warmup_init && !a.relative_step {
            return Err(args.error("warmup_init", "needs relative_step=True"));
        }
        Ok(a)
    }
}

/// Moments of one parameter.
struct Moments {
    /// `[o, 1]`
    row: Tensor,
    /// `[1, i]`
    col: Tensor,
    /// `[o, i]`, with `beta1`.
    m: Option<Tensor>,
}

/// The moments of one network, in the order of its parameters.
pub struct State(Vec<Moments>);

/// Root of the mean square, `[1, 1]`.
fn rms(t: &Tensor) -> Result<Tensor> {
    Ok(t.sqr()?.mean_all()?.sqrt()?.reshape((1, 1))?)
}

impl State {
    pub fn new(spec: &Adafactor, layout: &Layout, device: &Device) -> Result<Self> {
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, device);
        let of = |p: &Param| -> Result<Moments> {
            let [o, i] = p.shape;
            let m = spec.beta1.map(|_| zeros((o, i))).transpose()?;
            Ok(Moments { row: zeros((o, 1))?, col: zeros((1, i))?, m })
        };
        Ok(Self(layout.params.iter().map(of).collect::<Result<_>>()?))
    }

    /// Step `number` (from 1); `rate` gives the learning rate of a parameter's group.
    pub fn step(
        &mut self,
        spec: &Adafactor,
        number: u64,
        layout: &Layout,
        (master, grads): (&Flat, &Flat),
        rate: impl Fn(bool) -> f64,
        grad_scale: f64,
    ) -> Result<()> {
        let t = number as f64;
        let keep = 1.0 - t.powf(spec.decay_rate);
        let relative = (if spec.warmup_init { 1e-6 * t } else { 1e-2 }).min(1.0 / t.sqrt());
        for (param, moments) in layout.params.iter().zip(&mut self.0) {
            let (o, i) = (param.shape[0], param.shape[1]);
            let p_oi = master.view(&param.range, (o, i))?;
            let g_oi = grads.view(&param.range, (o, i))?.affine(grad_scale, 0.0)?;
            let square_oi = g_oi.sqr()?.affine(1.0, spec.eps1)?;
            let mix = |old: &Tensor, new: Tensor| -> Result<Tensor> {
                Ok((old.affine(keep, 0.0)? + new.affine(1.0 - keep, 0.0)?)?)
            };
            moments.row = mix(&moments.row, square_oi.mean_keepdim(1)?)?;
            moments.col = mix(&moments.col, square_oi.mean_keepdim(0)?)?;
            drop(square_oi);
            let by_row = moments.row.broadcast_div(&moments.row.mean_keepdim(0)?)?.sqrt()?.recip()?;
            let by_col = moments.col.sqrt()?.recip()?;
            let mut u_oi = g_oi.broadcast_mul(&by_row)?.broadcast_mul(&by_col)?;
            let over = rms(&u_oi)?.affine(1.0 / spec.clip_threshold, 0.0)?.maximum(1.0)?;
            let lr = if spec.relative_step { relative } else { rate(param.plus) };
            let lr_11 = match spec.scale_parameter {
                true => rms(&p_oi)?.maximum(spec.eps2)?.affine(lr, 0.0)?,
                false => Tensor::new(&[[lr as f32]], p_oi.device())?,
            };
            u_oi = u_oi.broadcast_mul(&lr_11.div(&over)?)?;
            if let (Some(beta1), Some(m)) = (spec.beta1, &mut moments.m) {
                *m = (m.affine(beta1, 0.0)? + u_oi.affine(1.0 - beta1, 0.0)?)?;
                u_oi = m.clone();
            }
            if spec.weight_decay > 0.0 {
                u_oi = (u_oi + p_oi.broadcast_mul(&lr_11.affine(spec.weight_decay, 0.0)?)?)?;
            }
            add_assign(&p_oi, &u_oi.neg()?)?;
        }
        Ok(())
    }

    /// Copies of all moments by name.
    pub fn export(&self, layout: &Layout) -> Result<Buffers> {
        let mut out = Buffers::default();
        for (p, moments) in layout.params.iter().zip(&self.0) {
            for (part, tensor) in moments.parts() {
                out.f32.insert(format!("{}.{part}", layout.full_name(p)), tensor.flatten_all()?.to_vec1()?);
            }
        }
        Ok(out)
    }

    /// Replaces the moments by exported ones.
    pub fn import(&mut self, layout: &Layout, buffers: &Buffers) -> Result<()> {
        for (p, moments) in layout.params.iter().zip(&mut self.0) {
            for (part, tensor) in moments.parts_mut() {
                let name = format!("{}.{part}", layout.full_name(p));
                let from = buffers.f32.get(&name).with_context(|| format!("the optimizer state lacks {name}"))?;
                let (have, want) = (from.len(), tensor.elem_count());
                anyhow::ensure!(have == want, "the optimizer state {name} has {have} elements, this network's {want}");
                *tensor = Tensor::from_slice(from, tensor.dims(), tensor.device())?;
            }
        }
        Ok(())
    }
}

impl Moments {
    fn parts(&self) -> Vec<(&'static str, &Tensor)> {
        let mut parts = vec![("row", &self.row), ("col", &self.col)];
        parts.extend(self.m.as_ref().map(|m| ("m", m)));
        parts
    }

    fn parts_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        let mut parts = vec![("row", &mut self.row), ("col", &mut self.col)];
        parts.extend(self.m.as_mut().map(|m| ("m", m)));
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Optimizer, OptimizerSpec};
    use super::*;
    use crate::adapter::{AdapterParams, Grads, NetworkSpec};
    use wan_models::arch::Site;

    fn setup(args: &[&str]) -> (AdapterParams, Grads, Optimizer) {
        let site = Site { name: "a".into(), in_features: 7, out_features: 5 };
        let params = AdapterParams::new(NetworkSpec::lora(3, 3.0), vec![site], 3, &Device::Cpu).unwrap();
        let grads = Grads::new(params.layout().clone(), &Device::Cpu).unwrap();
        let args: Vec<String> = args.iter().map(|s| s.to_string()).collect();
        let spec = OptimizerSpec::parse("Adafactor", &args).unwrap();
        let optimizer = Optimizer::on(spec, params.layout(), &Device::Cpu).unwrap();
        (params, grads, optimizer)
    }

    fn step(params: &AdapterParams, grads: &Grads, optimizer: &mut Optimizer, lr: f64) {
        let layout = params.layout().clone();
        optimizer.step(&layout, params.master(), grads.flat(), lr, lr, 1.0).unwrap();
    }

    /// A gradient that is a product of a row and a column factor has a factored second moment without error: the first
    /// update is its sign, times the rate.
    #[test]
    fn the_first_step_on_a_gradient_of_rank_one_moves_by_the_rate() {
        let (params, grads, mut optimizer) = setup(&["relative_step=False", "scale_parameter=False"]);
        let before = params.master().to_vec().unwrap();
        let mut g = vec![0f32; before.len()];
        for p in &params.layout().params {
            for (k, cell) in g[p.range.clone()].iter_mut().enumerate() {
                let (o, i) = (k / p.shape[1], k % p.shape[1]);
                let sign = if (o + i) % 2 == 0 { 1.0 } else { -1.0 };
                *cell = sign * (0.1 + o as f32) * (0.3 + 2.0 * i as f32);
            }
        }
        grads.flat().set(&(0..g.len()), &g).unwrap();
        step(&params, &grads, &mut optimizer, 1e-3);
        for ((was, now), g) in before.iter().zip(params.master().to_vec().unwrap()).zip(&g) {
            assert!((was - now - 1e-3 * g.signum()).abs() < 1e-6, "{was} {now} {g}");
        }
    }

    /// The formulas of the module's head, in scalar fp64.
    #[test]
    fn steps_follow_the_formulas_in_double_precision() {
        for args in [
            vec![],
            vec!["relative_step=False", "weight_decay=0.1"],
            vec!["warmup_init=True", "beta1=0.9", "clip_threshold=0.5"],
            vec!["relative_step=False", "scale_parameter=False", "decay_rate=-0.5", "eps=(1e-20, 0.01)"],
        ] {
            let (params, grads, mut optimizer) = setup(&args);
            let spec = optimizer.spec.adafactor;
            let layout = params.layout().clone();
            let mut p: Vec<f64> = params.master().to_vec().unwrap().into_iter().map(f64::from).collect();
            let mut moments: Vec<(Vec<f64>, Vec<f64>, Vec<f64>)> = layout
                .params
                .iter()
                .map(|q| (vec![0.0; q.shape[0]], vec![0.0; q.shape[1]], vec![0.0; q.range.len()]))
                .collect();
            let lr = 3e-3;
            for t in 1..=4u64 {
                let g: Vec<f32> =
                    (0..p.len()).map(|k| ((k * 37 + t as usize * 11) % 101) as f32 / 50.0 - 1.0).collect();
                grads.flat().set(&(0..g.len()), &g).unwrap();
                step(&params, &grads, &mut optimizer, lr);
                let keep = 1.0 - (t as f64).powf(spec.decay_rate);
                for (q, (row, col, m)) in layout.params.iter().zip(&mut moments) {
                    let (rows, cols) = (q.shape[0], q.shape[1]);
                    let g: Vec<f64> = g[q.range.clone()].iter().map(|v| f64::from(*v)).collect();
                    let p = &mut p[q.range.clone()];
                    let s: Vec<f64> = g.iter().map(|v| v * v + spec.eps1).collect();
                    for o in 0..rows {
                        let mean = s[o * cols..(o + 1) * cols].iter().sum::<f64>() / cols as f64;
                        row[o] = keep * row[o] + (1.0 - keep) * mean;
                    }
                    for i in 0..cols {
                        let mean = (0..rows).map(|o| s[o * cols + i]).sum::<f64>() / rows as f64;
                        col[i] = keep * col[i] + (1.0 - keep) * mean;
                    }
                    let mean_row = row.iter().sum::<f64>() / rows as f64;
                    let mut u: Vec<f64> =
                        (0..g.len()).map(|k| g[k] / (row[k / cols] / mean_row * col[k % cols]).sqrt()).collect();
                    let rms = |v: &[f64]| (v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64).sqrt();
                    let over = (rms(&u) / spec.clip_threshold).max(1.0);
                    let own = if spec.warmup_init { 1e-6 * t as f64 } else { 1e-2 };
                    let mut lr = if spec.relative_step { own.min(1.0 / (t as f64).sqrt()) } else { lr };
                    if spec.scale_parameter {
                        lr *= rms(p).max(spec.eps2);
                    }
                    u.iter_mut().for_each(|u| *u *= lr / over);
                    if let Some(beta1) = spec.beta1 {
                        for (m, u) in m.iter_mut().zip(&mut u) {
                            *m = beta1 * *m + (1.0 - beta1) * *u;
                            *u = *m;
                        }
                    }
                    for (p, u) in p.iter_mut().zip(&u) {
                        *p -= lr * spec.weight_decay * *p + u;
                    }
                }
            }
            for (a, b) in params.master().to_vec().unwrap().iter().zip(&p) {
                assert!((f64::from(*a) - b).abs() < 1e-6, "{args:?}: {a} {b}");
            }
        }
    }

    #[test]
    fn arguments_are_checked() {
        let text = |args: &[&str]| {
            let args: Vec<String> = args.iter().map(|s| s.to_string()).collect();
            OptimizerSpec::parse("adafactor", &args).unwrap_err().to_string()
        };
        assert!(text(&["eps=1e-8"]).contains("two positive numbers"));
        assert!(text(&["beta1=1.0"]).contains("0..1"));
        assert!(text(&["relative_step=False", "warmup_init=True"]).contains("relative_step"));
        assert!(text(&["betas=(0.9, 0.99)"]).contains("unknown key `betas`"));
        assert!(text(&["decay_rate=0.8"]).contains("negative"));
    }
}
