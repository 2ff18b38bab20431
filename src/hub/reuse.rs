//! Model files that are on this machine already: in the hub's own cache, in a ComfyUI installation. They are linked, or
//! copied where links do not work; the original is never touched.

use std::path::{Path, PathBuf};

use anyhow::Result;
use wan_models::arch::{ModelFile, Role};

use super::{fetch::Remote, local_names};
use crate::fsio;

/// A file that can stand for one of the manifest, and the name that it should get here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lent {
    pub from: PathBuf,
    pub name: String,
}

/// How a lent file came here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    Linked,
    Copied,
}

/// A file in the hub's cache (`HF_HOME`, `HF_HUB_CACHE`), as other programs have left it. With `remote`, only one of the
/// announced size and hash.
pub fn from_hub_cache(file: &ModelFile, remote: Option<&Remote>) -> Option<Lent> {
    let repo = hf_hub::resolve_cache_dir().join(format!("models--{}", file.repo.replace('/', "--")));
    let snapshots = std::fs::read_dir(repo.join("snapshots")).ok()?;
    let mut found: Vec<PathBuf> =
        snapshots.flatten().map(|s| s.path().join(&file.path)).filter(|p| p.is_file()).collect();
    found.sort();
    let fits = |path: &Path| {
        let Some(remote) = remote else { return true };
        // The cache names its files by their hash.
        let name = path.canonicalize().ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
        let same_hash = remote.sha256.as_ref().is_none_or(|hash| name.as_ref() == Some(hash));
        same_hash && path.metadata().is_ok_and(|m| m.len() == remote.size)
    };
    found.into_iter().find(|path| fits(path)).map(|from| Lent { from, name: file.name.clone() })
}

/// Where ComfyUI keeps files of a role, and under which names, the best first.
fn comfy_places(file: &ModelFile) -> (&'static [&'static str], Vec<(String, String)>) {
    let stem = |name: &str| Path::new(&file.name).with_file_name(name).with_extension("safetensors");
    let ours = || stem(&file.name).to_string_lossy().into_owned();
    match file.role {
        Role::Dit | Role::DitHigh | Role::DitLow => {
            let names = local_names(&file.name).into_iter().map(|name| (name.clone(), name)).collect();
            (&["diffusion_models", "unet"], names)
        }
        Role::Vae => (&["vae"], vec![(file.name.clone(), file.name.clone())]),
        Role::T5 => {
            let names = ["umt5-xxl-enc-bf16.safetensors", "umt5_xxl_fp16.safetensors", "umt5_xxl_bf16.safetensors"];
            (&["text_encoders", "clip"], names.iter().map(|name| ((*name).to_owned(), ours())).collect())
        }
        Role::Clip => (&["clip_vision"], vec![("clip_vision_h.safetensors".into(), ours())]),
        // Its users name them as they like.
        Role::LightningHigh | Role::LightningLow => (&[], Vec::new()),
    }
}

/// What a ComfyUI installation (its root, or its `models` folder) can lend for a file. Subfolders are looked into.
pub fn from_comfyui(file: &ModelFile, comfyui: &Path) -> Option<Lent> {
    let (folders, names) = comfy_places(file);
    let roots = [comfyui.join("models"), comfyui.to_path_buf()];
    let all: Vec<PathBuf> = roots
        .iter()
        .flat_map(|root| folders.iter().map(|f| root.join(f)))
        .flat_map(|dir| files_below(&dir, 3))
        .collect();
    names.into_iter().find_map(|(theirs, ours)| {
        let from = all.iter().find(|p| p.file_name().is_some_and(|n| *n == *theirs))?;
        from.metadata().is_ok_and(|m| m.len() > 0).then(|| Lent { from: from.clone(), name: ours })
    })
}

fn files_below(dir: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_file() {
            found.push(path);
        } else if depth > 0 && path.is_dir() {
            found.extend(files_below(&path, depth - 1));
        }
    }
    found.sort();
    found
}

/// Puts a lent file under its name in `dir`: a hard link, else a symbolic one, else a copy.
pub fn place(lent: &Lent, dir: &Path) -> Result<Placed> {
    let to = dir.join(&lent.name);
    if let Some(parent) = to.parent() {
        fsio::create_dir(parent)?;
    }
    let from = lent.from.canonicalize().map_err(|e| fsio::explain(e, &lent.from))?;
    if std::fs::hard_link(&from, &to).is_ok() {
        return Ok(Placed::Linked);
    }
    #[cfg(unix)]
    if std::os::unix::fs::symlink(&from, &to).is_ok() {
        return Ok(Placed::Linked);
    }
    let size = from.metadata().map_err(|e| fsio::explain(e, &from))?.len();
    fsio::require_space(dir, size, &format!("the copy of {}", from.display()))?;
    let mut file = std::fs::File::open(&from).map_err(|e| fsio::explain(e, &from))?;
    fsio::write_atomic(&to, |out| {
        std::io::copy(&mut file, out)?;
        Ok(())
    })?;
    Ok(Placed::Copied)
}
