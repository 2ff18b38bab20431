//! Names inside LoRA files: every spelling in use, and ours.
//!
//! A key is a module and a suffix. Our module names are the official ones (`blocks.0.self_attn.q`), our suffixes those
//! of `wan_models::adapter` (`lora_down.weight`, `hada_w1_a`, …).

use wan_models::keys;

/// What one key of a LoRA file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A factor of a module's adapter: module, suffix.
    Factor(String, &'static str),
    /// The module's alpha.
    Alpha(String),
    /// A difference to add to a whole tensor of the model (`blocks.0.norm3.weight`).
    Diff(String),
    /// A known thing that cannot be used, with the reason.
    Unusable(&'static str),
    /// No part of a Wan LoRA.
    Unknown,
}

/// Spellings of a factor's suffix. The longest that fits is taken.
const FACTORS: [(&str, &str); 26] = [
    (".lora_down.weight", "lora_down.weight"),
    (".lora_up.weight", "lora_up.weight"),
    (".lora_A.weight", "lora_down.weight"),
    (".lora_B.weight", "lora_up.weight"),
    (".lora_A.default.weight", "lora_down.weight"),
    (".lora_B.default.weight", "lora_up.weight"),
    (".lora_A", "lora_down.weight"),
    (".lora_B", "lora_up.weight"),
    ("_lora.down.weight", "lora_down.weight"),
    ("_lora.up.weight", "lora_up.weight"),
    (".lora.down.weight", "lora_down.weight"),
    (".lora.up.weight", "lora_up.weight"),
    (".lora_linear_layer.down.weight", "lora_down.weight"),
    (".lora_linear_layer.up.weight", "lora_up.weight"),
    (".hada_w1_a", "hada_w1_a"),
    (".hada_w1_b", "hada_w1_b"),
    (".hada_w2_a", "hada_w2_a"),
    (".hada_w2_b", "hada_w2_b"),
    (".lokr_w1", "lokr_w1"),
    (".lokr_w1_a", "lokr_w1_a"),
    (".lokr_w1_b", "lokr_w1_b"),
    (".lokr_w2", "lokr_w2"),
    (".lokr_w2_a", "lokr_w2_a"),
    (".lokr_w2_b", "lokr_w2_b"),
    (".lora_A.default", "lora_down.weight"),
    (".lora_B.default", "lora_up.weight"),
];

/// Suffixes of methods that a Wan base cannot be merged with here.
const UNUSABLE: [(&str, &str); 9] = [
    (".dora_scale", "DoRA magnitudes are not supported"),
    (".lora_magnitude_vector", "DoRA magnitudes are not supported"),
    (".lora_mid.weight", "convolution factors are not supported"),
    (".hada_t1", "convolution factors are not supported"),
    (".hada_t2", "convolution factors are not supported"),
    (".lokr_t2", "convolution factors are not supported"),
    (".reshape_weight", "reshaped weights are not supported"),
    (".set_weight", "replaced weights are not supported"),
    (".oft_blocks", "OFT is not supported"),
];

/// Sorts one key of a LoRA file of any form.
pub fn classify(key: &str) -> Part {
    if let Some(module) = [".alpha", ".lora_alpha", ".lora.alpha"].iter().find_map(|s| key.strip_suffix(s)) {
        return module_of(module).map_or(Part::Unknown, Part::Alpha);
    }
    let factor = FACTORS.iter().filter(|(s, _)| key.ends_with(s)).max_by_key(|(s, _)| s.len());
    if let Some((spelled, suffix)) = factor {
        return module_of(&key[..key.len() - spelled.len()]).map_or(Part::Unknown, |m| Part::Factor(m, suffix));
    }
    for (suffix, target) in [(".diff", "weight"), (".diff_b", "bias"), (".w_norm", "weight"), (".b_norm", "bias")] {
        if let Some(module) = key.strip_suffix(suffix) {
            return tensor_of(module, target).map_or(Part::Unknown, Part::Diff);
        }
    }
    match UNUSABLE.iter().find(|(s, _)| key.ends_with(s)) {
        Some((_, why)) => Part::Unusable(why),
        None => Part::Unknown,
    }
}

/// The official name of a module in any spelling: `lora_unet_blocks_0_attn1_to_q` -> `blocks.0.self_attn.q`.
pub fn module_of(spelled: &str) -> Option<String> {
    let weight = tensor_of(spelled, "weight")?;
    weight.strip_suffix(".weight").map(str::to_owned)
}

/// The official name of a module's weight or bias, or of a parameter that is no module (`blocks.0.modulation`).
fn tensor_of(spelled: &str, part: &str) -> Option<String> {
    let bare = strip_wrappers(spelled);
    if let Some(flat) = FLAT_PREFIXES.iter().find_map(|p| bare.strip_prefix(p)) {
        return dotted(flat).and_then(|d| tensor(&d, part));
    }
    tensor(bare, part).or_else(|| dotted(bare).and_then(|d| tensor(&d, part)))
}

fn tensor(module: &str, part: &str) -> Option<String> {
    keys::canonical(&format!("{module}.{part}")).or_else(|| match part {
        "weight" => keys::canonical(module),
        _ => None,
    })
}

/// What training programs put in front of a module name. The double underscore is that of the Wan-Fun scripts.
const FLAT_PREFIXES: [&str; 4] = ["lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_"];

fn strip_wrappers(mut name: &str) -> &str {
    while let Some(rest) = ["base_model.model.", "unet."].iter().find_map(|p| name.strip_prefix(p)) {
        name = rest;
    }
    name
}

/// Module names inside a block, official and of the diffusers port, as they look with dots.
const INNER: [&str; 36] = [
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "self_attn.norm_q",
    "self_attn.norm_k",
    "cross_attn.q",
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.o",
    "cross_attn.norm_q",
    "cross_attn.norm_k",
    "cross_attn.k_img",
    "cross_attn.v_img",
    "cross_attn.norm_k_img",
    "norm3",
    "modulation",
    "ffn.0",
    "ffn.2",
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn1.norm_q",
    "attn1.norm_k",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "attn2.norm_q",
    "attn2.norm_k",
    "attn2.add_k_proj",
    "attn2.add_v_proj",
    "attn2.norm_added_k",
    "ffn.net.0.proj",
    "ffn.net.2",
];

/// Module names outside the blocks.
const OUTER: [&str; 21] = [
    "patch_embedding",
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "head.head",
    "head.modulation",
    "img_emb.proj.0",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "img_emb.proj.4",
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj",
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "condition_embedder.image_embedder.ff.net.0.proj",
    "condition_embedder.image_embedder.ff.net.2",
    "proj_out",
    "img_emb.emb_pos",
];

/// Undoes the flattening of dots to underscores: `blocks_3_ffn_net_0_proj` -> `blocks.3.ffn.net.0.proj`. A table, since
/// underscores are part of some names.
fn dotted(flat: &str) -> Option<String> {
    let matches = |d: &&&str, flat: &str| d.replace('.', "_") == flat;
    if let Some(rest) = flat.strip_prefix("blocks_") {
        let (index, inner) = rest.split_once('_')?;
        let index: usize = index.parse().ok()?;
        let inner = INNER.iter().find(|d| matches(d, inner))?;
        return Some(format!("blocks.{index}.{inner}"));
    }
    OUTER.iter().find(|d| matches(d, flat)).map(|d| d.to_string())
}

/// How a written file names its tensors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Form {
    /// `diffusion_model.blocks.0.self_attn.q.lora_A.weight`: what ComfyUI loads surest.
    #[default]
    Comfy,
    /// `lora_unet_blocks_0_self_attn_q.lora_down.weight`: kohya's and the old trainer's.
    Kohya,
    /// `transformer.blocks.0.attn1.to_q.lora_A.weight`: the diffusers library's, which knows LoRA only and no alpha.
    Diffusers,
}

impl Form {
    /// The form that a key of a file is in.
    pub fn of_key(key: &str) -> Form {
        match key {
            k if k.starts_with("lora_unet") => Form::Kohya,
            k if [".attn1.", ".attn2.", ".ffn.net.", "condition_embedder."].iter().any(|p| k.contains(p)) => {
                Form::Diffusers
            }
            _ => Form::Comfy,
        }
    }

    /// The key of one factor (or `alpha`) of a module.
    pub fn key(self, module: &str, suffix: &str) -> String {
        match self {
            Form::Comfy => {
                format!("diffusion_model.{module}.{}", peft_suffix(suffix))
            }
            Form::Diffusers => {
                let name = diffusers_name(module).unwrap_or_else(|| module.to_owned());
                format!("transformer.{name}.{}", peft_suffix(suffix))
            }
            Form::Kohya => format!("lora_unet_{}.{suffix}", module.replace('.', "_")),
        }
    }
}

fn peft_suffix(suffix: &str) -> &str {
    match suffix {
        "lora_down.weight" => "lora_A.weight",
        "lora_up.weight" => "lora_B.weight",
        other => other,
    }
}

/// The diffusers name of one of our modules: `blocks.0.self_attn.q` -> `blocks.0.attn1.to_q`. `None` where both are the
/// same.
pub fn diffusers_name(module: &str) -> Option<String> {
    let spelled = |name: String| (name != module && module_of(&name).as_deref() == Some(module)).then_some(name);
    if let Some((index, _)) = module.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
        return INNER.iter().find_map(|inner| spelled(format!("blocks.{index}.{inner}")));
    }
    OUTER.iter().find_map(|outer| spelled((*outer).to_owned()))
}

/// The names that the old merge script understands: dotted modules with or without a prefix, `lora_down` and `lora_up`
/// only. Used in its compatibility mode alone.
pub fn classify_compat(key: &str) -> Part {
    if key.ends_with(".lora_A.weight") || key.ends_with(".lora_B.weight") || key.contains(".diff") {
        return Part::Unusable("ignored by the old merge");
    }
    let dotted_module = |module: &str| {
        let bare = keys::strip_prefix(module);
        (bare.contains('.') && keys::canonical(&format!("{bare}.weight")).is_some()).then(|| bare.to_owned())
    };
    for (spelled, suffix) in [(".lora_down.weight", "lora_down.weight"), (".lora_up.weight", "lora_up.weight")] {
        if let Some(module) = key.strip_suffix(spelled) {
            return dotted_module(module).map_or(Part::Unknown, |m| Part::Factor(m, suffix));
        }
    }
    match key.strip_suffix(".alpha").map(dotted_module) {
        Some(Some(module)) => Part::Alpha(module),
        _ => Part::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_spelling_means_the_same_factor() {
        let down = Part::Factor("blocks.7.self_attn.q".into(), "lora_down.weight");
        for key in [
            "diffusion_model.blocks.7.self_attn.q.lora_A.weight",
            "diffusion_model.blocks.7.self_attn.q.lora_down.weight",
            "blocks.7.self_attn.q.lora_A.default.weight",
            "transformer.blocks.7.attn1.to_q.lora_A.weight",
            "base_model.model.blocks.7.attn1.to_q.lora_A.weight",
            "lora_unet_blocks_7_self_attn_q.lora_down.weight",
            "lora_unet__blocks_7_self_attn_q.lora_down.weight",
            "lora_unet_blocks_7_attn1_to_q.lora_down.weight",
            "lycoris_blocks_7_self_attn_q.lora_down.weight",
            "model.diffusion_model.blocks.7.self_attn.q.lora.down.weight",
            "blocks.7.self_attn.q_lora.down.weight",
            "blocks.7.self_attn.q.lora_linear_layer.down.weight",
        ] {
            assert_eq!(classify(key), down, "{key}");
        }
    }

    #[test]
    fn every_module_of_a_block_survives_flattening() {
        for inner in INNER {
            let name = format!("blocks.12.{inner}");
            let flat = name.replace('.', "_");
            assert_eq!(dotted(&flat).as_deref(), Some(name.as_str()));
        }
        assert_eq!(module_of("lora_unet_blocks_0_cross_attn_k_img").as_deref(), Some("blocks.0.cross_attn.k_img"));
        assert_eq!(module_of("lora_unet_blocks_0_attn2_add_v_proj").as_deref(), Some("blocks.0.cross_attn.v_img"));
        assert_eq!(module_of("lora_unet_blocks_31_ffn_net_0_proj").as_deref(), Some("blocks.31.ffn.0"));
        assert_eq!(module_of("lora_unet_head_head").as_deref(), Some("head.head"));
        assert_eq!(module_of("lora_te_text_model_encoder_layers_0_mlp_fc1"), None);
        assert_eq!(module_of("lora_unet_double_blocks_0_img_attn_qkv"), None);
    }

    #[test]
    fn differences_and_unusable_things_are_told_apart() {
        assert_eq!(classify("diffusion_model.blocks.0.norm3.diff"), Part::Diff("blocks.0.norm3.weight".into()));
        assert_eq!(classify("diffusion_model.blocks.0.ffn.0.diff_b"), Part::Diff("blocks.0.ffn.0.bias".into()));
        assert_eq!(classify("diffusion_model.blocks.0.modulation.diff"), Part::Diff("blocks.0.modulation".into()));
        assert_eq!(
            classify("lora_unet_blocks_0_self_attn_norm_q.w_norm"),
            Part::Diff("blocks.0.self_attn.norm_q.weight".into())
        );
        assert_eq!(classify("blocks.0.ffn.0.alpha"), Part::Alpha("blocks.0.ffn.0".into()));
        assert!(matches!(classify("diffusion_model.blocks.0.ffn.0.dora_scale"), Part::Unusable(_)));
        assert_eq!(classify("lora_te1_text_model.lora_down.weight"), Part::Unknown);
        assert_eq!(classify("blocks.0.ffn.0.lokr_w1_a"), Part::Factor("blocks.0.ffn.0".into(), "lokr_w1_a"));
    }

    #[test]
    fn diffusers_names_are_those_of_the_library() {
        for (ours, theirs) in [
            ("blocks.7.self_attn.q", "blocks.7.attn1.to_q"),
            ("blocks.7.self_attn.o", "blocks.7.attn1.to_out.0"),
            ("blocks.7.cross_attn.k", "blocks.7.attn2.to_k"),
            ("blocks.7.cross_attn.v_img", "blocks.7.attn2.add_v_proj"),
            ("blocks.7.ffn.0", "blocks.7.ffn.net.0.proj"),
            ("blocks.7.ffn.2", "blocks.7.ffn.net.2"),
            ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
            ("head.head", "proj_out"),
        ] {
            assert_eq!(diffusers_name(ours).as_deref(), Some(theirs));
        }
        assert_eq!(diffusers_name("patch_embedding"), None);
    }

    #[test]
    fn written_names_read_back() {
        for form in [Form::Comfy, Form::Kohya, Form::Diffusers] {
            assert_eq!(Form::of_key(&form.key("blocks.3.ffn.2", "alpha")), form);
            for suffix in ["lora_down.weight", "lora_up.weight", "hada_w2_b", "lokr_w1", "lokr_w2", "lokr_w2_a"] {
                let key = form.key("blocks.3.cross_attn.v_img", suffix);
                assert_eq!(classify(&key), Part::Factor("blocks.3.cross_attn.v_img".into(), suffix), "{key}");
            }
            assert_eq!(classify(&form.key("blocks.3.ffn.2", "alpha")), Part::Alpha("blocks.3.ffn.2".into()));
        }
    }
}
