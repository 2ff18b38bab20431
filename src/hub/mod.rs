//! Model files and the Hugging Face hub: which file a task needs, whether it is here (this module), how it is downloaded
//! (`fetch`), and what other programs on this machine already have of it (`reuse`).

pub mod fetch;
pub mod reuse;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use wan_models::arch::{ModelConfig, ModelFile, Role};

use crate::config::registry;
use crate::error::UserError;

pub use fetch::{Hub, Remote, Transfer};

/// What `configs/models/<task>.toml` says about a task.
pub fn model_config(task: &str) -> Result<ModelConfig> {
    let text = registry::text(&format!("models/{task}.toml"))
        .ok_or_else(|| UserError::usage(format!("there is no task named `{task}`")))?;
    ModelConfig::from_toml(text).with_context(|| format!("configs/models/{task}.toml"))
}

/// The file of a role in a task's manifest; `variant` tells apart files of one role (`480p`, `720p`).
pub fn lookup(task: &str, role: Role, variant: Option<&str>) -> Result<ModelFile> {
    model_config(task)?.file(role, variant).cloned().ok_or_else(|| {
        let which = variant.map(|v| format!(" in the variant {v}")).unwrap_or_default();
        UserError::new(format!("no {} for {task}{which} is known on the hub", role_name(role)))
            .hint(format!("give the file with --{}", role_option(role)))
            .into()
    })
}

/// The manifest's file for a role; for the DiT of a task with variants, the first.
pub fn file(model: &ModelConfig, role: Role) -> Option<&ModelFile> {
    model.file(role, None)
}

/// Tasks whose models `wan-train setup` gets.
pub const SETUP_TASKS: [&str; 5] = ["t2v-A14B", "i2v-A14B", "t2v-14B", "t2v-1.3B", "i2v-14B"];

/// A sentence that says where to get the file of a role, for the hint of an error.
pub fn where_to_get(model: &ModelConfig, role: Role) -> String {
    let option = role_option(role);
    let of_setup = SETUP_TASKS.contains(&model.task.as_str()) && folder(role) == "models";
    let first = if of_setup { "`wan-train setup` gets it; by hand: " } else { "" };
    match file(model, role) {
        Some(f) => format!(
            "{first}download {} from the hub repository {} and save it as <base_dir>/{}/{}, or give its path with --{option}",
            f.path,
            f.repo,
            folder(role),
            f.name
        ),
        None => format!("give the path of a file that fits {} with --{option}", model.task),
    }
}

/// The folder under the base directory in which files of a role are kept.
pub fn folder(role: Role) -> &'static str {
    match role {
        Role::LightningHigh | Role::LightningLow => "lightning_loras",
        _ => "models",
    }
}

/// What a role is called in messages.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Dit => "DiT",
        Role::DitHigh => "high-noise DiT",
        Role::DitLow => "low-noise DiT",
        Role::Vae => "VAE",
        Role::T5 => "umT5 text encoder",
        Role::Clip => "CLIP vision model",
        Role::LightningHigh => "high-noise Lightning LoRA",
        Role::LightningLow => "low-noise Lightning LoRA",
    }
}

fn role_option(role: Role) -> &'static str {
    match role {
        Role::Dit | Role::DitHigh | Role::DitLow => "dit",
        Role::Vae => "vae",
        Role::T5 => "t5",
        Role::Clip => "clip",
        Role::LightningHigh | Role::LightningLow => "base_weights",
    }
}

/// The names under which a file may be kept: its own; a `.safetensors` of the same stem (people convert `.pth` files);
/// the scaled fp8 form that ComfyUI's users hold of a 16-bit DiT.
pub fn local_names(name: &str) -> Vec<String> {
    let path = Path::new(name);
    let mut names = vec![name.to_owned()];
    if path.extension().is_some_and(|x| x != "safetensors") {
        names.push(path.with_extension("safetensors").to_string_lossy().into_owned());
    }
    names.extend(
        ["_fp16.safetensors", "_bf16.safetensors"]
            .iter()
            .find_map(|end| Some(format!("{}_fp8_scaled.safetensors", name.strip_suffix(end)?))),
    );
    names
}

/// Another form of a file that is not there, beside its place.
pub fn other_form(path: &Path) -> Option<PathBuf> {
    let names = local_names(&path.file_name()?.to_string_lossy());
    names.into_iter().map(|name| path.with_file_name(name)).find(|p| p.is_file())
}

/// Where a manifest file is on this disk, under any of its names.
pub fn find_local(file: &ModelFile, dir: &Path) -> Option<PathBuf> {
    let paths = local_names(&file.name).into_iter().map(|name| dir.join(name));
    paths.into_iter().find(|p| p.metadata().is_ok_and(|m| m.is_file() && m.len() > 0))
}

/// The page of a file, for people.
fn page(file: &ModelFile) -> String {
    format!("https://huggingface.co/{}/blob/main/{}", file.repo, file.path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_templates_has_a_source() {
        for (task, role, name) in [
            ("i2v-A14B", Role::DitHigh, "wan2.2_i2v_high_noise_14B_fp16.safetensors"),
            ("t2v-A14B", Role::LightningLow, "lightning_loras"),
            ("t2v-1.3B", Role::Dit, "wan2.1_t2v_1.3B_bf16.safetensors"),
            ("i2v-14B", Role::Clip, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
        ] {
            let model = ModelConfig::from_toml(registry::text(&format!("models/{task}.toml")).unwrap()).unwrap();
            let said = where_to_get(&model, role);
            assert!(said.contains(name) && said.contains("hub repository"), "{said}");
        }
    }

    #[test]
    fn variants_are_told_apart_and_files_of_two_models_never_share_a_name() {
        let small = lookup("i2v-14B", Role::Dit, Some("480p")).unwrap();
        assert!(small.path.contains("480p"), "{}", small.path);
        let err = lookup("t2v-14B", Role::Clip, None).unwrap_err().to_string();
        assert!(err.contains("no CLIP vision model for t2v-14B") && err.contains("--clip"), "{err}");
        let high = lookup("t2v-A14B", Role::LightningHigh, None).unwrap();
        let other = lookup("i2v-A14B", Role::LightningHigh, None).unwrap();
        assert_ne!(high.name, other.name);
    }

    #[test]
    fn a_converted_file_of_the_same_stem_will_do() {
        let dir = tempfile::tempdir().unwrap();
        let t5 = lookup("t2v-A14B", Role::T5, None).unwrap();
        assert_eq!(find_local(&t5, dir.path()), None);
        std::fs::write(dir.path().join("models_t5_umt5-xxl-enc-bf16.pth"), "").unwrap();
        assert_eq!(find_local(&t5, dir.path()), None, "an empty file is no model");
        let converted = dir.path().join("models_t5_umt5-xxl-enc-bf16.safetensors");
        std::fs::write(&converted, "x").unwrap();
        assert_eq!(find_local(&t5, dir.path()), Some(converted));
        let dit = lookup("t2v-A14B", Role::DitHigh, None).unwrap();
        let scaled = dir.path().join("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors");
        std::fs::write(&scaled, "x").unwrap();
        assert_eq!(find_local(&dit, dir.path()), Some(scaled));
    }
}
