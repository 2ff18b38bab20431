//! Names of umT5 tensors: the official ones, and the ones of transformers and ComfyUI files.

/// Prefixes under which files carry the whole encoder.
const PREFIXES: [&str; 6] =
    ["text_encoders.umt5xxl.transformer.", "text_encoder.", "transformer.", "model.", "module.", "umt5xxl."];

/// Key of the relative position table of layer `i`.
pub(crate) fn bias_key(i: usize, shared: bool) -> String {
    match shared {
        true => "pos_embedding.embedding.weight".to_string(),
        false => format!("blocks.{i}.pos_embedding.embedding.weight"),
    }
}

/// The official key of a tensor named in the official or the transformers way, with or without a known prefix.
/// Suffixes other than `weight` (`scale_weight` of fp8 files) are kept. `None` for tensors that are not part of the
/// encoder (decoder, `spiece_model`, `scaled_fp8`).
pub fn official_key(key: &str) -> Option<String> {
    let mut key = key;
    while let Some(rest) = PREFIXES.iter().find_map(|p| key.strip_prefix(p)) {
        key = rest;
    }
    let key = key.strip_prefix("encoder.").unwrap_or(key);
    let (module, suffix) = key.rsplit_once('.')?;
    let module = match module {
        "shared" | "embed_tokens" | "token_embedding" => "token_embedding".to_string(),
        "final_layer_norm" | "norm" => "norm".to_string(),
        "pos_embedding.embedding" => module.to_string(),
        _ => layer_module(module)?,
    };
    Some(format!("{module}.{suffix}"))
}

/// `block.3.layer.0.SelfAttention.q` or `blocks.3.attn.q` -> `blocks.3.attn.q`.
fn layer_module(module: &str) -> Option<String> {
    let (stem, rest) = module.split_once('.')?;
    let (index, rest) = rest.split_once('.')?;
    let index: usize = index.parse().ok()?;
    let ours = match (stem, rest) {
        (
            "blocks",
            "norm1"
            | "norm2"
            | "attn.q"
            | "attn.k"
            | "attn.v"
            | "attn.o"
            | "ffn.gate.0"
            | "ffn.fc1"
            | "ffn.fc2"
            | "pos_embedding.embedding",
        ) => rest,
        ("block", "layer.0.layer_norm") => "norm1",
        ("block", "layer.1.layer_norm") => "norm2",
        ("block", "layer.0.SelfAttention.q") => "attn.q",
        ("block", "layer.0.SelfAttention.k") => "attn.k",
        ("block", "layer.0.SelfAttention.v") => "attn.v",
        ("block", "layer.0.SelfAttention.o") => "attn.o",
        ("block", "layer.0.SelfAttention.relative_attention_bias") => "pos_embedding.embedding",
        ("block", "layer.1.DenseReluDense.wi_0") => "ffn.gate.0",
        ("block", "layer.1.DenseReluDense.wi_1") => "ffn.fc1",
        ("block", "layer.1.DenseReluDense.wo") => "ffn.fc2",
        _ => return None,
    };
    Some(format!("blocks.{index}.{ours}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_origin_meet() {
        for (theirs, ours) in [
            ("shared.weight", "token_embedding.weight"),
            ("encoder.embed_tokens.weight", "token_embedding.weight"),
            ("encoder.token_embedding.weight", "token_embedding.weight"),
            ("encoder.block.11.layer.0.SelfAttention.q.weight", "blocks.11.attn.q.weight"),
            ("encoder.block.0.layer.0.SelfAttention.o.scale_weight", "blocks.0.attn.o.scale_weight"),
            (
                "encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight",
                "blocks.2.pos_embedding.embedding.weight",
            ),
            ("encoder.block.0.layer.0.layer_norm.weight", "blocks.0.norm1.weight"),
            ("encoder.block.0.layer.1.layer_norm.weight", "blocks.0.norm2.weight"),
            ("encoder.block.7.layer.1.DenseReluDense.wi_0.weight", "blocks.7.ffn.gate.0.weight"),
            ("encoder.block.7.layer.1.DenseReluDense.wi_1.weight", "blocks.7.ffn.fc1.weight"),
            ("encoder.block.7.layer.1.DenseReluDense.wo.weight", "blocks.7.ffn.fc2.weight"),
            ("encoder.final_layer_norm.weight", "norm.weight"),
            ("text_encoders.umt5xxl.transformer.encoder.final_layer_norm.weight", "norm.weight"),
            ("blocks.5.ffn.gate.0.weight", "blocks.5.ffn.gate.0.weight"),
            ("pos_embedding.embedding.weight", "pos_embedding.embedding.weight"),
        ] {
            assert_eq!(official_key(theirs).as_deref(), Some(ours), "{theirs}");
        }
        for other in ["decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight", "spiece_model", "scaled_fp8"]
        {
            assert_eq!(official_key(other), None, "{other}");
        }
    }
}
