//! Resizing to a bucket, pixel for pixel as OpenCV's INTER_AREA (shrinking) and Pillow's LANCZOS (enlarging) do it,
//! so that latents made here equal those made by the tool whose caches we read. All pictures are 8-bit RGB.

use image::RgbImage;
use rayon::prelude::*;

const CHANNELS: usize = 3;

/// Which filter a size change takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Same size: pixels untouched.
    None,
    /// OpenCV INTER_AREA.
    Area,
    /// Pillow LANCZOS.
    Lanczos,
}

/// How a source becomes a bucket: resized so that it covers it, then cropped in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub filter: Filter,
    /// Width, height after resizing.
    pub resized: (u32, u32),
    pub crop_left: u32,
    pub crop_top: u32,
}

/// The plan for a source of `size` and a bucket, both (width, height) and not empty.
pub fn plan(size: (u32, u32), bucket: (u32, u32)) -> Plan {
    if size == bucket {
        return Plan { filter: Filter::None, resized: size, crop_left: 0, crop_top: 0 };
    }
    let scale = (f64::from(bucket.0) / f64::from(size.0)).max(f64::from(bucket.1) / f64::from(size.1));
    let round = |side: u32| (f64::from(side) * scale + 0.5) as u32;
    let resized = (round(size.0), round(size.1));
    Plan {
        filter: if scale > 1.0 { Filter::Lanczos } else { Filter::Area },
        resized,
        crop_left: resized.0.saturating_sub(bucket.0) / 2,
        crop_top: resized.1.saturating_sub(bucket.1) / 2,
    }
}

/// Resizes and crops to the bucket (width, height).
pub fn to_bucket(picture: RgbImage, bucket: (u32, u32)) -> RgbImage {
    let plan = plan(picture.dimensions(), bucket);
    let resized = match plan.filter {
        Filter::None => return picture,
        Filter::Area => area(&picture, plan.resized),
        Filter::Lanczos => lanczos(&picture, plan.resized),
    };
    if plan.resized == bucket {
        return resized;
    }
    image::imageops::crop_imm(&resized, plan.crop_left, plan.crop_top, bucket.0, bucket.1).to_image()
}

/// OpenCV's `resize(…, INTER_AREA)` to `size`, which must not exceed the picture in either direction.
///
/// Two paths, as there: whole-number ratios take the mean of a block (2×2 rounds halves up, larger blocks to even);
/// others weigh the covered pixels in single precision, columns first within each source row.
pub fn area(picture: &RgbImage, size: (u32, u32)) -> RgbImage {
    let (sw, sh) = (picture.width() as usize, picture.height() as usize);
    let (dw, dh) = (size.0 as usize, size.1 as usize);
    if (sw, sh) == (dw, dh) {
        return picture.clone();
    }
    assert!(0 < dw && dw <= sw && 0 < dh && dh <= sh, "area: {sw}x{sh} -> {dw}x{dh} is not a reduction");
    // The ratio goes through its inverse there, and rounding follows it.
    let ratio = |s: usize, d: usize| 1.0 / (d as f64 / s as f64);
    let (rx, ry) = (ratio(sw, dw), ratio(sh, dh));
    let (ix, iy) = (rx.round_ties_even(), ry.round_ties_even());
    let src = picture.as_raw();
    let mut out = vec![0u8; dw * dh * CHANNELS];
    if (rx - ix).abs() < f64::EPSILON && (ry - iy).abs() < f64::EPSILON {
        area_blocks(src, sw, (ix as usize, iy as usize), &mut out, dw);
    } else {
        let columns = area_weights(sw, dw, rx);
        let rows = area_weights(sh, dh, ry);
        area_weighted(src, sw, &columns, &rows, &mut out, dw);
    }
    RgbImage::from_raw(size.0, size.1, out).expect("the buffer has the size of the picture")
}

fn area_blocks(src: &[u8], sw: usize, (bw, bh): (usize, usize), out: &mut [u8], dw: usize) {
    let scale = 1.0f32 / (bw * bh) as f32;
    out.par_chunks_mut(dw * CHANNELS).enumerate().for_each(|(y, line)| {
        for x in 0..dw {
            for c in 0..CHANNELS {
                let mut sum = 0u32;
                for by in 0..bh {
                    let row = ((y * bh + by) * sw + x * bw) * CHANNELS + c;
                    sum += (0..bw).map(|bx| u32::from(src[row + bx * CHANNELS])).sum::<u32>();
                }
                line[x * CHANNELS + c] =
                    if bw == 2 && bh == 2 { ((sum + 2) >> 2) as u8 } else { round_u8(sum as f32 * scale) };
            }
        }
    });
}

/// For each output position: the source positions it covers and how much of it each of them makes up.
fn area_weights(ssize: usize, dsize: usize, ratio: f64) -> Vec<Vec<(usize, f32)>> {
    (0..dsize)
        .map(|d| {
            let from = d as f64 * ratio;
            let to = from + ratio;
            let width = ratio.min(ssize as f64 - from);
            let last = (to.floor() as usize).min(ssize - 1);
            let first = (from.ceil() as usize).min(last);
            let mut taps = Vec::with_capacity(last - first + 2);
            if first as f64 - from > 1e-3 {
                taps.push((first - 1, ((first as f64 - from) / width) as f32));
            }
            taps.extend((first..last).map(|s| (s, (1.0 / width) as f32)));
            if to - last as f64 > 1e-3 {
                taps.push((last, ((to - last as f64).min(1.0).min(width) / width) as f32));
            }
            taps
        })
        .collect()
}

fn area_weighted(
    src: &[u8],
    sw: usize,
    columns: &[Vec<(usize, f32)>],
    rows: &[Vec<(usize, f32)>],
    out: &mut [u8],
    dw: usize,
) {
    out.par_chunks_mut(dw * CHANNELS).zip(rows).for_each(|(line, taps_y)| {
        let mut sum = vec![0f32; dw * CHANNELS];
        let mut part = vec![0f32; dw * CHANNELS];
        for (n, &(sy, beta)) in taps_y.iter().enumerate() {
            let row = &src[sy * sw * CHANNELS..(sy + 1) * sw * CHANNELS];
            for (acc, taps_x) in part.chunks_exact_mut(CHANNELS).zip(columns) {
                let mut rgb = [0f32; CHANNELS];
                for &(sx, alpha) in taps_x {
                    for (c, v) in rgb.iter_mut().enumerate() {
                        *v += f32::from(row[sx * CHANNELS + c]) * alpha;
                    }
                }
                acc.copy_from_slice(&rgb);
            }
            for (s, p) in sum.iter_mut().zip(&part) {
                *s = if n == 0 { beta * p } else { *s + beta * p };
            }
        }
        for (d, s) in line.iter_mut().zip(&sum) {
            *d = round_u8(*s);
        }
    });
}

fn round_u8(x: f32) -> u8 {
    x.round_ties_even().clamp(0.0, 255.0) as u8
}

/// Pillow's `resize(size, LANCZOS)`: a horizontal, then a vertical pass with 8-bit results in between and coefficients
/// of 22 fractional bits. A pass that would not change the size is left out.
pub fn lanczos(picture: &RgbImage, size: (u32, u32)) -> RgbImage {
    let (sw, sh) = (picture.width() as usize, picture.height() as usize);
    let (dw, dh) = (size.0 as usize, size.1 as usize);
    assert!(sw > 0 && sh > 0 && dw > 0 && dh > 0, "lanczos: {sw}x{sh} -> {dw}x{dh}");
    let mut pixels = None;
    if dw != sw {
        let taps = lanczos_taps(sw, dw);
        let src = picture.as_raw();
        let mut wide = vec![0u8; dw * sh * CHANNELS];
        wide.par_chunks_mut(dw * CHANNELS).zip(src.par_chunks(sw * CHANNELS)).for_each(|(line, row)| {
            for (pixel, t) in line.chunks_exact_mut(CHANNELS).zip(&taps) {
                let mut sums = [HALF; CHANNELS];
                let covered = &row[t.first * CHANNELS..(t.first + t.weights.len()) * CHANNELS];
                for (rgb, w) in covered.chunks_exact(CHANNELS).zip(&t.weights) {
                    for (s, v) in sums.iter_mut().zip(rgb) {
                        *s += i32::from(*v) * w;
                    }
                }
                for (d, s) in pixel.iter_mut().zip(sums) {
                    *d = (s >> BITS).clamp(0, 255) as u8;
                }
            }
        });
        pixels = Some(wide);
    }
    if dh != sh {
        let taps = lanczos_taps(sh, dh);
        let src = pixels.as_deref().unwrap_or(picture.as_raw());
        let mut out = vec![0u8; dw * dh * CHANNELS];
        out.par_chunks_mut(dw * CHANNELS).zip(&taps).for_each(|(line, t)| {
            let mut sums = vec![HALF; dw * CHANNELS];
            for (i, w) in t.weights.iter().enumerate() {
                let row = &src[(t.first + i) * dw * CHANNELS..][..dw * CHANNELS];
                for (s, v) in sums.iter_mut().zip(row) {
                    *s += i32::from(*v) * w;
                }
            }
            for (d, s) in line.iter_mut().zip(sums) {
                *d = (s >> BITS).clamp(0, 255) as u8;
            }
        });
        pixels = Some(out);
    }
    match pixels {
        Some(p) => RgbImage::from_raw(size.0, size.1, p).expect("the buffer has the size of the picture"),
        None => picture.clone(),
    }
}

const BITS: u32 = 22;
const HALF: i32 = 1 << (BITS - 1);

struct Taps {
    first: usize,
    weights: Vec<i32>,
}

fn lanczos_taps(ssize: usize, dsize: usize) -> Vec<Taps> {
    let scale = ssize as f64 / dsize as f64;
    let filter_scale = scale.max(1.0);
    let support = 3.0 * filter_scale;
    (0..dsize)
        .map(|d| {
            let center = (d as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(ssize);
            let raw: Vec<f64> =
                (first..end).map(|s| lanczos3((s as f64 - center + 0.5) * (1.0 / filter_scale))).collect();
            let total: f64 = raw.iter().sum();
            let weights = raw
                .iter()
                .map(|w| {
                    let w = if total != 0.0 { w / total } else { *w } * f64::from(1u32 << BITS);
                    (w + if w < 0.0 { -0.5 } else { 0.5 }) as i32
                })
                .collect();
            Taps { first, weights }
        })
        .collect()
}

fn lanczos3(x: f64) -> f64 {
    let sinc = |x: f64| {
        let x = x * std::f64::consts::PI;
        if x == 0.0 {
            1.0
        } else {
            x.sin() / x
        }
    };
    if (-3.0..3.0).contains(&x) {
        sinc(x) * sinc(x / 3.0)
    } else {
        0.0
    }
}
