//! The text encoder and its tokenizer, as caching wants them.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use wan_kernels::Exec;
use wan_models::arch::Role;
use wan_models::umt5::{official_key, Residence, Storage, Umt5, Umt5Config, Umt5Options, WeightSource};

use super::cache::unreadable;
use super::job::Job;
use crate::cache::{fingerprint, CacheOptions, CaptionTokens, Lazy, TextEncoder, TextModels};
use crate::error::UserError;
#[cfg(feature = "cuda")]
use crate::fsio::human;
use crate::loader::Keyed;
use crate::plan::available_ram;
use crate::report::Work;
use crate::tokenizer::{for_text_encoder, UmT5Tokenizer};

/// Prompts encoded together: a streamed encoder reads its weights once for each such batch.
const BATCH: usize = 16;

/// What tells one encoder and one tokenizer from another; `None` where the file is not at hand.
pub struct Fingerprints {
    pub encoder: Option<String>,
    pub tokenizer: Option<String>,
}

pub fn fingerprints(job: &Job, models: bool) -> anyhow::Result<Fingerprints> {
    let path = match job.model_file("t5", Role::T5, job.config.t5.as_ref()) {
        Ok(path) => path,
        Err(_) if !models => return Ok(Fingerprints { encoder: None, tokenizer: None }),
        Err(e) => return Err(e),
    };
    let found = for_text_encoder(Some(&path), None)?;
    if let Some(warning) = &found.warning {
        job.progress.say(&format!("warning: {warning}"));
    }
    let encoder = fingerprint::of_weights(std::slice::from_ref(&path))?;
    Ok(Fingerprints { encoder: Some(encoder), tokenizer: Some(tokenizer_fingerprint(found.path.as_deref())?) })
}

fn tokenizer_fingerprint(path: Option<&Path>) -> anyhow::Result<String> {
    Ok(match path {
        Some(path) => fingerprint::of_weights(&[path.to_path_buf()])?,
        None => "embedded".into(),
    })
}

/// The models that caption embeddings are made with; the encoder is loaded when the first caption needs it.
pub fn models<'a>(job: &'a Job, options: &CacheOptions, exec: &'a Exec) -> anyhow::Result<TextModels<'a>> {
    let path = job.model_file("t5", Role::T5, job.config.t5.as_ref())?;
    Ok(TextModels {
        encoder: Lazy {
            fingerprint: options.umt5.clone().unwrap_or_default(),
            load: Box::new(move || Ok(Box::new(Encoder::load(job, &path, exec)?) as Box<dyn TextEncoder>)),
        },
        tokenizer_fingerprint: options.tokenizer.clone().unwrap_or_default(),
        batch: BATCH,
    })
}

/// The embeddings `[tokens, width]` of some texts, in host memory; the encoder is gone afterwards. Also a note for each that
/// the model sees only the beginning of.
pub fn contexts(job: &Job, exec: &Exec, texts: &[&str]) -> anyhow::Result<(Vec<Tensor>, Vec<String>)> {
    let path = job.model_file("t5", Role::T5, job.config.t5.as_ref())?;
    let encoder = Encoder::load(job, &path, exec)?;
    let mut task = job.progress.begin(Work { what: "prompts", unit: "prompt", start: 0, total: texts.len() as u64 });
    let (mut all, mut notes) = (Vec::with_capacity(texts.len()), Vec::new());
    for batch in texts.chunks(BATCH) {
        let tokens = batch.iter().map(|text| encoder.tokenize(text)).collect::<anyhow::Result<Vec<_>>>()?;
        let most = job.model.arch.text_len;
        for (text, tokens) in batch.iter().zip(&tokens).filter(|(_, t)| t.full > t.ids.len().min(most)) {
            let start: String = text.chars().take(40).collect();
            let (full, kept) = (tokens.full, tokens.ids.len().min(most));
            notes.push(format!("the prompt `{start}…` has {full} tokens: the model sees the first {kept}"));
        }
        let ids: Vec<Vec<u32>> = tokens.into_iter().map(|t| t.ids).collect();
        for context in encoder.encode(&ids)? {
            let seen = context.narrow(0, 0, context.dim(0)?.min(most))?;
            all.push(seen.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?);
        }
        task.advance(batch.len() as u64, "");
    }
    Ok((all, notes))
}

/// What 16 prompts of 512 tokens take beside the weights, rounded up.
#[cfg(feature = "cuda")]
const WORKING: u64 = 5 << 29;

/// The fastest place for the weights in which they fit; `bytes` is the size of the file.
fn residence(job: &Job, exec: &Exec, config: &Umt5Config, storage: Storage, bytes: u64) -> Residence {
    let ram = available_ram().unwrap_or(u64::MAX);
    #[cfg(feature = "cuda")]
    if let Exec::Cuda { gpu, .. } = exec {
        let layers: usize = config.tensors()[1..].iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        // 16-bit scales for every 64 codes of a byte.
        let layers = if storage == Storage::AsStored { 2 * layers as u64 } else { layers as u64 * 33 / 32 };
        // What the pool holds and nobody uses is free too.
        let free = gpu.memory().map_or(0, |m| m.free + (m.reserved_peak.saturating_sub(m.used)));
        if layers + WORKING <= free {
            return Residence::Resident;
        }
        let room = format!("the text encoder takes {}, the card has {}", human(layers), human(free));
        if layers <= ram / 4 * 3 {
            job.progress.say(&format!("{room}: its layers are copied to it as they are needed; --fp8_t5 halves them"));
            return Residence::Host;
        }
        job.progress.say(&format!("{room}, and memory {}: its layers are read for each batch", human(ram)));
        return Residence::Source;
    }
    let _ = (exec, config, storage);
    // Half of what is free: the page cache and the caches being written want some too.
    if bytes > ram / 2 {
        job.progress.say("the text encoder does not fit in memory: its layers are read as they are needed");
        return Residence::Source;
    }
    Residence::Resident
}

struct Encoder {
    tokenizer: Arc<UmT5Tokenizer>,
    model: Umt5,
}

impl Encoder {
    fn load(job: &Job, path: &Path, exec: &Exec) -> anyhow::Result<Self> {
        let file = Keyed::open(path, job.config.reading(), "the text encoder", official_key)?;
        let bytes = file.source().total_bytes();
        let source = FileSource(file);
        let config = Umt5Config::from_shapes(&source)?;
        if config.dim != job.model.arch.text_dim {
            return Err(UserError::new(format!(
                "{} cannot be used as the text encoder: its embeddings are {} wide, and {} reads {}",
                path.display(),
                config.dim,
                job.config.task,
                job.model.arch.text_dim
            ))
            .hint(crate::hub::where_to_get(&job.model, Role::T5))
            .into());
        }
        let storage = match (job.config.fp8_t5, job.config.musubi_compat) {
            (false, _) => Storage::AsStored,
            (true, false) => Storage::Fp8,
            (true, true) => Storage::Fp8Cast,
        };
        let compute = if job.config.musubi_compat { DType::BF16 } else { DType::F32 };
        // A card computes linears and attention in bf16 (fp16 overflows in T5) on a stream in fp32.
        let exec = if exec.device().is_cuda() { exec.with_compute(DType::BF16) } else { exec.with_compute(compute) };
        let residence = residence(job, &exec, &config, storage, bytes);
        let options = Umt5Options { exec, storage, residence };
        Ok(Self {
            tokenizer: for_text_encoder(Some(path), None)?.tokenizer,
            model: Umt5::with_config(config, Box::new(source), options)?,
        })
    }
}

impl TextEncoder for Encoder {
    fn tokenize(&self, caption: &str) -> anyhow::Result<CaptionTokens> {
        let encoded = self.tokenizer.encode(caption)?;
        let full = encoded.truncated_from.unwrap_or(encoded.ids.len());
        Ok(CaptionTokens { ids: encoded.ids, full })
    }

    fn encode(&self, captions: &[Vec<u32>]) -> anyhow::Result<Vec<Tensor>> {
        Ok(self.model.contexts(captions)?)
    }
}

/// A checkpoint as umT5 asks for it.
struct FileSource(Keyed);

impl WeightSource for FileSource {
    fn get(&self, key: &str) -> wan_models::Result<Tensor> {
        self.0.get(key, &Device::Cpu).map_err(|e| unreadable("umT5", &e))
    }

    fn shape(&self, key: &str) -> Option<Vec<usize>> {
        self.0.shape(key)
    }

    fn rows(&self, key: &str, ids: &Tensor) -> wan_models::Result<Tensor> {
        let rows = ids.flatten_all()?.to_vec1::<u32>()?;
        self.0.rows(key, &rows, &Device::Cpu).map_err(|e| unreadable("umT5", &e))
    }
}
