//! Which tokenizer applies: one that comes with the text encoder wins over the embedded one.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{bail, Context, Result};

use super::UmT5Tokenizer;
use crate::error::UserError;

/// The tokenizer chosen for a text encoder.
pub struct Found {
    pub tokenizer: Arc<UmT5Tokenizer>,
    /// File it came from; `None` for the embedded one.
    pub path: Option<PathBuf>,
    /// What the caller should tell the user: that it differs from the embedded tokenizer, and where.
    pub warning: Option<String>,
}

/// Places beside the text encoder where hub downloads keep its tokenizer, best first.
const BESIDE: [&str; 5] = [
    "tokenizer.json",
    "spiece.model",
    "google/umt5-xxl/tokenizer.json",
    "google/umt5-xxl/spiece.model",
    "tokenizer/tokenizer.json",
];

/// Texts on which tokenizers are compared: scripts, numbers, symbols, emoji, special tokens, rare words.
const PROBES: [&str; 14] = [
    "A cat.",
    "a photo of a woman sitting on a wooden bench, cinematic lighting, 35mm",
    "An astronaut's slow-motion moonwalk; the camera pans left (4K, HDR).",
    "2024-01-31 12:45, 3.14159, 1,000,000 and 50%",
    "色调艳丽,过曝,静态,细节模糊不清,字幕",
    "桜の下で笑う少女、アニメ風",
    "벚꽃이 피는 거리를 걷는 사람",
    "Девушка идёт по заснеженной улице",
    "قطة تجلس على الطاولة",
    "एक बिल्ली मेज पर बैठी है",
    "Crème brûlée, jalapeño, Straße, Ångström",
    "🎬 a 😀 face → fire 🔥",
    "snake_case, CamelCase, <tag>, #hash, @name, a/b\\c",
    "supercalifragilisticexpialidocious zxqjv",
];

/// The tokenizer for a run. In order: `explicit` (a `tokenizer.json`, `spiece.model`, or a directory holding one), a
/// file beside `text_encoder`, the `spiece_model` tensor inside it (ComfyUI files), the embedded tokenizer. The choice
/// is compared with the embedded one on a set of probe texts.
pub fn for_text_encoder(text_encoder: Option<&Path>, explicit: Option<&Path>) -> Result<Found> {
    if let Some(path) = explicit {
        let file = if path.is_dir() { beside(path).next() } else { Some(path.to_path_buf()) };
        let file = file.ok_or_else(|| {
            UserError::new(format!("{}: holds neither tokenizer.json nor spiece.model", path.display()))
                .hint("leave the option out to use the tokenizer inside this program")
        })?;
        return compared(read(&file)?, file);
    }
    if let Some(encoder) = text_encoder {
        let folder = if encoder.is_dir() { Some(encoder) } else { encoder.parent() };
        if let Some(file) = folder.and_then(|folder| beside(folder).next()) {
            return compared(read(&file)?, file);
        }
        if let Some(spiece) = read_spiece_tensor(encoder)? {
            let tokenizer = UmT5Tokenizer::from_spiece(&spiece)
                .with_context(|| format!("{}: tensor spiece_model", encoder.display()))?;
            return compared(tokenizer, encoder.to_path_buf());
        }
    }
    Ok(Found { tokenizer: UmT5Tokenizer::embedded()?, path: None, warning: None })
}

fn beside(folder: &Path) -> impl Iterator<Item = PathBuf> + '_ {
    BESIDE.iter().map(|name| folder.join(name)).filter(|path| path.is_file())
}

fn read(file: &Path) -> Result<UmT5Tokenizer> {
    let bytes = fs_err::read(file)?;
    let json = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
    let tokenizer = if json { UmT5Tokenizer::from_json(&bytes) } else { UmT5Tokenizer::from_spiece(&bytes) };
    tokenizer.map_err(|e| {
        UserError::new(format!("{}: {e:#}", file.display()))
            .hint("put the umT5 tokenizer of the Wan model there, or move the file away to use the built-in one")
            .into()
    })
}

fn compared(tokenizer: UmT5Tokenizer, path: PathBuf) -> Result<Found> {
    let embedded = UmT5Tokenizer::embedded()?;
    let mut differing = Vec::new();
    for probe in PROBES {
        if tokenizer.encode(probe)?.ids != embedded.encode(probe)?.ids {
            differing.push(probe);
        }
    }
    let warning = differing.first().map(|first| {
        format!(
            "the tokenizer of {} gives other tokens than the built-in one for {} of {} probe texts (first: {first:?}); \
             the file is used",
            path.display(),
            differing.len(),
            PROBES.len(),
        )
    });
    Ok(Found { tokenizer: Arc::new(tokenizer), path: Some(path), warning })
}

/// The bytes of the U8 tensor `spiece_model` of a safetensors file, reading only the header and that tensor. `None`
/// where the file is no safetensors file or has no such tensor.
pub fn read_spiece_tensor(path: &Path) -> Result<Option<Vec<u8>>> {
    if path.extension().is_none_or(|ext| ext != "safetensors") || !path.is_file() {
        return Ok(None);
    }
    let read = || -> Result<Option<Vec<u8>>> {
        let mut file = File::open(path)?;
        let mut len = [0u8; 8];
        file.read_exact(&mut len)?;
        let header = u64::from_le_bytes(len);
        let total = file.metadata()?.len();
        if header > total.saturating_sub(8) {
            bail!("the header is longer than the file");
        }
        let mut json = vec![0u8; usize::try_from(header)?];
        file.read_exact(&mut json)?;
        let json: serde_json::Value = serde_json::from_slice(&json)?;
        let Some(entry) = json.get("spiece_model") else { return Ok(None) };
        let offset = |i: usize| entry["data_offsets"][i].as_u64();
        let (Some(from), Some(to)) = (offset(0), offset(1)) else { bail!("spiece_model has no data_offsets") };
        if from > to || 8 + header + to > total {
            bail!("spiece_model lies outside the file");
        }
        file.seek(SeekFrom::Start(8 + header + from))?;
        let mut bytes = vec![0u8; usize::try_from(to - from)?];
        file.read_exact(&mut bytes)?;
        Ok(Some(bytes))
    };
    read().with_context(|| format!("{}: not a readable safetensors file", path.display()))
}
