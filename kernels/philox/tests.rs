use super::box_muller::{ln_unit, turn};
use super::*;

/// Random123's known answers for philox4x32-10.
#[test]
fn known_answers() {
    let answers = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, want) in answers {
        assert_eq!(philox4x32(counter, key), want);
    }
}

#[test]
fn every_key_part_matters() {
    let base = Philox::new(7, stream::NOISE, 3, 5);
    let others = [
        Philox::new(8, stream::NOISE, 3, 5),
        Philox::new(7 + (1 << 32), stream::NOISE, 3, 5),
        Philox::new(7, stream::TIMESTEP, 3, 5),
        Philox::new(7, stream::NOISE, 4, 5),
        Philox::new(7, stream::NOISE, 3, 6),
        Philox::new(7, stream::NOISE, 5, 3),
    ];
    for other in others {
        assert!(base.block(0).iter().zip(other.block(0)).all(|(a, b)| *a != b));
    }
}

#[test]
fn logarithm_and_turn_are_right_to_the_last_place() {
    let words = (0..200_000u32).map(|i| i.wrapping_mul(0x9E37_79B9)).chain([0, 1, 2, u32::MAX, u32::MAX - 1]);
    let edges = (0..8).flat_map(|eighth: u32| [eighth << 29, (eighth << 29).wrapping_sub(1), (eighth << 29) + 1]);
    for word in words.chain(edges) {
        let u = (f64::from(word) + 1.0) / 4_294_967_296.0;
        let want = u.ln();
        assert!((ln_unit(word) - want).abs() <= 1e-15 * want.abs() + 1e-25, "{word}");
        let (sin, cos) = (std::f64::consts::TAU * (f64::from(word) / 4_294_967_296.0)).sin_cos();
        let got = turn(word);
        assert!((got.0 - cos).abs() < 2e-15 && (got.1 - sin).abs() < 2e-15, "{word}");
    }
    assert_eq!(ln_unit(u32::MAX), 0.0);
}

#[test]
fn normals_have_the_moments_of_a_standard_normal() {
    let mut z = vec![0f32; 400_001];
    Philox::new(1, stream::NOISE, 0, 0).fill_normal(&mut z);
    let mean = |f: &dyn Fn(f64) -> f64| z.iter().map(|&z| f(f64::from(z))).sum::<f64>() / z.len() as f64;
    // Five standard deviations of each estimate.
    assert!(mean(&|z| z).abs() < 5.0 / 632.0);
    assert!((mean(&|z| z * z) - 1.0).abs() < 5.0 * 2f64.sqrt() / 632.0);
    assert!(mean(&|z| z.powi(3)).abs() < 5.0 * 15f64.sqrt() / 632.0);
    assert!((mean(&|z| z.powi(4)) - 3.0).abs() < 5.0 * 96f64.sqrt() / 632.0);
    let pairs = z.windows(2).map(|w| f64::from(w[0]) * f64::from(w[1])).sum::<f64>() / z.len() as f64;
    assert!(pairs.abs() < 5.0 / 632.0);
    assert!(z.iter().all(|z| z.abs() < 6.67));
}

#[test]
fn uniforms_fill_the_unit_interval_evenly() {
    let mut u = vec![0f32; 100_000];
    Philox::new(2, stream::TIMESTEP, 0, 0).fill_uniform(&mut u);
    let mut bins = [0i32; 16];
    u.iter().for_each(|&u| bins[(u * 16.0) as usize] += 1);
    // 6250 expected a bin, standard deviation 77.
    assert!(bins.iter().all(|&n| (n - 6250).abs() < 5 * 77), "{bins:?}");
    assert!(u.iter().all(|u| (0.0..1.0).contains(u)));
}

#[test]
fn a_value_depends_on_its_position_alone() {
    let philox = Philox::new(3, stream::NOISE, 9, 2);
    let mut long = vec![0f32; 10_007];
    philox.fill_normal(&mut long);
    for len in [1, 2, 3, 5, 4096, 4099] {
        let mut short = vec![0f32; len];
        philox.fill_normal(&mut short);
        assert_eq!(short, long[..len]);
    }
    let tensor = philox.normal(&[3, 5], &Device::Cpu).unwrap();
    assert_eq!(tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap(), long[..15]);
    let mut draws = philox.draws();
    let drawn: Vec<f32> = (0..10).map(|_| draws.normal() as f32).collect();
    assert_eq!(drawn, long[..10]);
}

/// Noise must stay the same across releases and machines, or a resumed run would not repeat the unbroken one.
#[test]
fn bits_never_change() {
    let mut z = [0f32; 6];
    Philox::new(0x0123_4567_89ab_cdef, stream::NOISE, 11, 4).fill_normal(&mut z);
    assert_eq!(z.map(f32::to_bits), BITS);
}

const BITS: [u32; 6] = [0x3ff2_16c5, 0x3ffc_27bc, 0xbe1f_e76d, 0x3ead_fc9e, 0xbbe2_ca4b, 0xbfac_1d27];

#[test]
fn draws_are_fair() {
    let mut draws = Philox::new(4, stream::SHUFFLE, 0, 0).draws();
    let mut counts = [0; 6];
    for _ in 0..6000 {
        let mut items = [0, 1, 2];
        draws.shuffle(&mut items);
        counts[match items {
            [0, 1, 2] => 0,
            [0, 2, 1] => 1,
            [1, 0, 2] => 2,
            [1, 2, 0] => 3,
            [2, 0, 1] => 4,
            _ => 5,
        }] += 1;
    }
    // 1000 expected, standard deviation 29.
    assert!(counts.iter().all(|&n: &i32| (n - 1000).abs() < 5 * 29), "{counts:?}");
    assert!((0..1000).all(|_| draws.below(3) < 3));
    assert!((0..1000).all(|_| (0.0..1.0).contains(&draws.uniform())));
}
