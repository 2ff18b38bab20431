//! The full state of a training run: what is needed so that a resumed run ends bit-equal to an unbroken one.
//!
//! A state is a directory:
//! ```text
//! adapter.safetensors     fp32 masters by name
//! optimizer.safetensors   every other buffer: moments, 8-bit codes, their scales
//! state.json              position, identity, RNG and schedule facts, the whole run configuration
//! COMPLETE                format version, size and sha256 of the three; written last
//! ```
//! Without `COMPLETE` the directory is no state. It is filled under a temporary name and renamed, so a kill at any
//! instant leaves the old state or the new one.

use crate::error::UserError;
use crate::fsio::{self, TensorOut};
use anyhow::Result;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// Raised when the layout of a state changes in a way an older program could misread.
pub const FORMAT: u32 = 1;
const COMPLETE: &str = "COMPLETE";
const ADAPTER: &str = "adapter.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const FILES: [&str; 3] = [ADAPTER, OPTIMIZER, STATE];

/// Where a run stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Optimizer steps taken.
    pub step: u64,
    /// Whole epochs finished.
    pub epoch: u64,
    /// Micro-batches of the running epoch already consumed.
    pub micro_batch: u64,
    /// Items of the dataset consumed since the start: the counter of the keyed random numbers.
    pub items: u64,
}

/// What must agree between a state and the run that continues it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// Task name, such as `i2v-A14B`.
    pub task: String,
    /// The checkpoint trained on: file name, and whatever tells experts apart.
    pub base: String,
    /// `lora`, `loha` or `lokr`.
    pub network: String,
    pub rank: u64,
    pub alpha: f64,
    pub optimizer: String,
    /// Hash of the dataset's item list, so that the data position means the same items.
    pub dataset: String,
}

/// One trainable tensor in full precision.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Master {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// Everything a run needs to go on. The trainer fills it and takes it apart; nothing here knows what the buffers mean.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainState {
    pub position: Position,
    pub identity: Identity,
    /// Masters by canonical name (`blocks.0.self_attn.q.lora_down`); a second expert's names carry its prefix.
    pub adapters: BTreeMap<String, Master>,
    /// Optimizer vectors and other fp32 buffers by name.
    pub buffers_f32: BTreeMap<String, Vec<f32>>,
    /// 8-bit optimizer codes and other byte buffers by name.
    pub buffers_u8: BTreeMap<String, Vec<u8>>,
    /// Seeds, loss scale, running averages, whatever else the trainer keeps. A float that must come back bit-equal goes
    /// in as its bits (`f64::to_bits`): JSON text may cost its last digit.
    pub meta: Value,
    /// The whole resolved configuration of the run, for `show` and for the report of differences.
    pub config: Value,
    /// Hash of that configuration.
    pub config_hash: String,
}

#[derive(Serialize, Deserialize)]
struct StateJson {
    position: Position,
    identity: Identity,
    config_hash: String,
    meta: Value,
    config: Value,
}

#[derive(Serialize, Deserialize)]
struct Complete {
    format: u32,
    program: String,
    step: u64,
    epoch: u64,
    files: BTreeMap<String, FileSum>,
}

#[derive(Serialize, Deserialize)]
struct FileSum {
    bytes: u64,
    sha256: String,
}

impl TrainState {
    /// Writes the state under `dir`, replacing a state of that name in one step.
    pub fn save(&self, dir: &Path) -> Result<()> {
        fsio::write_dir_atomic(dir, |temp| {
            let none = BTreeMap::new();
            let masters = self.adapters.iter().map(|(n, m)| f32_out(n.clone(), m.shape.clone(), &m.data)).collect();
            fsio::write_safetensors(&temp.join(ADAPTER), masters, &none)?;

            let floats = self.buffers_f32.iter().map(|(n, v)| f32_out(format!("f32.{n}"), vec![v.len()], v));
            let bytes = self.buffers_u8.iter().map(|(n, v)| TensorOut {
                name: format!("u8.{n}"),
                dtype: Dtype::U8,
                shape: vec![v.len()],
                data: Cow::Borrowed(v.as_slice()),
            });
            fsio::write_safetensors(&temp.join(OPTIMIZER), floats.chain(bytes).collect(), &none)?;

            let json = StateJson {
                position: self.position.clone(),
                identity: self.identity.clone(),
                config_hash: self.config_hash.clone(),
                meta: self.meta.clone(),
                config: self.config.clone(),
            };
            fsio::write_bytes(&temp.join(STATE), &serde_json::to_vec_pretty(&json)?)?;

            let mut files = BTreeMap::new();
            for name in FILES {
                let content = std::fs::read(temp.join(name))?;
                files.insert(name.to_owned(), FileSum { bytes: content.len() as u64, sha256: sha256_hex(&content) });
            }
            let complete = Complete {
                format: FORMAT,
                program: format!("wan-train {}", env!("CARGO_PKG_VERSION")),
                step: self.position.step,
                epoch: self.position.epoch,
                files,
            };
            fsio::write_bytes(&temp.join(COMPLETE), &serde_json::to_vec_pretty(&complete)?)
        })
    }

    /// Reads and verifies a state. Errors name the directory and what is wrong with it: missing, unfinished, torn, of
    /// another program, of a newer format.
    pub fn load(dir: &Path) -> Result<Self> {
        let complete = read_complete(dir)?;
        let mut contents = BTreeMap::new();
        for name in FILES {
            let sum =
                complete.files.get(name).ok_or_else(|| damaged(dir, format!("its marker does not list {name}")))?;
            let path = dir.join(name);
            let bytes = std::fs::read(&path).map_err(|e| damaged(dir, format!("{name} cannot be read ({e})")))?;
            if bytes.len() as u64 != sum.bytes {
                return Err(damaged(dir, format!("{name} has {} bytes, {} were written", bytes.len(), sum.bytes)));
            }
            if sha256_hex(&bytes) != sum.sha256 {
                return Err(damaged(dir, format!("the content of {name} has changed since it was written")));
            }
            contents.insert(name, bytes);
        }
        let json: StateJson = serde_json::from_slice(&contents[STATE])
            .map_err(|e| damaged(dir, format!("{STATE} does not parse ({e})")))?;
        let mut state = TrainState {
            position: json.position,
            identity: json.identity,
            meta: json.meta,
            config: json.config,
            config_hash: json.config_hash,
            ..Default::default()
        };
        for (name, shape, bytes) in tensors(dir, ADAPTER, &contents[ADAPTER], Dtype::F32)? {
            state.adapters.insert(name, Master { shape, data: floats(&bytes) });
        }
        let optimizer = SafeTensors::deserialize(&contents[OPTIMIZER])
            .map_err(|e| damaged(dir, format!("{OPTIMIZER} does not parse ({e})")))?;
        for (name, view) in optimizer.tensors() {
            match (name.split_once('.'), view.dtype()) {
                (Some(("f32", n)), Dtype::F32) => drop(state.buffers_f32.insert(n.into(), floats(view.data()))),
                (Some(("u8", n)), Dtype::U8) => drop(state.buffers_u8.insert(n.into(), view.data().to_vec())),
                _ => return Err(damaged(dir, format!("{OPTIMIZER} holds an unknown buffer {name}"))),
            }
        }
        Ok(state)
    }

    /// Refuses a state that belongs to another run, naming both sides of the first thing that differs.
    pub fn check_identity(&self, dir: &Path, run: &Identity) -> Result<()> {
        let s = &self.identity;
        // As f32: the JSON text of an f64 may have lost its last digit.
        let rank = |i: &Identity| format!("{} of rank {} (alpha {})", i.network, i.rank, i.alpha as f32);
        let pairs = [
            ("the task", s.task.clone(), run.task.clone()),
            ("the base model", s.base.clone(), run.base.clone()),
            ("the network", rank(s), rank(run)),
            ("the optimizer", s.optimizer.clone(), run.optimizer.clone()),
            ("the dataset (hash of its items)", s.dataset.clone(), run.dataset.clone()),
        ];
        for (what, saved, now) in pairs {
            if saved != now {
                return Err(UserError::new(format!(
                    "{} cannot be resumed: {what} was `{saved}` there and is `{now}` in this run",
                    dir.display()
                ))
                .hint(
                    "give this run the same settings as the saved one, or start from its weights alone with --resume_from",
                )
                .into());
            }
        }
        Ok(())
    }
}

/// Steps and epochs of a state, from its marker alone. `None` where there is no finished state.
pub fn peek(dir: &Path) -> Option<(u64, u64)> {
    read_complete(dir).ok().map(|c| (c.step, c.epoch))
}

/// Refuses what is no finished state, by its marker alone.
pub fn require(dir: &Path) -> Result<()> {
    read_complete(dir).map(drop)
}

/// The configuration that a state was saved under, without the rest of it.
pub fn saved_config(dir: &Path) -> Result<Value> {
    read_complete(dir)?;
    let bytes = std::fs::read(dir.join(STATE)).map_err(|e| damaged(dir, format!("{STATE} cannot be read ({e})")))?;
    let json: StateJson =
        serde_json::from_slice(&bytes).map_err(|e| damaged(dir, format!("{STATE} does not parse ({e})")))?;
    Ok(json.config)
}

fn read_complete(dir: &Path) -> Result<Complete> {
    if !dir.is_dir() {
        let what = if dir.exists() { "is a file, not a state directory" } else { "does not exist" };
        return Err(UserError::new(format!("--resume: {} {what}", dir.display()))
            .hint("give a directory whose name ends in -state, as --save_state writes it")
            .into());
    }
    let bytes = match std::fs::read(dir.join(COMPLETE)) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(UserError::new(format!(
                "{} is no finished training state: it has no {COMPLETE} file",
                dir.display()
            ))
            .hint("resume from another -state directory, or start from weights with --resume_from FILE.safetensors")
            .into())
        }
        Err(e) => return Err(damaged(dir, format!("{COMPLETE} cannot be read ({e})"))),
    };
    // The version is looked at before anything else: a newer marker may have other fields.
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|e| damaged(dir, format!("{COMPLETE} does not parse ({e})")))?;
    if let Some(format) = value.get("format").and_then(Value::as_u64).filter(|f| *f != u64::from(FORMAT)) {
        return Err(UserError::new(format!(
            "{} was written in state format {format}; this program reads format {FORMAT}",
            dir.display()
        ))
        .hint("resume with the program version that wrote it")
        .into());
    }
    serde_json::from_value(value).map_err(|e| damaged(dir, format!("{COMPLETE} does not parse ({e})")))
}

fn damaged(dir: &Path, what: String) -> anyhow::Error {
    UserError::new(format!("the training state {} is damaged: {what}", dir.display()))
        .hint("resume from an earlier -state directory")
        .into()
}

/// An fp32 buffer as a tensor to write; borrowed, since states are as large as three LoRAs.
fn f32_out(name: String, shape: Vec<usize>, data: &[f32]) -> TensorOut<'_> {
    TensorOut { name, dtype: Dtype::F32, shape, data: Cow::Borrowed(bytemuck::cast_slice(data)) }
}

type Loaded = (String, Vec<usize>, Vec<u8>);

fn tensors(dir: &Path, file: &str, bytes: &[u8], want: Dtype) -> Result<Vec<Loaded>> {
    let parsed = SafeTensors::deserialize(bytes).map_err(|e| damaged(dir, format!("{file} does not parse ({e})")))?;
    let mut out = Vec::new();
    for (name, view) in parsed.tensors() {
        if view.dtype() != want {
            return Err(damaged(dir, format!("{name} in {file} is {:?}, not {want:?}", view.dtype())));
        }
        out.push((name, view.shape().to_vec(), view.data().to_vec()));
    }
    Ok(out)
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    // The bytes may lie at any address: no cast in place.
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Hash of a configuration value: sha256 of its JSON with sorted keys.
pub fn config_hash(config: &Value) -> String {
    fn sorted(v: &Value) -> Value {
        match v {
            Value::Object(m) => {
                let ordered: BTreeMap<_, _> = m.iter().map(|(k, v)| (k.clone(), sorted(v))).collect();
                ordered.into_iter().collect()
            }
            Value::Array(a) => a.iter().map(sorted).collect(),
            other => other.clone(),
        }
    }
    sha256_hex(sorted(config).to_string().as_bytes())
}
