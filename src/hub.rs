//! Where the published weights are on the Hugging Face hub, from the manifest in `configs/models/*.toml`.

use wan_models::arch::{ModelConfig, ModelFile, Role};

/// The manifest's file for a role; for the DiT of a task with variants, the first.
pub fn file(model: &ModelConfig, role: Role) -> Option<&ModelFile> {
    model.file(role, None)
}

/// A sentence that says where to get the file of a role, for the hint of an error.
pub fn where_to_get(model: &ModelConfig, role: Role) -> String {
    let option = match role {
        Role::Dit | Role::DitHigh | Role::DitLow => "dit",
        Role::Vae => "vae",
        Role::T5 => "t5",
        Role::Clip => "clip",
        Role::LightningHigh | Role::LightningLow => "base_weights",
    };
    match file(model, role) {
        Some(f) => format!(
            "download {} from the hub repository {} and save it as <base_dir>/{}/{}, or give its path with --{option}",
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::registry;

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
}
