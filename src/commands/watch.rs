//! Shows and records a training run: progress line, TensorBoard and JSON-lines log, the loss curve at every save.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::job::Job;
use crate::checkpoint::Position;
use crate::config::RunConfig;
use crate::report::{event_dir, Progress, RunLog, StepLog, Task, Work};
use crate::train::{MicroStep, Observer, RunFacts, Saved};

/// Listens to the trainer and passes on what people read.
pub struct Watch {
    progress: Arc<dyn Progress>,
    task: Option<Box<dyn Task>>,
    log: Option<RunLog>,
    curve: Option<PathBuf>,
    /// Losses of the micro-batches since the last optimizer step.
    pending: Vec<f64>,
    /// `loss/high` or `loss/low` beside the common tag, in a run that trains one of two experts.
    expert_tag: Option<String>,
}

impl Watch {
    /// Opens the log (none without `logging_dir`). `resumed_after` is the step a resumed run goes on from: what an
    /// interrupted run logged beyond it is cut.
    pub fn new(job: &Job, config: &RunConfig, resumed_after: Option<u64>) -> anyhow::Result<Self> {
        let (log, curve) = match &config.logging_dir {
            None => (None, None),
            Some(dir) => {
                let prefix = config.log_prefix.as_deref().unwrap_or_default();
                let events = event_dir(dir, prefix, chrono::Local::now(), config.log_tracker_name.as_deref());
                let name = config.output_name.as_deref().unwrap_or("run");
                let mut log = RunLog::create(&events, &dir.join(format!("{name}.jsonl")), resumed_after)?;
                log.config(&serde_json::to_string_pretty(config)?)?;
                (Some(log), Some(dir.join(format!("{name}-loss.png"))))
            }
        };
        let expert_tag = config.noise_level.as_ref().map(|level| format!("loss/{level}"));
        Ok(Self { progress: job.progress.clone(), task: None, log, curve, pending: Vec::new(), expert_tag })
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
}

impl Observer for Watch {
    fn started(&mut self, facts: &RunFacts, from: &Position) {
        let work = Work { what: "training", unit: "step", start: from.step, total: facts.total_steps };
        self.task = Some(self.progress.begin(work));
    }

    fn micro_step(&mut self, step: &MicroStep) {
        self.pending.push(f64::from(step.loss));
        let Some(update) = step.update else { return };
        let loss = self.pending.iter().sum::<f64>() / self.pending.len() as f64;
        self.pending.clear();
        if let Some(why) = &update.skipped {
            self.progress.say(&format!("warning: step {} was skipped: {why}", step.step));
        }
        let mut lr = vec![("unet", step.lr)];
        lr.extend(step.lr_plus.map(|plus| ("unet plus", plus)));
        let tag = self.expert_tag.clone();
        let mut extra = vec![("grad_norm", update.grad_norm), ("perf/s_per_step", update.seconds)];
        extra.extend(tag.as_deref().map(|tag| (tag, loss)));
        if let Some(norms) = &update.norms {
            extra.extend([
                ("max_norm/keys_scaled", norms.keys_scaled as f64),
                ("max_norm/average_key_norm", norms.mean),
                ("max_norm/max_key_norm", norms.max),
            ]);
        }
        let (at, epoch, average) = (step.step, step.epoch, step.average);
        self.record(|log| log.step(&StepLog { step: at, epoch, loss, average, lr: &lr, extra: &extra }));
        if let Some(task) = &mut self.task {
            task.advance(1, &format!("epoch {epoch}, loss {loss:.4} (avr {average:.4}), lr {:.3e}", step.lr));
        }
    }

    fn epoch(&mut self, epoch: u64, _step: u64, average_loss: f64) {
        self.record(|log| log.epoch(epoch, average_loss));
    }

    fn saved(&mut self, saved: &Saved) {
        for path in [&saved.lora, &saved.state].into_iter().flatten() {
            self.progress.say(&format!("saved {}", path.display()));
        }
        for path in &saved.removed {
            self.progress.say(&format!("removed {}", path.display()));
        }
        self.draw();
    }
}
