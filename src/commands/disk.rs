//! What a run will write, held against what the disk has: a night must not end at a full disk that could be foreseen.

use std::path::Path;

use super::job::Job;
use crate::adapter::select;
use crate::checkpoint::save_dtype;
use crate::config::RunConfig;
use crate::error::UserError;
use crate::fsio;
use crate::plan::{self, RunShape, Target};
use crate::train::TrainSettings;

/// Header, report and log of a checkpoint, roughly.
const BESIDE: u64 = 512 << 10;

/// The most files of a run that lie on the disk at one time, and bytes of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writes {
    pub loras: u64,
    pub lora_bytes: u64,
    pub states: u64,
    pub state_bytes: u64,
}

impl Writes {
    /// Those of a run with `batches` batches an epoch, of which (steps, epochs) are `done`.
    pub fn of(
        job: &Job,
        config: &RunConfig,
        settings: &TrainSettings,
        batches: u64,
        done: (u64, u64),
    ) -> anyhow::Result<Self> {
        // Adapters and moments are the same for every size of batch and on every device.
        let shape = RunShape {
            target: Target::Cpu,
            checkpoint_bytes: 2,
            latent: [1, 2, 2],
            batch: 1,
            adapter: settings.network.adapter,
            sites: select(&job.model.arch, &settings.network.patterns)?,
        };
        let sizes = plan::Job::from_config(config, &job.model.arch, &shape);
        let dtype = save_dtype(config.save_precision.as_deref())?;
        let (loras, states) = counts(config, settings, batches, done);
        Ok(Self {
            loras,
            lora_bytes: sizes.trainable() * dtype.size_in_bytes() as u64 + BESIDE,
            states,
            state_bytes: 4 * sizes.trainable() + sizes.moment_bytes() + BESIDE,
        })
    }

    pub fn bytes(&self) -> u64 {
        self.loras * self.lora_bytes + self.states * self.state_bytes
    }

    fn in_words(&self) -> String {
        let many = |n: u64, what: &str, bytes: u64| match n {
            1 => format!("a {what} of {}", fsio::human(bytes)),
            n => format!("{n} {what}s of {}", fsio::human(bytes)),
        };
        match self.states {
            0 => many(self.loras, "LoRA", self.lora_bytes),
            n => many(self.loras, "LoRA", self.lora_bytes) + " and " + &many(n, "resumable state", self.state_bytes),
        }
    }
}

/// LoRAs and states on the disk at most: what is due until the end, as far as old ones do not go, and one that is written
/// before the old one goes; and the last.
fn counts(c: &RunConfig, settings: &TrainSettings, batches: u64, (step, epoch): (u64, u64)) -> (u64, u64) {
    let due = |every: Option<u64>, total: u64, done: u64| {
        every.map_or(0, |n| (total.saturating_sub(1) / n).saturating_sub(done / n))
    };
    let (save, epochs, steps) = (settings.save, settings.total_epochs(batches), settings.total_steps(batches));
    let (by_epoch, by_step) = (due(save.epochs, epochs, epoch), due(save.steps, steps, step));
    let kept_epochs = |last: Option<u64>| last.map_or(by_epoch, |n| by_epoch.min(n + 1));
    // Steps are counted, not files.
    let kept_steps = |last: Option<u64>| last.map_or(by_step, |n| by_step.min(n / save.steps.unwrap_or(1) + 2));
    let loras = 1 + kept_epochs(c.save_last_n_epochs) + kept_steps(c.save_last_n_steps);
    let states = match save.state {
        true => {
            let (epochs, steps) = (c.save_last_n_epochs_state, c.save_last_n_steps_state);
            1 + kept_epochs(epochs.or(c.save_last_n_epochs)) + kept_steps(steps.or(c.save_last_n_steps))
        }
        false => u64::from(save.state_at_end),
    };
    (loras, states)
}

/// Refuses a disk without room for all of it; otherwise a line that says what will be written. `what` are the checkpoints of
/// the runs that are still to be done.
pub fn check(dir: &Path, what: &[Writes]) -> anyhow::Result<String> {
    let (bytes, free) = (what.iter().map(Writes::bytes).sum::<u64>(), fsio::free_space(dir)?);
    let words: Vec<String> = what.iter().map(Writes::in_words).collect();
    let (bytes_said, free_said, dir) = (fsio::human(bytes), fsio::human(free), dir.display());
    if bytes > free {
        return Err(UserError::new(format!(
            "the disk of {dir} has {free_said} free, and the checkpoints of this run take up to {bytes_said}: {}",
            words.join("; ")
        ))
        .hint("free some space, choose a directory on another disk, or keep fewer of them: --save_every_n_epochs, --save_last_n_epochs")
        .into());
    }
    Ok(format!("checkpoints: up to {bytes_said} of {free_said} in {dir}: {}", words.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::counts;
    use crate::config::RunConfig;
    use crate::train::TrainSettings;
    use wan_models::arch::ModelConfig;

    /// LoRAs and states of a run of 100 epochs of 10 batches.
    fn of(edit: impl Fn(&mut RunConfig), done: (u64, u64)) -> (u64, u64) {
        let text = crate::config::registry::text("models/demo.toml").unwrap();
        let model = ModelConfig::from_toml(text).unwrap();
        let mut config = RunConfig { max_train_epochs: Some(100), ..RunConfig::default() };
        edit(&mut config);
        let settings = TrainSettings::from_config(&config, &model, 1).unwrap();
        counts(&config, &settings, 10, done)
    }

    #[test]
    fn what_is_due_and_does_not_go_is_counted() {
        assert_eq!(of(|_| {}, (0, 0)), (1, 0));
        // The last epoch's is the run's.
        assert_eq!(of(|c| c.save_every_n_epochs = Some(20), (0, 0)), (5, 0));
        assert_eq!(of(|c| c.save_every_n_epochs = Some(20), (500, 50)), (3, 0));
        assert_eq!(of(|c| c.save_every_n_epochs = Some(20), (1000, 100)), (1, 0));
        assert_eq!(of(|c| c.save_every_n_steps = Some(100), (0, 0)), (10, 0));
        assert_eq!(of(|c| c.save_state_on_train_end = true, (0, 0)), (1, 1));
        let states = |c: &mut RunConfig| (c.save_every_n_epochs, c.save_state) = (Some(10), true);
        assert_eq!(of(states, (0, 0)), (10, 10));
        let few = |c: &mut RunConfig| {
            states(c);
            (c.save_last_n_epochs, c.save_last_n_epochs_state) = (Some(3), Some(1));
        };
        assert_eq!(of(few, (0, 0)), (5, 3));
        let steps = |c: &mut RunConfig| {
            (c.save_every_n_steps, c.save_last_n_steps, c.save_state) = (Some(50), Some(100), true);
        };
        assert_eq!(of(steps, (0, 0)), (5, 5));
    }
}
