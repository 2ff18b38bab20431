//! Model files and the Hugging Face hub: which file a task needs, whether it is here, and how to get it.

use crate::config::registry;
use crate::error::UserError;
use crate::fsio;
use anyhow::{Context, Result};
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::{HFClientBuilder, HFError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use wan_models::arch::{ModelConfig, ModelFile, Role};

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

/// A sentence that says where to get the file of a role, for the hint of an error.
pub fn where_to_get(model: &ModelConfig, role: Role) -> String {
    let option = role_option(role);
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

/// Where a manifest file is on this disk: under its own name, or a `.safetensors` of the same stem (people convert
/// `.pth` files), in `models_dir`.
pub fn find_local(file: &ModelFile, models_dir: &Path) -> Option<PathBuf> {
    let path = models_dir.join(&file.name);
    [path.clone(), path.with_extension("safetensors")].into_iter().find(|p| p.metadata().is_ok_and(|m| m.len() > 0))
}

/// The page of a file, for people.
fn page(file: &ModelFile) -> String {
    format!("https://huggingface.co/{}/blob/main/{}", file.repo, file.path)
}

/// Access to the hub.
#[derive(Debug, Clone, Default)]
pub struct Hub {
    /// Another server than huggingface.co (`HF_ENDPOINT`).
    endpoint: Option<String>,
    /// No network (`HF_HUB_OFFLINE`).
    offline: bool,
}

impl Hub {
    /// As the environment says (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`).
    pub fn from_env() -> Self {
        let offline = std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| !matches!(v.as_str(), "" | "0" | "false" | "no"));
        Self { endpoint: None, offline }
    }

    /// A server of one's own; for tests and mirrors.
    pub fn at(endpoint: impl Into<String>) -> Self {
        Self { endpoint: Some(endpoint.into()), offline: false }
    }

    /// Without a network: files that are not here are an error.
    pub fn offline() -> Self {
        Self { endpoint: None, offline: true }
    }

    /// The local path of a manifest file, downloaded into `models_dir` if it is not there yet. The download lands under
    /// a temporary directory and gets its name when its size is right. `progress` gets bytes done and in all.
    ///
    /// Errors: offline, unreachable, refused (a token is needed), absent, incomplete, disk full; each names the file, its
    /// page, and where to put it by hand.
    pub fn ensure(
        &self,
        file: &ModelFile,
        models_dir: &Path,
        progress: impl Fn(u64, u64) + Send + Sync + 'static,
    ) -> Result<PathBuf> {
        if let Some(path) = find_local(file, models_dir) {
            return Ok(path);
        }
        let target = models_dir.join(&file.name);
        let by_hand = format!("download {} by hand and save it as {}", page(file), target.display());
        let fail = |why: String| UserError::new(format!("{} could not be downloaded: {why}", file.path)).hint(&by_hand);
        if self.offline {
            return Err(fail("HF_HUB_OFFLINE is set".into()).into());
        }
        let staging = models_dir.join(".download");
        fsio::ensure_writable_dir(&staging)?;
        let size = Arc::new(AtomicU64::new(0));
        let got = self.download(file, &staging, Watch { size: size.clone(), report: Box::new(progress) });
        let path = match got {
            Ok(path) => path,
            Err(e) => {
                let _ = std::fs::remove_dir_all(&staging);
                return Err(fail(words(&e)).into());
            }
        };
        let (have, want) = (path.metadata().map(|m| m.len()).unwrap_or(0), size.load(Ordering::Relaxed));
        if have == 0 || (want > 0 && have != want) {
            let _ = std::fs::remove_dir_all(&staging);
            return Err(fail(format!("{have} of {want} bytes arrived")).into());
        }
        if let Some(parent) = target.parent() {
            fsio::create_dir(parent)?;
        }
        std::fs::rename(&path, &target).map_err(|e| fsio::explain(e, &target))?;
        let _ = std::fs::remove_dir_all(&staging);
        Ok(target)
    }

    fn download(&self, file: &ModelFile, staging: &Path, watch: Watch) -> std::result::Result<PathBuf, HFError> {
        let mut builder = HFClientBuilder::new().retry_max_attempts(2);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.endpoint(endpoint.clone());
        }
        let client = builder.build_sync()?;
        let (owner, name) = file.repo.split_once('/').unwrap_or(("", &file.repo));
        let repo = client.model(owner, name);
        repo.download_file().filename(file.path.clone()).local_dir(staging.to_path_buf()).progress(watch).send()
    }
}

/// Remembers the announced size and passes progress on.
struct Watch {
    size: Arc<AtomicU64>,
    report: Box<dyn Fn(u64, u64) + Send + Sync>,
}

impl ProgressHandler for Watch {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        match event {
            DownloadEvent::Start { total_bytes, .. } => {
                self.size.store(*total_bytes, Ordering::Relaxed);
                (self.report)(0, *total_bytes);
            }
            DownloadEvent::Progress { files } => {
                files.iter().for_each(|f| (self.report)(f.bytes_completed, f.total_bytes))
            }
            DownloadEvent::AggregateProgress { bytes_completed, total_bytes, .. } => {
                (self.report)(*bytes_completed, *total_bytes)
            }
            DownloadEvent::Complete => {}
        }
    }
}

/// One clause for what went wrong.
fn words(e: &HFError) -> String {
    match e {
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => {
            "the hub wants a login for it (accept its licence on its page and set HF_TOKEN)".into()
        }
        HFError::RepoNotFound { .. } | HFError::EntryNotFound { .. } | HFError::RevisionNotFound { .. } => {
            "the hub has no such file".into()
        }
        other => {
            // The innermost cause says most ("connection refused"); the layers above repeat the address.
            let mut cause: &dyn std::error::Error = other;
            while let Some(source) = cause.source() {
                cause = source;
            }
            format!("the hub cannot be reached ({cause})")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    fn file() -> ModelFile {
        lookup("i2v-A14B", Role::Vae, None).unwrap()
    }

    fn message(r: Result<PathBuf>) -> String {
        r.unwrap_err().downcast::<UserError>().expect("a user error").to_string()
    }

    /// Serves one repository file: the given status and body, with `claimed` as its announced size.
    fn server(status: &'static str, body: &'static [u8], claimed: usize) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut lines = BufReader::new(&stream).lines().map_while(|l| l.ok());
                let request = lines.next().unwrap_or_default();
                lines.take_while(|l| !l.is_empty()).for_each(drop);
                let known = request.contains(
                    "/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/vae/wan_2.1_vae.safetensors",
                );
                let status = if known { status } else { "404 Not Found" };
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nX-Repo-Commit: 0123456789012345678901234567890123456789\r\nETag: \"x\"\r\nX-Linked-Size: {claimed}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                let _ = (&stream).write_all(head.as_bytes());
                if !request.starts_with("HEAD") {
                    let _ = (&stream).write_all(body);
                }
            }
        });
        format!("http://{address}")
    }

    #[test]
    fn a_file_is_downloaded_once_under_its_local_name() {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::at(server("200 OK", b"weights", 7));
        let seen = Arc::new(AtomicU64::new(0));
        let total = seen.clone();
        let path = hub.ensure(&file(), dir.path(), move |_, all| total.store(all, Ordering::Relaxed)).unwrap();
        assert_eq!(path, dir.path().join("wan_2.1_vae.safetensors"));
        assert_eq!(std::fs::read(&path).unwrap(), b"weights");
        assert_eq!(seen.load(Ordering::Relaxed), 7);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
        // It is here now: no network is needed.
        assert_eq!(Hub::offline().ensure(&file(), dir.path(), |_, _| ()).unwrap(), path);
    }

    #[test]
    fn each_way_of_failing_names_the_file_and_the_way_by_hand() {
        let dir = tempfile::tempdir().unwrap();
        let try_at = |hub: Hub| message(hub.ensure(&file(), dir.path(), |_, _| ()));
        for (hub, words) in [
            (Hub::offline(), "HF_HUB_OFFLINE is set"),
            (Hub::at("http://127.0.0.1:1"), "the hub cannot be reached"),
            (Hub::at(server("404 Not Found", b"", 0)), "the hub has no such file"),
            (Hub::at(server("401 Unauthorized", b"", 0)), "set HF_TOKEN"),
            (Hub::at(server("200 OK", b"half", 4000)), "4 of 4000 bytes arrived"),
        ] {
            let err = try_at(hub);
            assert!(err.contains(words), "{words}: {err}");
            assert!(
                err.contains("https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/blob/main/split_files/vae"),
                "{err}"
            );
            assert!(err.contains(&dir.path().join("wan_2.1_vae.safetensors").display().to_string()), "{err}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{words}: something was left behind");
        }
    }

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
    }
}
