//! Logarithm and turn in plain IEEE double operations, in a fixed order: the same bits on every machine, where `libm`
//! differs in the last place from one to the next.

use std::f64::consts::{LN_2, SQRT_2, TAU};

/// Two standard normals from two words.
pub(super) fn normal_pair(a: u32, b: u32) -> (f64, f64) {
    let r = (-2.0 * ln_unit(a)).sqrt();
    let (cos, sin) = turn(b);
    (r * cos, r * sin)
}

/// ln((word + 1)·2⁻³²), within 1e-15 relative.
pub(super) fn ln_unit(word: u32) -> f64 {
    let n = u64::from(word) + 1;
    let mut exponent = 63 - n.leading_zeros() as i32;
    // n = m·2^exponent, m in [1, 2): exact, n has at most 33 bits.
    let mut m = n as f64 / (1u64 << exponent) as f64;
    if m > SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    // ln m = 2·artanh(s), s = (m − 1)/(m + 1), |s| < 0.172: eleven terms leave 2e-19.
    let s = (m - 1.0) / (m + 1.0);
    let s2 = s * s;
    let mut sum = 0.0;
    for k in (0..11).rev() {
        sum = sum * s2 + 1.0 / f64::from(2 * k + 1);
    }
    f64::from(exponent - 32) * LN_2 + 2.0 * s * sum
}

/// cos and sin of 2π·word·2⁻³², within 1e-15.
pub(super) fn turn(word: u32) -> (f64, f64) {
    // The nearest quarter turn, and what remains: an angle in [−π/4, π/4).
    let quarter = word.wrapping_add(1 << 29) >> 30;
    let rest = word.wrapping_sub(quarter << 30) as i32;
    let x = f64::from(rest) * (TAU / 4_294_967_296.0);
    let x2 = x * x;
    // Taylor series by Horner: 1 − x²/(1·2)·(1 − x²/(3·4)·(…)); eight terms leave 1e-17.
    let (mut cos, mut sin) = (1.0, 1.0);
    for k in (1..=8).rev() {
        let k = f64::from(2 * k);
        cos = 1.0 - x2 / ((k - 1.0) * k) * cos;
        sin = 1.0 - x2 / (k * (k + 1.0)) * sin;
    }
    sin *= x;
    match quarter {
        0 => (cos, sin),
        1 => (-sin, cos),
        2 => (-cos, -sin),
        _ => (sin, -cos),
    }
}
