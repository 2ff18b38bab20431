//! umT5 tokens of a prompt: cleaning, the tokenizer file that applies, truncation.
//!
//! The tokenizer is embedded, so that nothing is downloaded; a `tokenizer.json` or `spiece.model` that comes with the
//! user's models wins over it (see [`for_text_encoder`]).

pub mod clean;
mod source;
mod spiece;

use std::sync::{Arc, OnceLock};

use anyhow::{anyhow, bail, Context, Result};
use tokenizers::Tokenizer;

pub use clean::clean;
pub use source::{for_text_encoder, read_spiece_tensor, Found};

/// Longest sequence the Wan models were trained with, `</s>` included; a longer prompt loses its end.
pub const MAX_TOKENS: usize = 512;
/// Id of the padding token.
pub const PAD: u32 = 0;
/// Id of `</s>`, which ends every prompt.
pub const EOS: u32 = 1;

const EMBEDDED: &[u8] = include_bytes!("../../configs/tokenizer/umt5_tokenizer.json.zst");

/// The tokens of one prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids ending with `</s>`, without padding.
    pub ids: Vec<u32>,
    /// How many tokens the prompt had, where some were cut off.
    pub truncated_from: Option<usize>,
}

impl Encoded {
    /// Ids padded to `len` tokens, and the mask that marks the real ones.
    pub fn padded(&self, len: usize) -> (Vec<u32>, Vec<u32>) {
        let real = self.ids.len().min(len);
        let mut ids = self.ids[..real].to_vec();
        let mut mask = vec![1; real];
        ids.resize(len, PAD);
        mask.resize(len, 0);
        (ids, mask)
    }
}

/// A umT5 tokenizer.
pub struct UmT5Tokenizer {
    inner: Tokenizer,
}

impl UmT5Tokenizer {
    /// The one in this program, unpacked once per process.
    pub fn embedded() -> Result<Arc<Self>> {
        static LOADED: OnceLock<Arc<UmT5Tokenizer>> = OnceLock::new();
        if let Some(loaded) = LOADED.get() {
            return Ok(loaded.clone());
        }
        let json = zstd::decode_all(EMBEDDED).context("the embedded tokenizer cannot be unpacked")?;
        let loaded = Self::from_json(&json).context("the embedded tokenizer cannot be read")?;
        Ok(LOADED.get_or_init(|| Arc::new(loaded)).clone())
    }

    /// From the contents of a `tokenizer.json`. Truncation and padding set in the file are switched off.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        Self::checked(Tokenizer::from_bytes(json).map_err(|e| anyhow!("not a tokenizer.json: {e}"))?)
    }

    /// From the contents of a SentencePiece model (`spiece.model`).
    pub fn from_spiece(model: &[u8]) -> Result<Self> {
        Self::checked(spiece::build(model)?)
    }

    /// Refuses tokenizers of other models: umT5 has `<pad>` = 0 and `</s>` = 1.
    fn checked(mut inner: Tokenizer) -> Result<Self> {
        for (token, id) in [("<pad>", PAD), ("</s>", EOS)] {
            match inner.token_to_id(token) {
                Some(found) if found == id => {}
                found => bail!("not a umT5 tokenizer: {token} has id {found:?}, expected {id}"),
            }
        }
        inner.with_truncation(None).map_err(|e| anyhow!("{e}"))?;
        inner.with_padding(None);
        Ok(Self { inner })
    }

    /// Number of tokens, the added ones included.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Cleans a prompt and encodes it. Truncation keeps the first 511 tokens and `</s>`.
    pub fn encode(&self, prompt: &str) -> Result<Encoded> {
        self.encode_within(prompt, MAX_TOKENS)
    }

    /// [`Self::encode`] with another limit (at least 1: `</s>` always stays).
    pub fn encode_within(&self, prompt: &str, max_tokens: usize) -> Result<Encoded> {
        let mut ids = self.encode_raw(&clean(prompt))?;
        ids.push(EOS);
        let len = ids.len();
        let truncated_from = (len > max_tokens).then_some(len);
        if truncated_from.is_some() {
            ids.truncate(max_tokens.saturating_sub(1));
            ids.push(EOS);
        }
        Ok(Encoded { ids, truncated_from })
    }

    /// Tokens of the text as it is: no cleaning, no `</s>`, no truncation.
    pub fn encode_raw(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| anyhow!("cannot tokenize: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }
}
