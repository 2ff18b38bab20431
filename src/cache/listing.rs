//! What lies in a cache directory.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::names::{CacheName, LATENT_SUFFIX, TEXT_SUFFIX};
use crate::data::{Entry, Kind};
use crate::error::UserError;

/// The files of a cache directory that are named like caches, with the stems their names give.
#[derive(Debug, Clone)]
pub(super) struct Listing {
    pub files: BTreeMap<PathBuf, Option<String>>,
    latents_of: HashMap<String, Vec<PathBuf>>,
}

impl Listing {
    pub fn of(entry: &Entry) -> Result<Self> {
        let dir = &entry.cache_directory;
        let mut listing = Self { files: BTreeMap::new(), latents_of: HashMap::new() };
        let read = match std::fs::read_dir(dir) {
            Ok(read) => read,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(listing),
            Err(e) => {
                return Err(UserError::new(format!("the cache directory {} cannot be read: {e}", dir.display()))
                    .hint("change its permissions, or set another cache_directory in the dataset file")
                    .into())
            }
        };
        for found in read {
            let path = found?.path();
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
            let latents = match entry.kind {
                Kind::Image => CacheName::parse_image(name),
                Kind::Video => CacheName::parse_video(name),
            };
            if let Some(name) = &latents {
                listing.latents_of.entry(name.base().to_string()).or_default().push(path.clone());
            }
            if name.ends_with(LATENT_SUFFIX) || name.ends_with(TEXT_SUFFIX) {
                let parsed = latents.or_else(|| CacheName::parse_text(name));
                listing.files.insert(path, parsed.map(|n| n.base().to_string()));
            }
        }
        listing.latents_of.values_mut().for_each(|paths| paths.sort());
        Ok(listing)
    }

    /// Latent files of a stem, in order of name.
    pub fn of_base(&self, stem: &str) -> impl Iterator<Item = &Path> {
        self.latents_of.get(stem).into_iter().flatten().map(PathBuf::as_path)
    }
}
