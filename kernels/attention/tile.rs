//! Tile choice of the attention kernels: which variant runs on which card, the shared memory it takes, and how heads are
//! grouped. Pure functions; the figures behind them are in `docs/LOG.md`.

/// Key rows that one block of the backward owns, and query rows of its steps.
pub const BACKWARD_KEYS: usize = 128;
const BACKWARD_ROWS: usize = 64;

/// Query rows and keys of one step of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    pub rows: usize,
    pub keys: usize,
    /// V stays in registers.
    pub v_held: bool,
    /// Dynamic shared memory of a block.
    pub shared: usize,
}

/// Tiles of the kernels for Hopper alone, which take heads of width 128. Their shared memory begins at the first multiple
/// of 1024.
pub mod hopper {
    use super::{Tile, BACKWARD_KEYS};

    pub const HEAD: usize = 128;
    /// Threads of a block: three warpgroups.
    pub const THREADS: u32 = 384;
    /// Heads whose blocks are launched side by side. 4 to 16 are equally good; all 40 cost 5 % at 512 keys, 10 % at 3600 and
    /// 25 % at 21600.
    pub const HEAD_GROUP: usize = 8;
    /// Query rows of a warpgroup, hence of a box of Q and O.
    pub const WARPGROUP_ROWS: usize = 64;
    const BARRIERS: usize = 128;
    const ALIGN: usize = 1024;

    /// Q, and two stages of K and V: 161 KB.
    pub const FORWARD: Tile =
        Tile { rows: 128, keys: 128, v_held: false, shared: (128 + 2 * 2 * 128) * HEAD * 2 + BARRIERS + ALIGN };

    /// K and V, three stages of Q, dO and their statistics, two of dS: 195 KB.
    pub const BACKWARD: Tile = Tile {
        rows: 64,
        keys: BACKWARD_KEYS,
        v_held: false,
        shared: (2 * BACKWARD_KEYS + 3 * 2 * 64) * HEAD * 2
            + 2 * BACKWARD_KEYS * 64 * 2
            + 3 * 2 * 64 * 4
            + BARRIERS
            + ALIGN,
    };
    const _: () = assert!(FORWARD.shared <= 227 << 10 && BACKWARD.shared <= 227 << 10, "what a block may use");
}

/// Into how many parts the `tiles` query tiles of each of `blocks` key blocks are split, one part a processor at a time.
/// A part costs about eight tiles more than its own: filling its stages, writing dK and dV, summing them.
/// (512 keys, 40 heads, 21600 queries: 160 blocks for 132 processors; four parts take 1.76 ms, one 2.18.)
pub fn splits(blocks: usize, tiles: usize, processors: usize) -> usize {
    let time = |parts: usize| (blocks * parts).div_ceil(processors) * (tiles.div_ceil(parts) + 8);
    let best = (1..=8).min_by_key(|&parts| time(parts)).unwrap_or(1).min(tiles);
    tiles.div_ceil(tiles.div_ceil(best)) // no part is empty
}

/// Whether there are kernels for heads of this width.
pub fn supported(head: usize) -> bool {
    head == 64 || head == 128
}

/// Cards with 99 KB of shared memory a block (sm_86, sm_89) take 32 keys: two blocks then share a processor.
pub fn forward(head: usize, shared_bytes: usize) -> Tile {
    let rows = 128;
    let keys = if head == 128 && shared_bytes < 160 << 10 { 32 } else { 64 };
    Tile { rows, keys, v_held: false, shared: (rows + 2 * keys) * head * 2 }
}

/// Two stages of everything where shared memory allows (161 KB at head width 128); else V in registers and one stage of dO
/// and dS (97 KB).
pub fn backward(head: usize, shared_bytes: usize) -> Tile {
    let tile = |v_held, shared| Tile { rows: BACKWARD_ROWS, keys: BACKWARD_KEYS, v_held, shared };
    let wide = backward_shared(head, 2, [2, 2, 2]);
    if wide <= shared_bytes {
        return tile(false, wide);
    }
    tile(true, backward_shared(head, 1, [2, 1, 1]))
}

/// K, V unless it is held in registers, the stages of Q, dO and dS, and two stages of lse and delta.
fn backward_shared(head: usize, keys_and_values: usize, [q, d_o, ds]: [usize; 3]) -> usize {
    let rows = BACKWARD_ROWS;
    keys_and_values * BACKWARD_KEYS * head * 2
        + (q + d_o) * rows * head * 2
        + ds * BACKWARD_KEYS * rows * 2
        + 4 * rows * 4
}

/// Heads whose blocks are launched side by side. Blocks of one head wait for each other at the start, those of a group
/// share that wait; too many heads at once and their keys no longer fit the cache. (21600 queries and keys: 4 heads are 2 to
/// 3 % faster than 8; 3600: 4 are 4 % slower than 10.)
pub fn head_group(heads: usize, keys: usize, processors: usize) -> usize {
    let key_blocks = keys.div_ceil(BACKWARD_KEYS);
    (2 * processors).div_ceil(key_blocks).max(4).min(heads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_card_has_a_tile_that_fits() {
        for shared in [99 << 10, 163 << 10, 227 << 10] {
            for head in [64, 128] {
                assert!(forward(head, shared).shared <= shared);
                assert!(backward(head, shared).shared <= shared, "{head} {shared}");
            }
        }
        assert_eq!(backward(128, 227 << 10).shared, 164_864);
        assert_eq!(backward(128, 99 << 10), Tile { rows: 64, keys: 128, v_held: true, shared: 99_328 });
        assert!(!backward(64, 99 << 10).v_held);
    }

    #[test]
    fn few_key_blocks_are_split_and_many_are_not() {
        assert_eq!(splits(160, 338, 132), 4);
        assert_eq!(splits(40 * 169, 338, 132), 1);
        assert_eq!(splits(40 * 29, 57, 132), 1);
        for tiles in 1..200 {
            let parts = splits(3, tiles, 132);
            assert!((1..=8).contains(&parts) && (parts - 1) * tiles.div_ceil(parts) < tiles, "{tiles}: {parts}");
        }
    }

    #[test]
    fn groups_fill_the_card_and_no_more() {
        assert_eq!(head_group(40, 21_600, 132), 4);
        assert_eq!(head_group(40, 3_600, 132), 10);
        assert_eq!(head_group(40, 512, 132), 40);
        assert_eq!(head_group(3, 100, 132), 3);
    }
}
