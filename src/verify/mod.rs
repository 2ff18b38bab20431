//! `wan-train verify`: recomputes a directory of golden numbers with the program's own parts and says how far off
//! each one is. One file per kind of case; which kind a case is follows from its JSON, never from its name.

mod adapter_step;
mod archive;
mod buckets;
mod cache_files;
mod clip;
mod dit;
mod fp8;
mod golden;
mod json;
mod line;
mod merge;
mod samplers;
mod schedules;
mod timesteps;
mod tokenizer;
mod umt5;
mod vae;

use std::cell::RefCell;
use std::io::Write;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{anyhow, Result};
use serde_json::Value;
use wan_kernels::Exec;

pub use archive::pack;
use golden::{Golden, Tensors};
use line::{Line, Tolerance};

/// Where the golden cases are.
#[derive(Debug, Clone)]
pub enum GoldenSource {
    /// A directory laid out like `tests/golden`.
    Dir(PathBuf),
    /// The compact subset inside this program.
    Embedded,
}

/// How many checks passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    pub passed: usize,
    pub failed: usize,
}

/// Walks every case of `source`: one line a check on `out` with the largest absolute and relative error and the
/// tolerance, and `N passed, M failed` at the end. A case that cannot be computed, a kind of case that is not known and
/// a file that belongs to no case count as failed; nothing is skipped in silence.
///
/// Errors: [`crate::error::UserError`] with exit code 2 if the directory cannot be read or holds no case; whatever `out`
/// refuses.
pub fn run(source: &GoldenSource, exec: &Exec, out: &mut dyn Write) -> Result<Summary> {
    let golden = Golden::open(source)?;
    let report = RefCell::new(Report { out, summary: Summary::default(), broken: None });
    for name in golden.names_ending(".json") {
        let stem = name.trim_end_matches(".json").to_string();
        match golden.json(&name) {
            Ok(json) => Case { golden: &golden, stem, json, exec, report: &report }.run(),
            Err(error) => report.borrow_mut().failure(&stem, &format!("{error:#}")),
        }
        if report.borrow().broken.is_some() {
            break;
        }
    }
    let mut report = report.borrow_mut();
    for name in golden.untouched() {
        report.failure(&name, "was opened by no case");
    }
    let Summary { passed, failed } = report.summary;
    report.say(&format!("{passed} passed, {failed} failed"));
    match report.broken.take() {
        Some(error) => Err(error.into()),
        None => Ok(report.summary),
    }
}

/// Computes every check of a case.
type Kind = fn(&Case<'_>) -> Result<()>;

/// One JSON file and what it describes.
struct Case<'a> {
    golden: &'a Golden,
    /// File name without `.json`.
    stem: String,
    json: Value,
    exec: &'a Exec,
    report: &'a RefCell<Report<'a>>,
}

impl Case<'_> {
    /// Finds out what kind of case this is and computes it.
    fn run(&self) {
        let Some(kind) = self.kind() else {
            return self.report.borrow_mut().failure(&self.stem, "unknown kind of case");
        };
        self.golden.start_case();
        let outcome = guarded(|| kind(self));
        if let Err(error) = outcome {
            self.report.borrow_mut().failure(&self.stem, &format!("{error:#}"));
        }
        for unread in self.golden.unread_tensors() {
            self.report.borrow_mut().failure(&self.stem, &format!("{unread} was not looked at"));
        }
    }

    /// The function for this kind of case, told by the keys that only this kind has.
    fn kind(&self) -> Option<Kind> {
        let has = |pointer: &str| self.json.pointer(pointer).is_some();
        let kinds: [(bool, Kind); 17] = [
            (has("/config/model_type") && has("/config/num_heads"), dit::run),
            (has("/base_weights") && has("/network_dim"), adapter_step::run),
            (has("/quantized_layers"), fp8::dit),
            (has("/block_size") && has("/info"), fp8::matrices),
            (has("/config/z_dim"), vae::run),
            (has("/config/num_buckets"), umt5::run),
            (has("/cases/0/cleaned"), tokenizer::cleaned),
            (has("/cases/0/ids") && has("/cases/0/text"), tokenizer::raw),
            (has("/config/patch_size") && has("/config/image_size"), clip::run),
            (has("/schedules"), schedules::run),
            (has("/cases/0/args/timestep_sampling"), timesteps::run),
            (has("/bucket_lists"), buckets::sizes),
            (has("/cases/0/frame_extraction"), buckets::frames),
            (has("/cases/0/resizer") && has("/layout"), buckets::pixels),
            (has("/strength") && has("/style"), merge::run),
            (has("/cases/0/solver"), samplers::run),
            (has("/latent_cases"), cache_files::run),
        ];
        kinds.into_iter().find(|(fits, _)| *fits).map(|(_, kind)| kind)
    }

    /// The tensors of `<stem><suffix>.safetensors`.
    fn tensors(&self, suffix: &str) -> Result<Rc<Tensors>> {
        self.golden.tensors(&format!("{}{suffix}.safetensors", self.stem))
    }

    /// As [`Case::tensors`]; `None` where there is no such file.
    fn tensors_if_any(&self, suffix: &str) -> Result<Option<Rc<Tensors>>> {
        match self.golden.has(&format!("{}{suffix}.safetensors", self.stem)) {
            true => self.tensors(suffix).map(Some),
            false => Ok(None),
        }
    }

    /// One check, one line: `body` compares things, an error in it is a failure.
    fn check(&self, name: &str, tolerance: Tolerance, body: impl FnOnce(&mut Line) -> Result<()>) {
        let mut line = Line::new(tolerance);
        if let Err(error) = guarded(|| body(&mut line)) {
            line.fail(format!("{error:#}"));
        }
        self.report.borrow_mut().line(&format!("{} {name}", self.stem), &line);
    }
}

/// Turns a panic into an error: one damaged case must not hide the others.
fn guarded(body: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(anyhow!("panicked: {}", text.unwrap_or("for an unknown reason")))
    })
}

/// Where lines go.
struct Report<'a> {
    out: &'a mut dyn Write,
    summary: Summary,
    /// The first error of `out`.
    broken: Option<std::io::Error>,
}

impl Report<'_> {
    fn line(&mut self, name: &str, line: &Line) {
        match line.passed() {
            true => self.summary.passed += 1,
            false => self.summary.failed += 1,
        }
        self.say(&format!("{name:<52} {line}"));
    }

    fn failure(&mut self, name: &str, why: &str) {
        self.summary.failed += 1;
        self.say(&format!("{name:<52} FAIL: {why}"));
    }

    fn say(&mut self, text: &str) {
        if let Err(error) = writeln!(self.out, "{text}") {
            self.broken.get_or_insert(error);
        }
    }
}
