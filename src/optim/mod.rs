//! The optimizer: AdamW with fp32 or 8-bit moments, or Adafactor, over the flat masters and gradients. A step is a pure
//! function of (masters, gradients, moments, step number, rates), so a restored state continues bit for bit.

use std::collections::BTreeMap;
use std::ops::Range;
use std::str::FromStr;

use anyhow::{bail, Context, Result};
use candle_core::Device;
use wan_kernels::adamw::{self, AdamW, Step};
use wan_kernels::adamw8bit::{self, Moments};

use crate::adapter::params::Layout;
use crate::adapter::Flat;
use crate::error::UserError;
use crate::kwargs::KwArgs;

/// Supported optimizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptimizerKind {
    AdamW,
    /// Moments in blocks of 256 8-bit codes, the scheme of bitsandbytes.
    AdamW8bit,
    /// Second moments as row and column means.
    Adafactor,
}

impl OptimizerKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::AdamW8bit => "adamw8bit",
            Self::Adafactor => "adafactor",
        }
    }
}

impl FromStr for OptimizerKind {
    type Err = UserError;

    /// Names are case-insensitive; a dotted class path counts by its last part.
    fn from_str(text: &str) -> Result<Self, UserError> {
        match text.rsplit('.').next().unwrap_or_default().to_lowercase().as_str() {
            "adamw" => Ok(Self::AdamW),
            "adamw8bit" => Ok(Self::AdamW8bit),
            "adafactor" => Ok(Self::Adafactor),
            _ => Err(UserError::usage(format!("--optimizer_type {text} is not supported"))
                .hint("use adamw (32-bit moments), adamw8bit (a quarter of the memory) or adafactor (next to none)")),
        }
    }
}

/// `--optimizer_type` and `--optimizer_args`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerSpec {
    pub kind: OptimizerKind,
    pub adamw: AdamW,
    pub adafactor: Adafactor,
}

impl OptimizerSpec {
    pub fn parse(kind: &str, args: &[String]) -> Result<Self, UserError> {
        let kind: OptimizerKind = kind.parse()?;
        let mut args = KwArgs::parse("optimizer_args", args)?;
        let mut adamw = AdamW::default();
        if kind == OptimizerKind::Adafactor {
            let adafactor = Adafactor::parse(&mut args)?;
            args.finish()?;
            return Ok(Self { kind, adamw, adafactor });
        }
        if let Some(decay) = args.take_f64("weight_decay")? {
            adamw.weight_decay = decay;
        }
        if let Some(eps) = args.take_f64("eps")? {
            adamw.eps = eps;
        }
        if let Some(betas) = args.take_numbers("betas")? {
            match betas[..] {
                [b1, b2] if (0.0..1.0).contains(&b1) && (0.0..1.0).contains(&b2) => {
                    (adamw.beta1, adamw.beta2) = (b1, b2)
                }
                _ => return Err(args.error("betas", "must be two numbers in 0..1, such as (0.9, 0.999)")),
            }
        }
        if adamw.weight_decay < 0.0 {
            return Err(args.error("weight_decay", "must not be negative"));
        }
        if adamw.eps <= 0.0 {
            return Err(args.error("eps", "must be positive"));
        }
        args.finish()?;
        Ok(Self { kind, adamw, adafactor: Adafactor::default() })
    }

    /// Whether the optimizer sets its own rates, so that learning rate and schedule play no part.
    pub fn own_rates(&self) -> bool {
        self.kind == OptimizerKind::Adafactor && self.adafactor.relative_step
    }
}

/// Buffers of an optimizer as a checkpoint holds them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Buffers {
    pub f32: BTreeMap<String, Vec<f32>>,
    pub u8: BTreeMap<String, Vec<u8>>,
}

mod adafactor;
#[cfg(feature = "cuda")]
mod cuda;

pub use adafactor::Adafactor;

enum State {
    #[cfg(feature = "cuda")]
    Cuda(cuda::State),
    Full {
        m: Vec<f32>,
        v: Vec<f32>,
    },
    /// One pair of moments per parameter: blocks of codes never reach over its end.
    Coded(Vec<Moments>),
    /// Adafactor, wherever the masters lie.
    Factored(adafactor::State),
}

/// The moments of one network.
pub struct Optimizer {
    spec: OptimizerSpec,
    state: State,
    /// Steps applied, which is the exponent of the bias correction; a skipped step does not count.
    applied: u64,
}

impl Optimizer {
    /// With the moments where masters and gradients lie.
    pub fn on(spec: OptimizerSpec, layout: &Layout, device: &Device) -> Result<Self> {
        if spec.kind == OptimizerKind::Adafactor {
            let state = State::Factored(adafactor::State::new(&spec.adafactor, layout, device)?);
            return Ok(Self { spec, state, applied: 0 });
        }
        #[cfg(feature = "cuda")]
        if let Some(gpu) = wan_kernels::gpu::Gpu::of(device) {
            return Ok(Self { spec, state: State::Cuda(cuda::State::new(gpu, spec.kind, layout)?), applied: 0 });
        }
        anyhow::ensure!(device.is_cpu(), "the optimizer has no kernels for {device:?}");
        let zeros = || vec![0f32; layout.len()];
        let state = match spec.kind {
            OptimizerKind::AdamW8bit => {
                State::Coded(layout.params.iter().map(|p| Moments::new(p.range.len())).collect())
            }
            _ => State::Full { m: zeros(), v: zeros() },
        };
        Ok(Self { spec, state, applied: 0 })
    }

    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// One step. `lr` is the rate of the main group, `lr_plus` that of the LoRA+ group; every gradient is multiplied by
    /// `grad_scale` first (clipping, the inverse of a loss scale).
    pub fn step(
        &mut self,
        layout: &Layout,
        master: &Flat,
        grads: &Flat,
        lr: f64,
        lr_plus: f64,
        grad_scale: f64,
    ) -> Result<()> {
        let at = Step { number: self.applied + 1, lr, grad_scale };
        let rate = |plus: bool| if plus { lr_plus } else { lr };
        let (adamw, state) = (&self.spec.adamw, &mut self.state);
        if let State::Factored(state) = state {
            state.step(&self.spec.adafactor, at.number, layout, (master, grads), rate, grad_scale)?;
            self.applied += 1;
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        if let State::Cuda(state) = state {
            state.step(adamw, &at, &merged(layout, rate), lr_plus, master.tensor(), grads.tensor())?;
            self.applied += 1;
            return Ok(());
        }
        master.write_with(grads, |params, grads| -> Result<()> {
            match state {
                State::Full { m, v } => {
                    let ranges = merged(layout, rate);
                    adamw::step_ranges(adamw, &at, &ranges, params, grads, m, v)?;
                }
                State::Factored(_) => unreachable!("stepped above"),
                #[cfg(feature = "cuda")]
                State::Cuda(_) => unreachable!("stepped above"),
                State::Coded(all) => {
                    for (p, moments) in layout.params.iter().zip(all) {
                        let r = || p.range.clone();
                        let at = Step { lr: rate(p.plus), ..at };
                        adamw8bit::step(adamw, &at, &mut params[r()], &grads[r()], moments)?;
                    }
                }
            }
            Ok(())
        })??;
        self.applied += 1;
        Ok(())
    }

    /// Copies of all moments by name.
    pub fn export(&self, layout: &Layout) -> Result<Buffers> {
        match &self.state {
            #[cfg(feature = "cuda")]
            State::Cuda(state) => Ok(export(&state.export()?, layout)),
            State::Factored(state) => state.export(layout),
            state => Ok(export(state, layout)),
        }
    }

    /// Replaces the moments by exported ones. Every buffer must be there with its length.
    pub fn import(&mut self, layout: &Layout, buffers: &Buffers, applied: u64) -> Result<()> {
        match &mut self.state {
            #[cfg(feature = "cuda")]
            State::Cuda(state) => {
                let mut host = state.export()?;
                import(&mut host, layout, buffers)?;
                state.import(&host)?;
            }
            State::Factored(state) => state.import(layout, buffers)?,
            state => import(state, layout, buffers)?,
        }
        self.applied = applied;
        Ok(())
    }
}

fn export(state: &State, layout: &Layout) -> Buffers {
    let mut out = Buffers::default();
    match state {
        #[cfg(feature = "cuda")]
        State::Cuda(_) => unreachable!("exported to host memory first"),
        State::Factored(_) => unreachable!("exports itself"),
        State::Full { m, v } => {
            out.f32.insert("m".into(), m.clone());
            out.f32.insert("v".into(), v.clone());
        }
        State::Coded(all) => {
            for (p, moments) in layout.params.iter().zip(all) {
                let name = |part: &str| format!("{}.{part}", layout.full_name(p));
                match moments {
                    Moments::Full { m, v } => {
                        out.f32.insert(name("m"), m.clone());
                        out.f32.insert(name("v"), v.clone());
                    }
                    Moments::Blocks { m, v, m_max, v_max } => {
                        out.u8.insert(name("m"), m.clone());
                        out.u8.insert(name("v"), v.clone());
                        out.f32.insert(name("m_max"), m_max.clone());
                        out.f32.insert(name("v_max"), v_max.clone());
                    }
                }
            }
        }
    }
    out
}

fn import(state: &mut State, layout: &Layout, buffers: &Buffers) -> Result<()> {
    match state {
        #[cfg(feature = "cuda")]
        State::Cuda(_) => unreachable!("imported through host memory"),
        State::Factored(_) => unreachable!("imports itself"),
        State::Full { m, v } => {
            fill(m, buffers.f32.get("m"), "m")?;
            fill(v, buffers.f32.get("v"), "v")?;
        }
        State::Coded(all) => {
            for (p, moments) in layout.params.iter().zip(all) {
                let name = |part: &str| format!("{}.{part}", layout.full_name(p));
                let floats = |part: &str| buffers.f32.get(&name(part));
                let codes = |part: &str| buffers.u8.get(&name(part));
                match moments {
                    Moments::Full { m, v } => {
                        fill(m, floats("m"), &name("m"))?;
                        fill(v, floats("v"), &name("v"))?;
                    }
                    Moments::Blocks { m, v, m_max, v_max } => {
                        fill(m, codes("m"), &name("m"))?;
                        fill(v, codes("v"), &name("v"))?;
                        fill(m_max, floats("m_max"), &name("m_max"))?;
                        fill(v_max, floats("v_max"), &name("v_max"))?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn fill<T: Copy>(to: &mut [T], from: Option<&Vec<T>>, name: &str) -> Result<()> {
    let from = from.with_context(|| format!("the optimizer state lacks {name}"))?;
    if from.len() != to.len() {
        bail!("the optimizer state {name} has {} elements, this network's {}", from.len(), to.len());
    }
    to.copy_from_slice(from);
    Ok(())
}

/// Ranges of one rate each, neighbours of equal rate joined.
fn merged(layout: &Layout, rate: impl Fn(bool) -> f64) -> Vec<(Range<usize>, f64)> {
    let mut ranges: Vec<(Range<usize>, f64)> = Vec::new();
    for p in &layout.params {
        let lr = rate(p.plus);
        match ranges.last_mut() {
            Some((last, of)) if *of == lr && last.end == p.range.start => last.end = p.range.end,
            _ => ranges.push((p.range.clone(), lr)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{AdapterParams, Grads, NetworkSpec};
    use wan_models::arch::Site;

    fn setup(kind: &str, ratio: Option<f64>) -> (AdapterParams, Grads, Optimizer) {
        let site = |name: &str| Site { name: name.into(), in_features: 600, out_features: 40 };
        let spec = NetworkSpec { loraplus_lr_ratio: ratio, ..NetworkSpec::lora(8, 8.0) };
        let params = AdapterParams::new(spec, vec![site("a"), site("b")], 3, &Device::Cpu).unwrap();
        let grads = Grads::new(params.layout().clone(), &Device::Cpu).unwrap();
        let values: Vec<f32> = (0..params.len()).map(|i| ((i * 37 % 101) as f32 - 50.0) / 500.0).collect();
        grads.flat().set(&(0..values.len()), &values).unwrap();
        let optimizer = OptimizerSpec::parse(kind, &["weight_decay=0.0".into()]).unwrap();
        let optimizer = Optimizer::on(optimizer, params.layout(), &Device::Cpu).unwrap();
        (params, grads, optimizer)
    }

    #[test]
    fn lora_plus_moves_the_up_matrices_faster() {
        for kind in ["AdamW", "bitsandbytes.optim.AdamW8bit"] {
            let (params, grads, mut optimizer) = setup(kind, Some(4.0));
            let before = params.master().to_vec().unwrap();
            let layout = params.layout().clone();
            optimizer.step(&layout, params.master(), grads.flat(), 1e-3, 4e-3, 1.0).unwrap();
            let after = params.master().to_vec().unwrap();
            for p in &layout.params {
                let i = p.range.start + 1;
                // The first Adam step moves an element by its rate, whatever the gradient.
                let want = if p.plus { 4e-3 } else { 1e-3 };
                assert!(((after[i] - before[i]).abs() - want).abs() < 1e-6, "{kind} {}", p.name);
            }
        }
    }

    #[test]
    fn an_exported_state_continues_bit_for_bit() {
        for kind in ["adamw", "adamw8bit", "adafactor"] {
            let (a, grads, mut one) = setup(kind, None);
            let layout = a.layout().clone();
            let step = |o: &mut Optimizer, p: &AdapterParams| {
                o.step(&layout, p.master(), grads.flat(), 1e-3, 1e-3, 0.5).unwrap();
            };
            (0..3).for_each(|_| step(&mut one, &a));
            let (b, _, mut two) = setup(kind, None);
            two.import(&layout, &one.export(&layout).unwrap(), one.applied()).unwrap();
            b.master().set(&(0..a.len()), &a.master().to_vec().unwrap()).unwrap();
            (0..3).for_each(|_| (step(&mut one, &a), step(&mut two, &b)).0);
            let bits = |p: &AdapterParams| -> Vec<u32> {
                p.master().to_vec().unwrap().into_iter().map(f32::to_bits).collect()
            };
            assert_eq!(bits(&a), bits(&b), "{kind}");
            assert_eq!(one.export(&layout).unwrap(), two.export(&layout).unwrap());
            assert!(two.import(&layout, &Buffers::default(), 3).is_err());
        }
    }

    #[test]
    fn mistakes_are_named() {
        let text = |kind: &str, args: &[&str]| {
            let args: Vec<String> = args.iter().map(|s| s.to_string()).collect();
            OptimizerSpec::parse(kind, &args).unwrap_err().to_string()
        };
        assert!(text("Prodigy", &[]).contains("adamw8bit"));
        assert!(text("", &[]).contains("adamw"));
        assert!(text("adamw", &["weigth_decay=0.1"]).contains("did you mean `weight_decay`"));
        assert!(text("adamw", &["betas=0.9"]).contains("two numbers"));
        let spec = OptimizerSpec::parse("AdamW8bit", &["betas=(0.8, 0.9)".into(), "eps=1e-6".into()]).unwrap();
        assert_eq!(
            (spec.adamw.beta1, spec.adamw.beta2, spec.adamw.eps, spec.adamw.weight_decay),
            (0.8, 0.9, 1e-6, 0.01)
        );
    }
}
