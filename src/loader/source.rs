//! A checkpoint file, or several shards of one, opened but not read: names, shapes, dtypes, and one tensor at a time.
//!
//! A tensor is copied from its place in the file straight into the memory that it will own: from a mapping of the file,
//! piece by piece, so that neither the mapping's pages stay in memory nor a file that is cut kills the process (see
//! `mapped.rs`), or by position where that is asked for or a mapping cannot be had. Both share the system's page cache.

use super::header;
use super::part::{refuse, Part, Reading, AGAIN};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, WithDType};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where one tensor's bytes are.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub file: usize,
    pub start: u64,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Elements between neighbours, for torch tensors that are not stored row by row.
    pub stride: Option<Vec<usize>>,
}

impl Place {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// An open checkpoint.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    parts: Vec<Part>,
    places: BTreeMap<String, Place>,
    metadata: BTreeMap<String, String>,
    notes: Vec<String>,
    reading: Reading,
}

/// A tensor of a file where it is computed with, from whoever reads ahead; `None` where nobody does.
pub type Fetch<'a> = &'a dyn Fn(&Source, &str) -> Result<Option<Tensor>>;

impl Source {
    /// Opens a checkpoint. `path` may be a safetensors file, one shard of several (`…-00001-of-00006.safetensors` brings
    /// the others along), a `….safetensors.index.json`, a torch file, or a directory that holds one of these.
    /// What a file is, is read from its content: the ending does not matter.
    ///
    /// Errors name the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_by(path, Reading::default())
    }

    /// The same, read in the way that is asked for.
    pub fn open_by(path: &Path, reading: Reading) -> Result<Self> {
        let (main, files) = super::shards::find(path)?;
        let mut source = Source {
            path: main,
            parts: Vec::new(),
            places: BTreeMap::new(),
            metadata: BTreeMap::new(),
            notes: Vec::new(),
            reading,
        };
        for file in files {
            source.add(file)?;
        }
        Ok(source)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let part = Part::open(path, self.reading)?;
        let index = self.parts.len();
        let mut start = vec![0u8; part.len.min(64) as usize];
        part.read_at(&mut start, 0)?;
        let kind = Kind::of(&start, part.len).map_err(|(why, hint)| refuse(&part.path, why, hint))?;
        let extension = part.path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        let found = match kind {
            Kind::Safetensors => {
                if ["pth", "pt", "ckpt", "bin"].contains(&extension.as_str()) {
                    self.notes.push(format!("{} is a safetensors file in spite of its ending", part.path.display()));
                }
                let header = part.safetensors().map_err(|why| refuse(&part.path, why, AGAIN))?;
                self.metadata.extend(header.metadata);
                let place = |r: header::Region| Place {
                    file: index,
                    start: r.start,
                    dtype: r.dtype,
                    shape: r.shape,
                    stride: None,
                };
                header.tensors.into_iter().map(|(name, r)| (name, place(r))).collect::<Vec<_>>()
            }
            Kind::Torch => {
                if extension == "safetensors" {
                    self.notes.push(format!("{} is a torch file in spite of its ending", part.path.display()));
                }
                super::torch::tensors(&part, index).map_err(|why| refuse(&part.path, why, AGAIN))?
            }
        };
        for (name, place) in found {
            if let Some(other) = self.places.insert(name.clone(), place) {
                let other = &self.parts[other.file].path;
                return Err(refuse(
                    &part.path,
                    format!("{name} is also in {}", other.display()),
                    "keep one of the two",
                ));
            }
        }
        self.parts.push(part);
        Ok(())
    }

    /// The path as the user gave it (of a directory: the file found in it).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files of which this checkpoint consists.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|p| p.path.as_path())
    }

    /// Size of all files in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.len).sum()
    }

    /// Things worth telling the user, such as a wrong file ending.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The way of reading that was asked for.
    pub fn reading(&self) -> Reading {
        self.reading
    }

    /// Whether every file is read through a mapping. Not so where it was not asked for, where a system other than Linux
    /// or one before 5.14 runs, and for files on network file systems and in FUSE.
    pub fn is_mapped(&self) -> bool {
        self.parts.iter().all(Part::is_mapped)
    }

    /// The `__metadata__` of safetensors files.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Every key, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    pub fn contains(&self, key: &str) -> bool {
        self.places.contains_key(key)
    }

    pub fn shape(&self, key: &str) -> Option<&[usize]> {
        self.places.get(key).map(|p| p.shape.as_slice())
    }

    /// Key -> shape of everything in the file; no data is read.
    pub fn tensor_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.places.iter().map(|(k, p)| (k.clone(), p.shape.clone())).collect()
    }

    pub fn dtype(&self, key: &str) -> Option<Dtype> {
        self.places.get(key).map(|p| p.dtype)
    }

    /// Bytes that the tensor takes in memory.
    pub fn byte_len(&self, key: &str) -> Option<usize> {
        self.places.get(key).map(Place::bytes)
    }

    /// Reads one tensor in its own dtype (e5m2 as fp16, booleans as u8). Formats that candle lacks are an error that
    /// names the tensor.
    pub fn read(&self, key: &str, device: &Device) -> Result<Tensor> {
        Ok(self.read_place(key, self.place(key)?)?.to_device(device)?)
    }

    fn read_place(&self, key: &str, place: &Place) -> Result<Tensor> {
        let part = &self.parts[place.file];
        let shape = place.shape.as_slice();
        let cpu = &Device::Cpu;
        Ok(match place.dtype {
            Dtype::F32 => self.typed(place, 0f32, |v| bytemuck::cast_slice_mut(v))?,
            Dtype::F64 => self.typed(place, 0f64, |v| bytemuck::cast_slice_mut(v))?,
            Dtype::I64 => self.typed(place, 0i64, |v| bytemuck::cast_slice_mut(v))?,
            Dtype::U32 => self.typed(place, 0u32, |v| bytemuck::cast_slice_mut(v))?,
            Dtype::I32 => self.typed(place, 0i32, |v| bytemuck::cast_slice_mut(v))?,
            Dtype::F16 => self.typed(place, half::f16::ZERO, |v| bytemuck::cast_slice_mut(v.reinterpret_cast_mut()))?,
            Dtype::BF16 => {
                self.typed(place, half::bf16::ZERO, |v| bytemuck::cast_slice_mut(v.reinterpret_cast_mut()))?
            }
            Dtype::U8 | Dtype::BOOL => Tensor::from_vec(self.bytes_at(place)?, shape, cpu)?,
            Dtype::F8_E4M3 => {
                // Collected in place: no second buffer.
                let codes: Vec<float8::F8E4M3> =
                    self.bytes_at(place)?.into_iter().map(float8::F8E4M3::from_bits).collect();
                Tensor::from_vec(codes, shape, cpu)?
            }
            // The upper half of fp16, bit by bit: widening loses nothing.
            Dtype::F8_E5M2 => {
                let wide = self
                    .bytes_at(place)?
                    .into_iter()
                    .map(|b| half::f16::from_bits(u16::from(b) << 8))
                    .collect::<Vec<_>>();
                Tensor::from_vec(wide, shape, cpu)?
            }
            other => {
                return Err(refuse(
                    &part.path,
                    format!("{key} has the dtype {other:?}, which is not supported"),
                    "use the fp16, bf16 or fp8 (e4m3) version of this model",
                ))
            }
        })
    }

    /// The raw little-endian bytes of one tensor, row by row: e4m3 codes without a detour through floats.
    pub fn bytes(&self, key: &str) -> Result<Vec<u8>> {
        self.bytes_at(self.place(key)?)
    }

    fn bytes_at(&self, place: &Place) -> Result<Vec<u8>> {
        let mut out = vec![0u8; place.bytes()];
        self.fill(place, &mut out)?;
        Ok(out)
    }

    /// The dtype of a tensor that lies in the file as it is, row by row; `None` for torch tensors in another order.
    pub fn plain(&self, key: &str) -> Option<Dtype> {
        self.places.get(key).filter(|place| place.stride.is_none()).map(|place| place.dtype)
    }

    /// Bytes of a plain tensor from `offset` on, to fill `out`.
    pub fn read_part(&self, key: &str, offset: usize, out: &mut [u8]) -> Result<()> {
        let place = self.place(key)?;
        anyhow::ensure!(place.stride.is_none() && offset + out.len() <= place.bytes(), "{key} ends before that");
        self.parts[place.file].read_at(out, place.start + offset as u64)
    }

    /// Some rows of a matrix (its first axis), in the order asked for, without reading the others: the token table of
    /// umT5 has 2 GB, of which a prompt needs a few kilobytes.
    pub fn read_rows(&self, key: &str, rows: &[u32], device: &Device) -> Result<Tensor> {
        let place = self.place(key)?;
        let Some((count, row_shape)) = place.shape.split_first() else {
            return Err(refuse(&self.path, format!("{key} is a single number, not a table"), AGAIN));
        };
        if place.stride.is_some() {
            return Ok(self.read(key, device)?.index_select(&Tensor::new(rows, device)?, 0)?);
        }
        let bytes = row_shape.iter().product::<usize>() * place.dtype.bitsize() / 8;
        let mut picked = Vec::with_capacity(rows.len());
        for row in rows {
            if *row as usize >= *count {
                return Err(refuse(&self.path, format!("{key} has {count} rows; row {row} was asked for"), AGAIN));
            }
            let mut shape = vec![1];
            shape.extend(row_shape);
            let start = place.start + *row as u64 * bytes as u64;
            picked.push(self.read_place(key, &Place { start, shape, ..place.clone() })?);
        }
        if picked.is_empty() {
            let mut shape = vec![0];
            shape.extend(row_shape);
            return self.read_place(key, &Place { shape, ..place.clone() })?.to_device(device).map_err(Into::into);
        }
        Ok(Tensor::cat(&picked, 0)?.to_device(device)?)
    }

    /// Gives a float tensor's values as fp32, `piece` elements at a time, through one small buffer: for whoever makes
    /// something smaller of a large tensor. `f` gets the index of the first element and the values.
    /// `Ok(false)` without a call where the tensor is no plain fp32, fp16 or bf16 one: then [`Self::read`] it.
    pub fn for_each_piece(
        &self,
        key: &str,
        piece: usize,
        f: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<bool> {
        let place = self.place(key)?;
        if place.stride.is_some() || !matches!(place.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Ok(false);
        }
        let part = &self.parts[place.file];
        let count = place.shape.iter().product::<usize>();
        let (piece, width) = (piece.clamp(1, count.max(1)), place.dtype.bitsize() / 8);
        let mut bits = vec![0u16; if width == 2 { piece } else { 0 }];
        let mut values = vec![0f32; piece];
        for first in (0..count).step_by(piece) {
            let n = piece.min(count - first);
            let at = place.start + (first * width) as u64;
            let (bits, values) = (&mut bits[..if width == 2 { n } else { 0 }], &mut values[..n]);
            match place.dtype {
                Dtype::F32 => part.read_at(bytemuck::cast_slice_mut(values), at)?,
                other => {
                    part.read_at(bytemuck::cast_slice_mut(bits), at)?;
                    match other {
                        Dtype::F16 => bits.reinterpret_cast::<half::f16>().convert_to_f32_slice(values),
                        _ => bits.reinterpret_cast::<half::bf16>().convert_to_f32_slice(values),
                    }
                }
            }
            f(first, values)?;
        }
        Ok(true)
    }

    /// A number stored as a tensor of one element, whatever its dtype; `None` where the key is absent.
    pub fn scalar(&self, key: &str) -> Result<Option<f32>> {
        if !self.contains(key) {
            return Ok(None);
        }
        let t = self.read(key, &Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        match t.as_slice() {
            [x] => Ok(Some(*x)),
            _ => Err(refuse(&self.path, format!("{key} holds {} numbers, not one", t.len()), AGAIN)),
        }
    }

    fn place(&self, key: &str) -> Result<&Place> {
        self.places.get(key).with_context(|| format!("{} has no tensor {key}", self.path.display()))
    }

    fn typed<T: WithDType>(&self, place: &Place, zero: T, bytes_of: impl Fn(&mut [T]) -> &mut [u8]) -> Result<Tensor> {
        let mut data = vec![zero; place.shape.iter().product()];
        self.fill(place, bytes_of(&mut data))?;
        Ok(Tensor::from_vec(data, place.shape.as_slice(), &Device::Cpu)?)
    }

    /// Reads a tensor's bytes in row-major order.
    fn fill(&self, place: &Place, out: &mut [u8]) -> Result<()> {
        let part = &self.parts[place.file];
        let Some(stride) = &place.stride else {
            return part.read_at(out, place.start);
        };
        let size = place.dtype.bitsize() / 8;
        let span = 1 + place.shape.iter().zip(stride).map(|(d, s)| (d - 1) * s).sum::<usize>();
        let mut raw = vec![0u8; span * size];
        part.read_at(&mut raw, place.start)?;
        let mut index = vec![0usize; place.shape.len()];
        for cell in out.chunks_exact_mut(size) {
            let at: usize = index.iter().zip(stride).map(|(i, s)| i * s).sum();
            cell.copy_from_slice(&raw[at * size..(at + 1) * size]);
            for d in (0..index.len()).rev() {
                index[d] += 1;
                if index[d] < place.shape[d] {
                    break;
                }
                index[d] = 0;
            }
        }
        Ok(())
    }
}

enum Kind {
    Safetensors,
    Torch,
}

impl Kind {
    /// What a file is, by its first bytes; or why it is none of ours, and what to do.
    fn of(start: &[u8], len: u64) -> std::result::Result<Self, (String, &'static str)> {
        let other = |what: &str, hint| Err((what.to_owned(), hint));
        if len == 0 {
            return other("it is empty (0 bytes)", AGAIN);
        }
        // First of all: the length field in front of a header may start with anyone's magic bytes.
        let header = match (start.first_chunk::<8>(), start.get(8)) {
            (Some(first), Some(b'{')) => Some(header::header_len(*first, len)),
            _ => None,
        };
        if let Some(Ok(_)) = header {
            return Ok(Kind::Safetensors);
        }
        if start.starts_with(b"PK\x03\x04") {
            return Ok(Kind::Torch);
        }
        if start.starts_with(b"GGUF") {
            return other("it is a GGUF file", "use the safetensors version of this model (fp16, bf16 or fp8)");
        }
        if start.starts_with(b"version https://git-lfs") {
            return other(
                "it is a pointer of git-lfs, not the model",
                "run `git lfs pull` where it was cloned, or download the file itself",
            );
        }
        if start.starts_with(b"<") {
            return other("it is a web page, not a model", "download the file itself, not the page that shows it");
        }
        if start.starts_with(b"\x80") {
            return other(
                "it is a torch file of the format before 1.6, or a bare pickle",
                "load it in a current torch and save it again, or use the safetensors version",
            );
        }
        if let Some(Err(why)) = header {
            return Err((why, AGAIN));
        }
        if len > 8 {
            return other("it is neither a safetensors nor a torch file", "check that the path names a model file");
        }
        other(&format!("it has {len} bytes, too few for a model"), AGAIN)
    }
}
