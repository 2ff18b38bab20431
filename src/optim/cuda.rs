//! The optimizer's moments on a card, for masters and gradients that lie there.

use std::ops::Range;

use anyhow::Result;
use candle_core::{DType, Tensor};
use wan_kernels::adamw::{self, AdamW, Step};
use wan_kernels::adamw8bit::cuda::{Part, State as Coded};
use wan_kernels::gpu::Gpu;

use super::OptimizerKind;
use crate::adapter::params::Layout;

pub struct State {
    gpu: Gpu,
    moments: Moments,
}

enum Moments {
    Full { m: Tensor, v: Tensor },
    Coded(Coded),
}

impl State {
    pub fn new(gpu: Gpu, kind: OptimizerKind, layout: &Layout) -> Result<Self> {
        let zeros = || Tensor::zeros(layout.len(), DType::F32, &gpu.device());
        let moments = match kind {
            OptimizerKind::AdamW8bit => {
                let parts = layout.params.iter().map(|p| Part { range: p.range.clone(), plus: p.plus }).collect();
                Moments::Coded(Coded::new(&gpu, parts)?)
            }
            _ => Moments::Full { m: zeros()?, v: zeros()? },
        };
        Ok(Self { gpu, moments })
    }

    /// `ranges`: those of one rate each; `at.lr` and `lr_plus` are the same rates by group.
    pub fn step(
        &mut self,
        adamw: &AdamW,
        at: &Step,
        ranges: &[(Range<usize>, f64)],
        lr_plus: f64,
        params: &Tensor,
        grads: &Tensor,
    ) -> Result<()> {
        match &mut self.moments {
            Moments::Full { m, v } => adamw::cuda::step_ranges(&self.gpu, adamw, at, ranges, [params, grads, m, v])?,
            Moments::Coded(coded) => coded.step(&self.gpu, adamw, at, lr_plus, params, grads)?,
        }
        Ok(())
    }

    /// Copies in host memory.
    pub fn export(&self) -> Result<super::State> {
        Ok(match &self.moments {
            Moments::Full { m, v } => super::State::Full { m: m.to_vec1()?, v: v.to_vec1()? },
            Moments::Coded(coded) => super::State::Coded(coded.export()?),
        })
    }

    /// Takes over what [`Self::export`] gave, or what was read into its place.
    pub fn import(&mut self, host: &super::State) -> Result<()> {
        match (&mut self.moments, host) {
            (Moments::Full { m, v }, super::State::Full { m: m_host, v: v_host }) => {
                let device = m.device().clone();
                *m = Tensor::from_slice(m_host, m_host.len(), &device)?;
                *v = Tensor::from_slice(v_host, v_host.len(), &device)?;
            }
            (Moments::Coded(coded), super::State::Coded(all)) => coded.import(all)?,
            _ => anyhow::bail!("the optimizer state is of another kind"),
        }
        Ok(())
    }
}
