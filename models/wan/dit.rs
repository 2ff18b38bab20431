//! The whole model: embeddings, blocks, head, and the way back.
//!
//! Backward runs from the prediction through head and blocks and ends at the lowest block that has an adapter: what
//! stands below is frozen and nobody asks for its gradient. Blocks below that one keep nothing.

use candle_core::{DType, Tensor};
use wan_kernels::Exec;

use super::block::{Block, Context};
use super::embed::{self, Text, TimeEmbedding};
use super::head::Head;
use super::probe::Probe;
use super::saved::Stored;
use super::{rope, GradSink, Numerics, Pass, SavePlan, Tap, Timesteps, WanInputs, WanWeights, WeightProvider};
use crate::adapter::Adapters;
use crate::arch::WanArch;
use crate::{Error, Result};

/// Rows of the context that the old tool takes for the image, whatever they hold.
const MUSUBI_IMAGE_ROWS: usize = 257;

/// The DiT without its blocks' weights, which are lent block by block.
pub struct WanModel {
    arch: WanArch,
    weights: WanWeights,
    numerics: Numerics,
}

/// What backward needs of one forward pass.
pub struct Saved {
    cx: Context,
    /// From block `first` on.
    blocks: Vec<Stored>,
    first: usize,
    /// The stream after the last block, `[b, l, d]`.
    x_bld: Tensor,
}

impl Saved {
    /// Bytes that each block keeps, from the lowest trained one on.
    pub fn block_bytes(&self) -> Vec<usize> {
        self.blocks.iter().map(Stored::bytes).collect()
    }
}

impl WanModel {
    pub fn new(arch: WanArch, weights: WanWeights, numerics: Numerics) -> Result<Self> {
        arch.validate()?;
        Ok(Self { arch, weights, numerics })
    }

    pub fn arch(&self) -> &WanArch {
        &self.arch
    }

    pub fn numerics(&self) -> &Numerics {
        &self.numerics
    }

    pub fn weights(&self) -> &WanWeights {
        &self.weights
    }

    /// The prediction alone, `[B, C, F, H, W]` fp32. `tap` sees every activation on the way.
    pub fn predict(
        &self,
        exec: &Exec,
        inputs: &WanInputs,
        adapters: &dyn Adapters,
        blocks: &dyn WeightProvider,
        tap: Option<Tap>,
    ) -> Result<Tensor> {
        let mut probe = Probe::new(tap);
        let grid = self.check(inputs)?;
        let (cx, mut x_bld) = self.embed(exec, inputs, grid, adapters, &mut probe)?;
        for index in 0..self.arch.num_layers {
            let w = blocks.acquire(index, Pass::Forward)?;
            x_bld = self.block(index, exec, &cx, adapters).predict(&w, &x_bld, &mut probe)?;
        }
        self.head(exec, &cx).forward(grid, &x_bld, &mut probe)
    }

    /// Prediction `[B, C, F, H, W]` fp32 and what backward needs.
    pub fn forward(
        &self,
        exec: &Exec,
        inputs: &WanInputs,
        adapters: &dyn Adapters,
        blocks: &dyn WeightProvider,
        plan: &SavePlan,
    ) -> Result<(Tensor, Saved)> {
        let mut probe = Probe::off();
        let grid = self.check(inputs)?;
        let (cx, mut x_bld) = self.embed(exec, inputs, grid, adapters, &mut probe)?;
        let first = self.first_trained(adapters);
        let mut saved = Vec::with_capacity(self.arch.num_layers - first);
        for index in 0..self.arch.num_layers {
            let w = blocks.acquire(index, Pass::Forward)?;
            let block = self.block(index, exec, &cx, adapters);
            if index < first {
                x_bld = block.predict(&w, &x_bld, &mut probe)?;
                continue;
            }
            let (out_bld, kept) = block.forward(&w, x_bld, plan.of(index))?;
            saved.push(kept);
            x_bld = out_bld;
        }
        let pred = self.head(exec, &cx).forward(grid, &x_bld, &mut probe)?;
        Ok((pred, Saved { cx, blocks: saved, first, x_bld }))
    }

    /// From the gradient of the prediction `[B, C, F, H, W]` to the gradients of all adapters, which are handed to
    /// `sink` as they come up. `adapters` must be those of forward, with the same dropout.
    pub fn backward(
        &self,
        exec: &Exec,
        adapters: &dyn Adapters,
        blocks: &dyn WeightProvider,
        saved: Saved,
        dpred: &Tensor,
        sink: &mut dyn GradSink,
    ) -> Result<()> {
        let Saved { cx, blocks: mut kept, first, x_bld } = saved;
        if kept.is_empty() {
            return Ok(());
        }
        let mut dx_bld = self.head(exec, &cx).backward(&x_bld, dpred)?;
        drop(x_bld);
        while let Some(block_saved) = kept.pop() {
            let index = first + kept.len();
            let w = blocks.acquire(index, Pass::Backward)?;
            let block = self.block(index, exec, &cx, adapters);
            let mut prefetch = || kept.last_mut().map_or(Ok(()), Stored::prefetch);
            match block.backward(&w, block_saved.restore()?, dx_bld, index > first, sink, &mut prefetch)? {
                Some(dx) => dx_bld = dx,
                None => break,
            }
        }
        Ok(())
    }

    /// The lowest block with an adapter; the number of blocks if there is none.
    fn first_trained(&self, adapters: &dyn Adapters) -> usize {
        let has_adapter = |&i: &usize| self.arch.block_sites(i).iter().any(|s| adapters.get(&s.name).is_some());
        (0..self.arch.num_layers).find(has_adapter).unwrap_or(self.arch.num_layers)
    }

    fn block<'a>(&'a self, index: usize, exec: &'a Exec, cx: &'a Context, adapters: &'a dyn Adapters) -> Block<'a> {
        Block { index, exec, arch: &self.arch, numerics: &self.numerics, cx, adapters }
    }

    fn head<'a>(&'a self, exec: &'a Exec, cx: &'a Context) -> Head<'a> {
        Head { exec, arch: &self.arch, numerics: &self.numerics, w: &self.weights.head, time: &cx.time }
    }

    /// Everything before the first block: what all blocks read, and the residual stream.
    fn embed(
        &self,
        exec: &Exec,
        inputs: &WanInputs,
        grid: [usize; 3],
        adapters: &dyn Adapters,
        probe: &mut Probe,
    ) -> Result<(Context, Tensor)> {
        let (arch, w) = (&self.arch, &self.weights);
        let stream = self.numerics.residual.dtype(exec.compute());
        let x_bld = embed::patches(exec, arch, w, inputs, stream, probe)?;
        let time = TimeEmbedding::new(&exec.with_compute(DType::F32), arch, w, &inputs.t, probe)?;
        let takes_image = arch.clip.is_some() && inputs.clip_fea.is_none(); // text rows in the image's place
        let text = embed::text(exec, arch, w, &inputs.context, !adapters.draws_by_row() && !takes_image, probe)?;
        let image_bmd = match (&w.img_emb, &inputs.clip_fea) {
            (Some(img_emb), Some(clip_fea)) => {
                Some(embed::image(exec, img_emb, clip_fea, inputs.context.len(), probe)?)
            }
            _ => None,
        };
        let (text, image_bmd) = self.split_context(text, image_bmd)?;
        let (cos_lk, sin_lk) = rope::tables(arch.head_dim(), grid, inputs.f_indices.as_deref(), exec.device())?;
        if probe.is_on() {
            let (cos, sin) = rope::position_table(arch.head_dim(), 64, exec.device())?;
            probe.see("rope_table_cos", &cos)?;
            probe.see("rope_table_sin", &sin)?;
            probe.see("rope_cos_per_token", &cos_lk)?;
            probe.see("rope_sin_per_token", &sin_lk)?;
        }
        Ok((Context { time, cos_lk, sin_lk, text, image_bmd }, x_bld))
    }

    /// Which rows go through the text's keys and values, and which through the image's.
    fn split_context(&self, text: Text, image_bmd: Option<Tensor>) -> Result<(Text, Option<Tensor>)> {
        if !self.numerics.musubi_clip_split || self.arch.clip.is_none() {
            return Ok((text, image_bmd));
        }
        let all_bmd = match &image_bmd {
            Some(image_bmd) => Tensor::cat(&[image_bmd, &text.rows_bmd], 1)?,
            None => text.rows_bmd,
        };
        let rows = all_bmd.dim(1)?;
        if rows <= MUSUBI_IMAGE_ROWS {
            return Err(invalid(format!("{rows} context rows leave no text behind the first {MUSUBI_IMAGE_ROWS}")));
        }
        let image_bmd = all_bmd.narrow(1, 0, MUSUBI_IMAGE_ROWS)?.contiguous()?;
        let rows_bmd = all_bmd.narrow(1, MUSUBI_IMAGE_ROWS, rows - MUSUBI_IMAGE_ROWS)?.contiguous()?;
        Ok((Text { rows_bmd, ..text }, Some(image_bmd)))
    }

    /// The only gate of the model: shapes that fit each other and the architecture. Returns the patch grid.
    fn check(&self, inputs: &WanInputs) -> Result<[usize; 3]> {
        let arch = &self.arch;
        let [b, c, f, h, w] = *inputs.x.dims() else {
            return Err(invalid(format!("latent of shape {:?}, expected [B, C, F, H, W]", inputs.x.dims())));
        };
        let grid = arch.grid([f, h, w])?;
        let conditioning = match &inputs.y {
            Some(y) => match *y.dims() {
                [yb, yc, yf, yh, yw] if [yb, yf, yh, yw] == [b, f, h, w] => yc,
                _ => return Err(invalid(format!("conditioning {:?} for a latent {:?}", y.dims(), inputs.x.dims()))),
            },
            None => 0,
        };
        if c != arch.out_dim || c + conditioning != arch.in_dim {
            let (want, out) = (arch.in_dim, arch.out_dim);
            let what = format!(
                "{c} latent and {conditioning} conditioning channels, the model takes {out} and {}",
                want.saturating_sub(out)
            );
            return Err(invalid(what));
        }
        if inputs.t.batch() != b {
            return Err(invalid(format!("timesteps for {} samples, latents for {b}", inputs.t.batch())));
        }
        if let Timesteps::PerToken(t) = &inputs.t {
            let tokens = grid.iter().product::<usize>();
            if let Some(got) = t.iter().map(Vec::len).find(|&n| n != tokens) {
                return Err(invalid(format!("{got} timesteps for {tokens} tokens")));
            }
        }
        if inputs.context.len() != b {
            return Err(invalid(format!("{} prompts for {b} latents", inputs.context.len())));
        }
        for text in &inputs.context {
            match *text.dims() {
                [rows, width] if rows <= arch.text_len && width == arch.text_dim => {}
                _ => {
                    let (len, dim) = (arch.text_len, arch.text_dim);
                    return Err(invalid(format!("text features {:?}, expected at most [{len}, {dim}]", text.dims())));
                }
            }
        }
        self.check_clip(inputs, b)?;
        Ok(grid)
    }

    fn check_clip(&self, inputs: &WanInputs, b: usize) -> Result<()> {
        match (self.arch.clip, &inputs.clip_fea) {
            (None, None) => Ok(()),
            (None, Some(_)) => Err(invalid("CLIP features for a model that takes none".to_string())),
            // Fun Control without an image: the old tool sends text rows through the image's weights.
            (Some(_), None) if self.numerics.musubi_clip_split => Ok(()),
            (Some(_), None) => Err(invalid("the model takes CLIP features and none were given".to_string())),
            (Some(clip), Some(fea)) => match *fea.dims() {
                [all, tokens, width]
                    if all == b * clip.images
                        && width == clip.dim
                        && (clip.images == 1 && tokens > 0 || tokens == clip.tokens) =>
                {
                    Ok(())
                }
                _ => {
                    let want = [b * clip.images, clip.tokens, clip.dim];
                    Err(invalid(format!("CLIP features {:?}, expected {want:?}", fea.dims())))
                }
            },
        }
    }
}

fn invalid(what: String) -> Error {
    Error::Invalid { model: "wan", what }
}
