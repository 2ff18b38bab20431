use super::*;
use crate::Exec;
use candle_core::Device;

/// Seeded values in [-1, 1): a 64-bit linear congruential generator.
fn noise(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let n: usize = shape.iter().product();
    let data: Vec<f32> = (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn max_diff(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// The sum of the doc comment, in f64, element by element.
fn naive(a: &CausalConv3dArgs<'_>) -> Tensor {
    let s = a.sizes().unwrap();
    let (x, w) = (values(a.x), values(a.weight));
    let past: Vec<Vec<f32>> = a.past.iter().map(values).collect();
    let bias = a.bias.map(values).unwrap_or(vec![0.0; s.o]);
    let at = |b: usize, c: usize, f: isize, y: isize, xx: isize| -> f64 {
        if y < 0 || xx < 0 || y >= s.y as isize || xx >= s.x as isize {
            return 0.0;
        }
        let inside = y as usize * s.x + xx as usize;
        if f >= 0 {
            x[((b * s.c + c) * s.f + f as usize) * s.y * s.x + inside] as f64
        } else {
            match (past.len() as isize + f).try_into() {
                Ok(i) => {
                    let i: usize = i;
                    past[i][(b * s.c + c) * s.y * s.x + inside] as f64
                }
                Err(_) => 0.0,
            }
        }
    };
    let mut out = Vec::new();
    for b in 0..s.b {
        for (o, &bias) in bias.iter().enumerate() {
            for f in 0..s.f_out {
                for y in 0..s.y_out {
                    for xx in 0..s.x_out {
                        let mut sum = bias as f64;
                        for c in 0..s.c {
                            for t in 0..s.kt {
                                for i in 0..s.ky {
                                    for j in 0..s.kx {
                                        let wi = (((o * s.c + c) * s.kt + t) * s.ky + i) * s.kx + j;
                                        sum += w[wi] as f64
                                            * at(
                                                b,
                                                c,
                                                (f * a.stride[0] + t) as isize - a.pad_front as isize,
                                                (y * a.stride[1] + i) as isize - a.pad_y.0 as isize,
                                                (xx * a.stride[2] + j) as isize - a.pad_x.0 as isize,
                                            );
                                    }
                                }
                            }
                        }
                        out.push(sum as f32);
                    }
                }
            }
        }
    }
    Tensor::from_vec(out, (s.b, s.o, s.f_out, s.y_out, s.x_out), &Device::Cpu).unwrap()
}

struct Case {
    x: [usize; 5],
    o: usize,
    k: [usize; 3],
    past: usize,
    pad_front: usize,
    pad_y: (usize, usize),
    pad_x: (usize, usize),
    stride: [usize; 3],
}

/// The shapes the VAE uses, at sizes that divide by nothing.
fn cases() -> Vec<Case> {
    let same =
        |x, o, past| Case { x, o, k: [3, 3, 3], past, pad_front: 2, pad_y: (1, 1), pad_x: (1, 1), stride: [1; 3] };
    vec![
        same([1, 3, 1, 7, 19], 8, 0),
        same([1, 5, 1, 9, 33], 7, 1),
        same([2, 4, 3, 5, 17], 13, 2),
        same([1, 1, 4, 1, 1], 1, 2),
        // pointwise
        Case { k: [1; 3], pad_front: 0, pad_y: (0, 0), pad_x: (0, 0), ..same([1, 6, 2, 4, 21], 5, 0) },
        // halving in space: a zero row below and column to the right
        Case {
            k: [1, 3, 3],
            pad_front: 0,
            pad_y: (0, 1),
            pad_x: (0, 1),
            stride: [1, 2, 2],
            ..same([1, 3, 2, 10, 38], 9, 0)
        },
        // halving in time: no zeros, the last frame of before ahead
        Case {
            k: [3, 1, 1],
            past: 1,
            pad_front: 1,
            pad_y: (0, 0),
            pad_x: (0, 0),
            stride: [2, 1, 1],
            ..same([1, 4, 4, 3, 5], 6, 1)
        },
        // everything uneven
        Case {
            k: [2, 4, 5],
            past: 1,
            pad_front: 3,
            pad_y: (2, 0),
            pad_x: (3, 1),
            stride: [2, 3, 3],
            ..same([2, 2, 5, 11, 23], 3, 1)
        },
        Case {
            k: [1, 2, 3],
            pad_front: 0,
            pad_y: (0, 0),
            pad_x: (1, 1),
            stride: [1, 1, 2],
            ..same([1, 2, 1, 6, 9], 2, 0)
        },
    ]
}

fn each_case(mut f: impl FnMut(&CausalConv3dArgs<'_>)) {
    for (n, c) in cases().into_iter().enumerate() {
        let n = n as u64;
        let x = noise(&c.x, 10 * n + 1);
        let w = noise(&[c.o, c.x[1], c.k[0], c.k[1], c.k[2]], 10 * n + 2);
        let bias = noise(&[c.o], 10 * n + 3);
        let past: Vec<_> =
            (0..c.past).map(|i| noise(&[c.x[0], c.x[1], 1, c.x[3], c.x[4]], 10 * n + 4 + i as u64)).collect();
        let args = CausalConv3dArgs {
            x: &x,
            weight: &w,
            bias: Some(&bias),
            past: &past,
            pad_front: c.pad_front,
            pad_y: c.pad_y,
            pad_x: c.pad_x,
            stride: c.stride,
            up: false,
            add: None,
        };
        CausalConv3d::check(&args).unwrap();
        f(&args);
    }
}

#[test]
fn both_paths_are_the_sum_they_claim_to_be() {
    each_case(|a| {
        let want = naive(a);
        let s = a.sizes().unwrap();
        // Values up to 1, some hundred terms: fp32 sums differ in the sixth digit.
        assert!(max_diff(&cpu::forward(a, s, DType::F32).unwrap(), &want) < 2e-5);
        assert!(max_diff(&plain::forward(a, s, DType::F32).unwrap(), &want) < 2e-5);
    });
}

#[test]
fn sixteen_bit_rounds_inputs_and_the_result_only() {
    each_case(|a| {
        let s = a.sizes().unwrap();
        for dtype in [DType::BF16, DType::F16] {
            let rounded = |t: &Tensor| t.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
            let (x, w, b) = (rounded(a.x), rounded(a.weight), rounded(a.bias.unwrap()));
            let past: Vec<_> = a.past.iter().map(rounded).collect();
            let exact = naive(&CausalConv3dArgs {
                x: &x,
                weight: &w,
                bias: Some(&b),
                past: &past,
                ..CausalConv3dArgs { ..*a }
            });
            for got in [cpu::forward(a, s, dtype).unwrap(), plain::forward(a, s, dtype).unwrap()] {
                assert_eq!(got.dtype(), dtype);
                let half_ulp = if dtype == DType::BF16 { 2f32.powi(-8) } else { 2f32.powi(-11) };
                for (g, e) in values(&got).into_iter().zip(values(&exact)) {
                    assert!((g - e).abs() <= e.abs() * half_ulp * 1.01 + 1e-5, "{g} is not {e} rounded to {dtype:?}");
                }
            }
        }
    });
}

#[test]
fn cutting_a_clip_changes_no_bit() {
    let x = noise(&[1, 5, 9, 12, 37], 1);
    let w = noise(&[10, 5, 3, 3, 3], 2);
    let bias = noise(&[10], 3);
    let run = |x: &Tensor, past: &[Tensor]| {
        Exec::cpu().run::<CausalConv3d>(&CausalConv3dArgs::causal(x, &w, Some(&bias), past).unwrap()).unwrap()
    };
    let whole = run(&x, &[]);
    let frame = |i| x.narrow(2, i, 1).unwrap().contiguous().unwrap();
    let parts: Vec<_> = (0..9)
        .map(|i: usize| {
            let past: Vec<_> = (i.saturating_sub(2)..i).map(frame).collect();
            run(&frame(i), &past)
        })
        .collect();
    assert_eq!(values(&whole), values(&Tensor::cat(&parts, 2).unwrap()));
}

#[test]
fn a_batch_is_its_samples() {
    let x = noise(&[3, 4, 2, 6, 20], 5);
    let w = noise(&[7, 4, 3, 3, 3], 6);
    let run =
        |x: &Tensor| Exec::cpu().run::<CausalConv3d>(&CausalConv3dArgs::causal(x, &w, None, &[]).unwrap()).unwrap();
    let parts: Vec<_> = (0..3).map(|i| run(&x.narrow(0, i, 1).unwrap())).collect();
    assert_eq!(values(&run(&x)), values(&Tensor::cat(&parts, 0).unwrap()));
}

#[test]
fn wrong_shapes_are_named() {
    let x = noise(&[1, 4, 1, 6, 6], 1);
    let w = noise(&[2, 3, 3, 3, 3], 2);
    let refused = |a: CausalConv3dArgs<'_>| Exec::cpu().run::<CausalConv3d>(&a).unwrap_err().to_string();
    let e = refused(CausalConv3dArgs::causal(&x, &w, None, &[]).unwrap());
    assert!(e.contains("weight") && e.contains("[o,4,kt,ky,kx]"), "{e}");
    let w = noise(&[2, 4, 3, 3, 3], 2);
    let bias = noise(&[3], 1);
    assert!(refused(CausalConv3dArgs::causal(&x, &w, Some(&bias), &[]).unwrap()).contains("bias"));
    let small = [noise(&[1, 4, 1, 5, 6], 1)];
    assert!(refused(CausalConv3dArgs::causal(&x, &w, None, &small).unwrap()).contains("past"));
    let long = vec![noise(&[1, 4, 1, 6, 6], 1); 3];
    assert!(refused(CausalConv3dArgs::causal(&x, &w, None, &long).unwrap()).contains("3 past frames"));
    let none = CausalConv3dArgs { pad_front: 0, ..CausalConv3dArgs::causal(&x, &w, None, &[]).unwrap() };
    assert!(refused(none).contains("1 frames"), "a kernel of three frames needs three");
}

#[test]
fn cost_counts_multiply_adds_twice() {
    let x = noise(&[1, 2, 1, 4, 4], 1);
    let w = noise(&[3, 2, 3, 3, 3], 2);
    let cost = CausalConv3d::cost(&CausalConv3dArgs::causal(&x, &w, None, &[]).unwrap());
    assert_eq!(cost.flops, (2 * 16 * 3 * 2 * 27) as f64);
    assert_eq!(cost.bytes, (4 * (32 + 3 * 2 * 27 + 48)) as f64);
}

#[test]
fn channel_norm_is_its_definition() {
    for (shape, silu) in [(vec![2, 5, 3, 7, 11], true), (vec![1, 9, 1, 40, 33], false), (vec![1, 1, 1, 1, 1], true)] {
        // One position is all zeros: the floor of the length keeps it zero.
        let x = noise(&shape, 3);
        let x = (&x
            * &x.narrow(1, 0, 1)
                .unwrap()
                .ge(-0.9)
                .unwrap()
                .to_dtype(DType::F32)
                .unwrap()
                .broadcast_as(x.shape())
                .unwrap())
            .unwrap();
        let gamma = noise(&[shape[1]], 4);
        let a = ChannelNormArgs { x: &x, gamma: &gamma, silu };
        let got = Exec::cpu().run::<ChannelNorm>(&a).unwrap();
        assert!(max_diff(&got, &norm::plain(&a, DType::F32).unwrap()) < 2e-6);
        let n = shape[2..].iter().product::<usize>();
        let (xv, gv, yv) = (values(&x), values(&gamma), values(&got));
        for b in 0..shape[0] {
            for p in 0..n {
                let at = |c: usize| xv[(b * shape[1] + c) * n + p] as f64;
                let length = (0..shape[1]).map(|c| at(c) * at(c)).sum::<f64>().sqrt().max(1e-12);
                for c in 0..shape[1] {
                    let y = at(c) / length * (shape[1] as f64).sqrt() * gv[c] as f64;
                    let want = if silu { y / (1.0 + (-y).exp()) } else { y };
                    assert!((yv[(b * shape[1] + c) * n + p] as f64 - want).abs() < 2e-6);
                }
            }
        }
    }
}

#[test]
fn channel_norm_refuses_a_gamma_of_another_width() {
    let (x, gamma) = (noise(&[1, 4, 2, 2, 2], 1), noise(&[3], 1));
    let e = Exec::cpu().run::<ChannelNorm>(&ChannelNormArgs { x: &x, gamma: &gamma, silu: true }).unwrap_err();
    assert!(e.to_string().contains("gamma"), "{e}");
}

#[test]
fn a_repeated_input_and_an_addition_are_what_they_say() {
    let (x, w, bias) = (noise(&[1, 3, 2, 4, 5], 1), noise(&[2, 3, 1, 3, 3], 2), noise(&[2], 3));
    let larger = doubled(&x).unwrap();
    assert_eq!(larger.dims(), [1, 3, 2, 8, 10]);
    assert_eq!(values(&larger.narrow(3, 5, 1).unwrap()), values(&larger.narrow(3, 4, 1).unwrap()));
    let add = noise(&[1, 2, 2, 8, 10], 4);
    let run = |a: CausalConv3dArgs<'_>| Exec::cpu().run::<CausalConv3d>(&a).unwrap();
    let plain = run(CausalConv3dArgs::causal(&larger, &w, Some(&bias), &[]).unwrap());
    let a =
        CausalConv3dArgs { up: true, add: Some(&add), ..CausalConv3dArgs::causal(&x, &w, Some(&bias), &[]).unwrap() };
    assert_eq!(values(&run(a)), values(&(plain + &add).unwrap()));
    let small = noise(&[1, 2, 2, 4, 5], 4);
    let wrong =
        CausalConv3dArgs { up: true, add: Some(&small), ..CausalConv3dArgs::causal(&x, &w, None, &[]).unwrap() };
    assert!(Exec::cpu().run::<CausalConv3d>(&wrong).unwrap_err().to_string().contains("add"));
}
