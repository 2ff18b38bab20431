//! The pickle inside a torch file (`.pth`, `.pt`, `.ckpt`): which tensors there are and where their bytes lie.
//!
//! candle's reader turns the opcodes into plain objects and never runs anything: a pickle that asks for a function call
//! gets an object that says so. But it trusts its input in size: a tuple nested a million times overflows the stack when
//! dropped, memo references double objects without end, long integers overflow a shift. So [`guard`] walks the opcodes
//! first, counting depth and size only, and candle's reader sees nothing that it has not bounded.

use candle_core::pickle::{Object, Stack};
use safetensors::Dtype;

/// One tensor of the file: `shape` and `stride` in elements into the storage file `storage`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PthTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub stride: Vec<usize>,
    pub offset: usize,
    /// Name of the storage inside the archive's `data/`.
    pub storage: String,
}

/// Deeper nesting than any state dict has (about ten).
const MAX_DEPTH: u32 = 64;
/// Objects made by the whole pickle, copies through the memo included. A state dict makes some fifty a tensor.
const MAX_OBJECTS: u64 = 4_000_000;
/// Keys under which training programs nest a state dict.
const NESTS: [&str; 8] =
    ["state_dict", "model", "module", "model_state_dict", "params", "params_ema", "ema", "generator"];

/// The tensors named by a `data.pkl`. `Err` says in words what is wrong with it.
pub fn tensors(pickle: &[u8]) -> Result<Vec<PthTensor>, String> {
    guard(pickle)?;
    let mut stack = Stack::empty();
    let mut reader = std::io::Cursor::new(pickle);
    // candle quotes the objects that it could not use: only the start of that is worth reading.
    let short = |e: candle_core::Error| e.to_string().chars().take(200).collect::<String>();
    stack.read_loop(&mut reader).map_err(|e| format!("its pickle does not parse ({})", short(e)))?;
    let top = stack.finalize().map_err(|e| format!("its pickle is empty ({})", short(e)))?;
    let items = match top {
        Object::Dict(items) => items,
        Object::Build { .. } | Object::Reduce { .. } => {
            return Err("it holds a whole program object, not a table of tensors (state dict)".into())
        }
        _ => return Err("it holds no table of tensors (state dict)".into()),
    };
    let found = of_dict(&items)?;
    if !found.is_empty() {
        return Ok(found);
    }
    for (key, value) in &items {
        if let (Object::Unicode(k), Object::Dict(inner)) = (key, value) {
            if NESTS.contains(&k.as_str()) {
                let found = of_dict(inner)?;
                if !found.is_empty() {
                    return Ok(found);
                }
            }
        }
    }
    Err("it holds no tensors".into())
}

fn of_dict(items: &[(Object, Object)]) -> Result<Vec<PthTensor>, String> {
    let mut out = Vec::new();
    for (key, value) in items {
        if let (Object::Unicode(name), Some((callable, args))) = (key, rebuild(value)) {
            out.push(tensor(name, callable, args).map_err(|e| format!("{name}: {e}"))?);
        }
    }
    Ok(out)
}

/// The function name and arguments of a `torch._utils._rebuild_tensor…` call, parameter wrappers removed; `None` for
/// any other object.
fn rebuild(value: &Object) -> Option<(&str, &[Object])> {
    let Object::Reduce { callable, args } = value else { return None };
    let (Object::Class { module_name, class_name }, Object::Tuple(args)) = (callable.as_ref(), args.as_ref()) else {
        return None;
    };
    match (module_name.as_str(), class_name.as_str()) {
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3") => Some((class_name, args)),
        ("torch._utils", "_rebuild_parameter") => rebuild(args.first()?),
        ("torch._tensor", "_rebuild_from_type_v2") => match (args.first()?, args.get(2)?) {
            (Object::Class { class_name, .. }, Object::Tuple(inner)) if class_name.starts_with("_rebuild_tensor") => {
                Some((class_name, inner))
            }
            _ => None,
        },
        _ => None,
    }
}

/// Arguments: storage, offset, size, stride[, requires_grad, hooks[, dtype (v3) …]].
fn tensor(name: &str, callable: &str, args: &[Object]) -> Result<PthTensor, String> {
    let [storage, offset, size, stride, ..] = args else {
        return Err("a tensor with too few arguments".into());
    };
    // Persistent id: "storage", storage class, file name, device, number of elements.
    let Object::PersistentLoad(id) = storage else {
        return Err("a tensor without a storage".into());
    };
    let Object::Tuple(id) = id.as_ref() else {
        return Err("a storage without a description".into());
    };
    let (Some(Object::Class { class_name, .. }), Some(Object::Unicode(file))) = (id.get(1), id.get(2)) else {
        return Err("a storage whose description does not parse".into());
    };
    let dtype = match callable {
        "_rebuild_tensor_v3" => match args.get(6) {
            Some(Object::Class { class_name, .. }) => torch_dtype(class_name),
            _ => return Err("a tensor without a dtype".into()),
        },
        _ => storage_dtype(class_name),
    };
    let Some(dtype) = dtype else {
        return Err(format!("its dtype ({class_name}) is not supported"));
    };
    let (shape, stride) = (dims(size)?, dims(stride)?);
    if shape.len() != stride.len() {
        return Err(format!("shape {shape:?} and strides {stride:?} disagree"));
    }
    let offset = number(offset)?;
    Ok(PthTensor { name: name.to_owned(), dtype, shape, stride, offset, storage: file.clone() })
}

fn storage_dtype(class: &str) -> Option<Dtype> {
    Some(match class {
        "FloatStorage" => Dtype::F32,
        "DoubleStorage" => Dtype::F64,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        "IntStorage" => Dtype::I32,
        "LongStorage" => Dtype::I64,
        _ => return None,
    })
}

fn torch_dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "uint16" => Dtype::U16,
        "uint32" => Dtype::U32,
        _ => return None,
    })
}

fn number(o: &Object) -> Result<usize, String> {
    let n = match o {
        Object::Int(n) => i64::from(*n),
        Object::Long(n) => *n,
        _ => return Err("a size that is no number".into()),
    };
    usize::try_from(n).map_err(|_| format!("the negative size {n}"))
}

fn dims(o: &Object) -> Result<Vec<usize>, String> {
    match o {
        Object::Tuple(v) | Object::List(v) => v.iter().map(number).collect(),
        _ => Err("a shape that is no list of numbers".into()),
    }
}

/// Size of one object of the walk.
#[derive(Clone, Copy)]
struct Size {
    depth: u32,
    objects: u64,
    mark: bool,
}

const LEAF: Size = Size { depth: 1, objects: 1, mark: false };

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Size>,
    memo: std::collections::HashMap<u32, Size>,
    made: u64,
}

/// Walks the opcodes without making objects; `Err` where the pickle is torn, has opcodes that torch does not write, or
/// would build something absurdly deep or large.
fn guard(bytes: &[u8]) -> Result<(), String> {
    let mut w = Walk { bytes, at: 0, stack: Vec::new(), memo: Default::default(), made: 0 };
    while w.step()? {
        if w.made > MAX_OBJECTS {
            return Err(format!("its pickle makes more than {MAX_OBJECTS} objects"));
        }
    }
    Ok(())
}

impl Walk<'_> {
    fn take(&mut self, n: usize) -> Result<&[u8], String> {
        let end = self.at.checked_add(n).filter(|e| *e <= self.bytes.len());
        let end = end.ok_or_else(|| "its pickle is cut off".to_string())?;
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn u8(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> Result<u32, String> {
        let b = self.take(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// A new object, or a copy: all of it counts.
    fn push(&mut self, s: Size) -> Result<(), String> {
        self.made += s.objects;
        self.stack.push(s);
        Ok(())
    }

    fn pop(&mut self) -> Result<Size, String> {
        self.stack.pop().ok_or_else(|| "its pickle takes from an empty stack".to_string())
    }

    /// Replaces the last `n` objects by one that holds them.
    fn wrap(&mut self, n: usize) -> Result<(), String> {
        let mut whole = LEAF;
        for _ in 0..n {
            let part = self.pop()?;
            whole.depth = whole.depth.max(part.depth + 1);
            whole.objects += part.objects;
        }
        if whole.depth > MAX_DEPTH {
            return Err(format!("its pickle nests deeper than {MAX_DEPTH}"));
        }
        self.made += 1;
        self.stack.push(whole);
        Ok(())
    }

    /// Objects above the last mark.
    fn above_mark(&self) -> Result<usize, String> {
        self.stack.iter().rev().position(|s| s.mark).ok_or_else(|| "its pickle lacks a mark".to_string())
    }

    /// Moves the last `n` objects into the container below them (and the mark between, if `marked`).
    fn fill(&mut self, n: usize, marked: bool) -> Result<(), String> {
        let (mut depth, mut objects) = (0, 0);
        for _ in 0..n {
            let part = self.pop()?;
            (depth, objects) = (part.depth.max(depth), objects + part.objects);
        }
        if marked {
            self.pop()?;
        }
        let container = self.stack.last_mut().ok_or("its pickle fills a container that is not there")?;
        container.depth = container.depth.max(depth + 1);
        container.objects += objects;
        match container.depth > MAX_DEPTH {
            true => Err(format!("its pickle nests deeper than {MAX_DEPTH}")),
            false => Ok(()),
        }
    }

    fn line(&mut self) -> Result<(), String> {
        let rest = &self.bytes[self.at..];
        let n = rest.iter().position(|b| *b == b'\n').ok_or("its pickle is cut off")?;
        self.at += n + 1;
        Ok(())
    }

    fn put(&mut self, id: u32) -> Result<(), String> {
        let top = *self.stack.last().ok_or("its pickle stores from an empty stack")?;
        self.made += top.objects;
        self.memo.insert(id, top);
        Ok(())
    }

    fn get(&mut self, id: u32) -> Result<(), String> {
        let s = *self.memo.get(&id).ok_or("its pickle refers to an object that it never stored")?;
        self.push(s)
    }

    /// One opcode; `false` at the end.
    fn step(&mut self) -> Result<bool, String> {
        match self.u8()? {
            0x80 => match self.u8()? {
                0..=3 => {}
                v => return Err(format!("it was saved with pickle protocol {v}, torch writes 2")),
            },
            b'c' => {
                self.line()?;
                self.line()?;
                self.push(LEAF)?;
            }
            b'(' => self.push(Size { mark: true, ..LEAF })?,
            b')' | b']' | b'}' | b'N' | 0x88 | 0x89 => self.push(LEAF)?,
            b'K' => self.take(1).map(drop).and_then(|()| self.push(LEAF))?,
            b'M' => self.take(2).map(drop).and_then(|()| self.push(LEAF))?,
            b'J' => self.take(4).map(drop).and_then(|()| self.push(LEAF))?,
            b'G' => self.take(8).map(drop).and_then(|()| self.push(LEAF))?,
            0x8a => match self.u8()? {
                n @ 0..=8 => self.take(n.into()).map(drop).and_then(|()| self.push(LEAF))?,
                n => return Err(format!("its pickle holds an integer of {n} bytes")),
            },
            b'X' => {
                let n = self.u32()? as usize;
                self.take(n)?;
                self.push(LEAF)?;
            }
            0x85 | b'Q' => self.wrap(1)?,
            0x86 | b'R' | b'b' | 0x81 => self.wrap(2)?,
            0x87 => self.wrap(3)?,
            b't' => {
                let n = self.above_mark()?;
                self.wrap(n)?;
                // The mark lies below the new tuple.
                let tuple = self.pop()?;
                self.pop()?;
                self.stack.push(tuple);
            }
            b'a' => self.fill(1, false)?,
            b's' => self.fill(2, false)?,
            b'e' | b'u' => {
                let n = self.above_mark()?;
                self.fill(n, true)?;
            }
            b'q' => self.u8().and_then(|id| self.put(id.into()))?,
            b'r' => self.u32().and_then(|id| self.put(id))?,
            b'h' => self.u8().and_then(|id| self.get(id.into()))?,
            b'j' => self.u32().and_then(|id| self.get(id))?,
            b'.' => return Ok(false),
            op => return Err(format!("its pickle holds the instruction {op:#04x}, which no file of tensors needs")),
        }
        Ok(true)
    }
}
