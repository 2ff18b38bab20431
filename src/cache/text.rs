//! Makes the caption files a survey found wanting: every distinct caption is encoded once, whoever shares it.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};

use super::fingerprint::sha256_hex;
use super::format::{self, FormatError};
use super::latents::{say_stopped, Lazy};
use super::recipe::{Freshness, Stamp, TextRecipe};
use super::survey::{Outcome, Survey};
use crate::fsio;
use crate::report::{Progress, Work};

/// Token ids of a caption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptionTokens {
    /// At most as many as the model takes, the end token included, without padding.
    pub ids: Vec<u32>,
    /// How many they were before the end was cut off.
    pub full: usize,
}

/// What captions are encoded with: a tokenizer and a text encoder.
pub trait TextEncoder {
    fn tokenize(&self, caption: &str) -> Result<CaptionTokens>;

    /// One [tokens,width] for each caption.
    fn encode(&self, captions: &[Vec<u32>]) -> Result<Vec<Tensor>>;
}

/// The models that caption embeddings are made with.
pub struct TextModels<'a> {
    pub encoder: Lazy<'a, Box<dyn TextEncoder>>,
    /// Of the tokenizer; the encoder's is in `encoder`.
    pub tokenizer_fingerprint: String,
    /// Captions encoded together. An encoder that streams its weights reads them once for each such batch.
    pub batch: usize,
}

/// Caption files that share a caption.
struct Group {
    caption: String,
    /// Positions in `Survey::entries`.
    entries: Vec<usize>,
}

/// Makes every caption file that is missing, stale or torn, and writes the results into the survey. `stop` is looked at
/// between batches: what is finished then stays, and the call returns.
pub fn cache_text(
    survey: &mut Survey,
    models: TextModels<'_>,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<()> {
    let groups = groups(survey);
    if groups.is_empty() {
        return Ok(());
    }
    let directories: HashSet<&Path> =
        groups.iter().flat_map(|g| &g.entries).filter_map(|&e| survey.entries[e].text.path.parent()).collect();
    for dir in directories {
        fsio::ensure_writable_dir(dir)?;
    }
    let TextModels { encoder, tokenizer_fingerprint, batch } = models;
    let fingerprint = encoder.fingerprint;
    let encoder = (encoder.load)()?;
    let total = groups.len() as u64;
    let mut task = progress.begin(Work { what: "captions", unit: "caption", start: 0, total });
    let mut done = 0;
    for batch in groups.chunks(batch.max(1)) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let tokens: Vec<CaptionTokens> = batch
            .iter()
            .map(|g| encoder.tokenize(&g.caption).with_context(|| format!("the caption of {}", first_user(survey, g))))
            .collect::<Result<_>>()?;
        let ids: Vec<Vec<u32>> = tokens.iter().map(|t| t.ids.clone()).collect();
        let contexts = encoder
            .encode(&ids)
            .with_context(|| format!("encoding the caption of {}", first_user(survey, &batch[0])))?;
        ensure!(contexts.len() == batch.len(), "{} embeddings for {} captions", contexts.len(), batch.len());
        for ((group, tokens), context) in batch.iter().zip(&tokens).zip(contexts) {
            let context = context.to_device(&Device::Cpu)?.to_dtype(survey.options.text_dtype)?.contiguous()?;
            let (rows, _) = context.dims2().context("a caption embedding is [tokens,width]")?;
            ensure!(rows == tokens.ids.len(), "{rows} rows for {} tokens", tokens.ids.len());
            format::check_finite("its embedding", &context)
                .map_err(|e| anyhow::anyhow!("the caption of {}: {e}", first_user(survey, group)))?;
            let recipe = |stamp| TextRecipe {
                stamp,
                caption: sha256_hex(group.caption.as_bytes()),
                umt5: fingerprint.clone(),
                tokenizer: tokenizer_fingerprint.clone(),
                dtype: format::dtype_name(survey.options.text_dtype).unwrap_or_default().to_string(),
                musubi_compat: survey.options.musubi_compat,
                tokens: tokens.full,
            };
            for &e in &group.entries {
                write_text(&survey.entries[e].text.path, &group.caption, &context, recipe)?;
                let text = &mut survey.entries[e].text;
                text.remade = text.state.is_spoilt().then(|| text.state.why());
                text.state = Freshness::Fresh;
                text.outcome = Outcome::Cached;
                text.cut_from = (tokens.full > tokens.ids.len()).then_some(tokens.full);
            }
            done += 1;
            task.advance(1, "");
        }
    }
    drop(task);
    say_stopped(progress, stop, done, total, "captions");
    Ok(())
}

/// The first file that has this caption, for messages.
fn first_user(survey: &Survey, group: &Group) -> String {
    survey.items[survey.entries[group.entries[0]].item].path.display().to_string()
}

/// Captions to encode, in the order in which they first appear.
fn groups(survey: &Survey) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut of_caption: HashMap<&str, usize> = HashMap::new();
    for (e, entry) in survey.entries.iter().enumerate() {
        if entry.fault.is_some() || entry.text.state.is_usable() {
            continue;
        }
        let caption = survey.items[entry.item].caption.as_deref().unwrap_or_default();
        let group = *of_caption.entry(caption).or_insert_with(|| {
            groups.push(Group { caption: caption.to_string(), entries: Vec::new() });
            groups.len() - 1
        });
        groups[group].entries.push(e);
    }
    groups
}

/// Puts an embedding [tokens,width] into a caption file; what other programs have put there under other names stays.
fn write_text(path: &Path, caption: &str, context: &Tensor, recipe: impl Fn(Stamp) -> TextRecipe) -> Result<()> {
    let old = match format::read_tensors(path) {
        Ok((metadata, tensors)) if of_this_family(&metadata) => Some((metadata, tensors)),
        Ok(_) | Err(FormatError::Torn(_)) => None,
        Err(e) if e.is_missing() => None,
        Err(FormatError::Io(e)) => return Err(fsio::explain(e, path)),
    };
    let (mut metadata, tensors) = format::merge_text(old, context, format::text_metadata(caption))?;
    let ours = tensors.iter().filter(|(name, _)| format::base_key(name) == "varlen_t5");
    let stamp = Stamp::new(&ours.map(|(name, t)| (name.clone(), t.clone())).collect())?;
    metadata.insert(format::RECIPE_KEY.to_string(), serde_json::to_string(&recipe(stamp))?);
    fsio::write_bytes(path, &format::to_bytes(&tensors, &metadata)?)
}

fn of_this_family(metadata: &format::Metadata) -> bool {
    metadata.get("architecture").is_none_or(|a| a == format::ARCHITECTURE)
}
