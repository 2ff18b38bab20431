//! The files of a golden directory, or of the subset in the program, and which of them have been looked at.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{anyhow, Context, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::{archive, GoldenSource};
use crate::error::UserError;

enum Store {
    Dir(PathBuf),
    Memory(BTreeMap<String, Vec<u8>>),
}

pub struct Golden {
    store: Store,
    /// JSON and safetensors files, sorted.
    names: Vec<String>,
    opened: RefCell<BTreeSet<String>>,
    /// What the running case has opened.
    current: RefCell<Vec<Rc<Tensors>>>,
}

impl Golden {
    pub fn open(source: &GoldenSource) -> Result<Self> {
        let (store, mut names) = match source {
            GoldenSource::Dir(dir) => (Store::Dir(dir.clone()), list(dir)?),
            GoldenSource::Embedded => {
                let files = archive::embedded()?;
                let names = files.keys().cloned().collect();
                (Store::Memory(files), names)
            }
        };
        names.retain(|name| name.ends_with(".json") || name.ends_with(".safetensors"));
        names.sort();
        if !names.iter().any(|name| name.ends_with(".json")) {
            let what = match source {
                GoldenSource::Dir(dir) => format!("{} holds no golden case (no .json file)", dir.display()),
                GoldenSource::Embedded => "the embedded golden subset is empty".to_string(),
            };
            return Err(UserError::usage(what).hint("leave --golden out for the built-in self-test").into());
        }
        Ok(Golden { store, names, opened: RefCell::default(), current: RefCell::default() })
    }

    pub fn names_ending(&self, suffix: &str) -> Vec<String> {
        self.names.iter().filter(|name| name.ends_with(suffix)).cloned().collect()
    }

    pub fn has(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }

    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        self.opened.borrow_mut().insert(name.to_string());
        match &self.store {
            Store::Dir(dir) => std::fs::read(dir.join(name)).with_context(|| format!("cannot read {name}")),
            Store::Memory(files) => files.get(name).cloned().ok_or_else(|| anyhow!("{name} is missing")),
        }
    }

    pub fn json(&self, name: &str) -> Result<Value> {
        serde_json::from_slice(&self.bytes(name)?).with_context(|| format!("{name} is not JSON"))
    }

    /// Every tensor of a file, on the CPU, in the file's dtypes.
    pub fn tensors(&self, name: &str) -> Result<Rc<Tensors>> {
        let map = candle_core::safetensors::load_buffer(&self.bytes(name)?, &Device::Cpu)
            .with_context(|| format!("{name} is not a safetensors file"))?;
        let tensors = Tensors { file: name.to_string(), map: map.into_iter().collect(), read: RefCell::default() };
        let tensors = Rc::new(tensors);
        self.current.borrow_mut().push(tensors.clone());
        Ok(tensors)
    }

    /// Forgets what earlier cases have opened.
    pub fn start_case(&self) {
        self.current.borrow_mut().clear();
    }

    /// Tensors of files the running case opened, but never asked for.
    pub fn unread_tensors(&self) -> Vec<String> {
        let unread = |t: &Rc<Tensors>| {
            let read = t.read.borrow();
            let mut keys = t.map.keys().filter(|key| !read.contains(*key));
            let first = keys.next()?;
            Some(match keys.count() {
                0 => format!("{first} of {}", t.file),
                more => format!("{first} of {} (and {more} more)", t.file),
            })
        };
        self.current.borrow().iter().filter_map(unread).collect()
    }

    /// Files that no case has opened.
    pub fn untouched(&self) -> Vec<String> {
        let opened = self.opened.borrow();
        self.names.iter().filter(|name| !opened.contains(*name)).cloned().collect()
    }
}

fn list(dir: &Path) -> Result<Vec<String>> {
    let unreadable = |error: std::io::Error| {
        UserError::usage(format!("the golden directory {} cannot be read: {error}", dir.display()))
            .hint("give a directory laid out like tests/golden, or leave --golden out for the built-in self-test")
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        names.extend(entry.map_err(unreadable)?.file_name().into_string().ok());
    }
    Ok(names)
}

/// The tensors of one file; remembers which were asked for.
pub struct Tensors {
    file: String,
    map: BTreeMap<String, Tensor>,
    read: RefCell<BTreeSet<String>>,
}

impl Tensors {
    /// The tensor as stored.
    pub fn get(&self, key: &str) -> Result<&Tensor> {
        self.find(key).ok_or_else(|| anyhow!("{} has no tensor {key}", self.file))
    }

    pub fn find(&self, key: &str) -> Option<&Tensor> {
        let tensor = self.map.get(key)?;
        self.read.borrow_mut().insert(key.to_string());
        Some(tensor)
    }

    /// The tensor as fp32 on `device`.
    pub fn f32(&self, key: &str, device: &Device) -> Result<Tensor> {
        Ok(self.get(key)?.to_dtype(DType::F32)?.to_device(device)?)
    }

    /// As [`Tensors::f32`]; `None` where there is none.
    pub fn f32_if_any(&self, key: &str, device: &Device) -> Result<Option<Tensor>> {
        self.map.contains_key(key).then(|| self.f32(key, device)).transpose()
    }

    /// Keys that start with `prefix`, without marking them as read.
    pub fn keys<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str).filter(move |key| key.starts_with(prefix))
    }

    /// Everything under `prefix`, which is cut off.
    pub fn part(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let keys: Vec<&str> = self.keys(prefix).collect();
        keys.into_iter().filter_map(|key| Some((key[prefix.len()..].to_string(), self.find(key)?.clone()))).collect()
    }

    /// Every tensor as fp32 on `device`: how weights are stored as bf16 and computed with.
    pub fn all_f32(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        let to = |(key, tensor): (String, Tensor)| Ok((key, tensor.to_dtype(DType::F32)?.to_device(device)?));
        self.part("").into_iter().map(to).collect()
    }

    /// `name.0`, `name.1`, … as fp32 on `device`.
    pub fn sequence(&self, name: &str, device: &Device) -> Result<Vec<Tensor>> {
        let keys = (0..).map(|b| format!("{name}.{b}")).take_while(|key| self.map.contains_key(key));
        keys.map(|key| self.f32(&key, device)).collect()
    }
}
