//! A checkpoint file, or several shards of one, opened but not read: names, shapes, dtypes, and one tensor at a time.
//!
//! Tensors are read at their place in the file straight into the memory that the tensor will own. A mapping of the file
//! would do the same copy, but its pages count as resident memory of the process until the system takes them back, and
//! a file that shrinks or a network disk that fails under a mapping kills the process instead of giving an error. The
//! system's page cache is shared either way.

use super::{header, pickle};
use crate::error::UserError;
use crate::fsio;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Where one tensor's bytes are.
#[derive(Debug, Clone)]
struct Place {
    file: usize,
    start: u64,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Elements between neighbours, for torch tensors that are not stored row by row.
    stride: Option<Vec<usize>>,
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: File,
    len: u64,
}

/// An open checkpoint.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    parts: Vec<Part>,
    places: BTreeMap<String, Place>,
    metadata: BTreeMap<String, String>,
    notes: Vec<String>,
}

fn refuse(path: &Path, why: impl std::fmt::Display, hint: &str) -> anyhow::Error {
    UserError::new(format!("{} cannot be loaded: {why}", path.display())).hint(hint).into()
}

const AGAIN: &str = "download the file again, and compare its size with the one shown where it came from";

impl Source {
    /// Opens a checkpoint. `path` may be a safetensors file, one shard of several (`…-00001-of-00006.safetensors` brings
    /// the others along), a `….safetensors.index.json`, a torch file, or a directory that holds one of these.
    /// What a file is, is read from its content: the ending does not matter.
    ///
    /// Errors name the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self> {
        let (main, files) = super::shards::find(path)?;
        let mut source = Source {
            path: main,
            parts: Vec::new(),
            places: BTreeMap::new(),
            metadata: BTreeMap::new(),
            notes: Vec::new(),
        };
        for file in files {
            source.add(file)?;
        }
        Ok(source)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let file = File::open(&path).map_err(|e| fsio::explain(e, &path))?;
        let meta = file.metadata().map_err(|e| fsio::explain(e, &path))?;
        if meta.is_dir() {
            return Err(refuse(&path, "it is a directory", "name the file itself"));
        }
        let part = Part { len: meta.len(), path, file };
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
                part.torch(index).map_err(|why| refuse(&part.path, why, AGAIN))?
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
        self.places.get(key).map(|p| p.shape.iter().product::<usize>() * p.dtype.bitsize() / 8)
    }

    /// Reads one tensor in its own dtype. 8-bit floats other than e4m3, integers and booleans that candle lacks are an
    /// error that names the tensor.
    pub fn read(&self, key: &str, device: &Device) -> Result<Tensor> {
        let place = self.place(key)?;
        let part = &self.parts[place.file];
        let shape = place.shape.as_slice();
        let cpu = &Device::Cpu;
        let tensor = match place.dtype {
            Dtype::F32 => self.typed(place, 0f32, |v| bytemuck::cast_slice_mut(v))?,
            Dtype::F64 => self.typed(place, 0f64, |v| bytemuck::cast_slice_mut(v))?,
            Dtype::I64 => self.typed(place, 0i64, |v| bytemuck::cast_slice_mut(v))?,
            Dtype::U32 => self.typed(place, 0u32, |v| bytemuck::cast_slice_mut(v))?,
            Dtype::I32 => self.typed(place, 0i32, |v| bytemuck::cast_slice_mut(v))?,
            Dtype::F16 => self.typed(place, half::f16::ZERO, |v| bytemuck::cast_slice_mut(v.reinterpret_cast_mut()))?,
            Dtype::BF16 => {
                self.typed(place, half::bf16::ZERO, |v| bytemuck::cast_slice_mut(v.reinterpret_cast_mut()))?
            }
            Dtype::U8 | Dtype::BOOL => Tensor::from_vec(self.bytes(key)?, shape, cpu)?,
            Dtype::F8_E4M3 => {
                // Collected in place: no second buffer.
                let codes: Vec<float8::F8E4M3> = self.bytes(key)?.into_iter().map(float8::F8E4M3::from_bits).collect();
                Tensor::from_vec(codes, shape, cpu)?
            }
            other => {
                return Err(refuse(
                    &part.path,
                    format!("{key} has the dtype {other:?}, which is not supported"),
                    "use the fp16, bf16 or fp8 (e4m3) version of this model",
                ))
            }
        };
        Ok(tensor.to_device(device)?)
    }

    /// The raw little-endian bytes of one tensor, row by row: e4m3 codes without a detour through floats.
    pub fn bytes(&self, key: &str) -> Result<Vec<u8>> {
        let place = self.place(key)?;
        let len = self.byte_len(key).unwrap_or(0);
        let mut out = vec![0u8; len];
        self.fill(place, &mut out)?;
        Ok(out)
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

    /// A short name for this content: size, header and samples from all over the file(s), not every byte of 28 GB.
    pub fn fingerprint(&self) -> Result<String> {
        const SAMPLE: u64 = 1 << 16;
        let mut hash = Sha256::new();
        for part in &self.parts {
            hash.update(part.len.to_le_bytes());
            for i in 0..8u64 {
                let at = part.len.saturating_sub(SAMPLE) / 7 * i;
                let mut buf = vec![0u8; SAMPLE.min(part.len) as usize];
                part.read_at(&mut buf, at)?;
                hash.update(&buf);
            }
        }
        for (key, place) in &self.places {
            hash.update(format!("{key}{:?}{:?}", place.dtype, place.shape));
        }
        Ok(crate::checkpoint::state::hex(&hash.finalize()[..16]))
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

impl Part {
    fn read_at(&self, out: &mut [u8], at: u64) -> Result<()> {
        let result = read_exact_at(&self.file, out, at);
        result.map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                refuse(&self.path, "it ended early: it became shorter while in use", AGAIN)
            }
            _ => fsio::explain(e, &self.path),
        })
    }

    fn safetensors(&self) -> std::result::Result<header::Header, String> {
        let words = |e: anyhow::Error| e.to_string();
        let mut first = [0u8; 8];
        self.read_at(&mut first, 0).map_err(words)?;
        let n = header::header_len(first, self.len)?;
        let mut text = vec![0u8; n as usize];
        self.read_at(&mut text, 8).map_err(words)?;
        header::parse(&text, self.len)
    }

    /// The tensors of a torch archive: a zip of stored (never compressed) members, `…/data.pkl` and `…/data/<n>`.
    fn torch(&self, file: usize) -> std::result::Result<Vec<(String, Place)>, String> {
        /// Larger than the table of contents of any model by far.
        const MAX_PICKLE: u64 = 64 << 20;
        let handle = File::open(&self.path).map_err(|e| e.to_string())?;
        let torn = |e: zip::result::ZipError| format!("its archive is cut off or damaged ({e})");
        let mut archive = zip::ZipArchive::new(std::io::BufReader::new(handle)).map_err(torn)?;
        let mut members = BTreeMap::new();
        for i in 0..archive.len() {
            let member = archive.by_index_raw(i).map_err(torn)?;
            let name = member.name().map_err(torn)?.into_owned();
            let start = member.data_start().ok_or("its archive has a member without a place")?;
            let size = member.size();
            if start.checked_add(size).is_none_or(|end| end > self.len) {
                return Err(format!("its member {name} reaches beyond the end: it is cut off or damaged"));
            }
            let stored = member.compression() == zip::CompressionMethod::Stored && member.compressed_size() == size;
            members.insert(name, (start, size, stored));
        }
        let member = |name: &str| match members.get(name) {
            None => Err(format!("its archive lacks {name}")),
            Some((.., false)) => Err(format!("its member {name} is compressed, which torch never does")),
            Some((start, size, true)) => Ok((*start, *size)),
        };
        let pickles: Vec<&String> = members.keys().filter(|n| *n == "data.pkl" || n.ends_with("/data.pkl")).collect();
        let [name] = pickles.as_slice() else {
            return Err(match pickles.len() {
                0 => "it is a zip archive, but not one that torch wrote (no data.pkl)".into(),
                n => format!("its archive holds {n} files data.pkl"),
            });
        };
        let root = name.strip_suffix("data.pkl").unwrap_or("");
        if members.contains_key(&format!("{root}constants.pkl")) {
            return Err("it is a TorchScript program, not a table of tensors".into());
        }
        let read = |start: u64, size: u64| {
            let mut bytes = vec![0u8; size as usize];
            self.read_at(&mut bytes, start).map_err(|e| e.to_string()).map(|()| bytes)
        };
        if let Ok((start, size)) = member(&format!("{root}byteorder")) {
            if size < 16 && read(start, size)?.starts_with(b"big") {
                return Err("its numbers are big-endian".into());
            }
        }
        let (start, size) = member(name)?;
        if size > MAX_PICKLE {
            return Err(format!("its data.pkl has {size} bytes, more than {MAX_PICKLE}"));
        }
        let mut places = BTreeMap::new();
        for t in pickle::tensors(&read(start, size)?)? {
            let (start, size) = member(&format!("{root}data/{}", t.storage))?;
            let place = place_of(&t, file, start, size).map_err(|e| format!("{}: {e}", t.name))?;
            places.insert(t.name, place);
        }
        Ok(places.into_iter().collect())
    }
}

/// Checks a torch tensor against its storage of `size` bytes at `start`.
fn place_of(t: &pickle::PthTensor, file: usize, start: u64, size: u64) -> std::result::Result<Place, String> {
    let width = t.dtype.bitsize() as u64 / 8;
    let overflow =
        || format!("shape {:?} with strides {:?} does not fit its storage of {size} bytes", t.shape, t.stride);
    let count = t.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d as u64)).ok_or_else(overflow)?;
    // The last element's index; a tensor that repeats elements (stride 0) may not be larger than what it repeats.
    let last =
        t.shape.iter().zip(&t.stride).try_fold(t.offset as u64, |at, (d, s)| {
            at.checked_add((*d as u64).saturating_sub(1).checked_mul(*s as u64)?)
        });
    let elements = size / width;
    if count > elements || (count > 0 && last.is_none_or(|l| l >= elements)) {
        return Err(overflow());
    }
    let mut dense = Vec::with_capacity(t.shape.len());
    let mut step = 1usize;
    for d in t.shape.iter().rev() {
        dense.push(step);
        step = step.saturating_mul(*d);
    }
    dense.reverse();
    let row_major = count == 0 || t.shape.iter().zip(t.stride.iter().zip(&dense)).all(|(d, (s, w))| *d == 1 || s == w);
    Ok(Place {
        file,
        start: if count == 0 { start } else { start + t.offset as u64 * width },
        dtype: t.dtype,
        shape: t.shape.clone(),
        stride: (!row_major).then(|| t.stride.clone()),
    })
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, at)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => (out, at) = (&mut out[n..], at + n as u64),
        }
    }
    Ok(())
}
