//! Rotary tables: angles in f64, cosine and sine stored in fp32 for each token.
//!
//! A head's h/2 pairs are split over the three axes: a third (rounded down) each for rows and columns, the rest for
//! frames. Pair k of an axis with p pairs turns by position · 10000^(−k/p).

use candle_core::{Device, Tensor};

use crate::{Error, Result};

const THETA: f64 = 10_000.0;

/// Pairs of a head given to frames, rows, columns.
pub fn axis_pairs(head_dim: usize) -> [usize; 3] {
    let pairs = head_dim / 2;
    let third = pairs / 3;
    [pairs - 2 * third, third, third]
}

/// The angles of `pairs` pairs at one position.
fn angles(position: usize, pairs: usize) -> impl Iterator<Item = f64> {
    (0..pairs).map(move |k| position as f64 / THETA.powf(k as f64 / pairs as f64))
}

/// Cosine and sine for every token of a grid (frames, rows, columns), each `[l, h/2]` fp32.
/// `f_indices` gives the frame positions; without it they are 0, 1, 2, ...
pub fn tables(
    head_dim: usize,
    grid: [usize; 3],
    f_indices: Option<&[usize]>,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let [frames, rows, columns] = grid;
    let counted: Vec<usize>;
    let positions = match f_indices {
        Some(f) => f,
        None => {
            counted = (0..frames).collect();
            &counted
        }
    };
    if positions.len() != frames {
        let what = format!("{} frame indices for {frames} latent frames", positions.len());
        return Err(Error::Invalid { model: "wan", what });
    }
    let [pf, py, px] = axis_pairs(head_dim);
    let axis = |positions: &mut dyn Iterator<Item = usize>, pairs: usize| -> Vec<Vec<(f32, f32)>> {
        positions.map(|p| angles(p, pairs).map(|a| (a.cos() as f32, a.sin() as f32)).collect()).collect()
    };
    let by_frame = axis(&mut positions.iter().copied(), pf);
    let by_row = axis(&mut (0..rows), py);
    let by_column = axis(&mut (0..columns), px);
    let count = frames * rows * columns * (head_dim / 2);
    let (mut cos, mut sin) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for f in &by_frame {
        for y in &by_row {
            for x in &by_column {
                for &(c, s) in f.iter().chain(y).chain(x) {
                    cos.push(c);
                    sin.push(s);
                }
            }
        }
    }
    let shape = (frames * rows * columns, head_dim / 2);
    Ok((Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?))
}

/// The first `count` positions of the three axes' tables side by side, `[count, h/2]`: how the reference stores them.
pub fn position_table(head_dim: usize, count: usize, device: &Device) -> Result<(Tensor, Tensor)> {
    let all: Vec<f64> =
        (0..count).flat_map(|p| axis_pairs(head_dim).into_iter().flat_map(move |pairs| angles(p, pairs))).collect();
    let table = |f: fn(f64) -> f64| {
        Tensor::from_vec(all.iter().map(|&a| f(a) as f32).collect::<Vec<_>>(), (count, head_dim / 2), device)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_split_as_in_the_checkpoint() {
        assert_eq!(axis_pairs(128), [22, 21, 21]);
        assert_eq!(axis_pairs(32), [6, 5, 5]);
        assert_eq!(axis_pairs(2), [1, 0, 0]);
    }

    #[test]
    fn frame_indices_pick_positions() {
        let device = Device::Cpu;
        let (cos, _) = tables(8, [3, 1, 2], None, &device).unwrap();
        let (picked, _) = tables(8, [2, 1, 2], Some(&[2, 0]), &device).unwrap();
        let rows = |t: &Tensor| t.to_vec2::<f32>().unwrap();
        let (cos, picked) = (rows(&cos), rows(&picked));
        assert_eq!(picked[0..2], cos[4..6]);
        assert_eq!(picked[2..4], cos[0..2]);
        assert!(tables(8, [2, 1, 2], Some(&[0]), &device).is_err());
    }
}
