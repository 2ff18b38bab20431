//! Tile choice of the convolution kernels: which variant runs where, and the shared memory it takes. The figures behind it
//! are in `docs/LOG.md`.

/// A tile of `conv3d.cu`: rows of 16 columns by output channels.
#[derive(Debug)]
pub struct Tile {
    pub name: &'static str,
    pub rows: usize,
    pub channels: usize,
    pub warps: usize,
    /// Taps between two barriers.
    taps: usize,
    stages: usize,
}

/// 71 KB of shared memory and 128 registers, so that two blocks share a multiprocessor.
pub const WIDE: Tile = Tile { name: "conv_96", rows: 16, channels: 96, warps: 8, taps: 1, stages: 4 };
/// A row of taps between two barriers, by warps of 64 x 96 with all registers there are: 5 to 9 % faster on an H200 at the
/// VAE's large layers (up to 364 TFLOP/s), where two of these blocks fit a multiprocessor.
const WIDE_ROW: Tile = Tile { name: "conv_96_row", warps: 4, taps: 3, stages: 2, ..WIDE };
/// For the last layers of both halves, 32 and 3 channels.
const NARROW: Tile = Tile { name: "conv_32", rows: 16, channels: 32, warps: 8, taps: 1, stages: 4 };
/// 2.5 ms instead of 3.3 for 96 to 3 channels at 1280x720, 4 frames.
const NARROW_ROW: Tile = Tile { name: "conv_32_row", taps: 3, stages: 2, ..NARROW };
pub const COLUMNS: usize = 16;

impl Tile {
    /// For `o` output channels; `row`: whether every patch is read by whole rows of three taps. `shared_bytes`: what a
    /// block may use, 1 KB less than what a multiprocessor has. A block takes 1 KB more than it asks for.
    pub fn choose(o: usize, row: bool, shared_bytes: usize) -> &'static Tile {
        match (o > NARROW.channels, row) {
            (true, true) if 2 * (WIDE_ROW.shared() + 1024) <= shared_bytes + 1024 => &WIDE_ROW,
            (true, _) => &WIDE,
            (false, true) => &NARROW_ROW,
            (false, false) => &NARROW,
        }
    }

    /// As `Conv::kLoopBytes`, which is more than what the end needs.
    pub fn shared(&self) -> usize {
        let patch = (self.rows + 2) * (COLUMNS + 2);
        2 * patch * 64 + self.stages * self.taps * self.channels * 64 + (4 * patch + 9) * 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_taps_where_two_blocks_fit() {
        let (hopper, ampere, ada) = (227 << 10, 163 << 10, 99 << 10);
        let name = |o, row, shared| Tile::choose(o, row, shared).name;
        assert_eq!([hopper, ampere, ada].map(|card| name(96, true, card)), ["conv_96_row", "conv_96", "conv_96"]);
        assert_eq!(name(384, false, hopper), "conv_96");
        assert_eq!([hopper, ada].map(|card| name(32, true, card)), ["conv_32_row"; 2]);
        assert_eq!(name(32, false, ada), "conv_32");
        for tile in [WIDE, WIDE_ROW, NARROW, NARROW_ROW] {
            assert!(tile.shared() <= ada, "{} runs on every card", tile.name);
        }
    }
}
