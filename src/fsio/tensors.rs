//! Writing safetensors files. The `safetensors` crate keeps metadata in a hash map, so the same content gives other
//! bytes each time; hashes of LoRA files are shown to people and must be stable. This writer sorts.
//!
//! Layout: `u64` header length, JSON header padded with blanks to 8 bytes, then the tensors without gaps, ordered as the
//! crate orders them (dtype by falling alignment, then name), so that the body is byte-equal to what it writes.

use super::write_atomic;
use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Tensor};
use safetensors::Dtype;
use serde_json::{json, Map, Value};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// One tensor on its way to a file: little-endian bytes, row-major.
#[derive(Debug, Clone)]
pub struct TensorOut<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Cow<'a, [u8]>,
}

impl TensorOut<'static> {
    /// Copies a tensor (any device, any strides) to bytes of its own dtype.
    pub fn of(name: impl Into<String>, t: &Tensor) -> Result<Self> {
        let name = name.into();
        let flat = t.flatten_all()?;
        let (dtype, data) = match t.dtype() {
            DType::F32 => (Dtype::F32, bytemuck::cast_slice(&flat.to_vec1::<f32>()?).to_vec()),
            DType::F64 => (Dtype::F64, bytemuck::cast_slice(&flat.to_vec1::<f64>()?).to_vec()),
            DType::F16 => (Dtype::F16, half_bytes(&flat.to_vec1::<half::f16>()?)),
            DType::BF16 => (Dtype::BF16, half_bytes(&flat.to_vec1::<half::bf16>()?)),
            DType::I64 => (Dtype::I64, bytemuck::cast_slice(&flat.to_vec1::<i64>()?).to_vec()),
            DType::U32 => (Dtype::U32, bytemuck::cast_slice(&flat.to_vec1::<u32>()?).to_vec()),
            DType::U8 => (Dtype::U8, flat.to_vec1::<u8>()?),
            DType::F8E4M3 => (Dtype::F8_E4M3, flat.to_vec1::<float8::F8E4M3>()?.iter().map(|v| v.to_bits()).collect()),
            other => bail!("{name}: {other:?} tensors cannot be saved"),
        };
        Ok(Self { name, dtype, shape: t.dims().to_vec(), data: Cow::Owned(data) })
    }
}

fn half_bytes<T>(values: &[T]) -> Vec<u8>
where
    [T]: half::slice::HalfFloatSliceExt,
{
    use half::slice::HalfFloatSliceExt;
    bytemuck::cast_slice(values.reinterpret_cast()).to_vec()
}

/// One tensor of a file that is written while its tensors are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes in the file.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Sorts the tensors as they will lie in the file and returns the whole header (length field included).
pub fn header(tensors: &mut [TensorOut<'_>], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let spec = |t: &TensorOut<'_>| TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() };
    for t in tensors.iter() {
        let (bits, bytes) = (t.shape.iter().product::<usize>() * t.dtype.bitsize(), t.data.len());
        ensure!(bits == 8 * bytes, "{}: {bytes} bytes for shape {:?} of {:?}", t.name, t.shape, t.dtype);
    }
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    header_of(&mut specs, metadata)
}

fn header_of(specs: &mut [TensorSpec], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    specs.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut names = BTreeSet::new();
    let mut root = Map::new();
    if !metadata.is_empty() {
        root.insert("__metadata__".into(), json!(metadata));
    }
    let mut start = 0usize;
    for t in specs.iter() {
        ensure!(t.name != "__metadata__" && names.insert(&t.name), "two tensors of a file are named {}", t.name);
        let end = start + t.bytes();
        let dtype = serde_json::to_value(t.dtype).context("dtype name")?;
        root.insert(t.name.clone(), json!({ "dtype": dtype, "shape": t.shape, "data_offsets": [start, end] }));
        start = end;
    }
    let mut text = serde_json::to_vec(&Value::Object(root))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text);
    Ok(out)
}

/// Writes a safetensors file atomically. Equal content gives equal bytes.
pub fn write_safetensors(
    path: &Path,
    mut tensors: Vec<TensorOut<'_>>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let header = header(&mut tensors, metadata)?;
    write_atomic(path, |w| {
        w.write_all(&header)?;
        for t in &tensors {
            w.write_all(&t.data)?;
        }
        Ok(())
    })
}

/// Writes a safetensors file atomically without holding it: `make` gives each tensor's bytes when its turn comes.
pub fn write_streamed(
    path: &Path,
    mut specs: Vec<TensorSpec>,
    metadata: &BTreeMap<String, String>,
    make: &mut dyn FnMut(&TensorSpec) -> Result<Vec<u8>>,
) -> Result<()> {
    let header = header_of(&mut specs, metadata)?;
    write_atomic(path, |w| {
        w.write_all(&header)?;
        for spec in &specs {
            let data = make(spec)?;
            ensure!(data.len() == spec.bytes(), "{}: {} bytes, {} announced", spec.name, data.len(), spec.bytes());
            w.write_all(&data)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use std::collections::HashMap;

    fn sample() -> Vec<(String, Tensor)> {
        let d = Device::Cpu;
        let x = Tensor::from_vec(vec![1f32, -2.5, 3.0, 1e-3, 0.0, 7.0], (2, 3), &d).unwrap();
        vec![
            ("b.half".into(), x.to_dtype(DType::BF16).unwrap()),
            ("a.transposed".into(), x.t().unwrap()),
            ("c.scalar".into(), Tensor::new(4.0f32, &d).unwrap()),
            ("d.ids".into(), Tensor::new(&[3i64, -1], &d).unwrap()),
            ("e.bytes".into(), Tensor::new(&[3u8, 255], &d).unwrap()),
        ]
    }

    #[test]
    fn bodies_equal_those_of_the_safetensors_crate_and_bytes_repeat() {
        let dir = tempfile::tempdir().unwrap();
        let metadata: BTreeMap<String, String> =
            (0..20).map(|i| (format!("key{i}"), format!("value {i} \" \u{4e2d}"))).collect();
        let outs = || sample().iter().map(|(n, t)| TensorOut::of(n, t).unwrap()).collect::<Vec<_>>();
        let (p1, p2) = (dir.path().join("1.safetensors"), dir.path().join("2.safetensors"));
        write_safetensors(&p1, outs(), &metadata).unwrap();
        let mut shuffled = outs();
        shuffled.reverse();
        write_safetensors(&p2, shuffled, &metadata).unwrap();
        let ours = std::fs::read(&p1).unwrap();
        assert_eq!(ours, std::fs::read(&p2).unwrap());

        let info: HashMap<String, String> = metadata.clone().into_iter().collect();
        let theirs = safetensors::serialize(sample(), Some(info)).unwrap();
        let body = |b: &[u8]| b[8 + u64::from_le_bytes(b[..8].try_into().unwrap()) as usize..].to_vec();
        assert_eq!(body(&ours), body(&theirs));
        assert_eq!(ours.len(), theirs.len());
        let (_, read) = safetensors::SafeTensors::read_metadata(&ours).unwrap();
        assert_eq!(read.metadata().clone().unwrap()["key7"], metadata["key7"]);
        let loaded = candle_core::safetensors::load(&p1, &Device::Cpu).unwrap();
        let x = loaded["a.transposed"].to_vec2::<f32>().unwrap();
        assert_eq!(x, vec![vec![1.0, 1e-3], vec![-2.5, 0.0], vec![3.0, 7.0]]);
    }

    #[test]
    fn a_streamed_file_has_the_bytes_of_one_written_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (p1, p2) = (dir.path().join("1.safetensors"), dir.path().join("2.safetensors"));
        let metadata = BTreeMap::from([("a".to_string(), "b".to_string())]);
        let outs: Vec<TensorOut> = sample().iter().map(|(n, t)| TensorOut::of(n, t).unwrap()).collect();
        let specs: Vec<TensorSpec> =
            outs.iter().map(|t| TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() }).collect();
        let data: BTreeMap<String, Vec<u8>> = outs.iter().map(|t| (t.name.clone(), t.data.to_vec())).collect();
        write_safetensors(&p1, outs, &metadata).unwrap();
        write_streamed(&p2, specs.clone(), &metadata, &mut |s| Ok(data[&s.name].clone())).unwrap();
        assert!(std::fs::read(&p1).unwrap() == std::fs::read(&p2).unwrap());
        let short = write_streamed(&p2, specs.clone(), &metadata, &mut |_| Ok(vec![0; 3])).unwrap_err();
        assert!(short.to_string().contains("announced"), "{short}");
        let failed = write_streamed(&dir.path().join("3"), specs, &metadata, &mut |_| bail!("no source"));
        assert_eq!(failed.unwrap_err().to_string(), "no source");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing half-written stays");
        assert!(std::fs::read(&p1).unwrap() == std::fs::read(&p2).unwrap(), "a failed write leaves the old file");
    }

    #[test]
    fn a_wrong_size_or_a_name_given_twice_is_refused() {
        let t = TensorOut { name: "x".into(), dtype: Dtype::F32, shape: vec![2], data: Cow::Owned(vec![0; 8]) };
        let short = TensorOut { shape: vec![3], ..t.clone() };
        assert!(header(&mut [short], &BTreeMap::new()).is_err());
        assert!(header(&mut [t.clone(), t], &BTreeMap::new()).unwrap_err().to_string().contains("named x"));
    }
}
