//! Learning-rate schedules, as the old tool computes them.

use anyhow::Result;
use serde_json::Value;

use super::json::{list, number, numbers, text};
use super::{Case, Tolerance};
use crate::schedule::{Schedule, ScheduleSpec, StepCount};

pub fn run(case: &Case<'_>) -> Result<()> {
    for (i, entry) in list(&case.json, "schedules")?.iter().enumerate() {
        let args = &entry["args"];
        let class = text(args, "lr_scheduler_type")?;
        let name = if class.is_empty() { text(args, "lr_scheduler")? } else { class };
        let or = |key: &str, default: f64| args[key].as_f64().unwrap_or(default);
        let (lr, total) = (number(args, "learning_rate")?, number(args, "max_train_steps")? as u64);
        let spec = ScheduleSpec {
            class: class.to_string(),
            args: match args["lr_scheduler_args"].as_array() {
                Some(all) => all.iter().filter_map(|a| a.as_str().map(String::from)).collect(),
                None => Vec::new(),
            },
            warmup: StepCount::from_number(or("lr_warmup_steps", 0.0))?,
            decay: StepCount::from_number(or("lr_decay_steps", 0.0))?,
            num_cycles: or("lr_scheduler_num_cycles", 1.0),
            power: or("lr_scheduler_power", 1.0),
            timescale: args["lr_scheduler_timescale"].as_f64(),
            min_lr_ratio: args["lr_scheduler_min_lr_ratio"].as_f64(),
            compat: true,
            ..ScheduleSpec::new(text(args, "lr_scheduler")?, lr, total)
        };
        if entry["error"].is_string() {
            case.check(&format!("{i} {name} is refused"), Tolerance::Exact, |line| {
                line.equal("acceptance", &Schedule::new(&spec).is_ok(), &false);
                Ok(())
            });
            continue;
        }
        case.check(&format!("{i} {name}"), Tolerance::Rel(1e-9), |line| {
            let schedule = Schedule::new(&spec)?;
            let mut want = numbers(entry, "lr")?;
            want.extend(last(entry));
            for (step, want) in want.into_iter().enumerate() {
                let got = schedule.lr(step as u64, lr);
                // The files hold twelve digits, and near zero what is left of a recursive formula's rounding.
                let error = (got - want).abs();
                line.error(&format!("step {step}: {got:e} against {want:e}"), error, error / want.abs().max(1e-7 * lr));
            }
            Ok(())
        });
    }
    Ok(())
}

fn last(entry: &Value) -> Option<f64> {
    entry["lr_after_last"].as_f64()
}
