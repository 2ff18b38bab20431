//! Prompts: cleaning and token ids, and the bare tokenizer.

use anyhow::Result;
use serde_json::Value;

use super::json::{integer, integers, list, text};
use super::{Case, Line, Tolerance};
use crate::tokenizer::{clean, UmT5Tokenizer, EOS, PAD};

/// Cleaned text, ids with `</s>`, truncation.
pub fn cleaned(case: &Case<'_>) -> Result<()> {
    let tokenizer = UmT5Tokenizer::embedded()?;
    let prompts = list(&case.json, "cases")?;
    case.check(&format!("{} cleaned prompts", prompts.len()), Tolerance::Exact, |line| {
        for prompt in prompts {
            let given = text(prompt, "text")?;
            line.equal(&format!("the cleaned form of {given:?}"), &clean(given).as_str(), &text(prompt, "cleaned")?);
        }
        Ok(())
    });
    let limit = integer(&case.json, "max_len")?;
    case.check("special ids", Tolerance::Exact, |line| {
        line.equal(
            "pad and </s>",
            &(PAD as usize, EOS as usize),
            &(integer(&case.json, "pad_id")?, integer(&case.json, "eos_id")?),
        );
        Ok(())
    });
    ids(case, prompts, |prompt| Ok(tokenizer.encode_within(prompt, limit)?.ids))
}

/// Ids of the text as it is.
pub fn raw(case: &Case<'_>) -> Result<()> {
    let tokenizer = UmT5Tokenizer::embedded()?;
    ids(case, list(&case.json, "cases")?, |prompt| tokenizer.encode_raw(prompt))
}

fn ids(case: &Case<'_>, prompts: &[Value], encode: impl Fn(&str) -> Result<Vec<u32>>) -> Result<()> {
    case.check(&format!("{} prompts' ids", prompts.len()), Tolerance::Exact, |line: &mut Line| {
        for prompt in prompts {
            let given = text(prompt, "text")?;
            let got: Vec<usize> = encode(given)?.into_iter().map(|id| id as usize).collect();
            line.equal(&format!("the ids of {given:?}"), &got, &integers(prompt, "ids")?);
        }
        Ok(())
    });
    Ok(())
}
