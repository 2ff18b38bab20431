//! The record of a training run: TensorBoard events under the old trainer's tags, one JSON line a step, and from those
//! the loss curve.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{json, Map, Value};

use super::curve::write_loss_curve;
use super::tensorboard::EventWriter;
use crate::fsio;

/// What one step has to tell.
#[derive(Debug, Clone, Copy)]
pub struct StepLog<'a> {
    /// Optimizer steps done, this one included: the x axis.
    pub step: u64,
    /// Counts from 1.
    pub epoch: u64,
    pub loss: f64,
    pub average: f64,
    /// By parameter group: `("unet", lr)`, and `("unet plus", lr)` where there is such a group.
    pub lr: &'a [(&'a str, f64)],
    /// Anything else, under its full tag (`grad_norm`, `time/step`, `loss/high`).
    pub extra: &'a [(&'a str, f64)],
    /// Timestep and loss of each sample; in the JSON lines only.
    pub samples: &'a [(f64, f64)],
}

/// One step as it was logged.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Point {
    pub step: u64,
    pub loss: f64,
    /// Of the high-noise expert and of the low-noise one, where that was logged and they took part.
    pub experts: [Option<f64>; 2],
    pub lr: f64,
    /// NaN where it was not logged.
    pub grad_norm: f64,
    /// Timestep and loss of each sample.
    pub samples: Vec<(f64, f64)>,
}

/// Writes the log of a run as it goes.
pub struct RunLog {
    events: EventWriter,
    lines: File,
    lines_path: PathBuf,
    dir: PathBuf,
}

/// Where `RunLog` puts its events: `{logging_dir}/{prefix}{YYYYmmddHHMMSS}/{tracker, or network_train}`. The directory of the
/// time is made here and is this run's alone: others that began in the same second get `…-2` and so on, since TensorBoard
/// takes what lies in one directory for one run.
pub fn event_dir(
    logging_dir: &Path,
    prefix: &str,
    started: chrono::DateTime<chrono::Local>,
    tracker: Option<&str>,
) -> Result<PathBuf> {
    let time = format!("{prefix}{}", started.format("%Y%m%d%H%M%S"));
    let mut dir = logging_dir.join(&time);
    fsio::create_dir(logging_dir)?;
    let mut n = 1;
    loop {
        match std::fs::create_dir(&dir) {
            Ok(()) => return Ok(dir.join(tracker.unwrap_or("network_train"))),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                n += 1;
                dir = logging_dir.join(format!("{time}-{n}"));
            }
            Err(e) => return Err(fsio::explain(e, &dir)),
        }
    }
}

impl RunLog {
    /// Starts a log: events in `event_dir`, JSON lines in `lines_path`. A run that goes on after `resumed_after` steps
    /// keeps the lines up to that step, cuts what the interrupted run wrote beyond it, and appends.
    pub fn create(event_dir: &Path, lines_path: &Path, resumed_after: Option<u64>) -> Result<Self> {
        let explain = |e| fsio::explain(e, event_dir);
        let events = EventWriter::create(event_dir, resumed_after.map_or(0, |s| s + 1)).map_err(explain)?;
        let kept = match resumed_after {
            Some(step) => kept_lines(lines_path, step),
            None => String::new(),
        };
        fsio::write_bytes(lines_path, kept.as_bytes())?;
        let lines = OpenOptions::new().append(true).open(lines_path).map_err(|e| fsio::explain(e, lines_path))?;
        Ok(Self { events, lines, lines_path: lines_path.to_path_buf(), dir: event_dir.to_path_buf() })
    }

    pub fn event_dir(&self) -> &Path {
        &self.dir
    }

    pub fn lines_path(&self) -> &Path {
        &self.lines_path
    }

    /// Logs a step in both places.
    pub fn step(&mut self, log: &StepLog<'_>) -> Result<()> {
        let mut scalars = vec![("loss/current".to_string(), log.loss), ("loss/average".to_string(), log.average)];
        scalars.extend(log.lr.iter().map(|(group, lr)| (format!("lr/{group}"), *lr)));
        scalars.extend(log.extra.iter().map(|(tag, value)| (tag.to_string(), *value)));
        let events = scalars.iter().map(|(tag, value)| (tag.as_str(), *value as f32));
        self.events.scalars(log.step, events).map_err(|e| fsio::explain(e, &self.dir))?;

        let mut line = Map::new();
        line.insert("step".into(), json!(log.step));
        line.insert("epoch".into(), json!(log.epoch));
        line.extend(scalars.into_iter().map(|(tag, value)| (tag, number(value))));
        if !log.samples.is_empty() {
            let short = |v: f64| number((v * 1e5).round() / 1e5);
            let samples = log.samples.iter().map(|(t, loss)| json!([short(*t), short(*loss)])).collect();
            line.insert("samples".into(), Value::Array(samples));
        }
        self.line(line)
    }

    /// Logs the mean loss of a finished epoch, at the epoch's number.
    pub fn epoch(&mut self, epoch: u64, mean_loss: f64) -> Result<()> {
        self.events.scalars(epoch, [("loss/epoch", mean_loss as f32)]).map_err(|e| fsio::explain(e, &self.dir))?;
        self.flush()
    }

    /// Puts the settings of the run under the "Text" tab.
    pub fn config(&mut self, text: &str) -> Result<()> {
        let fenced = format!("```\n{text}\n```");
        self.events.text(0, "config", &fenced).map_err(|e| fsio::explain(e, &self.dir))
    }

    /// A picture, as the bytes of a PNG file, in the events alone.
    pub fn picture(&mut self, step: u64, tag: &str, size: (u32, u32), png: &[u8]) -> Result<()> {
        self.events.picture(step, tag, size, png).map_err(|e| fsio::explain(e, &self.dir))?;
        self.flush()
    }

    pub fn flush(&mut self) -> Result<()> {
        self.events.flush().map_err(|e| fsio::explain(e, &self.dir))
    }

    /// Draws every loss logged so far, those before a resume included.
    pub fn write_curve(&mut self, path: &Path) -> Result<()> {
        self.flush()?;
        write_loss_curve(path, &read_losses(&self.lines_path)?)
    }

    fn line(&mut self, fields: Map<String, Value>) -> Result<()> {
        let mut text = Value::Object(fields).to_string();
        text.push('\n');
        // One write a line: a reader, or a run killed now, sees whole lines.
        self.lines.write_all(text.as_bytes()).map_err(|e| fsio::explain(e, &self.lines_path))
    }
}

/// JSON has no NaN; as text it is at least seen.
fn number(value: f64) -> Value {
    if value.is_finite() {
        json!(value)
    } else {
        json!(value.to_string())
    }
}

fn step_of(line: &str) -> Option<u64> {
    serde_json::from_str::<Value>(line).ok()?.get("step")?.as_u64()
}

/// The lines up to a step, without torn ones; nothing where there is no file.
fn kept_lines(path: &Path, step: u64) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().filter(|line| step_of(line).is_some_and(|s| s <= step)).map(|line| format!("{line}\n")).collect()
}

/// Every step of a log; torn lines are left out.
pub fn read_points(path: &Path) -> Result<Vec<Point>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let float = |v: &Value| v.as_f64().or_else(|| v.as_str()?.parse().ok());
    let point = |line: &str| {
        let value: Value = serde_json::from_str(line).ok()?;
        let of = |tag: &str| value.get(tag).and_then(float);
        let pair = |v: &Value| Some((float(v.get(0)?)?, float(v.get(1)?)?));
        let samples = value.get("samples").and_then(Value::as_array);
        Some(Point {
            step: value.get("step")?.as_u64()?,
            loss: of("loss/current")?,
            experts: [of("loss/high"), of("loss/low")],
            lr: of("lr/unet").unwrap_or(f64::NAN),
            grad_norm: of("grad_norm").unwrap_or(f64::NAN),
            samples: samples.map(|all| all.iter().filter_map(pair).collect()).unwrap_or_default(),
        })
    };
    Ok(String::from_utf8_lossy(&text).lines().filter_map(point).collect())
}

/// `(step, loss)` of every line of a log.
pub fn read_losses(path: &Path) -> Result<Vec<(u64, f64)>> {
    Ok(read_points(path)?.into_iter().map(|p| (p.step, p.loss)).collect())
}
