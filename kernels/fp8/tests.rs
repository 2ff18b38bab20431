use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::codec::{decode, decode_slice, encode, encode_slice};
use super::*;
use crate::testing::{assert_bits, normal, refused, values};
use crate::Exec;

fn golden() -> HashMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/04_fp8_matrices.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn bytes(t: &Tensor) -> Vec<u8> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn encoded(t: &Tensor) -> Vec<u8> {
    let from = values(t);
    let mut to = vec![0; from.len()];
    encode_slice(&from, &mut to);
    to
}

#[test]
fn all_codes_have_the_golden_values() {
    let golden = golden();
    let want = values(&golden["table.u8_to_f32"]);
    for code in 0..=255u8 {
        let (got, want) = (decode(code), want[usize::from(code)]);
        if want == 1234.0 {
            assert!(got.is_nan());
        } else {
            assert_eq!(got.to_bits(), want.to_bits(), "{code:#x}");
            assert_eq!(encode(got), code);
        }
    }
}

#[test]
fn plain_casts_match_golden() {
    let golden = golden();
    assert_eq!(encoded(&golden["castcases.x"]), bytes(&golden["castcases.u8"]));
    let narrowed = golden["castcases.x"].to_dtype(DType::BF16).unwrap();
    assert_eq!(encoded(&narrowed), bytes(&golden["castcases.u8_from_bf16"]));
    let mut seen = 0;
    for (name, weight) in &golden {
        if let Some(stem) = name.strip_suffix(".weight") {
            if let Some(cast) = golden.get(&format!("{stem}.cast_u8")) {
                assert_eq!(encoded(weight), bytes(cast), "{name}");
                seen += 1;
            }
        }
    }
    assert!(seen >= 12, "{seen} plain casts compared");
}

#[test]
fn encode_takes_the_nearest_code_and_ties_go_to_even() {
    // Against a search of all codes, at every midpoint between neighbours and one place to either side of it.
    let mut finite: Vec<u8> = (0..0x7f).collect();
    finite.sort_by(|&a, &b| decode(a).total_cmp(&decode(b)));
    for pair in finite.windows(2) {
        let (low, high) = (pair[0], pair[1]);
        let middle = (decode(low) + decode(high)) / 2.0;
        let even = if low % 2 == 0 { low } else { high };
        for (x, want) in
            [(middle, even), (f32::from_bits(middle.to_bits() - 1), low), (f32::from_bits(middle.to_bits() + 1), high)]
        {
            assert_eq!(encode(x), want, "{x}");
            assert_eq!(encode(-x), want | 0x80, "-{x}");
        }
    }
    assert_eq!(encode(464.0), 0x7e);
    for beyond in [464.001, 480.0, 1e30, f32::INFINITY, f32::NAN] {
        assert_eq!(encode(beyond) & 0x7f, 0x7f, "{beyond}");
    }
    assert_eq!((encode(0.0), encode(-0.0), encode(1e-40)), (0, 0x80, 0));
    assert_eq!(encode(f32::NEG_INFINITY), 0xff);
}

#[test]
fn quantized_weights_match_golden() {
    let golden = golden();
    let mut seen = 0;
    for (name, codes) in &golden {
        let Some(stem) = name.strip_suffix(".q_u8") else { continue };
        let (base, granularity) = if let Some(base) = stem.strip_suffix(".tensor") {
            (base, Granularity::Tensor)
        } else if let Some(base) = stem.strip_suffix(".channel") {
            (base, Granularity::Channel)
        } else {
            (stem, Granularity::Block)
        };
        let weight = Weight::quantize(&golden[&format!("{base}.weight")], granularity).unwrap();
        assert_bits(weight.scale(), &golden[&format!("{stem}.scale")]);
        assert_eq!(bytes(weight.codes_oi()), bytes(codes), "{name}");
        if let Some(dequant) = golden.get(&format!("{stem}.dequant")) {
            assert_bits(&weight.dequantize().unwrap(), dequant);
            assert_bits(&weight.dequantize_plain().unwrap(), dequant);
        }
        seen += 1;
    }
    assert!(seen >= 12, "{seen} weights compared");
}

#[test]
fn rows_may_come_in_any_split() {
    let weight = normal(1, &[37, 128]);
    let whole = Weight::quantize(&weight, Granularity::Block).unwrap();
    let flat = values(&weight);
    for groups in [1, 5, 74] {
        let (mut codes, mut scales) = (vec![], vec![]);
        for piece in flat.chunks(groups * BLOCK) {
            let (mut c, mut s) = (vec![0; piece.len()], vec![0.0; piece.len() / BLOCK]);
            quantize_rows(piece, BLOCK, DType::F32, &mut c, &mut s).unwrap();
            codes.extend(c);
            scales.extend(s);
        }
        assert_eq!(codes, bytes(whole.codes_oi()));
        assert_eq!(scales, values(whole.scale()));
    }
}

#[test]
fn every_granularity_expands_as_its_definition() {
    // 40000 columns: a group larger than a parallel piece; 1 row, 1 column.
    for oi in [[3, 40000], [2, 128], [9, 97], [1, 64], [97, 1]] {
        for granularity in [Granularity::Block, Granularity::Channel, Granularity::Tensor] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let weight = Weight::quantize(&normal(1, &oi).to_dtype(dtype).unwrap(), granularity).unwrap();
                assert_eq!(weight.scale().dims(), granularity.scale_shape(oi));
                let full = weight.dequantize().unwrap();
                assert_eq!(full.dtype(), dtype);
                assert_bits(&full, &weight.dequantize_plain().unwrap());
            }
        }
    }
}

#[test]
fn large_values_saturate_and_zero_blocks_stay_zero() {
    let mut list = vec![0f32; 128];
    list[70] = 1000.0;
    list[71] = -1000.0;
    let weight =
        Weight::quantize(&Tensor::from_vec(list.clone(), (1, 128), &Device::Cpu).unwrap(), Granularity::Block).unwrap();
    assert_eq!(values(&weight.dequantize().unwrap())[70..72], list[70..72]);
    assert_eq!(bytes(weight.codes_oi())[..64], [0; 64]);
    // In fp16 the smallest scale is 0: what is left of a tiny block saturates, a zero stays zero.
    let tiny = Tensor::from_vec([0f32, 6e-8, -6e-8, 0.0].repeat(16), (1, 64), &Device::Cpu).unwrap();
    let weight = Weight::quantize(&tiny.to_dtype(DType::F16).unwrap(), Granularity::Block).unwrap();
    assert_eq!(values(weight.scale()), [0.0]);
    assert_eq!(bytes(weight.codes_oi())[..4], [0, 0x7e, 0xfe, 0]);
    assert!(values(&weight.dequantize().unwrap()).iter().all(|&w| w == 0.0));
}

#[test]
fn slices_decode_as_bytes_do() {
    let codes: Vec<u8> = (0..=255).cycle().take(70_001).collect();
    let mut full = vec![0f32; codes.len()];
    decode_slice(&codes, &mut full);
    assert!(codes.iter().zip(&full).all(|(&c, f)| decode(c).to_bits() == f.to_bits()));
}

#[test]
fn foreign_scales_are_taken_in_every_known_shape() {
    let codes = Tensor::from_vec(vec![0x38u8; 4 * 128], (4, 128), &Device::Cpu).unwrap();
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    for shape in [&[4, 2, 1][..], &[4, 1], &[4], &[1], &[]] {
        let weight = Weight::new(codes.clone(), ones(shape)).unwrap();
        assert!(values(&weight.dequantize().unwrap()).iter().all(|&w| w == 1.0), "{shape:?}");
    }
    let message = refused(Weight::new(codes.clone(), ones(&[4, 3, 1])));
    assert!(message.contains("fp8_weight: scale has shape [4, 3, 1]"), "{message}");
    let message = refused(Weight::new(codes.to_dtype(DType::F32).unwrap(), ones(&[])));
    assert!(message.contains("codes_oi is F32"), "{message}");
    let message = refused(quantize_rows(&[0.0; 128], 64, DType::F32, &mut [0; 128], &mut [0.0; 3]));
    assert!(message.contains("128 weights in groups of 64"), "{message}");
    assert!(refused(quantize_rows(&[0.0], 1, DType::U8, &mut [0], &mut [0.0])).contains("scale is U8"));
}

#[test]
fn the_op_casts_after_rounding_to_the_scale() {
    let weight = Weight::quantize(&normal(1, &[5, 64]).to_dtype(DType::BF16).unwrap(), Granularity::Block).unwrap();
    let full = weight.dequantize().unwrap();
    let got = Exec::cpu().run::<Dequantize>(&DequantizeArgs { weight: &weight, out: DType::F32 }).unwrap();
    assert_bits(&got, &full.to_dtype(DType::F32).unwrap());
}
