//! SentencePiece models (`spiece.model`): the few protobuf fields that a Unigram tokenizer needs.

use anyhow::{anyhow, bail, Context, Result};
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::{Precompiled, Replace, Sequence, Strip};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, NormalizerWrapper, Tokenizer};

/// What `sentencepiece_model.proto` says about a model, as far as it matters here.
#[derive(Debug, Default)]
struct Model {
    pieces: Vec<Piece>,
    /// trainer_spec (2): model_type (3), byte_fallback (35), unk_id (40).
    model_type: u64,
    byte_fallback: bool,
    unk_id: usize,
    /// normalizer_spec (3): precompiled_charsmap (2), add_dummy_prefix (3), remove_extra_whitespaces (4).
    charsmap: Vec<u8>,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

const UNIGRAM: u64 = 1;
/// Kinds of pieces that stand for themselves and are never the outcome of segmentation: unknown, control, user-defined.
const WHOLE: [u64; 3] = [2, 3, 4];

/// A tokenizer that segments like SentencePiece with this model.
pub fn build(model: &[u8]) -> Result<Tokenizer> {
    let model = parse(model).context("not a SentencePiece model")?;
    if model.model_type != UNIGRAM {
        bail!("the SentencePiece model is of type {}, umT5 uses Unigram ({UNIGRAM})", model.model_type);
    }
    let whole: Vec<AddedToken> = model
        .pieces
        .iter()
        .filter(|piece| WHOLE.contains(&piece.kind))
        .map(|piece| AddedToken::from(piece.text.clone(), true).normalized(false))
        .collect();
    let vocabulary = model.pieces.into_iter().map(|piece| (piece.text, f64::from(piece.score))).collect();
    let unigram = Unigram::from(vocabulary, Some(model.unk_id), model.byte_fallback).map_err(|e| anyhow!("{e}"))?;

    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if !model.charsmap.is_empty() {
        let charsmap = Precompiled::from(&model.charsmap).map_err(|e| anyhow!("normalization table: {e}"))?;
        normalizers.push(charsmap.into());
    }
    if model.remove_extra_whitespaces {
        let runs = tokenizers::normalizers::replace::ReplacePattern::Regex(" {2,}".to_string());
        normalizers.push(Replace::new(runs, " ").map_err(|e| anyhow!("{e}"))?.into());
        normalizers.push(Strip::new(true, true).into());
    }
    let prefix = if model.add_dummy_prefix { PrependScheme::Always } else { PrependScheme::Never };
    let mut tokenizer = Tokenizer::new(unigram);
    tokenizer.with_normalizer(Some(Sequence::new(normalizers))).map_err(|e| anyhow!("{e}"))?;
    // Not split into words: pieces may span several.
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('\u{2581}', prefix, false)));
    tokenizer.add_special_tokens(whole).map_err(|e| anyhow!("{e}"))?;
    Ok(tokenizer)
}

fn parse(bytes: &[u8]) -> Result<Model> {
    let mut model =
        Model { model_type: UNIGRAM, add_dummy_prefix: true, remove_extra_whitespaces: true, ..Model::default() };
    for field in Fields(bytes) {
        match field? {
            (1, Value::Bytes(piece)) => model.pieces.push(parse_piece(piece)?),
            (2, Value::Bytes(trainer)) => {
                for field in Fields(trainer) {
                    match field? {
                        (3, Value::Number(n)) => model.model_type = n,
                        (35, Value::Number(n)) => model.byte_fallback = n != 0,
                        (40, Value::Number(n)) => model.unk_id = usize::try_from(n)?,
                        _ => {}
                    }
                }
            }
            (3, Value::Bytes(normalizer)) => {
                for field in Fields(normalizer) {
                    match field? {
                        (2, Value::Bytes(charsmap)) => model.charsmap = charsmap.to_vec(),
                        (3, Value::Number(n)) => model.add_dummy_prefix = n != 0,
                        (4, Value::Number(n)) => model.remove_extra_whitespaces = n != 0,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if model.pieces.is_empty() {
        bail!("it has no pieces");
    }
    Ok(model)
}

/// SentencePiece: piece (1), score (2), type (3, normal by default).
fn parse_piece(bytes: &[u8]) -> Result<Piece> {
    let mut piece = Piece { kind: 1, ..Piece::default() };
    for field in Fields(bytes) {
        match field? {
            (1, Value::Bytes(text)) => piece.text = std::str::from_utf8(text)?.to_string(),
            (2, Value::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Value::Number(n)) => piece.kind = n,
            _ => {}
        }
    }
    Ok(piece)
}

enum Value<'a> {
    Number(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

/// The fields of a protobuf message in order: number and value. Ends after the first error.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Result<(u64, Value<'a>)> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Number(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Fixed64
            }
            2 => {
                let len = usize::try_from(self.varint()?)?;
                Value::Bytes(self.take(len)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.take(4)?.try_into()?)),
            other => bail!("wire type {other}"),
        };
        Ok((tag >> 3, value))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).context("it ends in the middle of a field")?;
        self.0 = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        bail!("a number of more than ten bytes")
    }
}
