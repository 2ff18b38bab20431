//! The loss curve as a picture: every step's loss, and a smoothed line through it.

use std::io::Cursor;
use std::path::Path;

use anyhow::Context;
use image::{imageops, ImageFormat, Rgb, RgbImage};

use super::font::{draw_text, text_width, GLYPH_HEIGHT};
use crate::fsio;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 540;
/// Lines are drawn this much larger and scaled down: smooth edges without a drawing library.
const OVERSAMPLE: u32 = 3;
/// Letters are this many times 5x7 pixels.
const TEXT: u32 = 2;
/// The plot within the picture.
const LEFT: f64 = 100.0;
const RIGHT: f64 = WIDTH as f64 - 30.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = HEIGHT as f64 - 64.0;

const PAPER: Rgb<u8> = Rgb([255, 255, 255]);
const INK: Rgb<u8> = Rgb([40, 40, 40]);
const GRID: Rgb<u8> = Rgb([228, 228, 228]);
const RAW: Rgb<u8> = Rgb([168, 200, 232]);
const SMOOTH: Rgb<u8> = Rgb([20, 80, 160]);
const ALARM: Rgb<u8> = Rgb([214, 40, 40]);

/// Draws `(step, loss)` pairs, in the order of their steps, as a PNG. Losses that are not finite get a red mark on the
/// step axis. An empty series gives an empty plot. Errors: the file cannot be written.
pub fn write_loss_curve(path: &Path, points: &[(u64, f64)]) -> anyhow::Result<()> {
    let mut png = Cursor::new(Vec::new());
    draw(points).write_to(&mut png, ImageFormat::Png).context("cannot encode the loss curve")?;
    fsio::write_bytes(path, png.get_ref())
}

/// Exponential moving average whose first values are not pulled to zero; it looks back over about a fifteenth of the
/// series.
pub(super) fn smoothed(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let keep = 1.0 - 2.0 / ((points.len() as f64 / 15.0).clamp(1.0, 200.0) + 1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mut average = |loss: f64| {
        sum = keep * sum + (1.0 - keep) * loss;
        weight = keep * weight + (1.0 - keep);
        sum / weight
    };
    points.iter().map(|&(step, loss)| (step, average(loss))).collect()
}

/// Maps data to plot coordinates.
struct Axes {
    steps: (f64, f64),
    losses: (f64, f64),
}

impl Axes {
    /// The range holds everything but the highest half percent, which may be spikes that would flatten the rest.
    fn around(finite: &[(u64, f64)], smooth: &[(u64, f64)], all: &[(u64, f64)]) -> Self {
        let mut sorted: Vec<f64> = finite.iter().map(|p| p.1).collect();
        sorted.sort_by(f64::total_cmp);
        let (low, mut high) = match sorted[..] {
            [] => (0.0, 1.0),
            _ => (sorted[0], sorted[(sorted.len() - 1) - sorted.len() / 200]),
        };
        high = smooth.iter().map(|p| p.1).fold(high, f64::max);
        let room = if high > low { 0.06 * (high - low) } else { 0.5 * high.abs().max(1e-6) };
        let floor = if low >= 0.0 { 0.0 } else { f64::NEG_INFINITY };
        let first = all.first().map_or(0.0, |p| p.0 as f64);
        let last = all.last().map_or(1.0, |p| p.0 as f64);
        Self { steps: (first, last.max(first + 1.0)), losses: ((low - room).max(floor), high + room) }
    }

    fn x(&self, step: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * (step - self.steps.0) / (self.steps.1 - self.steps.0)
    }

    fn y(&self, loss: f64) -> f64 {
        let part = (loss - self.losses.0) / (self.losses.1 - self.losses.0);
        BOTTOM - (BOTTOM - TOP) * part.clamp(0.0, 1.0)
    }
}

/// Round numbers in a range, about `wanted` of them, and how many decimals show them apart.
pub(super) fn ticks((low, high): (f64, f64), wanted: f64, smallest: f64) -> (Vec<f64>, usize) {
    let rough = ((high - low) / wanted).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let unit = [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= rough * 0.999).unwrap_or(10.0) * power;
    let unit = unit.max(smallest);
    let first = (low / unit).ceil() as i64;
    let marks = (first..).map(|i| i as f64 * unit).take_while(|v| *v <= high + unit * 1e-6).take(50).collect();
    (marks, (-(unit * 1.001).log10().floor()).clamp(0.0, 12.0) as usize)
}

fn draw(points: &[(u64, f64)]) -> RgbImage {
    let finite: Vec<(u64, f64)> = points.iter().copied().filter(|p| p.1.is_finite()).collect();
    let smooth = smoothed(&finite);
    let axes = Axes::around(&finite, &smooth, points);
    let (step_ticks, _) = ticks(axes.steps, 8.0, 1.0);
    let (loss_ticks, decimals) = ticks(axes.losses, 6.0, 1e-12);

    let mut large = Canvas(RgbImage::from_pixel(WIDTH * OVERSAMPLE, HEIGHT * OVERSAMPLE, PAPER));
    for &step in &step_ticks {
        large.line((axes.x(step), TOP), (axes.x(step), BOTTOM + 5.0), 1.0, GRID);
    }
    for &loss in &loss_ticks {
        large.line((LEFT - 5.0, axes.y(loss)), (RIGHT, axes.y(loss)), 1.0, GRID);
    }
    for (series, thickness, colour) in [(&finite, 1.2, RAW), (&smooth, 2.6, SMOOTH)] {
        let at = |p: &(u64, f64)| (axes.x(p.0 as f64), axes.y(p.1));
        for pair in series.windows(2) {
            large.line(at(&pair[0]), at(&pair[1]), thickness, colour);
        }
        if let [only] = series[..] {
            large.line(at(&only), at(&only), 6.0, colour);
        }
    }
    for (step, _) in points.iter().filter(|p| !p.1.is_finite()) {
        large.line((axes.x(*step as f64), BOTTOM - 14.0), (axes.x(*step as f64), BOTTOM), 2.0, ALARM);
    }
    large.line((LEFT, TOP), (LEFT, BOTTOM), 1.5, INK);
    large.line((LEFT, BOTTOM), (RIGHT, BOTTOM), 1.5, INK);
    let mut image = imageops::resize(&large.0, WIDTH, HEIGHT, imageops::FilterType::Triangle);

    let half = i64::from(GLYPH_HEIGHT * TEXT / 2);
    for step in step_ticks {
        let text = format!("{step:.0}");
        let x = axes.x(step) as i64 - i64::from(text_width(&text, TEXT) / 2);
        draw_text(&mut image, (x, BOTTOM as i64 + 12), &text, TEXT, INK);
    }
    for loss in loss_ticks {
        let text = format!("{loss:.decimals$}");
        let x = LEFT as i64 - 12 - i64::from(text_width(&text, TEXT));
        draw_text(&mut image, (x, axes.y(loss) as i64 - half), &text, TEXT, INK);
    }
    let middle = ((LEFT + RIGHT) / 2.0) as i64;
    draw_text(&mut image, (middle - i64::from(text_width("step", TEXT) / 2), HEIGHT as i64 - 26), "step", TEXT, INK);
    draw_text(&mut image, (LEFT as i64, 18), "loss", TEXT, INK);
    let mut x = RIGHT as i64;
    for (text, colour) in [("smoothed", SMOOTH), ("every step", RAW)] {
        x -= i64::from(text_width(text, TEXT));
        draw_text(&mut image, (x, 18), text, TEXT, INK);
        for dy in -2..=2 {
            draw_line_pixels(&mut image, (x - 36, 18 + half + dy), 28, colour);
        }
        x -= 64;
    }
    image
}

fn draw_line_pixels(image: &mut RgbImage, (x, y): (i64, i64), length: i64, colour: Rgb<u8>) {
    for px in x..x + length {
        image.put_pixel(px as u32, y as u32, colour);
    }
}

/// The enlarged drawing; coordinates and thickness are those of the final picture.
struct Canvas(RgbImage);

impl Canvas {
    /// A straight line of round dots.
    fn line(&mut self, from: (f64, f64), to: (f64, f64), thickness: f64, colour: Rgb<u8>) {
        let scale = f64::from(OVERSAMPLE);
        let (x0, y0, x1, y1) = (from.0 * scale, from.1 * scale, to.0 * scale, to.1 * scale);
        let radius = (thickness * scale / 2.0).max(0.5);
        let dots = (x1 - x0).abs().max((y1 - y0).abs()).ceil().max(1.0);
        for i in 0..=dots as u64 {
            let part = i as f64 / dots;
            self.dot(x0 + part * (x1 - x0), y0 + part * (y1 - y0), radius, colour);
        }
    }

    fn dot(&mut self, x: f64, y: f64, radius: f64, colour: Rgb<u8>) {
        let (width, height) = self.0.dimensions();
        for py in (y - radius).round() as i64..=(y + radius).round() as i64 {
            for px in (x - radius).round() as i64..=(x + radius).round() as i64 {
                let inside = (px as f64 - x).powi(2) + (py as f64 - y).powi(2) <= radius * radius + 0.25;
                if inside && (0..i64::from(width)).contains(&px) && (0..i64::from(height)).contains(&py) {
                    self.0.put_pixel(px as u32, py as u32, colour);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_inside_the_range() {
        assert_eq!(ticks((0.0, 100.0), 8.0, 1.0), (vec![0.0, 20.0, 40.0, 60.0, 80.0, 100.0], 0));
        let (marks, decimals) = ticks((0.031, 0.069), 6.0, 1e-12);
        assert_eq!((marks.len(), decimals), (3, 2));
        assert!(marks.iter().zip([0.04, 0.05, 0.06]).all(|(a, b)| (a - b).abs() < 1e-12), "{marks:?}");
        assert_eq!(ticks((3.0, 4.0), 8.0, 1.0).0, vec![3.0, 4.0]);
    }

    #[test]
    fn smoothing_starts_at_the_first_value_and_keeps_a_constant() {
        let flat: Vec<(u64, f64)> = (0..100).map(|i| (i, 0.25)).collect();
        assert!(smoothed(&flat).iter().all(|p| (p.1 - 0.25).abs() < 1e-12));
        assert_eq!(smoothed(&[(7, 3.0), (8, 1.0)])[0], (7, 3.0));
    }

    #[test]
    fn a_spike_does_not_flatten_the_rest() {
        let mut points: Vec<(u64, f64)> = (0..1000).map(|i| (i, 0.1)).collect();
        points[500].1 = 1e6;
        let axes = Axes::around(&points, &[], &points);
        assert!(axes.losses.1 < 1.0, "{:?}", axes.losses);
    }
}
