//! The numbers of a vision tower, the two spellings of its keys, and random weights of any size.

use crate::vae::random::seeded;
use crate::{Error, Result};
use candle_core::Tensor;
use serde::Deserialize;
use std::collections::BTreeMap;

pub(super) const MODEL: &str = "clip";

/// The numbers of a vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipArch {
    /// Side of the square input, in pixels.
    pub image_size: usize,
    pub patch_size: usize,
    pub dim: usize,
    pub mlp_dim: usize,
    pub num_heads: usize,
    /// All blocks of the file; the last one is not used for the DiT.
    pub num_layers: usize,
    pub norm_eps: f64,
}

fn invalid<T>(what: String) -> Result<T> {
    Err(Error::Invalid { model: MODEL, what })
}

impl ClipArch {
    /// ViT-H/14 at 224 pixels.
    pub fn vit_h14() -> Self {
        Self {
            image_size: 224,
            patch_size: 14,
            dim: 1280,
            mlp_dim: 5120,
            num_heads: 16,
            num_layers: 32,
            norm_eps: 1e-5,
        }
    }

    /// Reads the numbers off a checkpoint, under official or `clip_vision_h` keys. Heads are not in any shape: without
    /// `num_heads` they are 80 wide as in ViT-H where that divides the width, else 64.
    pub fn infer(shape: &dyn Fn(&str) -> Option<Vec<usize>>, num_heads: Option<usize>) -> Result<Self> {
        let names = if shape("visual.patch_embedding.weight").is_some() { Names::Official } else { Names::Hf };
        let need = |name: &str| {
            let key = names.keys(name).remove(0);
            shape(&key).ok_or(Error::MissingWeight { model: MODEL, key })
        };
        let patch = need("patch_embedding.weight")?;
        let positions = need("pos_embedding")?;
        let mlp = need("transformer.0.mlp.0.weight")?;
        let (&[dim, 3, patch_size, _], [.., tokens, _], [mlp_dim, _]) = (&patch[..], &positions[..], &mlp[..]) else {
            return invalid(format!(
                "patch embedding {patch:?}, positions {positions:?} and first layer {mlp:?} are not a vision tower"
            ));
        };
        let side = (tokens.saturating_sub(1) as f64).sqrt().round() as usize;
        if side * side + 1 != *tokens {
            return invalid(format!("{tokens} positions are not a class token and a square of patches"));
        }
        let num_layers =
            (0..).take_while(|i| shape(&names.keys(&format!("transformer.{i}.norm1.weight"))[0]).is_some()).count();
        let num_heads = match num_heads {
            Some(n) => n,
            None if dim % 80 == 0 => dim / 80,
            None if dim % 64 == 0 => dim / 64,
            None => return invalid(format!("a width of {dim} does not tell the number of heads")),
        };
        let image_size = side * patch_size;
        let arch = Self { image_size, patch_size, dim, mlp_dim: *mlp_dim, num_heads, num_layers, norm_eps: 1e-5 };
        arch.validate()?;
        Ok(arch)
    }

    /// From an official configuration object: `image_size`, `patch_size`, `dim`, `mlp_ratio`, `num_heads`,
    /// `num_layers`, `norm_eps`; what else it says must be what this tower does.
    pub fn from_official(config: &serde_json::Value) -> Result<Self> {
        #[derive(Deserialize)]
        struct Official {
            image_size: usize,
            patch_size: usize,
            dim: usize,
            mlp_ratio: f64,
            num_heads: usize,
            num_layers: usize,
            #[serde(default = "default_eps")]
            norm_eps: f64,
            pool_type: Option<String>,
            pre_norm: Option<bool>,
            activation: Option<String>,
        }
        fn default_eps() -> f64 {
            1e-5
        }
        let c: Official = match serde_json::from_value(config.clone()) {
            Ok(c) => c,
            Err(e) => return invalid(format!("configuration: {e}")),
        };
        let differs = |got: &Option<String>, want| got.as_deref().is_some_and(|g| g != want);
        if differs(&c.pool_type, "token") || differs(&c.activation, "gelu") || c.pre_norm == Some(false) {
            return invalid("a tower without class token, first norm or exact GELU is not Wan's".into());
        }
        let arch = Self {
            image_size: c.image_size,
            patch_size: c.patch_size,
            dim: c.dim,
            mlp_dim: (c.dim as f64 * c.mlp_ratio) as usize,
            num_heads: c.num_heads,
            num_layers: c.num_layers,
            norm_eps: c.norm_eps,
        };
        arch.validate()?;
        Ok(arch)
    }

    /// Tokens of the output: one class token and one a patch.
    pub fn tokens(&self) -> usize {
        1 + (self.image_size / self.patch_size).pow(2)
    }

    /// Refuses numbers that no tower can have, naming them.
    pub fn validate(&self) -> Result<()> {
        if self.dim == 0 || self.num_heads == 0 || !self.dim.is_multiple_of(self.num_heads) {
            return invalid(format!("a width of {} does not split into {} heads", self.dim, self.num_heads));
        }
        if self.patch_size == 0 || self.image_size == 0 || !self.image_size.is_multiple_of(self.patch_size) {
            return invalid(format!("{} pixels do not split into patches of {}", self.image_size, self.patch_size));
        }
        if self.num_layers == 0 || self.mlp_dim == 0 {
            return invalid(format!("{} layers of inner width {}", self.num_layers, self.mlp_dim));
        }
        Ok(())
    }
}

/// The spelling of a file's keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Names {
    /// `visual.transformer.N.attn.to_qkv.…`: the official checkpoint.
    Official,
    /// `vision_model.encoder.layers.N.self_attn.q_proj.…`: `clip_vision_h.safetensors`.
    Hf,
}

impl Names {
    /// The keys in the file of one of our tensors: one, or three for q, k, v where the file keeps them apart.
    pub fn keys(self, name: &str) -> Vec<String> {
        if self == Names::Official {
            return vec![format!("visual.{name}")];
        }
        let (module, leaf) = name.rsplit_once('.').unwrap_or((name, ""));
        let Some((layer, part)) = module.strip_prefix("transformer.").and_then(|m| m.split_once('.')) else {
            return vec![match module {
                "cls_embedding" => "vision_model.embeddings.class_embedding".to_owned(),
                "pos_embedding" => "vision_model.embeddings.position_embedding.weight".to_owned(),
                "patch_embedding" => format!("vision_model.embeddings.patch_embedding.{leaf}"),
                // Spelled so in every such file.
                "pre_norm" => format!("vision_model.pre_layrnorm.{leaf}"),
                _ => format!("vision_model.{name}"),
            }];
        };
        let parts: &[&str] = match part {
            "norm1" => &["layer_norm1"],
            "norm2" => &["layer_norm2"],
            "attn.to_qkv" => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attn.proj" => &["self_attn.out_proj"],
            "mlp.0" => &["mlp.fc1"],
            "mlp.2" => &["mlp.fc2"],
            other => return vec![format!("vision_model.encoder.layers.{layer}.{other}.{leaf}")],
        };
        parts.iter().map(|p| format!("vision_model.encoder.layers.{layer}.{p}.{leaf}")).collect()
    }
}

/// Seeded random weights under the official keys (F32, every value exact in bf16), for demonstrations and tests.
pub fn random_clip(arch: &ClipArch, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    arch.validate()?;
    let (d, p, m) = (arch.dim, arch.patch_size, arch.mlp_dim);
    let mut out = BTreeMap::new();
    let mut add = |name: String, shape: &[usize], mean: f64, std: f64| -> Result<()> {
        let key = format!("visual.{name}");
        let t = seeded(seed, &key, shape, mean, std)?;
        out.insert(key, t);
        Ok(())
    };
    let fan_in = |n: usize| (n as f64).powf(-0.5);
    add("patch_embedding.weight".into(), &[d, 3, p, p], 0.0, fan_in(3 * p * p))?;
    add("cls_embedding".into(), &[1, 1, d], 0.0, 0.5)?;
    add("pos_embedding".into(), &[1, arch.tokens(), d], 0.0, 0.5)?;
    add("pre_norm.weight".into(), &[d], 1.0, 0.1)?;
    add("pre_norm.bias".into(), &[d], 0.0, 0.1)?;
    for i in 0..arch.num_layers {
        for norm in ["norm1", "norm2"] {
            add(format!("transformer.{i}.{norm}.weight"), &[d], 1.0, 0.1)?;
            add(format!("transformer.{i}.{norm}.bias"), &[d], 0.0, 0.1)?;
        }
        for (part, n_in, n_out) in [("attn.to_qkv", d, 3 * d), ("attn.proj", d, d), ("mlp.0", d, m), ("mlp.2", m, d)] {
            add(format!("transformer.{i}.{part}.weight"), &[n_out, n_in], 0.0, fan_in(n_in))?;
            add(format!("transformer.{i}.{part}.bias"), &[n_out], 0.0, 0.05)?;
        }
    }
    Ok(out)
}
