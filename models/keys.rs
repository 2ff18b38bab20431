//! Names of DiT tensors. Ours are the official ones; every other spelling is mapped onto them here.

use crate::arch::WanArch;

/// What a key of a checkpoint file is, whoever wrote the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A tensor of the model, under its canonical name.
    Tensor(String),
    /// The dequantisation scale of the weight with this canonical name (`….weight`).
    Scale(String),
    /// Something that says how the file was made and holds no number of the model (`scaled_fp8`, activation scales).
    Note,
    /// No tensor of a Wan DiT: the key without its prefix.
    Foreign(String),
}

/// Prefixes that wrap the whole model, outermost first; they may be nested.
const PREFIXES: [&str; 6] =
    ["model.diffusion_model.", "diffusion_model.", "model.", "module.", "transformer.", "_orig_mod."];

/// The key without the prefixes of its packaging: `model.diffusion_model.blocks.0.…` -> `blocks.0.…`.
pub fn strip_prefix(key: &str) -> &str {
    let mut key = key;
    while let Some(rest) = PREFIXES.iter().find_map(|p| key.strip_prefix(p)) {
        key = rest;
    }
    key
}

/// Sorts one key of a checkpoint: prefixes stripped, diffusers names translated, scales told from weights.
pub fn classify(raw: &str) -> Entry {
    let key = strip_prefix(raw);
    if key == "scaled_fp8" || [".scale_input", ".input_scale", ".comfy_quant"].iter().any(|s| key.ends_with(s)) {
        return Entry::Note;
    }
    for suffix in [".scale_weight", ".weight_scale"] {
        if let Some(module) = key.strip_suffix(suffix) {
            let weight = from_diffusers(&format!("{module}.weight"));
            return match is_wan(&weight) {
                true => Entry::Scale(weight),
                false => Entry::Foreign(key.to_string()),
            };
        }
    }
    let name = from_diffusers(key);
    match is_wan(&name) {
        true => Entry::Tensor(name),
        false => Entry::Foreign(key.to_string()),
    }
}

/// The canonical name of a model tensor; `None` for anything else.
pub fn canonical(raw: &str) -> Option<String> {
    match classify(raw) {
        Entry::Tensor(name) => Some(name),
        _ => None,
    }
}

/// Module names of the diffusers port outside the blocks, and ours.
const DIFFUSERS_TOP: [(&str, &str); 12] = [
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.image_embedder.norm1.", "img_emb.proj.0."),
    ("condition_embedder.image_embedder.ff.net.0.proj.", "img_emb.proj.1."),
    ("condition_embedder.image_embedder.ff.net.2.", "img_emb.proj.3."),
    ("condition_embedder.image_embedder.norm2.", "img_emb.proj.4."),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("proj_out.", "head.head."),
    ("scale_shift_table", "head.modulation"),
];

/// Module names inside a block. The port numbers the norms in the order of use, the official code does not.
const DIFFUSERS_BLOCK: [(&str, &str); 19] = [
    ("attn1.to_q.", "self_attn.q."),
    ("attn1.to_k.", "self_attn.k."),
    ("attn1.to_v.", "self_attn.v."),
    ("attn1.to_out.0.", "self_attn.o."),
    ("attn1.norm_q.", "self_attn.norm_q."),
    ("attn1.norm_k.", "self_attn.norm_k."),
    ("attn2.to_q.", "cross_attn.q."),
    ("attn2.to_k.", "cross_attn.k."),
    ("attn2.to_v.", "cross_attn.v."),
    ("attn2.to_out.0.", "cross_attn.o."),
    ("attn2.norm_q.", "cross_attn.norm_q."),
    ("attn2.norm_k.", "cross_attn.norm_k."),
    ("attn2.add_k_proj.", "cross_attn.k_img."),
    ("attn2.add_v_proj.", "cross_attn.v_img."),
    ("attn2.norm_added_k.", "cross_attn.norm_k_img."),
    ("norm2.", "norm3."),
    ("ffn.net.0.proj.", "ffn.0."),
    ("ffn.net.2.", "ffn.2."),
    ("scale_shift_table", "modulation"),
];

/// A diffusers name in official spelling; any other name comes back unchanged.
pub fn from_diffusers(key: &str) -> String {
    let replace = |table: &[(&str, &str)], key: &str| {
        table.iter().find_map(|(theirs, ours)| key.strip_prefix(theirs).map(|rest| format!("{ours}{rest}")))
    };
    if let Some((block, inner)) = split_block(key) {
        return match replace(&DIFFUSERS_BLOCK, inner) {
            Some(inner) => format!("blocks.{block}.{inner}"),
            None => key.to_string(),
        };
    }
    replace(&DIFFUSERS_TOP, key).unwrap_or_else(|| key.to_string())
}

/// `blocks.3.ffn.0.weight` -> (3, `ffn.0.weight`).
fn split_block(key: &str) -> Option<(usize, &str)> {
    let (index, inner) = key.strip_prefix("blocks.")?.split_once('.')?;
    Some((index.parse().ok()?, inner))
}

const LINEARS: [&str; 12] = [
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "cross_attn.q",
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.o",
    "cross_attn.k_img",
    "cross_attn.v_img",
    "ffn.0",
    "ffn.2",
];

/// Whether a Wan DiT of any size has a tensor of this (canonical) name.
fn is_wan(key: &str) -> bool {
    if let Some((_, inner)) = split_block(key) {
        let norms =
            ["self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k", "cross_attn.norm_k_img"];
        return match inner.rsplit_once('.') {
            _ if inner == "modulation" => true,
            Some((module, "weight")) => LINEARS.contains(&module) || norms.contains(&module) || module == "norm3",
            Some((module, "bias")) => LINEARS.contains(&module) || module == "norm3",
            _ => false,
        };
    }
    let modules = [
        "patch_embedding",
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "img_emb.proj.0",
        "img_emb.proj.1",
        "img_emb.proj.3",
        "img_emb.proj.4",
        "head.head",
    ];
    match key.rsplit_once('.') {
        _ if key == "head.modulation" || key == "img_emb.emb_pos" => true,
        Some((module, "weight" | "bias")) => modules.contains(&module),
        _ => false,
    }
}

/// Whether the weight is stored in block-scaled fp8: the linears inside the blocks, nothing else.
/// The rule of the old tool: the key contains `blocks`, ends in `.weight` and contains none of these words.
pub fn is_quantisable(key: &str) -> bool {
    let spared = [
        "norm",
        "patch_embedding",
        "text_embedding",
        "time_embedding",
        "time_projection",
        "head",
        "modulation",
        "img_emb",
    ];
    key.contains("blocks") && key.ends_with(".weight") && !spared.iter().any(|s| key.contains(s))
}

/// One tensor that an architecture needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedKey {
    pub key: String,
    pub shape: Vec<usize>,
    /// The block it belongs to; `None` for embeddings and head.
    pub block: Option<usize>,
    /// See [`is_quantisable`].
    pub quantisable: bool,
}

/// Every tensor of a DiT of this architecture, with its shape: what stands outside the blocks first, then block by block.
pub fn expected(arch: &WanArch) -> Vec<ExpectedKey> {
    let mut keys = expected_rest(arch);
    for block in 0..arch.num_layers {
        keys.extend(expected_block(arch, block));
    }
    keys
}

/// The tensors outside the blocks.
pub fn expected_rest(arch: &WanArch) -> Vec<ExpectedKey> {
    let mut list = List { keys: Vec::new(), block: None };
    let [pf, ph, pw] = arch.patch;
    let dim = arch.dim;
    list.push("patch_embedding.weight", &[dim, arch.in_dim, pf, ph, pw]);
    list.push("patch_embedding.bias", &[dim]);
    list.linear("text_embedding.0", arch.text_dim, dim);
    list.linear("text_embedding.2", dim, dim);
    list.linear("time_embedding.0", arch.freq_dim, dim);
    list.linear("time_embedding.2", dim, dim);
    list.linear("time_projection.1", dim, 6 * dim);
    if let Some(clip) = arch.clip {
        list.norm("img_emb.proj.0", clip.dim);
        list.linear("img_emb.proj.1", clip.dim, clip.dim);
        list.linear("img_emb.proj.3", clip.dim, dim);
        list.norm("img_emb.proj.4", dim);
        if clip.images == 2 {
            list.push("img_emb.emb_pos", &[1, clip.rows(), clip.dim]);
        }
    }
    list.linear("head.head", dim, arch.patch_out());
    list.push("head.modulation", &[1, 2, dim]);
    list.keys
}

/// The tensors of one block.
pub fn expected_block(arch: &WanArch, block: usize) -> Vec<ExpectedKey> {
    let mut list = List { keys: Vec::new(), block: Some(block) };
    let dim = arch.dim;
    list.push("modulation", &[1, 6, dim]);
    for site in arch.block_sites(0) {
        list.linear(site.name.trim_start_matches("blocks.0."), site.in_features, site.out_features);
    }
    for attn in ["self_attn", "cross_attn"] {
        list.push(&format!("{attn}.norm_q.weight"), &[dim]);
        list.push(&format!("{attn}.norm_k.weight"), &[dim]);
    }
    if arch.clip.is_some() {
        list.push("cross_attn.norm_k_img.weight", &[dim]);
    }
    list.norm("norm3", dim);
    list.keys
}

struct List {
    keys: Vec<ExpectedKey>,
    block: Option<usize>,
}

impl List {
    fn push(&mut self, name: &str, shape: &[usize]) {
        let key = match self.block {
            Some(i) => format!("blocks.{i}.{name}"),
            None => name.to_string(),
        };
        let quantisable = is_quantisable(&key);
        self.keys.push(ExpectedKey { key, shape: shape.to_vec(), block: self.block, quantisable });
    }

    fn linear(&mut self, module: &str, i: usize, o: usize) {
        self.push(&format!("{module}.weight"), &[o, i]);
        self.push(&format!("{module}.bias"), &[o]);
    }

    fn norm(&mut self, module: &str, width: usize) {
        self.push(&format!("{module}.weight"), &[width]);
        self.push(&format!("{module}.bias"), &[width]);
    }
}

/// `blocks.0.self_attn.q` -> `lora_unet_blocks_0_self_attn_q`.
pub fn kohya_name(site: &str) -> String {
    format!("lora_unet_{}", site.replace('.', "_"))
}

/// `lora_unet_blocks_0_self_attn_q` -> `blocks.0.self_attn.q`; `None` where no linear of a block has that name.
pub fn site_from_kohya(name: &str) -> Option<String> {
    let (index, module) = name.strip_prefix("lora_unet_blocks_")?.split_once('_')?;
    let index: usize = index.parse().ok()?;
    let site = LINEARS.iter().find(|l| l.replace('.', "_") == module)?;
    Some(format!("blocks.{index}.{site}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::ClipArch;

    fn arch(clip: Option<ClipArch>) -> WanArch {
        let text = "dim = 64\nffn_dim = 128\nnum_heads = 2\nnum_layers = 3\nin_dim = 36\nout_dim = 16\ntext_dim = 32";
        WanArch { clip, ..toml::from_str(text).unwrap() }
    }

    /// The reverse of the diffusers map, written out by module, so that the table is checked against another spelling.
    fn to_diffusers(key: &str) -> String {
        let mut k = key.to_string();
        for (ours, theirs) in [
            ("cross_attn.k_img", "attn2.add_k_proj"),
            ("cross_attn.v_img", "attn2.add_v_proj"),
            ("cross_attn.norm_k_img", "attn2.norm_added_k"),
            ("self_attn.norm", "attn1.norm"),
            ("cross_attn.norm", "attn2.norm"),
            ("self_attn.o", "attn1.to_out.0"),
            ("cross_attn.o", "attn2.to_out.0"),
            ("self_attn.", "attn1.to_"),
            ("cross_attn.", "attn2.to_"),
            ("norm3", "norm2"),
            ("ffn.0", "ffn.net.0.proj"),
            ("ffn.2", "ffn.net.2"),
            ("head.modulation", "scale_shift_table"),
            ("modulation", "scale_shift_table"),
            ("head.head", "proj_out"),
            ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
            ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
            ("time_projection.1", "condition_embedder.time_proj"),
            ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
            ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
            ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
            ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
            ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
            ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
            ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        ] {
            if k.contains(ours) {
                k = k.replace(ours, theirs);
                break;
            }
        }
        k
    }

    #[test]
    fn every_expected_key_is_found_under_every_spelling() {
        let arch = arch(Some(ClipArch { dim: 48, tokens: 257, images: 2 }));
        for spec in expected(&arch) {
            let want = Entry::Tensor(spec.key.clone());
            assert_eq!(classify(&spec.key), want);
            for prefix in ["model.diffusion_model.", "diffusion_model.", "model.", "module.", "module.model."] {
                assert_eq!(classify(&format!("{prefix}{}", spec.key)), want);
            }
            assert_eq!(classify(&to_diffusers(&spec.key)), want, "{}", to_diffusers(&spec.key));
        }
    }

    #[test]
    fn scales_notes_and_foreign_keys_are_told_apart() {
        let weight = "blocks.1.self_attn.q.weight".to_string();
        assert_eq!(classify("blocks.1.self_attn.q.scale_weight"), Entry::Scale(weight.clone()));
        assert_eq!(classify("model.diffusion_model.blocks.1.self_attn.q.weight_scale"), Entry::Scale(weight));
        assert_eq!(classify("model.diffusion_model.scaled_fp8"), Entry::Note);
        assert_eq!(classify("blocks.1.ffn.0.scale_input"), Entry::Note);
        for foreign in
            ["vace_blocks.0.before_proj.weight", "blocks.0.norm1.weight", "encoder.conv1.weight", "blocks.x.y"]
        {
            assert_eq!(classify(foreign), Entry::Foreign(foreign.to_string()));
        }
    }

    #[test]
    fn only_linears_of_blocks_are_quantised() {
        let plain = expected(&arch(None));
        let with_images = expected(&arch(Some(ClipArch { dim: 48, tokens: 257, images: 1 })));
        let count = |keys: &[ExpectedKey]| keys.iter().filter(|k| k.quantisable).count();
        assert_eq!(count(&plain), 3 * 10);
        assert_eq!(count(&with_images), 3 * 12);
        assert!(plain.iter().filter(|k| k.quantisable).all(|k| k.shape.len() == 2 && k.block.is_some()));
    }

    #[test]
    fn kohya_names_go_both_ways() {
        for site in arch(Some(ClipArch { dim: 48, tokens: 257, images: 1 })).sites() {
            assert_eq!(site_from_kohya(&kohya_name(&site.name)).as_deref(), Some(site.name.as_str()));
        }
        assert_eq!(site_from_kohya("lora_unet_blocks_0_norm3"), None);
        assert_eq!(site_from_kohya("lora_te_blocks_0_ffn_0"), None);
    }
}
