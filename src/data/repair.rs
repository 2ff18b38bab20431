//! Puts right in a dataset file what has one right answer, and keeps everything else as it stands, comments included.

use std::path::{Path, PathBuf};

use anyhow::Result;
use toml_edit::{value, Array, DocumentMut, Item, Key, Table};

use super::config::{find, known_keys, plain};
use super::{bucket, folder, frames};
use crate::error::{nearest, UserError};

/// The repaired text, and one sentence for each change:
/// misspelled keys; a missing or shared `cache_directory`; sizes that are no multiples of 16 while buckets are off;
/// lengths that are not 4n+1 frames; a caption extension without its dot.
///
/// Errors: a JSON file, and text that is no TOML.
pub fn repair(text: &str, path: &Path) -> Result<(String, Vec<String>)> {
    if path.extension().is_some_and(|x| x.eq_ignore_ascii_case("json")) {
        let what = format!("{} is JSON: --fix rewrites TOML files only", path.display());
        return Err(UserError::new(what).hint("correct it by hand, or write it as TOML").into());
    }
    let mut document: DocumentMut = text.parse().map_err(|e: toml_edit::TomlError| {
        let what = format!("{} is no TOML file: {}", path.display(), e.message().replace('\n', ", "));
        UserError::usage(what).hint("correct the line; `wan-train check` names it")
    })?;
    let mut changes = Vec::new();
    let buckets = document.get("general").and_then(|g| g.get("enable_bucket")).and_then(Item::as_bool).unwrap_or(false);
    if let Some(general) = document.get_mut("general").and_then(Item::as_table_mut) {
        rename_keys(general, "[general]", &mut changes);
        captions(general, "[general]", &mut changes);
        resolution(general, "[general]", buckets, &mut changes);
    }
    let mut caches: Vec<PathBuf> = Vec::new();
    if let Some(list) = document.get_mut("datasets").and_then(Item::as_array_of_tables_mut) {
        for (i, table) in list.iter_mut().enumerate() {
            let name = super::dataset_name(i);
            rename_keys(table, &name, &mut changes);
            captions(table, &name, &mut changes);
            let own = table.get("enable_bucket").and_then(Item::as_bool).unwrap_or(buckets);
            resolution(table, &name, own, &mut changes);
            targets(table, &name, &mut changes);
            cache(table, &name, path, &mut caches, &mut changes);
        }
    }
    Ok((document.to_string(), changes))
}

fn rename_keys(table: &mut Table, name: &str, changes: &mut Vec<String>) {
    let keys: Vec<String> = table.iter().map(|(key, _)| key.to_owned()).collect();
    let known = |key: &str| known_keys().any(|k| k == key);
    let better = |old: &String| -> Option<&'static str> {
        nearest(old, known_keys()).filter(|new| !known(old) && !table.contains_key(new))
    };
    let new_names: Vec<Option<&str>> = keys.iter().map(better).collect();
    if new_names.iter().all(Option::is_none) {
        return;
    }
    // Taken out and put back one by one, so that each stays at its place, with the comments that stand around it.
    let mut fields = Vec::new();
    for (old, new) in keys.iter().zip(new_names) {
        let Some((mut key, item)) = table.remove_entry(old) else { continue };
        if let Some(new) = new {
            key = Key::new(new).with_leaf_decor(key.leaf_decor().clone());
            changes.push(format!("{name}: `{old}` is spelled `{new}`"));
        }
        fields.push((key, item));
    }
    fields.into_iter().for_each(|(key, item)| drop(table.insert_formatted(&key, item)));
}

fn captions(table: &mut Table, name: &str, changes: &mut Vec<String>) {
    let Some(ending) = table.get("caption_extension").and_then(Item::as_str).map(str::to_owned) else { return };
    if !ending.is_empty() && !ending.contains(['.', '/', '\\']) {
        set(table, "caption_extension", value(format!(".{ending}")));
        changes.push(format!("{name}: caption_extension \"{ending}\" is \".{ending}\""));
    }
}

fn resolution(table: &mut Table, name: &str, buckets: bool, changes: &mut Vec<String>) {
    if buckets {
        return;
    }
    let given = table.get("resolution").and_then(Item::as_array).map(integers).unwrap_or_default();
    let [Some(w), Some(h)] = given[..] else { return };
    let floor = |x: i64| i64::from(bucket::floor_step(u32::try_from(x).unwrap_or_default()));
    let (new_w, new_h) = (floor(w), floor(h));
    if (new_w, new_h) != (w, h) && new_w > 0 && new_h > 0 {
        set(table, "resolution", value(Array::from_iter([new_w, new_h])));
        changes.push(format!("{name}: resolution [{w}, {h}] becomes [{new_w}, {new_h}], multiples of 16"));
    }
}

fn targets(table: &mut Table, name: &str, changes: &mut Vec<String>) {
    let given = table.get("target_frames").and_then(Item::as_array).map(integers).unwrap_or_default();
    let given: Vec<usize> =
        given.into_iter().flatten().filter_map(|n| usize::try_from(n).ok()).filter(|n| *n > 0).collect();
    if given.is_empty() || given.len() != table["target_frames"].as_array().map_or(0, Array::len) {
        return;
    }
    let rounded = frames::round_targets(&given);
    if given.iter().any(|n| !rounded.contains(n)) {
        set(table, "target_frames", value(Array::from_iter(rounded.iter().map(|n| *n as i64))));
        changes.push(format!("{name}: target_frames {given:?} become {rounded:?}, 4n+1 frames each"));
    }
}

/// Every dataset gets a directory of its own for its caches.
fn cache(table: &mut Table, name: &str, file: &Path, taken: &mut Vec<PathBuf>, changes: &mut Vec<String>) {
    let text = |key: &str| table.get(key).and_then(Item::as_str).map(str::to_owned);
    let media = text("image_directory").or_else(|| text("video_directory"));
    let list = text("image_jsonl_file").or_else(|| text("video_jsonl_file"));
    let wanted = match (text("cache_directory"), &media, &list) {
        (Some(given), ..) => given,
        // What is cached in the media's own directory stays in use there.
        (None, Some(media), _) if has_caches(file, media) => media.clone(),
        (None, Some(media), _) => format!("{}/cache", media.trim_end_matches('/')),
        (None, None, Some(list)) => Path::new(list).with_extension("cache").to_string_lossy().into_owned(),
        (None, None, None) => return,
    };
    let place = |written: &str| plain(&find(file, written).unwrap_or_else(|| PathBuf::from(written)));
    let free = std::iter::once(wanted.clone())
        .chain((2..).map(|n| format!("{}-{n}", wanted.trim_end_matches('/'))))
        .find(|written| !taken.contains(&place(written)))
        .unwrap_or_else(|| wanted.clone());
    taken.push(place(&free));
    let before = text("cache_directory");
    let is_default = before.is_none() && media.as_ref() == Some(&free);
    if before.as_ref() != Some(&free) && !is_default {
        set(table, "cache_directory", value(free.clone()));
        let why = if before.is_some() { "another dataset has the same" } else { "there was none" };
        changes.push(format!("{name}: cache_directory = \"{free}\" ({why})"));
    }
}

fn has_caches(file: &Path, media: &str) -> bool {
    let found = find(file, media).and_then(|dir| folder::list(&dir).ok()).unwrap_or_default();
    found
        .iter()
        .any(|p| folder::name(p).ends_with("_wan.safetensors") || folder::name(p).ends_with("_wan_te.safetensors"))
}

fn integers(array: &Array) -> Vec<Option<i64>> {
    array.iter().map(|v| v.as_integer()).collect()
}

/// Sets a key and keeps what stands around an old value: blanks, and the comment behind it.
fn set(table: &mut Table, key: &str, mut new: Item) {
    let old = table.get(key).and_then(Item::as_value).map(|v| v.decor().clone());
    if let (Some(old), Some(new)) = (old, new.as_value_mut()) {
        *new.decor_mut() = old;
    }
    match table.get_mut(key) {
        Some(item) => *item = new,
        None => drop(table.insert(key, new)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixed(text: &str) -> (String, Vec<String>) {
        repair(text, Path::new("set.toml")).unwrap()
    }

    #[test]
    fn faults_with_one_right_answer_are_put_right_and_comments_stay() {
        let text = "# mine\n[general]\nresolution = [833, 480] # wide\ncaption_extension = \"txt\"\n\n# clips\n[[datasets]]\n# here they are\nvideo_directry = \"clips\"\ntarget_frames = [1, 24] # short\n\n[[datasets]]\nimage_jsonl_file = \"a/list.jsonl\"\n\n[[datasets]]\nimage_directory = \"pictures\"\ncache_directory = \"clips/cache\"\n";
        let (now, changes) = fixed(text);
        assert_eq!(
            now,
            "# mine\n[general]\nresolution = [832, 480] # wide\ncaption_extension = \".txt\"\n\n# clips\n[[datasets]]\n# here they are\nvideo_directory = \"clips\"\ntarget_frames = [1, 21] # short\ncache_directory = \"clips/cache\"\n\n[[datasets]]\nimage_jsonl_file = \"a/list.jsonl\"\ncache_directory = \"a/list.cache\"\n\n[[datasets]]\nimage_directory = \"pictures\"\ncache_directory = \"clips/cache-2\"\n"
        );
        assert_eq!(changes.len(), 7, "{changes:?}");
        let (again, none) = fixed(&now);
        assert!(again == now && none.is_empty(), "{none:?}");
    }

    #[test]
    fn what_has_no_one_answer_stays() {
        let text = "[general]\nenable_bucket = true\nresolution = [833, 480]\nzzz = 1\n[[datasets]]\nbatch_size = 2\n";
        assert_eq!(fixed(text), (text.to_string(), Vec::new()));
        assert!(repair("{}", Path::new("set.json")).unwrap_err().to_string().contains("JSON"));
        assert!(repair("[general", Path::new("set.toml")).is_err());
    }
}
