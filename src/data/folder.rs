//! What lies in a directory.

use std::cmp::Ordering;
use std::path::{Path, PathBuf};

use anyhow::{bail, Result};

use super::picture;

/// The pictures of a directory of frames.
pub struct FrameFolder {
    pub pictures: Vec<PathBuf>,
    /// Numbers decided the order, where letters alone would have put 10 before 2.
    pub by_number: bool,
}

/// The frames of a directory, in order: by the numbers in their names, or (`compat`) letter by letter.
pub fn frames(directory: &Path, compat: bool) -> Result<FrameFolder> {
    let extensions = match compat {
        true => &picture::EXTENSIONS[..picture::OLD_EXTENSIONS],
        false => picture::EXTENSIONS.as_slice(),
    };
    let mut pictures: Vec<PathBuf> =
        list(directory)?.into_iter().filter(|p| !is_hidden(p) && has_extension(p, extensions)).collect();
    if pictures.is_empty() {
        bail!("the directory holds no pictures");
    }
    let letters = pictures.clone();
    if !compat {
        pictures.sort_by(|a, b| natural(&name(a), &name(b)));
    }
    let by_number = pictures != letters;
    Ok(FrameFolder { pictures, by_number })
}

/// Everything in a directory, sorted by name.
pub fn list(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut all = std::fs::read_dir(directory)?.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>()?;
    all.sort();
    Ok(all)
}

/// The file name as text (empty where it has none).
pub fn name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// File name without its last extension.
pub fn stem(path: &Path) -> String {
    path.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

pub fn is_hidden(path: &Path) -> bool {
    name(path).starts_with('.')
}

pub fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|own| extensions.iter().any(|e| own.eq_ignore_ascii_case(e)))
}

/// Order in which runs of digits count as numbers: `f2` before `f10`.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a_rest, mut b_rest) = (a, b);
    loop {
        let (Some(x), Some(y)) = (a_rest.chars().next(), b_rest.chars().next()) else {
            return a_rest.len().cmp(&b_rest.len()).then_with(|| a.cmp(b));
        };
        if x.is_ascii_digit() && y.is_ascii_digit() {
            let (m, n) = (digits(&mut a_rest), digits(&mut b_rest));
            let order = m.len().cmp(&n.len()).then_with(|| m.cmp(n));
            if order != Ordering::Equal {
                return order;
            }
        } else if x != y {
            return x.cmp(&y);
        } else {
            a_rest = &a_rest[x.len_utf8()..];
            b_rest = &b_rest[y.len_utf8()..];
        }
    }
}

/// Takes the leading digits off and returns them without leading zeros.
fn digits<'a>(rest: &mut &'a str) -> &'a str {
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (run, tail) = rest.split_at(end);
    *rest = tail;
    run.trim_start_matches('0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_order_frames() {
        let mut names = ["f10.png", "f2.png", "f1.png", "f02b.png", "e9.png", "f.png"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["e9.png", "f.png", "f1.png", "f2.png", "f02b.png", "f10.png"]);
    }
}
