//! e4m3fn bytes and fp32: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities, ±448 the largest, 0x7f and 0xff
//! NaN, 2⁻⁹ the smallest.

use rayon::prelude::*;

/// Largest finite value.
pub const MAX: f32 = 448.0;

const PIECE: usize = 1 << 16;

/// The value of each code.
pub static VALUES: [f32; 256] = table();

const fn table() -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = value(code as u8);
        code += 1;
    }
    values
}

const fn value(code: u8) -> f32 {
    let sign = ((code & 0x80) as u32) << 24;
    let (exponent, mantissa) = ((code >> 3 & 0xf) as u32, (code & 7) as u32);
    if code & 0x7f == 0x7f {
        return f32::from_bits(sign | 0x7fc0_0000);
    }
    if exponent == 0 {
        let magnitude = mantissa as f32 / 512.0;
        return f32::from_bits(sign | magnitude.to_bits());
    }
    f32::from_bits(sign | (exponent + 120) << 23 | mantissa << 20)
}

/// The nearest code, ties to the even one. No saturation: |x| > 464 and NaN give NaN, as a plain cast in PyTorch does.
pub fn encode(x: f32) -> u8 {
    /// 480, the first value that no code is left for.
    const BEYOND: u32 = 0x43f0_0000;
    /// 2⁻⁶, the smallest normal.
    const NORMAL: u32 = 121 << 23;
    /// 2¹⁴: adding it leaves units of 2⁻⁹ in the last place of the sum, rounded to even by the addition.
    const UNITS: f32 = 16384.0;

    let bits = x.to_bits();
    let (sign, magnitude) = ((bits >> 24 & 0x80) as u8, bits & 0x7fff_ffff);
    let code = if magnitude >= BEYOND {
        0x7f
    } else if magnitude < NORMAL {
        (f32::from_bits(magnitude) + UNITS).to_bits().wrapping_sub(UNITS.to_bits()) as u8
    } else {
        // Move the exponent's bias from 127 to 7 and round half to even at bit 20; a carry runs into the exponent.
        let odd = magnitude >> 20 & 1;
        ((magnitude - (120 << 23) + 0x7_ffff + odd) >> 20) as u8
    };
    sign | code
}

pub fn decode(code: u8) -> f32 {
    VALUES[usize::from(code)]
}

/// [`encode`] on a slice, in parallel; both of one length.
pub fn encode_slice(from: &[f32], to: &mut [u8]) {
    assert_eq!(from.len(), to.len());
    to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = encode(from);
        }
    });
}

/// [`decode`] on a slice, in parallel; both of one length.
pub fn decode_slice(from: &[u8], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = decode(from);
        }
    });
}
