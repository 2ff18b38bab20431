//! Inside a cache file: tensor names, dtypes and metadata as the old trainer writes and reads them.
//!
//! | tensor | shape | when |
//! |---|---|---|
//! | `latents_{F}x{h}x{w}_{dt}` | [c,F,h,w] | always |
//! | `latents_image_{F}x{h}x{w}_{dt}` | [4+c,F,h,w]: mask, then first-frame latents | image-to-video |
//! | `latents_control_{F}x{h}x{w}_{dt}` | [c,F,h,w] | a control picture or clip belongs to the item |
//! | `clip_{dt of the latents}` | [tokens,width], or [n,tokens,width] of n images; fp16 whatever the name says | Wan 2.1 image-to-video |
//! | `f_indices_int32` | [n] | one-frame training |
//! | `varlen_t5_{dt}` | [tokens,width], the end token included | caption files |
//!
//! Suffixes are hints: shapes and dtypes are taken from the tensors, and a name that contradicts its tensor makes the
//! file torn. Nothing here panics on a hostile file.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};

/// `format_version` of the metadata.
pub const FORMAT_VERSION: &str = "1.0.1";
/// `architecture` of the metadata, also that of the Wan 2.2 models.
pub const ARCHITECTURE: &str = "wan";
/// Where our recipe record is in the metadata; the old trainer ignores it.
pub const RECIPE_KEY: &str = "wan_train.recipe";

/// Headers are a few hundred bytes; anything near this is not a cache.
const HEADER_LIMIT: u64 = 16 << 20;

/// A file's text pairs.
pub type Metadata = BTreeMap<String, String>;
/// A file's tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// Why a cache file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// Cut off, overwritten, or not such a file at all.
    #[error("{0}")]
    Torn(String),
}

impl FormatError {
    pub fn is_missing(&self) -> bool {
        matches!(self, FormatError::Io(e) if e.kind() == std::io::ErrorKind::NotFound)
    }
}

fn torn(why: impl Into<String>) -> FormatError {
    FormatError::Torn(why.into())
}

/// Metadata, tensor names, shapes and dtypes of a file, whose length agrees with them.
#[derive(Debug, Clone)]
pub struct Header {
    pub metadata: Metadata,
    pub tensors: BTreeMap<String, (Dtype, Vec<usize>)>,
}

/// Reads the header alone: what a check of thousands of caches can afford.
pub fn read_header(path: &Path) -> Result<Header, FormatError> {
    let mut file = std::fs::File::open(path)?;
    let len = file.metadata()?.len();
    let mut prefix = [0u8; 8];
    if len < 8 {
        return Err(torn(format!("{len} bytes, too short to be a cache")));
    }
    file.read_exact(&mut prefix)?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > HEADER_LIMIT || header_len + 8 > len {
        return Err(torn(format!(
            "a header of {header_len} bytes in a file of {len}: cut off, or not a safetensors file"
        )));
    }
    let mut json = vec![0u8; header_len as usize];
    file.read_exact(&mut json)?;
    parse_header(&json, len - 8 - header_len)
}

#[derive(serde::Deserialize)]
struct RawTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// Checks what the safetensors crate checks, with only the header in hand: tensors tile the data without gap or overlap.
fn parse_header(json: &[u8], data_len: u64) -> Result<Header, FormatError> {
    let mut object: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(json).map_err(|e| torn(format!("its header is not readable ({e})")))?;
    let metadata = match object.remove("__metadata__") {
        Some(value) => {
            serde_json::from_value(value).map_err(|e| torn(format!("its metadata are not text pairs ({e})")))?
        }
        None => BTreeMap::new(),
    };
    let mut tensors = BTreeMap::new();
    let mut spans = Vec::new();
    for (name, value) in object {
        let raw: RawTensor = serde_json::from_value(value)
            .map_err(|e| torn(format!("tensor {name} has no proper description ({e})")))?;
        let bits = raw.shape.iter().try_fold(raw.dtype.bitsize(), |n, &d| n.checked_mul(d));
        let (start, end) = raw.data_offsets;
        if bits.map(|b| b as u64) != end.checked_sub(start).and_then(|n| n.checked_mul(8)) {
            return Err(torn(format!("tensor {name}: shape {:?} does not fill its {start}..{end} bytes", raw.shape)));
        }
        spans.push((start, end));
        tensors.insert(name, (raw.dtype, raw.shape));
    }
    spans.sort_unstable();
    let mut covered = 0;
    for (start, end) in spans {
        if start != covered {
            return Err(torn(format!("its tensors overlap or leave a gap at byte {covered}")));
        }
        covered = end;
    }
    match covered == data_len {
        true => Ok(Header { metadata, tensors }),
        false => Err(torn(format!("{data_len} bytes of data where its header announces {covered}"))),
    }
}

/// Reads a whole file: metadata and every tensor, on the CPU, in the dtype it is stored in.
pub fn read_tensors(path: &Path) -> Result<(Metadata, Tensors), FormatError> {
    let bytes = std::fs::read(path)?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| torn(e.to_string()))?;
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let file = SafeTensors::deserialize(&bytes).map_err(|e| torn(e.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let dtype = DType::try_from(view.dtype()).map_err(|e| torn(format!("tensor {name}: {e}")))?;
        let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)
            .map_err(|e| torn(format!("tensor {name}: {e}")))?;
        tensors.insert(name.to_string(), tensor);
    }
    Ok((metadata, tensors))
}

/// The bytes of a cache file with these tensors and metadata.
pub fn to_bytes(tensors: &Tensors, metadata: &Metadata) -> anyhow::Result<Vec<u8>> {
    let metadata = metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    Ok(safetensors::serialize(tensors.iter().map(|(k, t)| (k.as_str(), t)), Some(metadata))?)
}

/// Suffix of a dtype in tensor names.
pub fn dtype_name(dtype: DType) -> anyhow::Result<&'static str> {
    Ok(match dtype {
        DType::F32 => "float32",
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        other => anyhow::bail!("caches hold float32, bfloat16 or float16, not {other:?}"),
    })
}

/// A tensor name without its dtype suffix: the part that one file may hold once.
pub fn base_key(name: &str) -> &str {
    const SUFFIXES: [&str; 9] =
        ["float32", "bfloat16", "float16", "float64", "int32", "int64", "uint8", "bool", "float8_e4m3fn"];
    SUFFIXES.iter().find_map(|s| name.strip_suffix(s)?.strip_suffix('_')).unwrap_or(name)
}

/// `{kind}_{F}x{h}x{w}_{dt}`.
pub fn latent_key(kind: &str, f_h_w: (usize, usize, usize), dtype: DType) -> anyhow::Result<String> {
    let (f, h, w) = f_h_w;
    Ok(format!("{kind}_{f}x{h}x{w}_{}", dtype_name(dtype)?))
}

/// Splits `{kind}_{F}x{h}x{w}_{dt}` where `kind` is exactly the one asked for.
fn parse_latent_key(name: &str, kind: &str) -> Option<Vec<usize>> {
    let size = base_key(name).strip_prefix(kind)?.strip_prefix('_')?;
    let size: Vec<usize> = size.split('x').map(|n| n.parse().ok()).collect::<Option<_>>()?;
    (size.len() == 3).then_some(size)
}

/// What a file of latents holds, told from its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatentInfo {
    /// [c,F,h,w] of the latents.
    pub shape: [usize; 4],
    pub dtype: Dtype,
    /// Whether the first-frame conditioning is there.
    pub image: bool,
    pub control: bool,
    /// Images whose CLIP features are there.
    pub clip_images: usize,
    /// Whether it says where its frames stand in time (one-frame training).
    pub positions: bool,
    keys: LatentKeys,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct LatentKeys {
    latents: String,
    image: Option<String>,
    control: Option<String>,
    clip: Option<String>,
    positions: Option<String>,
}

impl LatentInfo {
    /// Finds the tensors by name, and refuses names, shapes and dtypes that contradict one another.
    pub fn from_header(header: &Header) -> Result<Self, FormatError> {
        let names = || header.tensors.keys();
        let latents = only("latents", names().filter(|n| parse_latent_key(n, "latents").is_some()))?
            .ok_or_else(|| torn("it holds no tensor latents_FxHxW_dtype"))?;
        let image = only("latents_image", names().filter(|n| parse_latent_key(n, "latents_image").is_some()))?;
        let control = only("latents_control", names().filter(|n| parse_latent_key(n, "latents_control").is_some()))?;
        let clip = only("clip", names().filter(|n| base_key(n) == "clip"))?;
        let positions = only("f_indices", names().filter(|n| base_key(n) == "f_indices"))?;
        let f_h_w = parse_latent_key(&latents, "latents").unwrap_or_default();
        let (dtype, shape) = &header.tensors[&latents];
        let [c, f, h, w] = shape[..] else {
            return Err(torn(format!("{latents} has shape {shape:?}, wanted [c,F,h,w]")));
        };
        let wanted = [(&Some(latents.clone()), c), (&image, c + 4), (&control, c)];
        for (name, channels) in wanted.iter().filter_map(|(n, c)| n.as_ref().map(|n| (n, *c))) {
            let (dtype, shape) = &header.tensors[name];
            float(name, *dtype)?;
            let same_as_latents = shape[..] == [channels, f, h, w] && [f, h, w] == f_h_w[..];
            if !same_as_latents || shape.contains(&0) {
                return Err(torn(format!("{name} has shape {shape:?} beside latents of {:?}", [c, f, h, w])));
            }
        }
        if let Some(name) = &positions {
            let (dtype, shape) = &header.tensors[name];
            if !matches!(dtype, Dtype::I32 | Dtype::I64) || shape[..] != [f] {
                return Err(torn(format!("{name} is {dtype:?} of shape {shape:?}, wanted one whole number a frame")));
            }
        }
        let mut clip_images = 0;
        if let Some(name) = &clip {
            let (dtype, shape) = &header.tensors[name];
            float(name, *dtype)?;
            clip_images = match shape[..] {
                [tokens, width] if tokens > 0 && width > 0 => 1,
                [images, tokens, width] if tokens > 0 && width > 0 => images,
                _ => return Err(torn(format!("{name} has shape {shape:?}, wanted [tokens,width]"))),
            };
        }
        Ok(Self {
            shape: [c, f, h, w],
            dtype: *dtype,
            image: image.is_some(),
            control: control.is_some(),
            clip_images,
            positions: positions.is_some(),
            keys: LatentKeys { latents, image, control, clip, positions },
        })
    }
}

fn float(name: &str, dtype: Dtype) -> Result<(), FormatError> {
    match dtype {
        Dtype::F32 | Dtype::BF16 | Dtype::F16 => Ok(()),
        other => Err(torn(format!("{name} is {other:?}, wanted a 16- or 32-bit float"))),
    }
}

fn only<'a>(kind: &str, mut names: impl Iterator<Item = &'a String>) -> Result<Option<String>, FormatError> {
    match (names.next(), names.next()) {
        (first, None) => Ok(first.cloned()),
        (Some(a), Some(b)) => Err(torn(format!("it holds {kind} twice ({a}, {b})"))),
        (None, Some(_)) => unreachable!("an iterator that starts with its end"),
    }
}

/// The name of the caption embedding, and its [tokens,width].
pub fn text_info(header: &Header) -> Result<(String, [usize; 2]), FormatError> {
    let name = only("varlen_t5", header.tensors.keys().filter(|n| base_key(n) == "varlen_t5"))?
        .ok_or_else(|| torn("it holds no tensor varlen_t5_dtype"))?;
    let (dtype, shape) = &header.tensors[&name];
    float(&name, *dtype)?;
    match shape[..] {
        [tokens, width] if tokens > 0 && width > 0 => Ok((name, [tokens, width])),
        _ => Err(torn(format!("{name} has shape {shape:?}, wanted [tokens,width]"))),
    }
}

/// The tensors of a latent file, in the dtypes they are stored in.
#[derive(Debug, Clone)]
pub struct LatentTensors {
    /// [c,F,h,w]
    pub latents: Tensor,
    /// [4+c,F,h,w]: mask, then the encoded first frame
    pub latents_image: Option<Tensor>,
    /// [c,F,h,w]
    pub latents_control: Option<Tensor>,
    /// [tokens,width] of the first frame, or [2,tokens,width] of the first and the last
    pub clip: Option<Tensor>,
    /// [F], int32: where the frames stand in time, of one-frame caches
    pub positions: Option<Tensor>,
}

impl LatentTensors {
    /// Under the names the file gives them; the CLIP features take the latents' suffix and are stored as fp16.
    pub fn named(&self) -> anyhow::Result<Tensors> {
        let (_, f, h, w) = self.latents.dims4()?;
        let dtype = self.latents.dtype();
        let mut named = BTreeMap::new();
        named.insert(latent_key("latents", (f, h, w), dtype)?, self.latents.clone());
        if let Some(image) = &self.latents_image {
            named.insert(latent_key("latents_image", (f, h, w), dtype)?, image.clone());
        }
        if let Some(control) = &self.latents_control {
            named.insert(latent_key("latents_control", (f, h, w), dtype)?, control.clone());
        }
        if let Some(clip) = &self.clip {
            named.insert(format!("clip_{}", dtype_name(dtype)?), clip.to_dtype(DType::F16)?);
        }
        if let Some(positions) = &self.positions {
            named.insert("f_indices_int32".to_string(), positions.to_dtype(DType::I32)?);
        }
        Ok(named)
    }

    /// From a file's tensors; numbers that are not finite make an error, where the old trainer puts zeros.
    pub fn from_named(header: &Header, mut tensors: Tensors) -> Result<Self, FormatError> {
        let info = LatentInfo::from_header(header)?;
        let mut take = |name: &Option<String>| match name {
            Some(name) => {
                let tensor = tensors.remove(name).ok_or_else(|| torn(format!("{name} is gone")))?;
                check_finite(name, &tensor).map(|()| Some(tensor))
            }
            None => Ok(None),
        };
        let latents = take(&Some(info.keys.latents))?.ok_or_else(|| torn("it holds no latents"))?;
        Ok(Self {
            latents,
            latents_image: take(&info.keys.image)?,
            latents_control: take(&info.keys.control)?,
            clip: take(&info.keys.clip)?,
            positions: take(&info.keys.positions)?,
        })
    }
}

/// Refuses NaN and infinities, and says where the first one is.
pub fn check_finite(name: &str, tensor: &Tensor) -> Result<(), FormatError> {
    let values = tensor
        .flatten_all()
        .and_then(|t| t.to_dtype(DType::F32))
        .and_then(|t| t.to_vec1::<f32>())
        .map_err(|e| torn(format!("{name}: {e}")))?;
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => {
            let n = values.iter().filter(|v| !v.is_finite()).count();
            Err(torn(format!("{name} holds {n} numbers that are not finite (first {} at element {i})", values[i])))
        }
    }
}

/// Metadata of a latent file. `frame_count` is absent for pictures.
pub fn latent_metadata(width: usize, height: usize, frame_count: Option<usize>) -> Metadata {
    let mut metadata = common_metadata();
    metadata.insert("width".into(), width.to_string());
    metadata.insert("height".into(), height.to_string());
    metadata.extend(frame_count.map(|n| ("frame_count".to_string(), n.to_string())));
    metadata
}

/// Metadata of a caption file.
pub fn text_metadata(caption: &str) -> Metadata {
    let mut metadata = common_metadata();
    metadata.insert("caption1".into(), caption.to_string());
    metadata
}

fn common_metadata() -> Metadata {
    BTreeMap::from([
        ("architecture".to_string(), ARCHITECTURE.to_string()),
        ("format_version".to_string(), FORMAT_VERSION.to_string()),
    ])
}

/// What a caption file becomes when `context` [tokens,width] is put into it: tensors of other encoders and unknown
/// metadata of the file that was there stay; ours replaces its predecessor of any dtype.
pub fn merge_text(
    old: Option<(Metadata, Tensors)>,
    context: &Tensor,
    new_metadata: Metadata,
) -> anyhow::Result<(Metadata, Tensors)> {
    let (mut metadata, mut tensors) = old.unwrap_or_default();
    tensors.retain(|name, _| base_key(name) != "varlen_t5");
    tensors.insert(format!("varlen_t5_{}", dtype_name(context.dtype())?), context.clone());
    metadata.extend(new_metadata);
    Ok((metadata, tensors))
}
