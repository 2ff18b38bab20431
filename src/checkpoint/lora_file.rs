//! LoRA files of any form, opened under our names: which modules they adapt, with what rank and alpha, and what they
//! add to a weight.

use super::lora_keys::{classify, classify_compat, Form, Part};
use crate::error::UserError;
use crate::loader::{Fetch, Reading, Source};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use wan_models::adapter::Kind;

/// Where the tensors come from: a file, read when asked for, or memory.
#[derive(Debug)]
enum Store {
    File(Box<Source>),
    Memory(BTreeMap<String, Tensor>),
}

/// Raw keys of one module's parts.
#[derive(Debug, Clone, Default)]
struct Entry {
    factors: BTreeMap<&'static str, String>,
    alpha: Option<String>,
}

/// Elements of the largest matrix that an adapter may stand for: four times the largest of a 14B model. Factors of a few MB
/// can stand for more than any machine holds.
const LARGEST: usize = 1 << 28;

/// An open LoRA file.
#[derive(Debug)]
pub struct LoraFile {
    path: PathBuf,
    store: Store,
    modules: BTreeMap<String, Entry>,
    /// Tensor of the model -> raw key of what is added to it.
    diffs: BTreeMap<String, String>,
    unmapped: Vec<String>,
    form: Form,
    metadata: BTreeMap<String, String>,
}

/// One module's adapter as stored.
#[derive(Debug, Clone)]
pub struct LoraModule {
    /// Suffix (`lora_down.weight`, `hada_w1_a`, …) -> tensor in the file's dtype.
    pub factors: BTreeMap<&'static str, Tensor>,
    /// `None` where the file has none: then the scale is 1.
    pub alpha: Option<f64>,
}

impl LoraFile {
    /// Opens a LoRA. Known key forms are mapped onto our names.
    ///
    /// Errors: no file, no LoRA, a key that maps to nothing we know (all of them listed), a module with half of its
    /// factors, two keys for the same thing.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_by(path, Reading::default())
    }

    /// The same, read in the way that is asked for.
    pub fn open_by(path: &Path, reading: Reading) -> Result<Self> {
        let file = Self::index(Store::File(Box::new(Source::open_by(path, reading)?)), path, false)?;
        file.require_all_mapped()?;
        Ok(file)
    }

    /// The old merge script's view of a file: it knows dotted `lora_down`/`lora_up` keys only and passes over the rest.
    pub fn open_compat(path: &Path) -> Result<Self> {
        Self::index(Store::File(Box::new(Source::open(path)?)), path, true)
    }

    /// A LoRA whose tensors are in memory; `name` stands for the path in messages. With `compat`, as
    /// [`Self::open_compat`].
    pub fn from_tensors(name: &str, tensors: BTreeMap<String, Tensor>, compat: bool) -> Result<Self> {
        let file = Self::index(Store::Memory(tensors), Path::new(name), compat)?;
        if !compat {
            file.require_all_mapped()?;
        }
        Ok(file)
    }

    fn index(store: Store, path: &Path, compat: bool) -> Result<Self> {
        let keys: Vec<String> = match &store {
            Store::File(s) => s.keys().map(str::to_owned).collect(),
            Store::Memory(m) => m.keys().cloned().collect(),
        };
        let metadata = match &store {
            Store::File(s) => s.metadata().clone(),
            Store::Memory(_) => BTreeMap::new(),
        };
        let mut file = LoraFile {
            path: path.to_owned(),
            store,
            modules: BTreeMap::new(),
            diffs: BTreeMap::new(),
            unmapped: Vec::new(),
            form: keys.iter().map(|k| Form::of_key(k)).find(|f| *f != Form::Comfy).unwrap_or_default(),
            metadata,
        };
        for key in keys {
            let taken = match if compat { classify_compat(&key) } else { classify(&key) } {
                Part::Factor(module, suffix) => {
                    file.modules.entry(module).or_default().factors.insert(suffix, key.clone())
                }
                Part::Alpha(module) => file.modules.entry(module).or_default().alpha.replace(key.clone()),
                Part::Diff(tensor) => file.diffs.insert(tensor, key.clone()),
                Part::Unusable(why) if !compat => {
                    return Err(file.refuse(format!("{key}: {why}"), "use a plain LoRA, LoHa or LoKr"))
                }
                Part::Unusable(_) | Part::Unknown => {
                    file.unmapped.push(key);
                    continue;
                }
            };
            if let Some(other) = taken {
                return Err(file.refuse(format!("{other} and {key} mean the same tensor"), "keep one of the two"));
            }
        }
        // An alpha alone adapts nothing.
        file.modules.retain(|_, e| !e.factors.is_empty());
        if !compat {
            file.check_complete()?;
        }
        Ok(file)
    }

    fn refuse(&self, what: impl std::fmt::Display, hint: &str) -> anyhow::Error {
        UserError::new(format!("the LoRA {} cannot be used: {what}", self.path.display())).hint(hint).into()
    }

    fn require_all_mapped(&self) -> Result<()> {
        const HINT: &str = "check that it is a LoRA for a Wan 2.1 or 2.2 DiT";
        if !self.unmapped.is_empty() {
            let shown = self.unmapped.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
            let n = self.unmapped.len();
            let more = if n > 3 { format!(" and {} more", n - 3) } else { String::new() };
            let verb = if n == 1 { "key is" } else { "keys are" };
            return Err(self.refuse(format!("{n} of its {verb} not known: {shown}{more}"), HINT));
        }
        if self.modules.is_empty() && self.diffs.is_empty() {
            return Err(self.refuse("it adapts nothing", HINT));
        }
        Ok(())
    }

    /// Each module must have all factors of one method.
    fn check_complete(&self) -> Result<()> {
        for (module, entry) in &self.modules {
            let has = |s: &str| entry.factors.contains_key(s);
            let pair = |w: &str| has(w) || (has(&format!("{w}_a")) && has(&format!("{w}_b")));
            let whole = match entry.factors.len() {
                _ if has("lora_down.weight") || has("lora_up.weight") => {
                    entry.factors.len() == 2 && has("lora_down.weight") && has("lora_up.weight")
                }
                n if has("hada_w1_a") => n == 4,
                _ => pair("lokr_w1") && pair("lokr_w2"),
            };
            if !whole {
                let found = entry.factors.values().cloned().collect::<Vec<_>>().join(", ");
                return Err(self.refuse(
                    format!("{module} has only {found}"),
                    "the file is incomplete: download or save it again",
                ));
            }
        }
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `ss_*` and `modelspec.*` of the file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The form in which the file is written.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Adapted modules, sorted by name.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.keys().map(String::as_str)
    }

    pub fn adapts(&self, module: &str) -> bool {
        self.modules.contains_key(module)
    }

    pub fn len(&self) -> usize {
        self.modules.len()
    }

    pub fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }

    /// Keys that map to nothing; empty unless opened in compatibility mode.
    pub fn unmapped(&self) -> &[String] {
        &self.unmapped
    }

    /// Tensors of the model (not modules) to which the file adds a difference.
    pub fn diffs(&self) -> impl Iterator<Item = &str> {
        self.diffs.keys().map(String::as_str)
    }

    fn read(&self, key: &str, fetch: Fetch) -> Result<Tensor> {
        match &self.store {
            Store::Memory(tensors) => Ok(tensors[key].clone()),
            Store::File(source) => match fetch(source, key)? {
                Some(there) => Ok(there),
                None => source.read(key, &Device::Cpu),
            },
        }
    }

    /// The open file, unless the tensors are in memory.
    pub fn source(&self) -> Option<&Source> {
        match &self.store {
            Store::File(source) => Some(source),
            Store::Memory(_) => None,
        }
    }

    /// Keys in the file of what is added to a tensor of the model, in the order in which they are read: factors (not
    /// alpha, a single number), the difference.
    pub fn keys_for(&self, tensor: &str) -> impl Iterator<Item = &str> {
        let module = tensor.strip_suffix(".weight").and_then(|module| self.modules.get(module));
        let factors = module.into_iter().flat_map(|entry| entry.factors.values());
        factors.chain(self.diffs.get(tensor)).map(String::as_str)
    }

    /// Reads one module's adapter; `None` where the file does not adapt it.
    pub fn module(&self, name: &str) -> Result<Option<LoraModule>> {
        self.module_from(name, &|_, _| Ok(None))
    }

    /// The same, with factors from whoever has read them already.
    pub fn module_from(&self, name: &str, fetch: Fetch) -> Result<Option<LoraModule>> {
        let Some(entry) = self.modules.get(name) else { return Ok(None) };
        let mut factors = BTreeMap::new();
        for (suffix, key) in &entry.factors {
            factors.insert(*suffix, self.read(key, fetch)?);
        }
        let alpha = match &entry.alpha {
            None => None,
            Some(key) => {
                let t = self.read(key, &|_, _| Ok(None))?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
                match t.as_slice() {
                    [a] if a.is_finite() => Some(*a),
                    _ => return Err(self.refuse(format!("{key} is no number"), "save the LoRA again")),
                }
            }
        };
        let module = LoraModule { factors, alpha };
        module.check().map_err(|what| self.refuse(format!("{name}: {what}"), "save the LoRA again"))?;
        Ok(Some(module))
    }

    /// Reads the difference to a tensor of the model, in the file's dtype.
    pub fn diff(&self, tensor: &str) -> Result<Option<Tensor>> {
        self.diff_from(tensor, &|_, _| Ok(None))
    }

    /// The same; see [`Self::module_from`].
    pub fn diff_from(&self, tensor: &str, fetch: Fetch) -> Result<Option<Tensor>> {
        self.diffs.get(tensor).map(|key| self.read(key, fetch)).transpose()
    }

    /// Every rank in the file; more than one means that modules differ.
    pub fn ranks(&self) -> Result<BTreeSet<usize>> {
        let mut ranks = BTreeSet::new();
        for name in self.modules.keys() {
            if let Some(rank) = self.module(name)?.and_then(|m| m.rank()) {
                ranks.insert(rank);
            }
        }
        Ok(ranks)
    }

    /// The kind of adapter that the file holds, by its first module; `None` if it holds differences only.
    pub fn kind(&self) -> Option<Kind> {
        let entry = self.modules.values().next()?;
        let has = |s: &str| entry.factors.keys().any(|f| f.starts_with(s));
        Some(match () {
            _ if has("lora_") => Kind::Lora,
            _ if has("hada_") => Kind::Loha,
            _ => Kind::Lokr { factor: -1 },
        })
    }
}

impl LoraModule {
    fn get(&self, suffix: &str) -> Option<&Tensor> {
        self.factors.get(suffix)
    }

    /// Checks that the factors are matrices that multiply, and to no more than a model could have.
    fn check(&self) -> std::result::Result<(), String> {
        let dims = |s: &str| self.get(s).map(|t| t.dims().to_vec());
        let inner = |a: &str, b: &str| match (dims(a), dims(b)) {
            (Some(x), Some(y)) if x.len() < 2 || y.len() < 2 || x[1] != y[0] => {
                Err(format!("{a} {x:?} and {b} {y:?} do not multiply"))
            }
            _ => Ok(()),
        };
        inner("lora_up.weight", "lora_down.weight")?;
        inner("hada_w1_a", "hada_w1_b")?;
        inner("hada_w2_a", "hada_w2_b")?;
        inner("lokr_w1_a", "lokr_w1_b")?;
        inner("lokr_w2_a", "lokr_w2_b")?;
        if let Some((s, t)) = self.factors.iter().find(|(_, t)| t.rank() < 2 || t.elem_count() == 0) {
            return Err(format!("{s} has the shape {:?}", t.dims()));
        }
        match (self.shape(), self.pair("hada_w2_a", "hada_w2_b")) {
            (Some([o, i]), _) | (_, Some([o, i])) if o.saturating_mul(i) > LARGEST => {
                Err(format!("its factors stand for a matrix of {o} x {i}, which no model has"))
            }
            (Some(first), Some(second)) if first != second => {
                Err(format!("its two products have the shapes {first:?} and {second:?}"))
            }
            _ => Ok(()),
        }
    }

    /// `[o, i]` of the product of two factors, without multiplying.
    fn pair(&self, up: &str, down: &str) -> Option<[usize; 2]> {
        Some([self.get(up)?.dims()[0], self.get(down)?.dims()[1..].iter().product()])
    }

    /// `[o, i]` of [`Self::product`], without multiplying; `None` where a factor is missing.
    pub fn shape(&self) -> Option<[usize; 2]> {
        let factor = |w: &str| self.pair(w, w).or_else(|| self.pair(&format!("{w}_a"), &format!("{w}_b")));
        let plain = self.pair("lora_up.weight", "lora_down.weight").or_else(|| self.pair("hada_w1_a", "hada_w1_b"));
        plain.or_else(|| {
            let ([o1, i1], [o2, i2]) = (factor("lokr_w1")?, factor("lokr_w2")?);
            Some([o1.saturating_mul(o2), i1.saturating_mul(i2)])
        })
    }

    /// The inner width of the product; `None` for a LoKr of two full matrices.
    pub fn rank(&self) -> Option<usize> {
        let rows = |s: &str| self.get(s).map(|t| t.dims()[0]);
        rows("lora_down.weight").or(rows("hada_w1_b")).or(rows("lokr_w1_b")).or(rows("lokr_w2_b"))
    }

    /// alpha / rank; 1 without an alpha or a rank.
    pub fn scale(&self) -> f64 {
        match (self.alpha, self.rank()) {
            (Some(alpha), Some(rank)) => alpha / rank as f64,
            _ => 1.0,
        }
    }

    /// The factors up `[o, r]` and down `[r, i]` in fp32 of a plain LoRA (1×1 convolutions flattened); `None` of others.
    pub fn low_rank(&self) -> candle_core::Result<Option<(Tensor, Tensor)>> {
        let (Some(up), Some(down)) = (self.get("lora_up.weight"), self.get("lora_down.weight")) else {
            return Ok(None);
        };
        let wide = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_from(1);
        Ok(Some((wide(up)?, wide(down)?)))
    }

    /// What the adapter adds to its weight at strength 1, without the scale: fp32, the factors' natural shape `[o, i]`
    /// (1×1 convolutions are flattened).
    pub fn product(&self) -> candle_core::Result<Tensor> {
        let get = |s: &str| match self.get(s) {
            Some(t) => t.to_dtype(DType::F32)?.flatten_from(1),
            None => candle_core::bail!("{s} is missing"),
        };
        if let Some((up, down)) = self.low_rank()? {
            return product(&up, &down);
        }
        if self.get("hada_w1_a").is_some() {
            let w1 = product(&get("hada_w1_a")?, &get("hada_w1_b")?)?;
            return w1.mul(&product(&get("hada_w2_a")?, &get("hada_w2_b")?)?);
        }
        let factor = |w: &str| match self.get(w) {
            Some(_) => get(w),
            None => product(&get(&format!("{w}_a"))?, &get(&format!("{w}_b"))?),
        };
        kronecker(&factor("lokr_w1")?, &factor("lokr_w2")?)
    }

    /// [`Self::product`] times [`Self::scale`].
    pub fn delta(&self) -> candle_core::Result<Tensor> {
        self.product()?.affine(self.scale(), 0.0)
    }

    /// As a trainable adapter with fp32 tensors; a LoKr with a factored w1 becomes one with a full w1.
    pub fn to_adapter(&self) -> Result<wan_models::adapter::Adapter> {
        let mut factors = BTreeMap::new();
        for (suffix, t) in &self.factors {
            factors.insert(*suffix, t.to_dtype(DType::F32)?);
        }
        if let (Some(a), Some(b)) = (factors.remove("lokr_w1_a"), factors.remove("lokr_w1_b")) {
            factors.insert("lokr_w1", a.matmul(&b)?);
        }
        Ok(wan_models::adapter::Adapter::from_params(&mut |name| factors.get(name).cloned(), self.scale())?)
    }
}

/// Of two fp32 factors, the same on every machine.
pub(crate) fn product(up_or: &Tensor, down_ri: &Tensor) -> candle_core::Result<Tensor> {
    wan_kernels::lora_delta::delta(up_or, down_ri).map_err(candle_core::Error::wrap)
}

/// `a ⊗ b` for matrices: `[o1·o2, i1·i2]`.
fn kronecker(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let ((o1, i1), (o2, i2)) = (a.dims2()?, b.dims2()?);
    let a = a.reshape((o1, 1, i1, 1))?;
    let b = b.reshape((1, o2, 1, i2))?;
    a.broadcast_mul(&b)?.reshape((o1 * o2, i1 * i2))
}
