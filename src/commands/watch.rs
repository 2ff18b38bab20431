//! Shows and records a training run: progress line, TensorBoard and JSON-lines log, the loss curve and a report at every
//! save.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use wan_kernels::Exec;

use super::job::Job;
use super::plan::Planned;
use crate::checkpoint::Position;
use crate::config::RunConfig;
use crate::plan::host_peak;
use crate::report::runlog::read_points;
use crate::report::{event_dir, write_report, Point, Progress, RunLog, RunReport, StepLog, Task, Work};
use crate::train::preview::write::png;
use crate::train::preview::{At, Previews};
use crate::train::timesteps::Timestep;
use crate::train::{Expert, MicroStep, Observer, RunFacts, Saved, Trainer};

/// What a run stands on, for its report.
pub struct Background<'a> {
    pub exec: &'a Exec,
    pub plan: &'a Planned,
    /// What became of every file of the dataset.
    pub dataset: String,
    pub previews: Option<Previews<'a>>,
}

/// Listens to the trainer and passes on what people read.
pub struct Watch<'a> {
    progress: Arc<dyn Progress>,
    task: Option<Box<dyn Task>>,
    log: Option<RunLog>,
    curve: Option<PathBuf>,
    background: Background<'a>,
    report: RunReport,
    facts: RunFacts,
    began: Instant,
    skipped: u64,
    /// Micro-batches since the last optimizer step.
    pending: Pending,
    /// The expert that this run trains, where it trains one of two.
    expert: Option<String>,
    /// One adapter over both experts: each batch is one's.
    shared: bool,
    /// Timesteps that the other expert would see were trained, and that was said.
    mixed: bool,
    /// Where the high-noise expert takes over (0..1): splits the loss of a run that trains over all noise.
    boundary: Option<f64>,
}

#[derive(Default)]
struct Pending {
    losses: Vec<f64>,
    /// Of those, the ones of the high expert and of the low one, where the batches are either's.
    of_experts: [Vec<f64>; 2],
    /// Timestep and loss of each sample.
    samples: Vec<(f64, f64)>,
    tokens: u64,
}

const GIB: f64 = (1u64 << 30) as f64;

impl<'a> Watch<'a> {
    /// Opens the log (none without `logging_dir`). `resumed_after` is the step a resumed run goes on from: what an
    /// interrupted run logged beyond it is cut.
    pub fn new(
        job: &Job,
        config: &RunConfig,
        resumed_after: Option<u64>,
        background: Background<'a>,
    ) -> anyhow::Result<Self> {
        let mut report = report_of(job, config)?;
        let (log, curve) = match &config.logging_dir {
            None => (None, None),
            Some(dir) => {
                let prefix = config.log_prefix.as_deref().unwrap_or_default();
                let events = event_dir(dir, prefix, chrono::Local::now(), config.log_tracker_name.as_deref())?;
                let name = config.output_name.as_deref().unwrap_or("run");
                let mut log = RunLog::create(&events, &dir.join(format!("{name}.jsonl")), resumed_after)?;
                log.config(&serde_json::to_string_pretty(config)?)?;
                report.points = read_points(log.lines_path())?;
                (Some(log), Some(dir.join(format!("{name}-loss.png"))))
            }
        };
        report.dataset = background.dataset.clone();
        report.plan = background.plan.table();
        Ok(Self {
            progress: job.progress.clone(),
            task: None,
            log,
            curve,
            background,
            report,
            facts: RunFacts::default(),
            began: Instant::now(),
            skipped: 0,
            pending: Pending::default(),
            expert: config.noise_level.clone().filter(|_| !config.is_shared()),
            shared: config.is_shared(),
            mixed: false,
            boundary: config.boundary(),
        })
    }

    /// Where the events, the JSON lines and the curve are.
    pub fn places(&self) -> Option<(&Path, &Path, &Path)> {
        let log = self.log.as_ref()?;
        Some((log.event_dir(), log.lines_path(), self.curve.as_deref()?))
    }

    /// Draws the curve once more and ends the progress line.
    pub fn close(&mut self) {
        self.task = None;
        self.draw();
    }

    /// A log that cannot be written is said once and given up: it must not end the training of a night.
    fn record(&mut self, write: impl FnOnce(&mut RunLog) -> anyhow::Result<()>) {
        if let Some(Err(error)) = self.log.as_mut().map(write) {
            self.progress.say(&format!("warning: logging stops here: {error:#}"));
            self.log = None;
        }
    }

    fn draw(&mut self) {
        if let Some(curve) = self.curve.clone() {
            self.record(|log| log.write_curve(&curve));
        }
    }

    /// Mean loss of either expert: `loss/high`, `loss/low`; by who computed it, or of a single model by the timesteps.
    fn by_expert(&self, loss: f64) -> Vec<(String, f64)> {
        if let Some(level) = &self.expert {
            return vec![(format!("loss/{level}"), loss)];
        }
        let mean = |own: &[f64]| (!own.is_empty()).then(|| own.iter().sum::<f64>() / own.len() as f64);
        let [high, low] = match (self.shared, self.boundary) {
            (true, _) => self.pending.of_experts.each_ref().map(|own| mean(own)),
            (false, None) => return Vec::new(),
            (false, Some(boundary)) => [Expert::High, Expert::Low].map(|expert| {
                let own = self.pending.samples.iter().filter(|s| Expert::at(s.0, boundary) == expert);
                mean(&own.map(|s| s.1).collect::<Vec<f64>>())
            }),
        };
        let tags = [("loss/high", high), ("loss/low", low)];
        tags.into_iter().filter_map(|(tag, mean)| Some((tag.to_string(), mean?))).collect()
    }

    /// Of one adapter over both experts: the steps that each took part in and its mean loss, from the start on as far as
    /// it was logged.
    pub fn experts(&self) -> Vec<(&'static str, String)> {
        let points = &self.report.points;
        let one = |which: usize| {
            let losses: Vec<f64> = points.iter().filter_map(|p| p.experts[which]).collect();
            let share = 100.0 * losses.len() as f64 / points.len().max(1) as f64;
            let finite: Vec<f64> = losses.iter().copied().filter(|loss| loss.is_finite()).collect();
            let mean = finite.iter().sum::<f64>() / finite.len() as f64;
            let mean = if finite.is_empty() { String::new() } else { format!(", mean loss {mean:.5}") };
            (EXPERTS[which], format!("{} of {} steps ({share:.0} %){mean}", losses.len(), points.len()))
        };
        if self.shared {
            vec![one(0), one(1)]
        } else {
            Vec::new()
        }
    }

    /// Memory in GiB: of the card now and at most, of this process at most.
    fn memory(&self) -> Vec<(&'static str, f64)> {
        let mut all = Vec::new();
        #[cfg(feature = "cuda")]
        if let Exec::Cuda { gpu, .. } = self.background.exec {
            if let Ok(m) = gpu.memory() {
                all.extend([("mem/device_gib", m.used as f64 / GIB), ("mem/device_peak_gib", m.peak as f64 / GIB)]);
            }
        }
        all.extend(host_peak().map(|bytes| ("mem/host_peak_gib", bytes as f64 / GIB)));
        all
    }

    fn write_report(&mut self, lora: &Path) {
        let points = &self.report.points;
        let done = points.last().map_or(0, |p| p.step);
        let recent: Vec<f64> =
            points.iter().rev().take(self.facts.batches_per_epoch.max(1) as usize).map(|p| p.loss).collect();
        let mean = recent.iter().sum::<f64>() / recent.len().max(1) as f64;
        self.report.facts.retain(|(name, _)| !LIVE.contains(&name.as_str()) && !EXPERTS.contains(&name.as_str()));
        let experts = self.experts();
        self.report.facts.extend(experts.into_iter().map(|(name, what)| (name.to_owned(), what)));
        let live = [
            format!("{done} of {}", self.facts.total_steps),
            format!(
                "{}, each of {} batches and {} samples",
                self.facts.total_epochs, self.facts.batches_per_epoch, self.facts.samples_per_epoch
            ),
            format!("{} numbers in {} adapters", self.facts.trainable, self.facts.sites),
            format!("{mean:.5}"),
            self.skipped.to_string(),
            crate::report::progress::clock(self.began.elapsed()),
            chrono::Local::now().format("%Y-%m-%d %H:%M:%S").to_string(),
        ];
        self.report.facts.extend(LIVE.iter().map(|n| n.to_string()).zip(live));
        self.report.measured = self.background.plan.measured(self.background.exec);
        if let Some(bytes) = host_peak() {
            self.report.measured.push(format!("peak host memory of this process: {:.2} GiB", bytes as f64 / GIB));
        }
        // As the log: what cannot be written must not end the training.
        if let Err(error) = write_report(&lora.with_extension("html"), &self.report) {
            self.progress.say(&format!("warning: no report was written: {error:#}"));
        }
    }
}

/// The same of the two experts.
const EXPERTS: [&str; 2] = ["high noise", "low noise"];

/// Facts of a report that change from save to save.
const LIVE: [&str; 7] =
    ["steps", "epochs", "trained", "mean loss of the last epoch", "steps skipped", "time in this session", "written"];

/// What a report says about a run from its start.
fn report_of(job: &Job, config: &RunConfig) -> anyhow::Result<RunReport> {
    let name = |p: &Option<PathBuf>| {
        p.as_ref().and_then(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let mut facts = vec![("task".to_string(), config.task.clone()), ("base".into(), name(&config.dit))];
    match (&config.noise_level, config.boundary()) {
        (Some(_), Some(boundary)) if config.is_shared() => facts.extend([
            ("base, high noise".to_string(), name(&config.dit_high_noise)),
            ("expert".into(), format!("both, the high-noise one from {boundary} on")),
        ]),
        (Some(level), _) => facts.push(("expert".into(), format!("{level} noise"))),
        _ => {}
    }
    facts.push(("program".into(), format!("wan-train {}", env!("CARGO_PKG_VERSION"))));
    facts.push(("seed".into(), config.seed.map(|s| s.to_string()).unwrap_or_default()));
    let mut options = Vec::new();
    if let serde_json::Value::Object(all) = serde_json::to_value(config)? {
        for (option, value) in all {
            let value = match value {
                serde_json::Value::String(s) => s,
                serde_json::Value::Null => "not set".into(),
                other => other.to_string(),
            };
            let origin = job.resolved.origin.get(option.as_str()).map_or("default".into(), |o| o.to_string());
            options.push([option, value, origin]);
        }
    }
    let title = config.output_name.clone().unwrap_or_else(|| "training run".into());
    Ok(RunReport { title, facts, options, ..RunReport::default() })
}

impl Observer for Watch<'_> {
    fn started(&mut self, facts: &RunFacts, from: &Position) {
        self.facts = *facts;
        let work = Work { what: "training", unit: "step", start: from.step, total: facts.total_steps };
        self.task = Some(self.progress.begin(work));
    }

    fn micro_step(&mut self, step: &MicroStep) {
        self.pending.losses.push(f64::from(step.loss));
        if let Some(expert) = step.expert {
            self.pending.of_experts[usize::from(expert == Expert::Low)].push(f64::from(step.loss));
            let strange = |t: &Timestep| Expert::at(t.t.into(), self.boundary.unwrap_or_default()) != expert;
            if !self.mixed && step.timesteps.iter().any(strange) {
                self.mixed = true;
                self.progress.say(&format!(
                    "warning: step {}: no timesteps of the {}-noise expert were found for every item of a batch, which is trained on any (said once)",
                    step.step,
                    expert.name()
                ));
            }
        }
        self.pending.tokens += step.tokens;
        let samples = step.timesteps.iter().zip(step.per_sample).map(|(t, l)| (f64::from(t.t), f64::from(*l)));
        self.pending.samples.extend(samples);
        let Some(update) = step.update else { return };
        let loss = self.pending.losses.iter().sum::<f64>() / self.pending.losses.len() as f64;
        if let Some(why) = &update.skipped {
            self.skipped += 1;
            self.progress.say(&format!("warning: step {} was skipped: {why}", step.step));
        }
        let mut lr = vec![("unet", step.lr)];
        lr.extend(step.lr_plus.map(|plus| ("unet plus", plus)));
        let by_expert = self.by_expert(loss);
        let mut extra = vec![("grad_norm", update.grad_norm), ("perf/s_per_step", update.seconds)];
        if update.seconds > 0.0 {
            extra.push(("perf/tokens_per_s", self.pending.tokens as f64 / update.seconds));
        }
        extra.extend(by_expert.iter().map(|(tag, loss)| (tag.as_str(), *loss)));
        extra.extend(self.memory());
        if let Some(norms) = &update.norms {
            extra.extend([
                ("max_norm/keys_scaled", norms.keys_scaled as f64),
                ("max_norm/average_key_norm", norms.mean),
                ("max_norm/max_key_norm", norms.max),
            ]);
        }
        let (at, epoch, average) = (step.step, step.epoch, step.average);
        let of = |name: &str| by_expert.iter().find(|(tag, _)| tag == name).map(|(_, loss)| *loss);
        let experts = [of("loss/high"), of("loss/low")];
        let samples = std::mem::take(&mut self.pending).samples;
        self.record(|log| {
            log.step(&StepLog { step: at, epoch, loss, average, lr: &lr, extra: &extra, samples: &samples })
        });
        let (lr, grad_norm) = (step.lr, update.grad_norm);
        self.report.points.push(Point { step: at, loss, experts, lr, grad_norm, samples });
        if let Some(task) = &mut self.task {
            task.advance(1, &format!("epoch {epoch}, loss {loss:.4} (avr {average:.4}), lr {:.3e}", step.lr));
        }
    }

    fn epoch(&mut self, epoch: u64, _step: u64, average_loss: f64) {
        self.record(|log| log.epoch(epoch, average_loss));
    }

    fn preview(&mut self, at: At, trainer: &Trainer) {
        let Some(previews) = &self.background.previews else { return };
        let made = previews.make(at, trainer, &*self.progress);
        let step = trainer.position().step;
        for made in made {
            let (w, h) = made.first_frame.dimensions();
            self.record(|log| {
                log.picture(step, &format!("preview/{:02}", made.number), (w, h), &png(&made.first_frame)?)
            });
        }
    }

    fn saved(&mut self, saved: &Saved) {
        for path in [&saved.lora, &saved.state].into_iter().flatten() {
            self.progress.say(&format!("saved {}", path.display()));
        }
        for path in &saved.removed {
            self.progress.say(&format!("removed {}", path.display()));
            if path.extension().is_some_and(|e| e == "safetensors") {
                // Gone already where reports could not be written.
                let _ = std::fs::remove_file(path.with_extension("html"));
            }
        }
        self.draw();
        if let Some(lora) = &saved.lora {
            self.write_report(lora);
        }
    }
}
