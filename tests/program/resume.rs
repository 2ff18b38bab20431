//! A run that is stopped or killed and resumed ends bit-equal to one that was not.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use safetensors::SafeTensors;

use super::{text, Bench};

/// A run of 24 steps with a state every two.
const RUN: &[&str] = &["--epochs", "3", "--save_every_n_steps", "2", "--save_state", "--learning_rate", "1e-3"];

fn tensors(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().into_iter().map(|(name, t)| (name, t.data().to_vec())).collect()
}

fn final_lora(bench: &Bench) -> PathBuf {
    let all = bench.outputs(".safetensors");
    let step_or_state = |p: &PathBuf| p.to_string_lossy().contains("-step") || p.to_string_lossy().contains("-state");
    let last: Vec<_> = all.iter().filter(|p| !step_or_state(p)).collect();
    assert_eq!(last.len(), 1, "{all:?}");
    last[0].clone()
}

fn unbroken() -> BTreeMap<String, Vec<u8>> {
    static ONCE: std::sync::OnceLock<BTreeMap<String, Vec<u8>>> = std::sync::OnceLock::new();
    let make = || {
        let bench = Bench::new();
        let out = bench.run("", RUN);
        assert!(out.status.success(), "{}", text(&out));
        tensors(&final_lora(&bench))
    };
    ONCE.get_or_init(make).clone()
}

/// The finished state that got furthest.
fn newest_state(bench: &Bench) -> Option<PathBuf> {
    bench.outputs("-state").into_iter().filter(|p| p.join("COMPLETE").is_file()).max()
}

#[test]
fn killed_at_random_instants_and_resumed_it_ends_the_same() {
    let whole = unbroken();
    let bench = Bench::new();
    let mut kills = 0;
    for attempt in 0..60u64 {
        let state = newest_state(&bench).map(|p| p.to_string_lossy().into_owned());
        let mut args = RUN.to_vec();
        if let Some(state) = &state {
            args.extend(["--resume", state]);
        }
        let mut child = bench.command("", &args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Instants spread over start-up, steps and saves; the last attempts run to the end.
        let patience = if attempt < 8 { 300 + attempt * 997 % 1400 } else { 120_000 };
        let until = std::time::Instant::now() + Duration::from_millis(patience);
        let ended = loop {
            match child.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if std::time::Instant::now() >= until => break None,
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        match ended {
            Some(status) => {
                assert!(status.success(), "attempt {attempt} ended with {status}");
                break;
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
        }
    }
    assert!(kills > 0, "nothing was killed: the run is too short for this test");
    assert_eq!(tensors(&final_lora(&bench)), whole);
}

#[test]
fn ctrl_c_ends_with_a_state_and_the_command_to_go_on() {
    let whole = unbroken();
    let bench = Bench::new();
    let child = bench.command("", RUN).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The first checkpoint shows that training is under way.
    for _ in 0..2000 {
        if newest_state(&bench).is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    send("-INT", &child);
    let out = child.wait_with_output().unwrap();
    let said = text(&out);
    if out.status.success() {
        return; // it was faster than the signal: nothing to see
    }
    assert_eq!(out.status.code(), Some(130), "{said}");
    let line = said.lines().find(|l| l.contains("--resume")).unwrap_or_else(|| panic!("{said}"));
    let state = line.split_whitespace().last().unwrap().trim_matches('\'').to_owned();
    assert!(bench.path(&state).join("COMPLETE").is_file(), "{state}");
    let rest = bench.run("", &[RUN, &["--resume", &state]].concat());
    assert!(rest.status.success(), "{}", text(&rest));
    assert_eq!(tensors(&final_lora(&bench)), whole);
}

/// Waits until a line in the step log shows that training is under way.
fn wait_for_a_step(bench: &Bench) {
    let trains = || {
        bench.outputs(".jsonl").iter().any(|log| std::fs::read_to_string(log).is_ok_and(|text| text.contains("loss")))
    };
    let waited = (0..12000).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        trains()
    });
    assert!(waited, "no step within a minute");
}

fn send(signal: &str, child: &Child) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// A training started by `env` with these words, which say how it takes signals.
fn started_with(env: &str, bench: &Bench, args: &[&str]) -> Child {
    let plain = bench.command("", args);
    let mut command = Command::new("env");
    command.arg(env).arg(plain.get_program()).args(plain.get_args()).current_dir(plain.get_current_dir().unwrap());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Shells pass a hangup on, so that it comes twice: once for both, an orderly end.
#[test]
fn a_terminal_that_goes_away_ends_a_run_with_a_state() {
    let bench = Bench::new();
    let child = started_with("--default-signal=HUP", &bench, &["--epochs", "400"]);
    wait_for_a_step(&bench);
    (0..3).for_each(|_| send("-HUP", &child));
    let out = child.wait_with_output().unwrap();
    let said = text(&out);
    assert_eq!(out.status.code(), Some(130), "{said}");
    assert!(said.contains("the terminal is gone") && said.contains("--resume"), "{said}");
    let states = bench.outputs("-state");
    assert!(states.len() == 1 && states[0].join("COMPLETE").is_file(), "{states:?}\n{said}");
}

#[test]
fn a_run_that_was_told_to_outlive_its_terminal_does() {
    let bench = Bench::new();
    let child = started_with("--ignore-signal=HUP", &bench, &["--epochs", "4"]);
    wait_for_a_step(&bench);
    send("-HUP", &child);
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && text(&out).contains("finished after 32 steps"), "{}", text(&out));
}

/// The state of a large rank takes its time, in which the second one comes.
#[test]
fn ctrl_c_twice_ends_at_once() {
    let bench = Bench::new();
    let mut child = started_with("--default-signal=INT", &bench, &["--epochs", "400", "--network_dim", "512"]);
    wait_for_a_step(&bench);
    send("-INT", &child);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("press Ctrl-C again")), "the first asks for an orderly end");
    send("-INT", &child);
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(!rest.iter().any(|line| line.contains("--resume")) && bench.outputs("-state").is_empty(), "{rest:?}");
}

#[test]
fn what_an_interrupt_saved_goes_when_the_run_has_finished() {
    const PLAIN: &[&str] = &["--epochs", "4"];
    let bench = Bench::new();
    let child = bench.command("", PLAIN).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_a_step(&bench);
    send("-INT", &child);
    let out = child.wait_with_output().unwrap();
    let said = text(&out);
    assert_eq!(out.status.code(), Some(130), "{said}");
    let (states, loras) = (bench.outputs("-state"), bench.outputs(".html"));
    assert_eq!((states.len(), loras.len()), (1, 1), "{said}");
    let lora = loras[0].with_extension("safetensors");
    assert!(lora.to_string_lossy().contains("-step") && lora.is_file());
    let rest = bench.run("", &[PLAIN, &["--resume", &states[0].to_string_lossy()]].concat());
    let said = text(&rest);
    assert!(rest.status.success() && said.contains("removed") && said.contains("-step"), "{said}");
    let left = [bench.outputs(".safetensors"), bench.outputs(".html")];
    assert!(left.iter().all(|files| files.len() == 1 && !files[0].to_string_lossy().contains("-step")), "{left:?}");
    assert!(bench.outputs("-state").is_empty());
}

#[test]
fn streaming_blocks_does_not_change_a_bit() {
    let whole = unbroken();
    for swap in [["--blocks_to_swap", "1"], ["--blocks_to_swap", "3"]] {
        let bench = Bench::new();
        let out = bench.run("", &[RUN, &swap, &["--gradient_checkpointing"]].concat());
        assert!(out.status.success(), "{}", text(&out));
        assert_eq!(tensors(&final_lora(&bench)), whole, "{swap:?}");
    }
}

#[test]
fn starting_from_weights_is_a_new_run() {
    let bench = Bench::new();
    let out = bench.run("", &["--epochs", "1"]);
    assert!(out.status.success(), "{}", text(&out));
    let lora = final_lora(&bench).to_string_lossy().into_owned();
    let again = bench.run("", &["--epochs", "1", "--resume_from", &lora, "--output_name", "second"]);
    let said = text(&again);
    assert!(again.status.success() && said.contains("starting from the weights"), "{said}");
    // The newest file of resume_checkpoints is taken by itself, and said.
    std::fs::create_dir_all(bench.path("base/resume_checkpoints")).unwrap();
    std::fs::copy(&lora, bench.path("base/resume_checkpoints/mine.safetensors")).unwrap();
    let third = bench.run("", &["--epochs", "1", "--output_name", "third"]);
    let said = text(&third);
    assert!(third.status.success() && said.contains("resume_checkpoints/mine.safetensors"), "{said}");
}
