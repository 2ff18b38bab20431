//! The direct convolution on the CPU: for a band of rows, gather the input rows it reads (padding, stride and past
//! resolved), then run a register tile of `OB` channels by `XB` columns over all taps. Every output is one fp32 sum in
//! the order (frame, channel, row, column), so neither the band nor the cut of the clip can change a bit.

use super::{CausalConv3dArgs, Sizes};
use crate::{Error, Result};
use candle_core::{DType, Device, Storage, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;
use std::cell::RefCell;

/// Output channels of a tile. With two 8-wide vectors a channel, 4 x 2 independent sums just cover the latency of the two
/// multiply-adders, and 4 divides the channel counts there are (6 left a third of the work unused at 8 channels).
const OB: usize = 4;
/// Output columns of a tile.
const XB: usize = 16;
/// Elements of gathered input for one band: about the second-level cache of a core.
const GATHER: usize = 512 << 10;

/// What is stored between ops; converted to and from fp32 at the edges of a band.
pub(super) trait Element: WithDType + Send + Sync {
    fn widen(self) -> f32;
    fn narrow(x: f32) -> Self;
    /// Zeros by the type's constant: memory that the system gives zeroed is not written again.
    fn zeros(n: usize) -> Vec<Self>;
}

impl Element for f32 {
    fn widen(self) -> f32 {
        self
    }
    fn narrow(x: f32) -> Self {
        x
    }
    fn zeros(n: usize) -> Vec<Self> {
        vec![0.0; n]
    }
}

impl Element for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn zeros(n: usize) -> Vec<Self> {
        vec![bf16::ZERO; n]
    }
}

impl Element for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn zeros(n: usize) -> Vec<Self> {
        vec![f16::ZERO; n]
    }
}

/// Lends the elements of a contiguous CPU tensor.
pub(super) fn with_slice<E: Element, R>(t: &Tensor, f: impl FnOnce(&[E]) -> Result<R>) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    let slice = match &*storage {
        Storage::Cpu(cpu) => cpu.as_slice::<E>()?,
        _ => return Err(Error::Argument { op: "cpu", what: "tensor is not on the CPU".into() }),
    };
    match layout.contiguous_offsets() {
        Some((from, to)) => f(&slice[from..to]),
        None => Err(Error::Argument { op: "cpu", what: "tensor is not contiguous".into() }),
    }
}

pub(super) fn forward(a: &CausalConv3dArgs<'_>, s: Sizes, compute: DType) -> Result<Tensor> {
    let x = a.x.to_dtype(compute)?.contiguous()?;
    let past = a.past.iter().map(|p| p.to_dtype(compute)?.contiguous()).collect::<candle_core::Result<Vec<_>>>()?;
    let round = |t: &Tensor| t.to_dtype(compute)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let weight = pack_weight(&round(a.weight)?, s);
    let bias = match a.bias {
        Some(b) => round(b)?,
        None => vec![0.0; s.o],
    };
    let job = Job { s, stride: a.stride, pad: [a.pad_front, a.pad_y.0, a.pad_x.0], weight, bias };
    match compute {
        DType::F32 => run::<f32>(&job, &x, &past),
        DType::BF16 => run::<bf16>(&job, &x, &past),
        DType::F16 => run::<f16>(&job, &x, &past),
        got => Err(Error::Dtype { op: "causal_conv3d", tensor: "compute", got, want: "f32, bf16 or f16" }),
    }
}

/// `[o,c,kt,ky,kx]` to `[o / OB, kt, c, ky, kx, OB]`, the order in which the tile reads it; channels beyond `o` are zero.
fn pack_weight(w: &[f32], s: Sizes) -> Vec<f32> {
    let (space, taps) = (s.ky * s.kx, s.kt * s.c * s.ky * s.kx);
    let mut packed = vec![0.0; s.o.div_ceil(OB) * taps * OB];
    for o in 0..s.o {
        for c in 0..s.c {
            for t in 0..s.kt {
                for k in 0..space {
                    let at = (t * s.c + c) * space + k;
                    packed[(o / OB * taps + at) * OB + o % OB] = w[((o * s.c + c) * s.kt + t) * space + k];
                }
            }
        }
    }
    packed
}

thread_local! {
    /// The gathered rows of one band; a few MiB that each worker keeps.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Job {
    s: Sizes,
    stride: [usize; 3],
    /// Frames ahead, rows above, columns left.
    pad: [usize; 3],
    weight: Vec<f32>,
    bias: Vec<f32>,
}

fn run<E: Element>(job: &Job, x: &Tensor, past: &[Tensor]) -> Result<Tensor> {
    let s = job.s;
    // Guards keep the storages borrowed while the slices of all frames are in use.
    let guards: Vec<_> = past.iter().chain([x]).map(|t| t.storage_and_layout()).collect();
    let mut slices = Vec::with_capacity(guards.len());
    for (storage, layout) in &guards {
        let Storage::Cpu(cpu) = &**storage else {
            return Err(Error::Argument { op: "causal_conv3d", what: "past is not on the CPU".into() });
        };
        let all = cpu.as_slice::<E>()?;
        slices.push(&all[layout.start_offset()..layout.start_offset() + layout.shape().elem_count()]);
    }
    let x_all = slices.pop().unwrap_or_default();
    let plan = Plan::new(job);
    let bands = s.y_out.div_ceil(plan.rows);
    let len = s.b * s.o * s.f_out * s.y_out * s.x_out;
    let mut out: Vec<E> = Vec::with_capacity(len);
    let sink = Sink(out.as_mut_ptr());
    (0..s.b * s.f_out * bands).into_par_iter().for_each(|task| {
        SCRATCH.with_borrow_mut(|scratch| {
            // What a band reads it has gathered before: nothing needs clearing.
            scratch.resize(plan.scratch.max(scratch.len()), 0.0);
            let (band, bf) = (task % bands, task / bands);
            let (f, b) = (bf % s.f_out, bf / s.f_out);
            let y0 = band * plan.rows;
            let rows = plan.rows.min(s.y_out - y0);
            // Frames before the clip are zero and add nothing: their taps are skipped.
            let zero_frames = job.pad[0] - past.len();
            let first_tap = zero_frames.saturating_sub(f * job.stride[0]).min(s.kt);
            for t in first_tap..s.kt {
                let i = f * job.stride[0] + t - zero_frames;
                for c in 0..s.c {
                    let plane = s.y * s.x;
                    let src = match i.checked_sub(past.len()) {
                        None => &slices[i][(b * s.c + c) * plane..][..plane],
                        Some(i) => &x_all[((b * s.c + c) * s.f + i) * plane..][..plane],
                    };
                    plan.gather(job, src, y0, rows, &mut scratch[(t * s.c + c) * plan.channel..]);
                }
            }
            let out_at = |o: usize, y: usize, x: usize| (((b * s.o + o) * s.f_out + f) * s.y_out + y) * s.x_out + x;
            let first_k = first_tap * s.c * s.ky * s.kx;
            for ob in 0..s.o.div_ceil(OB) {
                let weight = &job.weight[ob * plan.taps.len() * OB..][..plan.taps.len() * OB];
                let channels = OB.min(s.o - ob * OB);
                for y in 0..rows {
                    for x in (0..s.x_out).step_by(XB) {
                        let from = &scratch[y * job.stride[1] * plan.row..][x..];
                        let sums = tile(plan.fma, &plan.taps[first_k..], &weight[first_k * OB..], from);
                        let columns = XB.min(s.x_out - x);
                        for (j, sum) in sums.iter().enumerate().take(channels) {
                            let o = ob * OB + j;
                            // SAFETY: each (b, o, f, y, x) belongs to exactly one task, and lies inside `out`.
                            unsafe { sink.put(out_at(o, y0 + y, x), job.bias[o], &sum[..columns]) };
                        }
                    }
                }
            }
        })
    });
    // SAFETY: the tasks above wrote every element once: all (b, f, band), all channels, all columns.
    unsafe { out.set_len(len) };
    Ok(Tensor::from_vec(out, (s.b, s.o, s.f_out, s.y_out, s.x_out), &Device::Cpu)?)
}

/// The output, written by many tasks at places that do not overlap: a band is strided through all output channels,
/// which safe chunks cannot express.
struct Sink<E>(*mut E);

// SAFETY: see `Sink::put`; the pointer outlives the parallel loop that uses it.
unsafe impl<E: Send> Send for Sink<E> {}
unsafe impl<E: Send> Sync for Sink<E> {}

impl<E: Element> Sink<E> {
    /// Writes `sums + bias` from element `at` on.
    ///
    /// # Safety
    /// The elements are inside the allocation and no other task writes or reads them.
    #[inline(always)]
    unsafe fn put(&self, at: usize, bias: f32, sums: &[f32]) {
        let to = unsafe { self.0.add(at) };
        if let Ok(sums) = <&[f32; XB]>::try_from(sums) {
            // A full tile has a known length: this becomes vector stores.
            for (k, &v) in sums.iter().enumerate() {
                unsafe { to.add(k).write(E::narrow(v + bias)) };
            }
        } else {
            for (k, &v) in sums.iter().enumerate() {
                unsafe { to.add(k).write(E::narrow(v + bias)) };
            }
        }
    }
}

/// How bands are gathered: a row is split into `stride_x` phases, so that neighbouring outputs read neighbouring values.
struct Plan {
    /// Output rows of a band.
    rows: usize,
    /// Gathered elements of one phase of a row, of a row, and of all rows of a channel.
    phase: usize,
    row: usize,
    channel: usize,
    scratch: usize,
    /// Where each tap `(t,c,i,j)` starts, for the first output of a band.
    taps: Vec<usize>,
    fma: bool,
}

impl Plan {
    fn new(job: &Job) -> Self {
        let s = job.s;
        let [_, sy, sx] = job.stride;
        // The last tile of a row reads full width; what it reads beyond the row is never written out.
        let phase = s.x_out.next_multiple_of(XB) + s.kx.div_ceil(sx);
        let row = phase * sx;
        let per_row = s.kt * s.c * row;
        let rows = (GATHER / (per_row * sy).max(1)).saturating_sub(s.ky / sy).clamp(1, 16).min(s.y_out);
        let channel = ((rows - 1) * sy + s.ky) * row;
        let mut taps = Vec::with_capacity(s.kt * s.c * s.ky * s.kx);
        for tc in 0..s.kt * s.c {
            for i in 0..s.ky {
                for j in 0..s.kx {
                    taps.push(tc * channel + i * row + (j % sx) * phase + j / sx);
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        #[cfg(not(target_arch = "x86_64"))]
        let fma = false;
        Self { rows, phase, row, channel, scratch: s.kt * s.c * channel, taps, fma }
    }

    /// Copies the rows of one channel that outputs `y0..y0+rows` read, with zeros for what lies outside the picture.
    fn gather<E: Element>(&self, job: &Job, src: &[E], y0: usize, rows: usize, dst: &mut [f32]) {
        let s = job.s;
        let [_, sy, sx] = job.stride;
        for r in 0..(rows - 1) * sy + s.ky {
            let line = &mut dst[r * self.row..][..self.row];
            let y = (y0 * sy + r).wrapping_sub(job.pad[1]);
            if y >= s.y {
                line.fill(0.0);
                continue;
            }
            let src = &src[y * s.x..][..s.x];
            for p in 0..sx {
                let line = &mut line[p * self.phase..][..self.phase];
                // Column q of this phase is input column q * sx + p - pad.
                let lead = job.pad[2].saturating_sub(p).div_ceil(sx).min(self.phase);
                line[..lead].fill(0.0);
                let first = lead * sx + p - job.pad[2];
                let n = if first < s.x { (s.x - first).div_ceil(sx).min(self.phase - lead) } else { 0 };
                if sx == 1 {
                    for (d, v) in line[lead..lead + n].iter_mut().zip(&src[first..first + n]) {
                        *d = v.widen();
                    }
                } else if n > 0 {
                    for (d, v) in line[lead..lead + n].iter_mut().zip(src[first..].iter().step_by(sx)) {
                        *d = v.widen();
                    }
                }
                line[lead + n..].fill(0.0);
            }
        }
    }
}

/// Sums `weight[k][j] * from[taps[k] + x]` over k for `OB` channels and `XB` columns.
#[inline(always)]
fn tile(fma: bool, taps: &[usize], weight: &[f32], from: &[f32]) -> [[f32; XB]; OB] {
    // One bound for all loads below: taps grow with k only within a phase, so look at the largest.
    debug_assert!(taps.iter().all(|t| t + XB <= from.len()));
    debug_assert_eq!(weight.len(), taps.len() * OB);
    #[cfg(target_arch = "x86_64")]
    if fma {
        // SAFETY: AVX2 and FMA were detected; `Plan::new` sizes the scratch so that every tap of every tile, at full
        // width, lies inside it.
        return unsafe { tile_avx2(taps, weight, from) };
    }
    let _ = fma;
    let mut sums = [[0f32; XB]; OB];
    for (&at, w) in taps.iter().zip(weight.chunks_exact(OB)) {
        let x = &from[at..at + XB];
        for (sum, &w) in sums.iter_mut().zip(w) {
            for (acc, &v) in sum.iter_mut().zip(x) {
                *acc += w * v;
            }
        }
    }
    sums
}

/// # Safety
/// AVX2 and FMA are present; `from[t..t + XB]` is in bounds for every tap; `weight` has `OB` values a tap.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2(taps: &[usize], weight: &[f32], from: &[f32]) -> [[f32; XB]; OB] {
    use std::arch::x86_64::*;
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; OB];
        let mut w = weight.as_ptr();
        for &at in taps {
            let x = from.as_ptr().add(at);
            let (x0, x1) = (_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8)));
            for (j, sum) in sums.iter_mut().enumerate() {
                let wj = _mm256_broadcast_ss(&*w.add(j));
                sum[0] = _mm256_fmadd_ps(wj, x0, sum[0]);
                sum[1] = _mm256_fmadd_ps(wj, x1, sum[1]);
            }
            w = w.add(OB);
        }
        let mut out = [[0f32; XB]; OB];
        for (row, sum) in out.iter_mut().zip(sums) {
            _mm256_storeu_ps(row.as_mut_ptr(), sum[0]);
            _mm256_storeu_ps(row.as_mut_ptr().add(8), sum[1]);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_portable_tile_sums_what_the_vector_tile_sums() {
        let wave = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
        let taps: Vec<usize> = (0..45).map(|k| k * 7 % 50).collect();
        let (weight, from) = (wave(taps.len() * OB, 0.7), wave(50 + XB, 0.3));
        let portable = tile(false, &taps, &weight, &from);
        for (j, row) in portable.iter().enumerate() {
            for (x, &got) in row.iter().enumerate() {
                let want: f64 =
                    (0..taps.len()).map(|k| f64::from(weight[k * OB + j]) * f64::from(from[taps[k] + x])).sum();
                assert!((f64::from(got) - want).abs() < 1e-5);
            }
        }
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            let vector = tile(true, &taps, &weight, &from);
            let worst = portable.iter().flatten().zip(vector.iter().flatten()).map(|(a, b)| (a - b).abs());
            assert!(worst.fold(0.0, f32::max) < 1e-5);
        }
    }
}
