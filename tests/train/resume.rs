//! A run that is stopped or killed and resumed ends bit-equal to one that was not.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Result;
use wan_train::checkpoint::{Names, TrainState};
use wan_train::train::{Saved, Saver, TrainSettings, Trainer, When};

use super::support::{bits, data, settings, Bench};

type Change = fn(&mut wan_train::config::RunConfig);

/// Settings whose state is the most there is to get wrong.
const VARIANTS: [(&str, Change); 6] = [
    ("plain", |_| {}),
    ("accumulation cut short by the epoch", |c| c.gradient_accumulation_steps = 2),
    ("8-bit, LoRA+, dropout", |c| {
        c.optimizer_type = "adamw8bit".into();
        c.network_dim = 280;
        c.network_dropout = Some(0.1);
        c.network_args = vec!["loraplus_lr_ratio=2".into(), "rank_dropout=0.1".into()];
    }),
    ("strata, rejection, polynomial", |c| {
        c.num_timestep_buckets = Some(4);
        c.min_timestep = Some(500);
        c.preserve_distribution_shape = true;
        c.lr_scheduler = "polynomial".into();
        c.lr_scheduler_min_lr_ratio = Some(0.1);
        c.scale_weight_norms = Some(0.5);
    }),
    ("LoHa", |c| {
        c.network_module = "networks.loha".into();
        c.network_args = vec!["rank_dropout=0.2".into(), "module_dropout=0.2".into()];
    }),
    ("LoKr", |c| {
        c.network_module = "networks.lokr".into();
        c.network_dim = 1;
        c.network_args = vec!["factor=2".into(), "exclude_patterns=['.*ffn.*']".into()];
    }),
];

#[test]
fn a_stopped_run_continues_bit_for_bit() {
    // Three small items and two large ones in batches of two: three batches an epoch, nine in all.
    let bench = Bench::new(data(3, 2, 2));
    let dir = tempfile::tempdir().unwrap();
    for (what, change) in VARIANTS {
        let whole = bench.run(settings(change), None, None).unwrap();
        // Every step once for the plain run; elsewhere the middle of an epoch and its end.
        let stops: Vec<u64> = if what == "plain" { (1..whole.record.facts.total_steps).collect() } else { vec![2, 3] };
        for stop in stops {
            let first = bench.run(settings(change), None, Some(stop)).unwrap();
            let state = first.saver.last.unwrap();
            assert_eq!((first.saver.asked.last().unwrap().0, state.position.step), (When::Stop(stop), stop));
            // Through the files, as a real resume goes.
            let path = dir.path().join("run-state");
            state.save(&path).unwrap();
            let state = TrainState::load(&path).unwrap();
            let second = bench.run(settings(change), Some(&state), None).unwrap();
            let mut micro = first.record.micro.clone();
            micro.extend(&second.record.micro);
            assert_eq!(micro, whole.record.micro, "{what}, stopped after step {stop}: losses and averages");
            assert_eq!(bits(&second.state), bits(&whole.state), "{what}, stopped after step {stop}");
            assert_eq!(second.state.position, whole.state.position);
            assert_eq!(second.outcome, whole.outcome);
            let mut epochs = first.record.epochs.clone();
            epochs.extend(&second.record.epochs);
            assert_eq!(epochs, whole.record.epochs, "{what}, stopped after step {stop}");
        }
    }
}

#[test]
fn a_state_saved_at_the_last_step_of_an_epoch_still_ends_the_epoch() {
    let bench = Bench::new(data(2, 0, 1));
    let options = || settings(|c| c.save_every_n_epochs = Some(1));
    let first = bench.run(options(), None, Some(2)).unwrap();
    let state = first.saver.last.unwrap();
    assert_eq!((state.position.epoch, state.position.micro_batch), (0, 2));
    let second = bench.run(options(), Some(&state), None).unwrap();
    assert_eq!(second.record.epochs, [1, 2, 3]);
    let asked: Vec<When> = second.saver.asked.iter().map(|a| a.0).collect();
    assert_eq!(asked, [When::Epoch(1), When::Epoch(2), When::End]);
}

#[test]
fn a_finished_run_resumed_does_nothing_but_save_its_end() {
    let bench = Bench::new(data(2, 0, 1));
    let options = || settings(|c| c.save_state = true);
    let whole = bench.run(options(), None, None).unwrap();
    let again = bench.run(options(), Some(&whole.state), None).unwrap();
    assert!(again.record.micro.is_empty());
    assert_eq!(bits(&again.state), bits(&whole.state));
    // More epochs go on from there.
    let more = bench
        .run(
            settings(|c| {
                c.save_state = true;
                c.max_train_epochs = Some(4);
            }),
            Some(&whole.state),
            None,
        )
        .unwrap();
    assert_eq!(more.record.micro.len(), 2);
}

#[test]
fn a_state_of_another_run_is_refused_with_the_difference() {
    let bench = Bench::new(data(2, 0, 1));
    let state = bench.run(settings(|c| c.save_state = true), None, None).unwrap().state;
    let refused = |bench: &Bench, settings: TrainSettings| {
        bench.trainer(settings).restore(&state, Path::new("x-state")).unwrap_err().to_string()
    };
    let text = refused(&bench, settings(|c| c.network_dim = 4));
    assert!(text.contains("x-state") && text.contains("rank 3") && text.contains("rank 4"), "{text}");
    let text = refused(&bench, settings(|c| c.optimizer_type = "adamw8bit".into()));
    assert!(text.contains("adamw8bit"), "{text}");
    let text = refused(&Bench::new(data(3, 0, 1)), settings(|_| {}));
    assert!(text.contains("dataset"), "{text}");
    let text = refused(&bench, TrainSettings { seed: 6, ..settings(|_| {}) });
    assert!(text.contains("seed 6") && text.contains("with 5"), "{text}");
    let text = refused(&bench, settings(|c| c.network_args = vec!["exclude_patterns=['.*ffn.*']".into()]));
    assert!(text.contains("another network"), "{text:?}");
}

/// Writes a state after every step, under names that count.
struct ToDisk {
    names: Names,
}

impl Saver for ToDisk {
    fn save(&mut self, when: When, state: bool, trainer: &Trainer) -> Result<Saved> {
        let path = match when {
            When::Step(n) => self.names.step_state(n),
            _ => self.names.final_state(),
        };
        if state {
            trainer.snapshot()?.save(&path)?;
        }
        Ok(Saved { state: Some(path), ..Saved::default() })
    }
}

const CHILD: &str = "WAN_TRAIN_TEST_RUN_INTO";

fn long_settings() -> TrainSettings {
    settings(|c| {
        c.max_train_epochs = Some(12);
        c.save_every_n_steps = Some(1);
        c.save_state = true;
        c.gradient_accumulation_steps = 2;
    })
}

/// The part of the test below that gets killed: trains into the directory it is told.
#[test]
fn child_trains_until_it_is_killed() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    let bench = Bench::new(data(3, 2, 2));
    let mut trainer = bench.trainer(long_settings());
    let names = Names::new(&dir, "run");
    if let Some(state) = names.latest_state() {
        trainer.restore(&TrainState::load(&state).unwrap(), &state).unwrap();
    }
    trainer.run(&mut (), &mut ToDisk { names }, &AtomicBool::new(false)).unwrap();
}

#[test]
fn a_run_killed_at_any_instant_continues_bit_for_bit() {
    let bench = Bench::new(data(3, 2, 2));
    let whole = bench.run(long_settings(), None, None).unwrap();
    let steps = whole.record.facts.total_steps;
    let dir = tempfile::tempdir().unwrap();
    let names = Names::new(dir.path(), "run");
    let finished = |p: &PathBuf| p.ends_with("run-state");
    // Each child is killed a little after it has got a step further; the last one may finish.
    let (mut kills, mut reached) = (0, 0);
    while !names.latest_state().as_ref().is_some_and(finished) && kills < 6 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["train::resume::child_trains_until_it_is_killed", "--exact", "--test-threads=1"])
            .env(CHILD, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let step_now = || names.latest_state().and_then(|p| wan_train::checkpoint::state::peek(&p)).map_or(0, |p| p.0);
        let patience = Instant::now() + Duration::from_secs(60);
        while step_now() <= reached + 1 && child.try_wait().unwrap().is_none() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_micros(700 * kills));
        let _ = child.kill();
        child.wait().unwrap();
        reached = step_now();
        kills += 1;
    }
    assert!(kills > 2 && reached > 3, "{kills} children got to step {reached} of {steps}");
    let state = TrainState::load(&names.latest_state().unwrap()).unwrap();
    let rest = bench.run(long_settings(), Some(&state), None).unwrap();
    assert_eq!(bits(&rest.state), bits(&whole.state), "killed {kills} times, last at step {reached} of {steps}");
    let seen = rest.record.micro.len();
    assert_eq!(rest.record.micro, whole.record.micro[whole.record.micro.len() - seen..]);
}

/// Prints a digest of a run's end, for the test below.
#[test]
fn child_prints_the_weights() {
    if std::env::var(CHILD).as_deref() != Ok("digest") {
        return;
    }
    let state = Bench::new(data(3, 2, 2)).run(settings(|_| {}), None, None).unwrap().state;
    let sum =
        bits(&state).iter().flat_map(|(_, v)| v).fold(0u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    println!("digest {sum:016x}");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let digest = |threads: &str| {
        let out = Command::new(std::env::current_exe().unwrap())
            .args(["train::resume::child_prints_the_weights", "--exact", "--nocapture"])
            .env(CHILD, "digest")
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        text.lines().find_map(|l| l.strip_prefix("digest ").map(str::to_owned)).unwrap_or_else(|| panic!("{text}"))
    };
    let one = digest("1");
    for threads in ["2", "3", "8"] {
        assert_eq!(digest(threads), one, "{threads} threads");
    }
}
