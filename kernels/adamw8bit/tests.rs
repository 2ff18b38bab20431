use super::*;
use crate::adamw;
use crate::philox::{stream, Philox};
use crate::testing::refused;

fn normals(seed: u64, len: usize) -> Vec<f32> {
    let mut out = vec![0f32; len];
    Philox::new(seed, stream::INIT, 0, 0).fill_normal(&mut out);
    out
}

const AT: Step = Step { number: 1, lr: 1e-2, grad_scale: 1.0 };

#[test]
fn maps_are_the_dynamic_tree() {
    let (signed, unsigned) = (signed_map().values(), unsigned_map().values());
    for map in [signed, unsigned] {
        assert!(map.windows(2).all(|w| w[0] < w[1]), "ascending, all different");
        assert_eq!(map[255], 1.0);
    }
    assert_eq!((signed[127], unsigned[0]), (0.0, 0.0));
    assert_eq!((signed_map().zero(), unsigned_map().zero()), (127, 0));
    // Mirrored but for 1, which has no opposite.
    for i in 0..127 {
        assert_eq!(signed[i], -signed[254 - i]);
    }
    // The top decade: 64 and 128 equal parts of [0.1, 1], and the lowest: one part, two parts, of [1e-7, 1e-6].
    assert!((signed[254] - (1.0 - 0.45 / 64.0)).abs() < 1e-6);
    assert!((signed[191] - (0.1 + 0.45 / 64.0)).abs() < 1e-6);
    assert!((unsigned[254] - (1.0 - 0.45 / 128.0)).abs() < 1e-6);
    assert!((unsigned[127] - (0.1 + 0.45 / 128.0)).abs() < 1e-6);
    assert!((signed[128] / 5.5e-7 - 1.0).abs() < 1e-5);
    assert!((unsigned[1] / 3.25e-7 - 1.0).abs() < 1e-5);
    assert!((unsigned[2] / 7.75e-7 - 1.0).abs() < 1e-5);
    // One decade holds twice the values of the one below.
    for decade in 0..7 {
        let (low, high) = (10f32.powi(decade - 7), 10f32.powi(decade - 6));
        let count = |map: &[f32; 256]| map.iter().filter(|&&v| v > low && v < high).count();
        assert_eq!((count(signed), count(unsigned)), (1 << decade, 2 << decade));
    }
}

#[test]
fn codes_are_the_nearest() {
    let map = signed_map();
    for code in 0..=255 {
        assert_eq!(map.nearest(3.0 * map.value(code), 3.0), code);
    }
    for &x in &normals(1, 4000) {
        let x = (x / 3.0).clamp(-1.0, 1.0);
        let got = (map.value(map.nearest(x, 1.0)) - x).abs();
        let best = map.values().iter().map(|v| (v - x).abs()).fold(f32::MAX, f32::min);
        assert!(got <= best * (1.0 + 1e-5), "{x}");
    }
    assert_eq!(map.nearest(0.0, 0.0), map.zero());
}

#[test]
fn a_small_moment_keeps_its_sign() {
    let map = signed_map();
    for x in [1e-9f32, 1e-7, 2.8e-7] {
        assert!(map.value(map.nearest_of_sign(-x, 1.0)) < 0.0);
        // Zero counts as positive: a small positive moment may vanish.
        assert!(map.value(map.nearest_of_sign(x, 1.0)) >= 0.0);
    }
    assert_eq!(map.nearest_of_sign(0.0, 1.0), map.zero());
    assert_eq!(map.nearest_of_sign(-0.0, 1.0), map.zero());
}

#[test]
fn small_tensors_step_as_adamw_does() {
    let len = MIN_QUANTIZED - 1;
    let hyper = AdamW { weight_decay: 0.0, ..AdamW::default() };
    let mut p = normals(1, len);
    let mut want = p.clone();
    let mut moments = Moments::new(len);
    assert!(matches!(moments, Moments::Full { .. }));
    let (mut m, mut v) = (vec![0f32; len], vec![0f32; len]);
    for number in 1..=10 {
        let g = normals(10 + number, len);
        let at = Step { number, ..AT };
        step(&hyper, &at, &mut p, &g, &mut moments).unwrap();
        adamw::step(&hyper, &at, &mut want, &g, &mut m, &mut v).unwrap();
    }
    assert!(p.iter().zip(&want).all(|(p, w)| (p - w).abs() < 2e-6));
}

#[test]
fn decay_comes_after_the_update() {
    let hyper = AdamW { weight_decay: 0.5, ..AdamW::default() };
    let (mut p, mut moments) = ([2f32], Moments::new(1));
    step(&hyper, &Step { lr: 0.1, ..AT }, &mut p, &[1.0], &mut moments).unwrap();
    assert!((p[0] - (2.0 - 0.1) * (1.0 - 0.05)).abs() < 1e-6, "{}", p[0]);
}

#[test]
fn the_first_quantized_step_is_exact_and_its_moments_near() {
    // 17 blocks, the last one short.
    let len = MIN_QUANTIZED + 31;
    let hyper = AdamW::default();
    let (p0, g) = (normals(1, len), normals(2, len));
    let (mut p, mut moments) = (p0.clone(), Moments::new(len));
    step(&hyper, &AT, &mut p, &g, &mut moments).unwrap();
    let Moments::Blocks { m, v, m_max, v_max } = &moments else { panic!("a large tensor is quantised") };
    assert_eq!((m.len(), v.len(), m_max.len(), v_max.len()), (len, len, 17, 17));
    for i in 0..len {
        let (want_m, want_v) = (0.1 * g[i], 0.001 * g[i] * g[i]);
        let (got_m, got_v) =
            (signed_map().value(m[i]) * m_max[i / BLOCK], unsigned_map().value(v[i]) * v_max[i / BLOCK]);
        // Half a step of the top decade (0.9/64 and 0.9/128), in units of the block's largest.
        assert!((got_m - want_m).abs() <= 0.0071 * m_max[i / BLOCK]);
        assert!((got_v - want_v).abs() <= 0.0036 * v_max[i / BLOCK]);
        // The update itself uses the moments before they are coded.
        let want = (p0[i] - 1e-2 * g[i].signum()) * (1.0 - 1e-4);
        assert!((p[i] - want).abs() < 1e-5, "{} {want}", p[i]);
    }
}

#[test]
fn converges_on_a_quadratic_as_adamw_does() {
    // Σ c·(p − target)²/2 with curvatures over two decades.
    let len = 2 * MIN_QUANTIZED + 100;
    let (target, start) = (normals(1, len), normals(2, len));
    let curvature: Vec<f32> = (0..len).map(|i| 10f32.powf((i % 97) as f32 / 48.0 - 1.0)).collect();
    let hyper = AdamW { weight_decay: 0.0, ..AdamW::default() };
    let gradient =
        |p: &[f32]| -> Vec<f32> { p.iter().zip(&target).zip(&curvature).map(|((p, t), c)| c * (p - t)).collect() };
    let loss = |p: &[f32]| {
        let terms = p.iter().zip(&target).zip(&curvature).map(|((p, t), c)| f64::from(c * (p - t).powi(2)) / 2.0);
        terms.sum::<f64>() / len as f64
    };
    let (mut p, mut moments) = (start.clone(), Moments::new(len));
    let (mut q, mut m, mut v) = (start.clone(), vec![0f32; len], vec![0f32; len]);
    for number in 1..=300 {
        let at = Step { number, lr: 5e-2 * (1.0 - number as f64 / 301.0), grad_scale: 1.0 };
        let g = gradient(&p);
        step(&hyper, &at, &mut p, &g, &mut moments).unwrap();
        let g = gradient(&q);
        adamw::step(&hyper, &at, &mut q, &g, &mut m, &mut v).unwrap();
    }
    let (first, eight, full) = (loss(&start), loss(&p), loss(&q));
    assert!(eight < 1e-3 * first, "{first} to {eight}");
    assert!(full < 1e-3 * first, "{first} to {full}");
}

#[test]
fn a_bad_gradient_resets_its_element_only() {
    let len = MIN_QUANTIZED;
    let hyper = AdamW::default();
    let (p0, mut g) = (normals(1, len), normals(2, len));
    let (mut p, mut moments) = (p0.clone(), Moments::new(len));
    step(&hyper, &AT, &mut p, &g, &mut moments).unwrap();
    let (before, p1) = (moments.clone(), p.clone());
    (g[3], g[700]) = (f32::NAN, f32::INFINITY);
    step(&hyper, &Step { number: 2, ..AT }, &mut p, &g, &mut moments).unwrap();
    let (Moments::Blocks { m, v, .. }, Moments::Blocks { m: m0, .. }) = (&moments, &before) else {
        panic!("a large tensor is quantised")
    };
    for i in [3, 700] {
        assert_eq!((p[i], m[i], v[i]), (p1[i], signed_map().zero(), unsigned_map().zero()));
        assert_ne!(m0[i], signed_map().zero());
    }
    assert!(p.iter().all(|p| p.is_finite()));
    assert!((0..len).filter(|i| ![3, 700].contains(i)).all(|i| p[i] != p1[i]));
}

#[test]
fn zero_gradients_leave_zero_moments() {
    let len = MIN_QUANTIZED;
    let (mut p, mut moments) = (normals(1, len), Moments::new(len));
    let want = p.clone();
    let hyper = AdamW { weight_decay: 0.0, ..AdamW::default() };
    for number in 1..=3 {
        step(&hyper, &Step { number, ..AT }, &mut p, &vec![0.0; len], &mut moments).unwrap();
    }
    assert_eq!(p, want);
}

#[test]
fn lengths_are_checked() {
    let hyper = AdamW::default();
    let mut p = vec![0f32; 5000];
    let g = vec![0f32; 5000];
    let message = refused(step(&hyper, &AT, &mut p, &g, &mut Moments::new(4999)));
    assert_eq!(message, "adamw8bit: m has 4999 elements for 5000 parameters");
    let mut torn = Moments::new(5000);
    if let Moments::Blocks { v_max, .. } = &mut torn {
        v_max.pop();
    }
    assert!(refused(step(&hyper, &AT, &mut p, &g, &mut torn)).contains("20 and 19 scales for 20 blocks"));
}
