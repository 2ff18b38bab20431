//! One preview: from noise to a latent with the model and the adapter as they are between two steps.
//!
//! Nothing of the run changes: the numbers come from counters of their own, the weights are only read.
//! Axes: `c` latent channels, `f`, `h`, `w` latent frames, rows, columns; `m` text rows, `d` their width.

use anyhow::{ensure, Result};
use candle_core::{Device, Tensor};
use wan_kernels::philox::{stream, Philox};
use wan_models::adapter::Adapters;
use wan_models::wan::{Timesteps, WanInputs};

use crate::adapter::StepAdapters;
use crate::sampler::{Sampler, Solver};
use crate::train::expert::Expert;
use crate::train::models::{Frozen, Models};
use crate::train::trainer::Trainer;

/// What the model is given for one preview, in host memory.
#[derive(Debug, Clone)]
pub struct Given {
    /// Text features `[m, d]`.
    pub context_md: Tensor,
    /// Those of the negative prompt, where there is guidance.
    pub negative_md: Option<Tensor>,
    /// Channels behind the latent, `[1, ·, f, h, w]`.
    pub y: Option<Tensor>,
    /// CLIP features `[images, tokens, width]`.
    pub clip: Option<Tensor>,
    /// A clean first latent frame `[1, c, 1, h, w]` that takes the noisy one's place (ti2v).
    pub first: Option<Tensor>,
}

/// How one preview is made.
#[derive(Debug, Clone)]
pub struct How {
    /// Latent frames, rows, columns.
    pub fhw: [usize; 3],
    pub seed: u64,
    pub steps: usize,
    pub shift: f64,
    /// Of the low-noise expert (or the only model) and of the high-noise one; 1 asks the model once a step.
    pub guidance: [f64; 2],
    /// Whose guidance a single model takes.
    pub alone: Expert,
    /// The old tool: the adapter's dropout stays on, and of two experts the low-noise one makes all steps.
    pub musubi: bool,
}

/// The latent `[1, c, f, h, w]`, fp32 on the CPU; `None` where `go_on`, asked before each step, said no.
pub fn sample(
    trainer: &Trainer,
    given: &Given,
    how: &How,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Tensor>> {
    let parts = trainer.parts();
    let (exec, arch) = (parts.exec, parts.models.arch());
    let [frames, rows, columns] = how.fhw;
    let tokens = arch.grid(how.fhw)?;
    let here = |t: &Tensor| t.to_device(exec.device());
    let maybe = |t: &Option<Tensor>| t.as_ref().map(here).transpose();
    let (context_md, negative_md) = (here(&given.context_md)?, maybe(&given.negative_md)?);
    let (y, clip_fea) = (maybe(&given.y)?, maybe(&given.clip)?);

    let noise = Philox::new(how.seed, stream::PREVIEW, 0, 0);
    let mut x = noise.normal(&[1, arch.out_dim, frames, rows, columns], &Device::Cpu)?;
    let mut sampler = Sampler::new(Solver::UniPc, how.steps, how.shift)?;
    for i in 0..sampler.steps() {
        if !go_on(i) {
            return Ok(None);
        }
        let t = sampler.timesteps()[i];
        let expert = match (parts.models, trainer.settings().shared_boundary) {
            (Models::Two { .. }, Some(boundary)) if !how.musubi => Some(Expert::at(t.into(), boundary)),
            (Models::Two { .. }, _) => Some(Expert::Low),
            (Models::One(_), _) => None,
        };
        let Frozen { model, blocks } = parts.models.of(expert);
        if let Some(first) = &given.first {
            x = Tensor::cat(&[first, &x.narrow(2, 1, frames - 1)?], 2)?;
        }
        let times = match &given.first {
            Some(_) => {
                let clean = tokens[1] * tokens[2];
                let all = (0..tokens[0] * clean).map(|token| if token < clean { 0.0 } else { t }).collect();
                Timesteps::PerToken(vec![all])
            }
            None => Timesteps::PerSample(vec![t]),
        };
        let dropping = StepAdapters::new(trainer.params(), how.seed, i as u64, exec.device());
        let adapters: &dyn Adapters = if how.musubi { &dropping } else { trainer.params() };
        let x_here = here(&x)?;
        let ask = |context_md: &Tensor| -> Result<Tensor> {
            let inputs = WanInputs {
                x: x_here.clone(),
                t: times.clone(),
                context: vec![context_md.clone()],
                y: y.clone(),
                clip_fea: clip_fea.clone(),
                f_indices: None,
            };
            Ok(model.predict(exec, &inputs, adapters, blocks, None)?.to_device(&Device::Cpu)?)
        };
        let guidance = how.guidance[usize::from(expert.unwrap_or(how.alone) == Expert::High)];
        let with = ask(&context_md)?;
        let v = match &negative_md {
            Some(negative_md) if guidance != 1.0 => {
                let without = ask(negative_md)?;
                (&without + ((with - &without)? * guidance)?)?
            }
            _ => with,
        };
        x = sampler.step(&v, i, &x)?;
    }
    if let Some(first) = &given.first {
        x = Tensor::cat(&[first, &x.narrow(2, 1, frames - 1)?], 2)?;
    }
    let sum = x.sqr()?.sum_all()?.to_scalar::<f32>()?;
    ensure!(sum.is_finite(), "the model gave numbers that are not finite");
    Ok(Some(x))
}
