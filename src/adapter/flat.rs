//! One fp32 buffer whose parts are seen as tensors. Writing to the buffer changes what the views show: the model always
//! computes with the current masters, and nothing is copied after an optimizer step.

use std::ops::Range;
use std::sync::Mutex;

use anyhow::{bail, Result};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, InplaceOp2, Layout, Shape, Storage, Tensor};

/// A flat fp32 tensor `[n]`.
#[derive(Debug, Clone)]
pub struct Flat {
    tensor: Tensor,
}

impl Flat {
    pub fn zeros(len: usize, device: &Device) -> Result<Self> {
        Ok(Self { tensor: Tensor::zeros(len, DType::F32, device)? })
    }

    pub fn len(&self) -> usize {
        self.tensor.elem_count()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// A part of the buffer as a tensor of `shape`; it shares the buffer's memory.
    pub fn view(&self, range: &Range<usize>, shape: impl Into<Shape>) -> Result<Tensor> {
        Ok(self.tensor.narrow(0, range.start, range.len())?.reshape(shape.into())?)
    }

    pub fn to_vec(&self) -> Result<Vec<f32>> {
        Ok(self.tensor.to_vec1()?)
    }

    /// Lends the values for reading (host memory only).
    pub fn read<T>(&self, body: impl FnOnce(&[f32]) -> T) -> Result<T> {
        let (storage, layout) = self.tensor.storage_and_layout();
        match &*storage {
            Storage::Cpu(cpu) => Ok(body(span(cpu, layout)?)),
            _ => bail!("the buffer is not in host memory"),
        }
    }

    /// Lends the values for writing (host memory only).
    pub fn write<T>(&self, body: impl FnOnce(&mut [f32]) -> T) -> Result<T> {
        let run = Write { body: Mutex::new(Some(body)), out: Mutex::new(None) };
        self.tensor.inplace_op1(&run)?;
        match run.out.into_inner() {
            Ok(Some(out)) => Ok(out),
            _ => bail!("the buffer was not lent"),
        }
    }

    /// Lends the values for reading and writing; of a buffer on a device a copy, which then takes its place.
    pub fn edit<T>(&self, body: impl FnOnce(&mut [f32]) -> T) -> Result<T> {
        if self.tensor.device().is_cpu() {
            return self.write(body);
        }
        let mut values = self.to_vec()?;
        let out = body(&mut values);
        self.set(&(0..self.len()), &values)?;
        Ok(out)
    }

    /// Lends the values of this buffer for writing and those of another for reading.
    pub fn write_with<T>(&self, other: &Flat, body: impl FnOnce(&mut [f32], &[f32]) -> T) -> Result<T> {
        let run = WriteWith { body: Mutex::new(Some(body)), out: Mutex::new(None) };
        self.tensor.inplace_op2(&other.tensor, &run)?;
        match run.out.into_inner() {
            Ok(Some(out)) => Ok(out),
            _ => bail!("the buffers were not lent"),
        }
    }

    /// Overwrites a part, wherever the buffer lies.
    pub fn set(&self, range: &Range<usize>, values: &[f32]) -> Result<()> {
        if values.len() != range.len() {
            bail!("{} values for {} elements", values.len(), range.len());
        }
        if self.tensor.device().is_cpu() {
            return self.write(|all| all[range.clone()].copy_from_slice(values));
        }
        let fresh = Tensor::from_slice(values, values.len(), self.tensor.device())?;
        Ok(self.tensor.slice_set(&fresh, 0, range.start)?)
    }

    /// L2 norm of all values; not finite if any is not.
    pub fn norm(&self) -> Result<f64> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = wan_kernels::gpu::Gpu::of(self.tensor.device()) {
            return Ok(wan_kernels::adamw::cuda::global_norm(&gpu, &self.tensor)?);
        }
        self.read(wan_kernels::adamw::global_norm)
    }

    /// Sets every element to zero.
    pub fn clear(&self) -> Result<()> {
        Ok(self.tensor.zero_set()?)
    }
}

/// `view += grad`, where `view` is a part of a [`Flat`].
pub fn add_assign(view: &Tensor, grad: &Tensor) -> candle_core::Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = wan_kernels::gpu::Gpu::of(view.device()) {
        return wan_kernels::linear::add_assign(&gpu, view, grad).map_err(candle_core::Error::wrap);
    }
    view.inplace_op2(&grad.contiguous()?, &AddAssign)
}

struct AddAssign;

impl InplaceOp2 for AddAssign {
    fn name(&self) -> &'static str {
        "add_assign"
    }

    fn cpu_fwd(
        &self,
        dst: &mut CpuStorage,
        dst_l: &Layout,
        src: &CpuStorage,
        src_l: &Layout,
    ) -> candle_core::Result<()> {
        let (dst, src) = (span_mut(dst, dst_l)?, span(src, src_l)?);
        dst.iter_mut().zip(src).for_each(|(d, s)| *d += s);
        Ok(())
    }
}

type Slot<T> = Mutex<Option<T>>;

struct Write<F, T> {
    body: Slot<F>,
    out: Slot<T>,
}

impl<T, F: FnOnce(&mut [f32]) -> T> InplaceOp1 for Write<F, T> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let values = span_mut(storage, layout)?;
        run(&self.body, &self.out, |body| body(values))
    }
}

struct WriteWith<F, T> {
    body: Slot<F>,
    out: Slot<T>,
}

impl<T, F: FnOnce(&mut [f32], &[f32]) -> T> InplaceOp2 for WriteWith<F, T> {
    fn name(&self) -> &'static str {
        "write_with"
    }

    fn cpu_fwd(
        &self,
        dst: &mut CpuStorage,
        dst_l: &Layout,
        src: &CpuStorage,
        src_l: &Layout,
    ) -> candle_core::Result<()> {
        let (dst, src) = (span_mut(dst, dst_l)?, span(src, src_l)?);
        run(&self.body, &self.out, |body| body(dst, src))
    }
}

/// An op is called with `&self`, but a closure that writes can run once only.
fn run<F, T>(body: &Slot<F>, out: &Slot<T>, call: impl FnOnce(F) -> T) -> candle_core::Result<()> {
    let lost = |_| candle_core::Error::Msg("a writer panicked".into());
    if let Some(body) = body.lock().map_err(|e| lost(e.to_string()))?.take() {
        let value = call(body);
        *out.lock().map_err(|e| lost(e.to_string()))? = Some(value);
    }
    Ok(())
}

fn offsets(layout: &Layout) -> candle_core::Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => candle_core::bail!("a flat buffer has only contiguous parts, not {layout:?}"),
    }
}

fn span<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match storage {
        CpuStorage::F32(values) => Ok(&values[offsets(layout)?]),
        _ => candle_core::bail!("flat buffers and what is added to them are fp32"),
    }
}

fn span_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [f32]> {
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[offsets(layout)?]),
        _ => candle_core::bail!("flat buffers are fp32"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_show_what_is_written() {
        let flat = Flat::zeros(10, &Device::Cpu).unwrap();
        let view = flat.view(&(4..10), (2, 3)).unwrap();
        flat.set(&(3..6), &[1.0, 2.0, 3.0]).unwrap();
        assert_eq!(view.to_vec2::<f32>().unwrap(), [[2.0, 3.0, 0.0], [0.0; 3]]);
        add_assign(&view, &Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap().t().unwrap()).unwrap();
        assert_eq!(flat.to_vec().unwrap(), [0.0, 0.0, 0.0, 1.0, 3.0, 4.0, 1.0, 1.0, 1.0, 1.0]);
        let other = Flat::zeros(10, &Device::Cpu).unwrap();
        let sum = flat.write_with(&other, |a, b| {
            a[0] = 7.0 + b[0];
            a.iter().sum::<f32>()
        });
        assert_eq!(sum.unwrap(), 19.0);
        flat.clear().unwrap();
        assert_eq!(view.sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
        assert!(flat.set(&(0..2), &[1.0]).is_err());
    }
}
