//! Torch files made by hand: a zip of stored members, one of them a pickle of protocol 2.

use std::io::Write;

/// One tensor to put into a torch file; `data` is the whole storage.
pub struct Stored {
    pub name: &'static str,
    /// `FloatStorage`, `HalfStorage`, …
    pub class: &'static str,
    pub data: Vec<u8>,
    pub offset: u16,
    pub shape: Vec<u16>,
    pub stride: Vec<u16>,
}

impl Stored {
    pub fn f32(name: &'static str, shape: &[u16], values: &[f32]) -> Self {
        let mut stride = vec![1u16; shape.len()];
        for i in (1..shape.len()).rev() {
            stride[i - 1] = stride[i] * shape[i];
        }
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name, class: "FloatStorage", data, offset: 0, shape: shape.to_vec(), stride }
    }
}

/// Opcode `X`: a string with its length.
pub fn text(out: &mut Vec<u8>, s: &str) {
    out.push(b'X');
    out.extend((s.len() as u32).to_le_bytes());
    out.extend(s.as_bytes());
}

/// Opcode `c`: the name of a global, never looked up here.
pub fn global(out: &mut Vec<u8>, module: &str, name: &str) {
    write!(out, "c{module}\n{name}\n").unwrap();
}

fn tuple_of_ints(out: &mut Vec<u8>, values: &[u16]) {
    out.push(b'('); // mark
    for v in values {
        out.push(b'M'); // 2-byte integer
        out.extend(v.to_le_bytes());
    }
    out.push(b't'); // tuple of all above the mark
}

/// What `torch.save({name: tensor, …})` puts into `data.pkl`.
pub fn pickle(tensors: &[Stored]) -> Vec<u8> {
    let mut p = vec![0x80, 2]; // protocol 2
    p.extend(b"}q\x00("); // empty dict, stored as memo 0, mark
    for (i, t) in tensors.iter().enumerate() {
        text(&mut p, t.name);
        global(&mut p, "torch._utils", "_rebuild_tensor_v2");
        p.push(b'('); // arguments: storage, offset, size, stride, requires_grad, hooks
        p.push(b'('); // persistent id: "storage", class, file, device, elements
        text(&mut p, "storage");
        global(&mut p, "torch", t.class);
        text(&mut p, &i.to_string());
        text(&mut p, "cpu");
        p.push(b'J');
        p.extend((t.data.len() as i32).to_le_bytes());
        p.extend(b"tQ"); // tuple, persistent load
        p.push(b'M');
        p.extend(t.offset.to_le_bytes());
        tuple_of_ints(&mut p, &t.shape);
        tuple_of_ints(&mut p, &t.stride);
        p.push(0x89); // False
        global(&mut p, "collections", "OrderedDict");
        p.extend(b")R"); // (), call: an empty ordered dict
        p.extend(b"tR"); // the tuple of arguments, call
    }
    p.extend(b"u."); // set all items since the mark, stop
    p
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for b in bytes {
        crc ^= u32::from(*b);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// A zip archive of stored members.
pub fn zip(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in members {
        let at = out.len() as u32;
        let mut common = Vec::new(); // version, flags, method 0 (stored), time, date, crc, sizes, name, extra
        for v in [20u16, 0, 0, 0, 33] {
            common.extend(v.to_le_bytes());
        }
        for v in [crc32(data), data.len() as u32, data.len() as u32] {
            common.extend(v.to_le_bytes());
        }
        common.extend((name.len() as u16).to_le_bytes());
        common.extend(0u16.to_le_bytes());
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend(name.as_bytes());
        out.extend(data);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&common);
        directory.extend([0u8; 10]); // comment, disk, attributes
        directory.extend(at.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (start, len, n) = (out.len() as u32, directory.len() as u32, members.len() as u16);
    out.extend(directory);
    out.extend(b"PK\x05\x06\x00\x00\x00\x00");
    out.extend(n.to_le_bytes());
    out.extend(n.to_le_bytes());
    out.extend(len.to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0u8; 2]);
    out
}

/// A whole torch file with the given pickle and storages.
pub fn archive(pickle: Vec<u8>, storages: Vec<Vec<u8>>) -> Vec<u8> {
    let mut members = vec![("archive/data.pkl".to_string(), pickle), ("archive/byteorder".into(), b"little".to_vec())];
    members.extend(storages.into_iter().enumerate().map(|(i, d)| (format!("archive/data/{i}"), d)));
    members.push(("archive/version".into(), b"3\n".to_vec()));
    zip(&members)
}

pub fn torch_file(tensors: &[Stored]) -> Vec<u8> {
    archive(pickle(tensors), tensors.iter().map(|t| t.data.clone()).collect())
}
