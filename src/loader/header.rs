//! The header of a safetensors file, checked before a byte of data is touched.
//!
//! A file from the network may be torn, truncated or made to hurt: every number is checked against the size of the
//! file, so nothing later can read outside of it or allocate more than it holds.

use safetensors::Dtype;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Larger headers are refused, as by every other reader of this format.
pub const MAX_HEADER: u64 = 100_000_000;

/// Where one tensor lies: `start..end` counts from the first byte of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub start: u64,
    pub end: u64,
}

#[derive(Debug, Default)]
pub struct Header {
    pub tensors: BTreeMap<String, Region>,
    pub metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawRegion {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The length field of a file of `file_len` bytes that starts with `first`; `Err` says why it is no safetensors file.
pub fn header_len(first: [u8; 8], file_len: u64) -> Result<u64, String> {
    let n = u64::from_le_bytes(first);
    if n > MAX_HEADER {
        return Err(format!("its header claims {n} bytes; no more than {MAX_HEADER} are allowed"));
    }
    if n < 2 || n + 8 > file_len {
        return Err(format!("its header claims {n} bytes, the file has {file_len}: it is cut off or damaged"));
    }
    Ok(n)
}

/// Parses the JSON text of the header; `file_len` is the size of the whole file.
pub fn parse(text: &[u8], file_len: u64) -> Result<Header, String> {
    let text = std::str::from_utf8(text).map_err(|e| format!("its header is not UTF-8 text ({e})"))?;
    let raw: BTreeMap<String, serde_json::Value> =
        serde_json::from_str(text).map_err(|e| format!("its header is not valid JSON ({e})"))?;
    let body = 8 + text.len() as u64;
    let room = file_len - body;
    let mut header = Header::default();
    for (name, value) in raw {
        if name == "__metadata__" {
            header.metadata = serde_json::from_value(value)
                .map_err(|e| format!("the metadata of its header is not a map of strings ({e})"))?;
            continue;
        }
        let region: RawRegion =
            serde_json::from_value(value).map_err(|e| format!("the header entry of {name} does not parse ({e})"))?;
        let dtype: Dtype = serde_json::from_value(serde_json::Value::String(region.dtype.clone()))
            .map_err(|_| format!("{name} has the unknown dtype {}", region.dtype))?;
        let (from, to) = region.data_offsets;
        let bits = region.shape.iter().try_fold(dtype.bitsize() as u64, |n, d| n.checked_mul(*d));
        if from > to || bits.map(|b| b.div_ceil(8)) != Some(to - from) {
            return Err(format!(
                "{name} of shape {:?} and dtype {dtype:?} does not fit its {from}..{to}",
                region.shape
            ));
        }
        if to > room {
            return Err(format!(
                "{name} ends at byte {}, the file has {file_len}: it is cut off",
                body.saturating_add(to)
            ));
        }
        let shape = region.shape.iter().map(|d| *d as usize).collect();
        header.tensors.insert(name, Region { dtype, shape, start: body + from, end: body + to });
    }
    no_gaps(&header, body, file_len)?;
    Ok(header)
}

/// The format wants the tensors back to back from the header to the end of the file.
fn no_gaps(header: &Header, body: u64, file_len: u64) -> Result<(), String> {
    let mut by_start: Vec<(&String, &Region)> = header.tensors.iter().collect();
    by_start.sort_by_key(|(_, r)| (r.start, r.end));
    let mut end = body;
    let mut last = "the header";
    for (name, region) in by_start {
        if region.start < end {
            return Err(format!("{name} overlaps {last}"));
        }
        if region.start > end {
            return Err(format!("{} bytes between {last} and {name} belong to nothing", region.start - end));
        }
        (end, last) = (region.end, name);
    }
    if end != file_len {
        return Err(format!("{} bytes follow its last tensor", file_len - end));
    }
    Ok(())
}
