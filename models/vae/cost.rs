//! What a clip costs: multiply-adds of convolutions and attention, counted twice each. For benches.
//!
//! The frames before a clip are zero: its first frame needs one of a causal convolution's three frame taps, its second two.

use super::{VaeArch, VaeKind};

/// Of a convolution over so many positions.
fn conv(c: usize, o: usize, taps: usize, positions: usize) -> f64 {
    2.0 * (c * o * taps) as f64 * positions as f64
}

/// Of a causal convolution of three frames by 3 x 3 over frames of so many positions.
fn causal(c: usize, o: usize, frames: usize, area: usize) -> f64 {
    (0..frames).map(|f| conv(c, o, 9 * (f + 1).min(3), area)).sum()
}

/// Of a residual block.
fn block(c: usize, o: usize, frames: usize, area: usize) -> f64 {
    let shortcut = if c == o { 0.0 } else { conv(c, o, 1, frames * area) };
    causal(c, o, frames, area) + causal(o, o, frames, area) + shortcut
}

/// Of the two blocks and the attention between them.
fn middle(c: usize, frames: usize, area: usize) -> f64 {
    let all = frames * area;
    let attention = 4.0 * all as f64 * area as f64 * c as f64;
    2.0 * block(c, c, frames, area) + conv(c, 4 * c, 1, all) + attention
}

impl VaeArch {
    /// Floating-point operations of encoding a clip of width, height, frames (sides multiples of the stride).
    pub fn encoder_flops(&self, [width, height, frames]: [usize; 3]) -> f64 {
        let (mut frames, mut area) = (frames, width * height / self.patch().pow(2));
        let mut sum = causal(self.pixel_channels(), self.base_dim, frames, area);
        for level in 0..self.levels() {
            let (c, o) = self.enc_dims(level);
            for i in 0..self.res_blocks {
                sum += block(if i == 0 { c } else { o }, o, frames, area);
            }
            if level + 1 < self.levels() {
                area /= 4;
                sum += conv(o, o, 9, frames * area);
                if self.down_in_time(level) {
                    // The first frame passes.
                    frames = 1 + (frames - 1) / 2;
                    sum += conv(o, o, 3, (frames - 1) * area);
                }
            }
        }
        let c = self.enc_dims(self.levels() - 1).1;
        sum += middle(c, frames, area);
        sum + causal(c, 2 * self.z_dim, frames, area) + conv(2 * self.z_dim, self.z_dim, 1, frames * area)
    }

    /// Floating-point operations of decoding to a clip of width, height, frames.
    pub fn decoder_flops(&self, [width, height, frames]: [usize; 3]) -> f64 {
        let stride = self.spatial_stride();
        let (mut frames, mut area) = (self.latent_frames(frames), (width / stride) * (height / stride));
        let c = self.dec_dims(0).0;
        let mut sum = conv(self.z_dim, self.z_dim, 1, frames * area) + causal(self.z_dim, c, frames, area);
        sum += middle(c, frames, area);
        for level in 0..self.levels() {
            let (c, o) = self.dec_dims(level);
            for i in 0..=self.res_blocks {
                sum += block(if i == 0 { c } else { o }, o, frames, area);
            }
            if level + 1 < self.levels() {
                if self.up_in_time(level) {
                    sum += conv(o, 2 * o, 3, (frames - 1) * area);
                    frames = 1 + (frames - 1) * 2;
                }
                area *= 4;
                let to = if self.kind == VaeKind::Wan21 { o / 2 } else { o };
                sum += conv(o, to, 9, frames * area);
            }
        }
        sum + causal(self.dec_dims(self.levels() - 1).1, self.pixel_channels(), frames, area)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counted by hand for 720p: four convolutions of 96 channels at full size are 38.5 TFLOP but for the zeros before the
    /// clip, which are a frame's worth.
    #[test]
    fn a_clip_of_720p_costs_what_its_layers_cost() {
        let arch = VaeArch::wan21();
        let full = 4.0 * causal(96, 96, 21, 1280 * 720);
        assert!((full / 1e12 - 38.53 * 20.0 / 21.0).abs() < 0.05, "{full}");
        let encode = arch.encoder_flops([1280, 720, 21]) / 1e12;
        assert!((encode - 94.3).abs() < 0.2, "{encode}");
        let decode = arch.decoder_flops([1280, 720, 21]) / 1e12;
        assert!((decode - 158.3).abs() < 0.2, "{decode}");
        // Without the attention, whose share grows with the area, four times the area is four times the work.
        let image = |w, h| arch.encoder_flops([w, h, 1]) - 4.0 * ((w * h / 64) as f64).powi(2) * 384.0;
        assert!((image(256, 256) / image(128, 128) - 4.0).abs() < 1e-9);
    }
}
