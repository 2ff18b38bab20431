//! Torch files: a zip archive of stored members, of which one is a pickle that names the tensors.

use super::part::Part;
use super::pickle;
use super::source::Place;
use std::collections::BTreeMap;
use std::fs::File;

/// The tensors of a torch archive: a zip of stored (never compressed) members, `…/data.pkl` and `…/data/<n>`.
pub fn tensors(part: &Part, file: usize) -> std::result::Result<Vec<(String, Place)>, String> {
    /// Larger than the table of contents of any model by far.
    const MAX_PICKLE: u64 = 64 << 20;
    let handle = File::open(&part.path).map_err(|e| e.to_string())?;
    let torn = |e: zip::result::ZipError| format!("its archive is cut off or damaged ({e})");
    let mut archive = zip::ZipArchive::new(std::io::BufReader::new(handle)).map_err(torn)?;
    let mut members = BTreeMap::new();
    for i in 0..archive.len() {
        let member = archive.by_index_raw(i).map_err(torn)?;
        let name = member.name().map_err(torn)?.into_owned();
        let start = member.data_start().ok_or("its archive has a member without a place")?;
        let size = member.size();
        if start.checked_add(size).is_none_or(|end| end > part.len) {
            return Err(format!("its member {name} reaches beyond the end: it is cut off or damaged"));
        }
        let stored = member.compression() == zip::CompressionMethod::Stored && member.compressed_size() == size;
        members.insert(name, (start, size, stored));
    }
    let member = |name: &str| match members.get(name) {
        None => Err(format!("its archive lacks {name}")),
        Some((.., false)) => Err(format!("its member {name} is compressed, which torch never does")),
        Some((start, size, true)) => Ok((*start, *size)),
    };
    let pickles: Vec<&String> = members.keys().filter(|n| *n == "data.pkl" || n.ends_with("/data.pkl")).collect();
    let [name] = pickles.as_slice() else {
        return Err(match pickles.len() {
            0 => "it is a zip archive, but not one that torch wrote (no data.pkl)".into(),
            n => format!("its archive holds {n} files data.pkl"),
        });
    };
    let root = name.strip_suffix("data.pkl").unwrap_or("");
    if members.contains_key(&format!("{root}constants.pkl")) {
        return Err("it is a TorchScript program, not a table of tensors".into());
    }
    let read = |start: u64, size: u64| {
        let mut bytes = vec![0u8; size as usize];
        part.read_at(&mut bytes, start).map_err(|e| e.to_string()).map(|()| bytes)
    };
    if let Ok((start, size)) = member(&format!("{root}byteorder")) {
        if size < 16 && read(start, size)?.starts_with(b"big") {
            return Err("its numbers are big-endian".into());
        }
    }
    let (start, size) = member(name)?;
    if size > MAX_PICKLE {
        return Err(format!("its data.pkl has {size} bytes, more than {MAX_PICKLE}"));
    }
    let mut places = BTreeMap::new();
    for t in pickle::tensors(&read(start, size)?)? {
        let (start, size) = member(&format!("{root}data/{}", t.storage))?;
        let place = place_of(&t, file, start, size).map_err(|e| format!("{}: {e}", t.name))?;
        places.insert(t.name, place);
    }
    Ok(places.into_iter().collect())
}

/// Checks a torch tensor against its storage of `size` bytes at `start`.
fn place_of(t: &pickle::PthTensor, file: usize, start: u64, size: u64) -> std::result::Result<Place, String> {
    let width = t.dtype.bitsize() as u64 / 8;
    let overflow =
        || format!("shape {:?} with strides {:?} does not fit its storage of {size} bytes", t.shape, t.stride);
    let count = t.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d as u64)).ok_or_else(overflow)?;
    // The last element's index; a tensor that repeats elements (stride 0) may not be larger than what it repeats.
    let last =
        t.shape.iter().zip(&t.stride).try_fold(t.offset as u64, |at, (d, s)| {
            at.checked_add((*d as u64).saturating_sub(1).checked_mul(*s as u64)?)
        });
    let elements = size / width;
    if count > elements || (count > 0 && last.is_none_or(|l| l >= elements)) {
        return Err(overflow());
    }
    let mut dense = Vec::with_capacity(t.shape.len());
    let mut step = 1usize;
    for d in t.shape.iter().rev() {
        dense.push(step);
        step = step.saturating_mul(*d);
    }
    dense.reverse();
    let row_major = count == 0 || t.shape.iter().zip(t.stride.iter().zip(&dense)).all(|(d, (s, w))| *d == 1 || s == w);
    Ok(Place {
        file,
        start: if count == 0 { start } else { start + t.offset as u64 * width },
        dtype: t.dtype,
        shape: t.shape.clone(),
        stride: (!row_major).then(|| t.stride.clone()),
    })
}
