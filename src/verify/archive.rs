//! The golden subset inside the program: a zstd file of names and contents, its bytes split into planes.
//!
//! Layout before compression: for each file `name length (u32), data length (u64), name, data`, little endian. The data
//! of safetensors files is stored as two planes, even bytes then odd ones: the exponents of 16-bit weights, which
//! hardly vary, then lie together, and compress.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// Made by the ignored test `make_the_embedded_subset` of `tests/verify.rs`.
const EMBEDDED: &[u8] = include_bytes!("../../configs/golden/subset.bin.zst");

/// The files of the embedded subset.
pub fn embedded() -> Result<BTreeMap<String, Vec<u8>>> {
    unpack(EMBEDDED).context("the embedded golden subset is damaged")
}

/// The archive of `files`.
pub fn pack(files: &BTreeMap<String, Vec<u8>>) -> Result<Vec<u8>> {
    let mut raw = Vec::new();
    for (name, data) in files {
        raw.extend((name.len() as u32).to_le_bytes());
        raw.extend((data.len() as u64).to_le_bytes());
        raw.extend(name.as_bytes());
        match in_planes(name) {
            true => {
                raw.extend(data.iter().step_by(2));
                raw.extend(data.iter().skip(1).step_by(2));
            }
            false => raw.extend(data),
        }
    }
    Ok(zstd::encode_all(&raw[..], 19)?)
}

fn unpack(packed: &[u8]) -> Result<BTreeMap<String, Vec<u8>>> {
    let raw = zstd::decode_all(packed)?;
    let mut rest = &raw[..];
    let mut take = |len: usize| -> Result<&[u8]> {
        let (taken, after) = rest.split_at_checked(len).context("it ends in the middle of a file")?;
        rest = after;
        Ok(taken)
    };
    let mut files = BTreeMap::new();
    let mut left = raw.len();
    while left > 0 {
        let name_len = u32::from_le_bytes(take(4)?.try_into()?) as usize;
        let len = usize::try_from(u64::from_le_bytes(take(8)?.try_into()?))?;
        let name = String::from_utf8(take(name_len)?.to_vec())?;
        let stored = take(len)?;
        let data = match in_planes(&name) {
            true => {
                let (even, odd) = stored.split_at(len.div_ceil(2));
                (0..len).map(|i| if i % 2 == 0 { even[i / 2] } else { odd[i / 2] }).collect()
            }
            false => stored.to_vec(),
        };
        files.insert(name, data);
        left -= 12 + name_len + len;
    }
    Ok(files)
}

fn in_planes(name: &str) -> bool {
    name.ends_with(".safetensors")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_out_again() {
        let files: BTreeMap<String, Vec<u8>> = [
            ("a.json".to_string(), b"{}".to_vec()),
            ("b.safetensors".to_string(), (0..=255).collect()),
            ("odd.safetensors".to_string(), vec![1, 2, 3]),
            ("empty.safetensors".to_string(), vec![]),
        ]
        .into();
        let packed = pack(&files).unwrap();
        assert_eq!(unpack(&packed).unwrap(), files);
        assert!(unpack(&packed[..packed.len() - 3]).is_err());
    }
}
