//! Which files make up a checkpoint.

use crate::error::UserError;
use crate::fsio;
use anyhow::Result;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The file that `path` means, and every file to open for it.
pub fn find(path: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    if path.is_dir() {
        return in_directory(path);
    }
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if name.ends_with(".index.json") {
        return Ok((path.to_path_buf(), of_index(path)?));
    }
    if let Some((stem, count)) = shard_of(&name) {
        let all: Vec<PathBuf> =
            (1..=count).map(|i| path.with_file_name(format!("{stem}-{i:05}-of-{count:05}.safetensors"))).collect();
        return Ok((path.to_path_buf(), present(path, all)?));
    }
    Ok((path.to_path_buf(), vec![path.to_path_buf()]))
}

/// `x-00002-of-00006.safetensors` -> ("x", 6).
fn shard_of(name: &str) -> Option<(&str, usize)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, index) = rest.rsplit_once('-')?;
    let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    let (index, count) =
        (digits(index).then(|| index.parse::<usize>())?.ok()?, digits(count).then(|| count.parse::<usize>())?.ok()?);
    (1..=count).contains(&index).then_some((stem, count))
}

/// All files, or an error that lists the missing ones.
fn present(path: &Path, files: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    let missing: Vec<String> = files
        .iter()
        .filter(|f| !f.is_file())
        .map(|f| f.file_name().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    if missing.is_empty() {
        return Ok(files);
    }
    let shown = missing.iter().take(6).cloned().collect::<Vec<_>>().join(", ");
    let more = if missing.len() > 6 { format!(" and {} more", missing.len() - 6) } else { String::new() };
    Err(UserError::new(format!(
        "{} is one of {} parts, but {shown}{more} {} missing beside it",
        path.display(),
        files.len(),
        if missing.len() == 1 { "is" } else { "are" }
    ))
    .hint("download the missing parts into the same directory")
    .into())
}

fn of_index(path: &Path) -> Result<Vec<PathBuf>> {
    let bad = |why: String| {
        UserError::new(format!("{} cannot be loaded: {why}", path.display()))
            .hint("name one of the .safetensors parts instead, or download the index again")
    };
    let text = std::fs::read(path).map_err(|e| fsio::explain(e, path))?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| bad(format!("it is not valid JSON ({e})")))?;
    let map = json.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| bad("it has no weight_map".into()))?;
    let mut names = BTreeSet::new();
    for value in map.values() {
        let name = value.as_str().ok_or_else(|| bad("its weight_map is not a map of file names".into()))?;
        // Parts lie beside their index; a path that leads elsewhere is none of ours to open.
        if Path::new(name).components().count() != 1 || name.contains("..") {
            return Err(bad(format!("it names {name}, which is not in its own directory")).into());
        }
        names.insert(name.to_owned());
    }
    if names.is_empty() {
        return Err(bad("its weight_map is empty".into()).into());
    }
    present(path, names.into_iter().map(|n| path.with_file_name(n)).collect())
}

fn in_directory(dir: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    let entries = std::fs::read_dir(dir).map_err(|e| fsio::explain(e, dir))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
    files.sort();
    let named = |p: &PathBuf, end: &str| p.file_name().is_some_and(|n| n.to_string_lossy().ends_with(end));
    let indexes: Vec<&PathBuf> = files.iter().filter(|p| named(p, ".safetensors.index.json")).collect();
    if let [index] = indexes.as_slice() {
        return Ok(((*index).clone(), of_index(index)?));
    }
    let models: Vec<&PathBuf> = files.iter().filter(|p| named(p, ".safetensors")).collect();
    let mut sets: BTreeSet<String> = BTreeSet::new();
    for m in &models {
        let name = m.file_name().unwrap_or_default().to_string_lossy().into_owned();
        sets.insert(shard_of(&name).map_or(name.clone(), |(stem, n)| format!("{stem} in {n} parts")));
    }
    match (sets.len(), models.first()) {
        (1, Some(first)) => find(first),
        (0, _) | (_, None) => {
            Err(UserError::new(format!("{} is a directory without a .safetensors file", dir.display()))
                .hint("name the model file itself")
                .into())
        }
        (n, _) => Err(UserError::new(format!(
            "{} is a directory with {n} models: {}",
            dir.display(),
            sets.into_iter().collect::<Vec<_>>().join(", ")
        ))
        .hint("name the one that is meant")
        .into()),
    }
}
