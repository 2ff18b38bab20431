//! One-frame caches: control pictures and the picture to learn, as frames of one short sequence, each encoded by itself.
//! The controls are given clean in the condition, the target's place there is empty; positions in time say which is which.

use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use wan_models::clip::ClipVision;
use wan_models::vae::Vae;

use super::latents::{encode_frames, frames_to_tensor};
use crate::data::{Entry, Kind};
use crate::error::UserError;

/// Where the frames of a data set's items stand in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    /// `fp_1f_clean_indices`, one for each control picture.
    pub controls: Vec<i64>,
    /// `fp_1f_target_index`.
    pub target: i64,
}

/// Positions that the model has angles for.
const LIMIT: i64 = 1024;

impl Positions {
    /// Those of a data set.
    ///
    /// Errors: a data set of videos, without the keys, without controls, or with positions that the model does not have.
    pub fn of(entry: &Entry) -> Result<Self> {
        let refuse = |what: &str, hint: &str| -> anyhow::Error {
            UserError::usage(format!(
                "--one_frame: {what} (dataset {}: {})",
                entry.index + 1,
                entry.source.path().display()
            ))
            .hint(hint)
            .into()
        };
        const KEYS: &str = "write fp_1f_clean_indices = [0] and fp_1f_target_index = 1, or leave --one_frame out";
        if entry.kind != Kind::Image {
            return Err(refuse(
                "it trains on pictures, and this data set holds videos",
                "leave the data set or the option out",
            ));
        }
        let (Some(controls), Some(target)) = (entry.fp_1f_clean_indices.clone(), entry.fp_1f_target_index) else {
            return Err(refuse("the data set does not say where its frames stand", KEYS));
        };
        if controls.is_empty() || controls.iter().chain([&target]).any(|p| !(0..LIMIT).contains(p)) {
            return Err(refuse("positions are one or more numbers from 0 to 1023", KEYS));
        }
        if controls.contains(&target) {
            return Err(refuse("the target stands where a control stands", KEYS));
        }
        Ok(Self { controls, target })
    }

    /// Latent frames: controls and target.
    pub fn frames(&self) -> usize {
        self.controls.len() + 1
    }

    /// As the recipe of a file records them: the controls', then the target's.
    pub fn record(&self) -> Vec<i64> {
        self.controls.iter().copied().chain([self.target]).collect()
    }

    /// Frames in the order of their positions: position, and which control it is (`None`: the target).
    pub fn order(&self) -> Vec<(i64, Option<usize>)> {
        let mut order: Vec<_> = self.controls.iter().enumerate().map(|(i, p)| (*p, Some(i))).collect();
        order.push((self.target, None));
        order.sort_by_key(|(position, _)| *position);
        order
    }
}

/// What a one-frame file holds, with a batch axis of 1 but for the positions.
pub struct Encoded {
    /// [1,c,F,h,w]
    pub latents: Tensor,
    /// [1,4+c,F,h,w]: mask 1 and the control's latents; at the target mask 0 and the latents of mid-grey.
    pub condition: Tensor,
    /// [F], int32
    pub positions: Tensor,
    /// [tokens,width] of the first control, or [2,tokens,width] where the model sees two pictures.
    pub clip: Option<Tensor>,
}

/// Encodes a target with its controls, all of one size. `see` is the CLIP tower with the number of pictures the model
/// takes; a single control counts for both.
pub fn encode(
    vae: &Vae,
    see: Option<(&ClipVision, usize)>,
    positions: &Positions,
    target: &Arc<RgbImage>,
    controls: &[Arc<RgbImage>],
    device: &Device,
) -> Result<Encoded> {
    let one = |picture: &Arc<RgbImage>| encode_frames(vae, std::slice::from_ref(picture), device);
    let pixels = |picture: &Arc<RgbImage>| -> Result<Tensor> {
        Ok(vae.pixels(&frames_to_tensor(std::slice::from_ref(picture), device)?)?)
    };
    let empty = vae.encode(&pixels(target)?.zeros_like()?)?;
    let (mut latents, mut conditions, mut at) = (Vec::new(), Vec::new(), Vec::new());
    for (position, control) in positions.order() {
        let own = one(control.map_or(target, |i| &controls[i]))?;
        let (b, _, f, h, w) = own.dims5()?;
        let given = if control.is_some() { own.clone() } else { empty.to_dtype(own.dtype())? };
        let mask = (Tensor::ones((b, 4, f, h, w), own.dtype(), own.device())? * f64::from(control.is_some()))?;
        conditions.push(Tensor::cat(&[&mask, &given], 1)?);
        latents.push(own);
        at.push(position as i32);
    }
    let clip = match see {
        None => None,
        Some((vision, images)) => {
            let of = |picture: &Arc<RgbImage>| -> Result<Tensor> {
                Ok(vision.encode(&pixels(picture)?.squeeze(2)?.to_dtype(DType::F32)?)?.to_device(&Device::Cpu)?)
            };
            let seen = (0..images).map(|i| of(&controls[i.min(controls.len() - 1)])).collect::<Result<Vec<_>>>()?;
            let all = Tensor::cat(&seen, 0)?;
            Some(if images == 1 { all.squeeze(0)? } else { all })
        }
    };
    Ok(Encoded {
        latents: Tensor::cat(&latents, 2)?,
        condition: Tensor::cat(&conditions, 2)?,
        positions: Tensor::new(at, &Device::Cpu)?,
        clip,
    })
}
