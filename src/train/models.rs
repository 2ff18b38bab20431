//! The frozen models under an adapter: one, or the two experts of Wan 2.2.

use anyhow::{anyhow, Result};
use wan_models::arch::WanArch;
use wan_models::wan::{WanModel, WeightProvider};

use super::expert::Expert;
use crate::error::UserError;

/// A frozen model and whoever has the weights of its blocks.
#[derive(Clone, Copy)]
pub struct Frozen<'a> {
    pub model: &'a WanModel,
    pub blocks: &'a dyn WeightProvider,
}

/// The frozen models of a run.
#[derive(Clone, Copy)]
pub enum Models<'a> {
    One(Frozen<'a>),
    /// Two experts under one adapter. Both stay at hand: every micro-batch is computed by one of them.
    Two {
        high: Frozen<'a>,
        low: Frozen<'a>,
    },
}

impl<'a> Models<'a> {
    pub fn one(model: &'a WanModel, blocks: &'a dyn WeightProvider) -> Self {
        Self::One(Frozen { model, blocks })
    }

    /// The one that computes a batch of `expert`.
    pub fn of(&self, expert: Option<Expert>) -> Frozen<'a> {
        match (self, expert) {
            (Self::One(model), _) => *model,
            (Self::Two { high, .. }, Some(Expert::High)) => *high,
            (Self::Two { low, .. }, _) => *low,
        }
    }

    /// Both have the same.
    pub fn arch(&self) -> &'a WanArch {
        self.of(None).model.arch()
    }

    /// Refuses models that one adapter does not fit, and a boundary without two models or the other way round.
    pub fn check(&self, boundary: Option<f64>) -> Result<()> {
        match (self, boundary) {
            (Self::One(_), None) => Ok(()),
            (Self::Two { high, low }, Some(_)) if high.model.arch() == low.model.arch() => Ok(()),
            (Self::Two { .. }, Some(_)) => {
                Err(UserError::new("the two experts have different architectures: one adapter does not fit both")
                    .hint("give the two models of one task")
                    .into())
            }
            (Self::One(_), Some(_)) => Err(anyhow!("a boundary between experts, and one model")),
            (Self::Two { .. }, None) => Err(anyhow!("two experts, and no boundary between them")),
        }
    }
}
