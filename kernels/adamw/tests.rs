use super::*;
use crate::philox::{stream, Philox};
use crate::testing::refused;

fn normals(seed: u64, len: usize) -> Vec<f32> {
    let mut out = vec![0f32; len];
    Philox::new(seed, stream::INIT, 0, 0).fill_normal(&mut out);
    out
}

/// The update in f64, one element.
struct Oracle {
    p: f64,
    m: f64,
    v: f64,
}

impl Oracle {
    fn step(&mut self, a: &AdamW, s: &Step, g: f64) {
        let g = g * s.grad_scale;
        self.p *= 1.0 - s.lr * a.weight_decay;
        self.m = a.beta1 * self.m + (1.0 - a.beta1) * g;
        self.v = a.beta2 * self.v + (1.0 - a.beta2) * g * g;
        let t = s.number as i32;
        let (mhat, vhat) = (self.m / (1.0 - a.beta1.powi(t)), self.v / (1.0 - a.beta2.powi(t)));
        self.p -= s.lr * mhat / (vhat.sqrt() + a.eps);
    }
}

#[test]
fn follows_the_update_in_f64() {
    // More than a piece, and not a multiple of one.
    let len = PIECE + 97;
    let adamw = AdamW { weight_decay: 0.1, ..AdamW::default() };
    let mut p = normals(1, len);
    let (mut m, mut v) = (vec![0f32; len], vec![0f32; len]);
    let mut oracle: Vec<Oracle> = p.iter().map(|&p| Oracle { p: f64::from(p), m: 0.0, v: 0.0 }).collect();
    for number in 1..=20 {
        let g = normals(100 + number, len);
        let at = Step { number, lr: 1e-2 / number as f64, grad_scale: 0.5 };
        step(&adamw, &at, &mut p, &g, &mut m, &mut v).unwrap();
        oracle.iter_mut().zip(&g).for_each(|(o, &g)| o.step(&adamw, &at, f64::from(g)));
    }
    for (p, o) in p.iter().zip(&oracle) {
        assert!((f64::from(*p) - o.p).abs() < 2e-6, "{p} {}", o.p);
    }
}

#[test]
fn the_first_step_moves_by_lr_against_the_sign() {
    let adamw = AdamW { weight_decay: 0.0, ..AdamW::default() };
    let (mut p, mut m, mut v) = ([1f32, 1.0, 1.0], [0f32; 3], [0f32; 3]);
    let at = Step { number: 1, lr: 0.1, grad_scale: 1.0 };
    step(&adamw, &at, &mut p, &[3.0, -1e-3, 0.0], &mut m, &mut v).unwrap();
    for (p, want) in p.iter().zip([0.9, 1.1, 1.0]) {
        assert!((p - want).abs() < 1e-5, "{p} {want}");
    }
}

#[test]
fn ranges_have_their_own_rate() {
    let adamw = AdamW::default();
    let (p, g) = (normals(1, 100), normals(2, 100));
    let at = Step { number: 1, lr: 0.0, grad_scale: 1.0 };
    let mut ranged = p.clone();
    let (mut m, mut v) = (vec![0f32; 100], vec![0f32; 100]);
    let ranges = [(0..30, 1e-3), (30..90, 1.6e-2)];
    step_ranges(&adamw, &at, &ranges, &mut ranged, &g, &mut m, &mut v).unwrap();
    for (range, lr) in ranges {
        let mut want = p.clone();
        let (mut m, mut v) = (vec![0f32; 100], vec![0f32; 100]);
        step(&adamw, &Step { lr, ..at }, &mut want, &g, &mut m, &mut v).unwrap();
        assert_eq!(ranged[range.clone()], want[range]);
    }
    assert_eq!(ranged[90..], p[90..]);
    assert!(m[90..].iter().all(|&m| m == 0.0));
}

#[test]
fn norm_and_clipping() {
    let g = normals(3, 3 * PIECE + 5);
    let want = g.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    assert!((global_norm(&g) / want - 1.0).abs() < 1e-12);
    assert_eq!(global_norm(&g).to_bits(), global_norm(&g).to_bits());
    assert_eq!(global_norm(&[]), 0.0);
    // Squares beyond fp32 are no overflow; what is not finite shows.
    assert!((global_norm(&[3e38, 0.0]) / 3e38 - 1.0).abs() < 1e-6);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut g = g.clone();
        g[2 * PIECE] = bad;
        assert!(!global_norm(&g).is_finite());
    }
    assert_eq!(clip_scale(0.5, 1.0), 1.0);
    assert!((clip_scale(4.0, 1.0) - 0.25).abs() < 1e-6);
    assert_eq!(clip_scale(4.0, 0.0), 1.0);
}

#[test]
fn lengths_and_counts_are_checked() {
    let adamw = AdamW::default();
    let at = Step { number: 1, lr: 1e-3, grad_scale: 1.0 };
    let (mut p, g, mut m, mut v) = (vec![0f32; 4], vec![0f32; 3], vec![0f32; 4], vec![0f32; 4]);
    let message = refused(step(&adamw, &at, &mut p, &g, &mut m, &mut v));
    assert_eq!(message, "adamw: grads has 3 elements for 4 parameters");
    let g = vec![0f32; 4];
    let message = refused(step(&adamw, &Step { number: 0, ..at }, &mut p, &g, &mut m, &mut v));
    assert!(message.contains("count from 1"), "{message}");
    let message = refused(step_ranges(&adamw, &at, &[(2..5, 1e-3)], &mut p, &g, &mut m, &mut v));
    assert!(message.contains("2..5"), "{message}");
}
