//! Learning-rate schedules against the recorded ones, and the properties that hold for every one of them.

use serde_json::Value;
use wan_train::schedule::{Schedule, ScheduleSpec, StepCount, NAMES};

use crate::golden_support::golden_dir;

fn spec_of(args: &Value, compat: bool) -> ScheduleSpec {
    let number = |key: &str| args[key].as_f64();
    let lr = number("learning_rate").unwrap();
    let total = args["max_train_steps"].as_u64().unwrap();
    ScheduleSpec {
        class: args["lr_scheduler_type"].as_str().unwrap().into(),
        args: args["lr_scheduler_args"]
            .as_array()
            .map(|a| a.iter().map(|v| v.as_str().unwrap().to_string()).collect())
            .unwrap_or_default(),
        warmup: StepCount::from_number(number("lr_warmup_steps").unwrap()).unwrap(),
        decay: StepCount::from_number(number("lr_decay_steps").unwrap()).unwrap(),
        num_cycles: number("lr_scheduler_num_cycles").unwrap(),
        power: number("lr_scheduler_power").unwrap(),
        timescale: number("lr_scheduler_timescale"),
        min_lr_ratio: number("lr_scheduler_min_lr_ratio"),
        compat,
        ..ScheduleSpec::new(args["lr_scheduler"].as_str().unwrap(), lr, total)
    }
}

fn golden() -> Value {
    let text = std::fs::read_to_string(golden_dir().join("09_lr_schedules.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn recorded_schedules_are_reproduced() {
    let golden = golden();
    let (mut checked, mut refused, mut worst) = (0, 0, 0f64);
    for entry in golden["schedules"].as_array().unwrap() {
        let spec = spec_of(&entry["args"], true);
        let schedule = Schedule::new(&spec);
        if !entry["error"].is_null() {
            assert_eq!(schedule.unwrap_err().exit, 2, "{}", spec.name);
            refused += 1;
            continue;
        }
        let schedule = schedule.unwrap_or_else(|e| panic!("{}: {e}", spec.name));
        for (step, want) in entry["lr"].as_array().unwrap().iter().enumerate() {
            let (got, want) = (schedule.lr(step as u64, spec.lr), want.as_f64().unwrap());
            // The file holds twelve digits; values near zero are the rounding of a recursive formula.
            let error = (got - want).abs() / want.abs().max(1e-7 * spec.lr);
            assert!(error < 1e-9, "{} step {step}: {got:e} against {want:e}", spec.name);
            worst = worst.max(error);
        }
        checked += 1;
    }
    assert_eq!((checked, refused), (24, 3));
    println!("worst relative difference {worst:.1e}");
}

#[test]
fn compat_differs_from_the_default_only_in_polynomial_and_the_start_of_rex() {
    let golden = golden();
    for entry in golden["schedules"].as_array().unwrap().iter().filter(|e| e["error"].is_null()) {
        let (ours, old) = (spec_of(&entry["args"], false), spec_of(&entry["args"], true));
        let (a, b) = (Schedule::new(&ours).unwrap(), Schedule::new(&old).unwrap());
        let differs: Vec<u64> = (0..=200).filter(|s| a.factor(*s) != b.factor(*s)).collect();
        match ours.name.as_str() {
            "polynomial" if ours.min_lr_ratio.is_some() => {
                assert!(differs.len() > 150);
                let ratio = ours.min_lr_ratio.unwrap();
                assert!((a.lr(200, ours.lr) - ratio * ours.lr).abs() < 1e-18);
                assert!((b.lr(200, ours.lr) - 1e-7).abs() < 1e-18);
                assert!(a.note().unwrap().contains("ends at 1.00e-6"), "{:?}", a.note());
            }
            "rex" if ours.warmup == StepCount::Steps(20) => assert_eq!(differs, [0]),
            name => assert!(differs.is_empty(), "{name}: {differs:?}"),
        }
    }
}

#[test]
fn step_counts_read_as_steps_shares_and_percentages() {
    for (text, want) in [("0", 0), ("100", 100), ("1", 1), ("0.05", 10), ("5%", 10), ("100%", 200), ("100.0", 100)] {
        assert_eq!(text.parse::<StepCount>().unwrap().resolve(200), want, "{text}");
    }
    for text in ["1.5", "-1", "x", "120%", "", "nan"] {
        assert!(text.parse::<StepCount>().is_err(), "{text}");
    }
}

#[test]
fn every_schedule_stays_between_zero_and_the_base_rate() {
    for name in NAMES {
        for warmup in [0u64, 1, 7, 50] {
            let mut spec = ScheduleSpec::new(name, 1e-4, 50);
            spec.warmup = StepCount::Steps(if name == "constant" { 0 } else { warmup });
            spec.decay = StepCount::Ratio(0.2);
            spec.min_lr_ratio = Some(0.05);
            if name == "piecewise_constant" {
                spec.args = vec!["step_rules=1:10,0.5:20,0.1".into()];
            }
            let schedule = Schedule::new(&spec).unwrap();
            for step in 0..120 {
                let factor = schedule.factor(step);
                assert!((0.0..=1.0 + 1e-12).contains(&factor), "{name} W={warmup} s={step}: {factor}");
            }
        }
    }
}

#[test]
fn mistakes_are_named() {
    let error = |change: &dyn Fn(&mut ScheduleSpec)| {
        let mut spec = ScheduleSpec::new("cosine", 1e-4, 100);
        change(&mut spec);
        Schedule::new(&spec).unwrap_err().to_string()
    };
    assert!(error(&|s| s.name = "cosin".into()).contains("did you mean `cosine`"));
    assert!(error(&|s| s.name = "cosine_with_min_lr".into()).contains("lower limit"));
    assert!(error(&|s| s.args = vec!["lr_ned=1".into()]).contains("lr_ned"));
    assert!(error(&|s| s.class = "torch.optim.lr_scheduler.OneCycleLR".into()).contains("CosineAnnealingLR"));
    assert!(error(&|s| s.name = "piecewise_constant".into()).contains("step_rules"));
    assert!(error(&|s| s.min_lr_ratio = Some(1.5)).contains("min_lr_ratio"));
    assert!(error(&|s| {
        s.name = "polynomial".into();
        s.args = vec!["lr_end=1".into()];
    })
    .contains("would end at"));
}
