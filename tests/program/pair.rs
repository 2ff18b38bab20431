//! `--noise_level both`: two LoRAs in one go, whatever interrupts it.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::mistakes::refused;
use super::{read_lora, text, wan_train, Bench, Tensors};

/// A recipe with two experts of the demo's size.
const RECIPE: &str = r#"
extends = "demo"
output_name = "two"
max_train_epochs = 2
save_every_n_epochs = 1
timestep_boundary = 0.875
[high]
dit = "{base_dir}/models/demo_dit_high.safetensors"
network_dim = 8
network_alpha = 8
min_timestep = 875
max_timestep = 1000
[low]
min_timestep = 0
max_timestep = 875
"#;

fn bench() -> Bench {
    let bench = Bench::new();
    std::fs::write(bench.path("two.toml"), RECIPE).unwrap();
    bench
}

fn both(bench: &Bench, verb: &str, args: &[&str]) -> Command {
    let mut command = wan_train(&bench.path("."));
    command.args((!verb.is_empty()).then_some(verb));
    command.args(["--template", "two.toml", "--base_dir", "base", "--noise_level", "both"]).args(args);
    command
}

fn run(bench: &Bench, args: &[&str]) -> (bool, String) {
    let out = both(bench, "", args).output().unwrap();
    (out.status.success(), text(&out))
}

/// The finished LoRA of an expert.
fn lora(bench: &Bench, level: &str) -> PathBuf {
    let ours = |p: &PathBuf| {
        let name = p.file_name().unwrap().to_string_lossy().into_owned();
        let stamp = name.strip_prefix(&format!("two-{level}-")).and_then(|n| n.strip_suffix(".safetensors"));
        stamp.is_some_and(|s| !s.contains('-'))
    };
    let all: Vec<_> = bench.outputs(".safetensors").into_iter().filter(ours).collect();
    assert_eq!(all.len(), 1, "{:?}", bench.outputs(".safetensors"));
    all[0].clone()
}

/// What an unbroken run makes of the two experts.
fn unbroken() -> (Tensors, Tensors) {
    static ONCE: std::sync::OnceLock<(Tensors, Tensors)> = std::sync::OnceLock::new();
    let make = || {
        let bench = bench();
        let (fine, said) = run(&bench, &[]);
        assert!(fine, "{said}");
        (read_lora(&lora(&bench, "high")).0, read_lora(&lora(&bench, "low")).0)
    };
    ONCE.get_or_init(make).clone()
}

fn assert_same(bench: &Bench) {
    let (high, low) = unbroken();
    assert_eq!(read_lora(&lora(bench, "high")).0, high);
    assert_eq!(read_lora(&lora(bench, "low")).0, low);
}

fn start(bench: &Bench) -> Child {
    both(bench, "", &[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until something of that name is in the output directory, or the program has ended.
fn wait_for(bench: &Bench, child: &mut Child, part: &str, suffix: &str) {
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(120) {
        let there = bench.outputs(suffix).iter().any(|p| p.to_string_lossy().contains(part));
        if there || child.try_wait().unwrap().is_some() {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("no {part}*{suffix} after two minutes");
}

#[test]
fn each_expert_gets_its_own_settings_names_and_logs() {
    let bench = bench();
    let (fine, said) = run(&bench, &[]);
    assert!(fine, "{said}");
    let ((high, of_high), (low, of_low)) = (read_lora(&lora(&bench, "high")), read_lora(&lora(&bench, "low")));
    assert_ne!(high, low);
    assert_eq!((of_high["ss_network_dim"].as_str(), of_low["ss_network_dim"].as_str()), ("8", "16"));
    assert_eq!((of_high["ss_expert"].as_str(), of_low["ss_expert"].as_str()), ("high_noise", "low_noise"));
    assert_eq!(of_high["modelspec.timestep_range"], "875,1000");
    for level in ["high", "low"] {
        let log = bench.outputs(".jsonl").into_iter().find(|p| p.to_string_lossy().contains(level)).unwrap();
        let log = std::fs::read_to_string(log).unwrap();
        assert_eq!(log.lines().count(), 16);
        assert!(log.lines().all(|l| l.contains(&format!("\"loss/{level}\""))), "{log}");
    }
    // The dataset was looked at once for both, and the states that bound the cost of a kill are gone.
    assert_eq!(said.lines().filter(|l| l.contains("used") && l.contains("coffee.jpg")).count(), 1, "{said}");
    assert!(bench.outputs("-state").is_empty());

    // Once more: a new pair, beside the first.
    let (fine, said) = run(&bench, &["--save_state_on_train_end"]);
    assert!(fine && !said.contains("finished before"), "{said}");
    let finished = bench.outputs(".safetensors").into_iter().filter(|p| {
        let name = p.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("two-") && !name.contains("-000001.")
    });
    assert_eq!(finished.count(), 4);
    let states = bench.outputs("-state");
    assert!(states.len() == 2 && states.iter().all(|p| !p.to_string_lossy().contains("-000001-")), "{states:?}");
}

#[test]
fn killed_in_either_half_it_goes_on_with_the_right_expert() {
    let bench = bench();
    for part in ["two-high-", "two-low-"] {
        let mut child = start(&bench);
        wait_for(&bench, &mut child, part, "-state");
        child.kill().unwrap();
        let said = text(&child.wait_with_output().unwrap());
        if part == "two-low-" {
            assert!(said.contains("expert 1 of 2, high noise: going on from"), "{said}");
        }
    }
    let high = std::fs::metadata(lora(&bench, "high")).unwrap().modified().unwrap();
    let (fine, said) = run(&bench, &[]);
    assert!(fine, "{said}");
    assert!(said.contains("going on with the pair of"), "{said}");
    assert!(said.contains("high noise: finished before, not trained again"), "{said}");
    assert!(said.contains("low noise: going on from"), "{said}");
    assert_eq!(std::fs::metadata(lora(&bench, "high")).unwrap().modified().unwrap(), high);
    assert_same(&bench);
}

#[test]
fn interrupted_it_says_the_same_command_goes_on() {
    let bench = bench();
    let mut child = start(&bench);
    wait_for(&bench, &mut child, "two-high-", "-state");
    let signal = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(signal.success());
    let out = child.wait_with_output().unwrap();
    let said = text(&out);
    assert_eq!(out.status.code(), Some(130), "{said}");
    assert!(said.contains("--noise_level both") && !said.contains("--resume"), "{said}");
    let (fine, said) = run(&bench, &[]);
    assert!(fine && said.contains("going on with the pair of"), "{said}");
    assert_same(&bench);
}

/// Typed a second time while it runs, it is not trained by two.
#[test]
fn a_pair_that_is_going_on_is_left_alone() {
    let bench = bench();
    let mut first =
        both(&bench, "", &["--epochs", "2000"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&bench, &mut first, "-high-", "-state");
    let out = both(&bench, "", &["--epochs", "2000"]).output().unwrap();
    refused(&out, 1, &["a run is going on that writes files named two-high-", "process", "hint: wait for it"]);
    first.kill().unwrap();
    first.wait().unwrap();
    // What is killed holds nothing: the same command goes on.
    let (fine, said) = run(&bench, &["--epochs", "2"]);
    assert!(!said.contains("a run is going on"), "{fine}: {said}");
}

#[test]
fn a_finished_expert_is_known_by_its_file_even_where_the_record_was_not_written() {
    let bench = bench();
    let mut child = start(&bench);
    wait_for(&bench, &mut child, "two-low-", "-state");
    child.kill().unwrap();
    child.wait().unwrap();
    let record = bench.outputs("-both.json").remove(0);
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(text.contains("\"high\""), "{text}");
    std::fs::write(&record, text.replace("\"high\"", "")).unwrap();
    // Another dataset under the same name is another job.
    std::fs::write(bench.path("other.toml"), "").unwrap();
    let other = both(&bench, "", &["--dataset_config", "other.toml"]).output().unwrap();
    refused(&other, 1, &["unfinished pair", "demo.toml", "other.toml", "--output_name", "-both.json"]);
    let (fine, said) = run(&bench, &[]);
    assert!(fine && said.contains("high noise: finished before"), "{said}");
    assert_same(&bench);
}

#[test]
fn weights_to_start_from_are_never_the_other_experts() {
    let bench = bench();
    let (fine, said) = run(&bench, &["--epochs", "1"]);
    assert!(fine, "{said}");
    std::fs::create_dir_all(bench.path("base/resume_checkpoints")).unwrap();
    std::fs::copy(lora(&bench, "high"), bench.path("base/resume_checkpoints/mine.safetensors")).unwrap();
    let (fine, said) = run(&bench, &["--epochs", "1", "--output_name", "next"]);
    assert!(fine, "{said}");
    let (high, low) = said.split_once("expert 2 of 2").unwrap();
    assert!(high.contains("taking") && !low.contains("taking"), "{said}");
}

#[test]
fn without_a_template_the_boundary_divides_the_timesteps() {
    let mut typed = wan_train::config::Typed::default();
    for (name, word) in [
        ("task", "i2v-A14B"),
        ("noise_level", "both"),
        ("dit", "low.safetensors"),
        ("dit_high_noise", "high.safetensors"),
        ("output_name", "mine"),
        ("save_merged", "dir/merged.safetensors"),
    ] {
        typed.flags.insert(name, vec![word.into()]);
    }
    let runs = wan_train::config::resolve_runs(&typed, "stamp").unwrap();
    let facts: Vec<_> = runs
        .iter()
        .map(|r| {
            let c = &r.config;
            let text = |p: &Option<PathBuf>| p.as_ref().unwrap().display().to_string();
            (text(&c.dit), c.min_timestep, c.max_timestep, c.output_name.clone().unwrap(), text(&c.save_merged))
        })
        .collect();
    let row = |dit: &str, min, max, name: &str, merged: &str| {
        (dit.to_owned(), Some(min), Some(max), name.to_owned(), merged.to_owned())
    };
    assert_eq!(facts[0], row("high.safetensors", 900, 1000, "mine-high", "dir/merged-high.safetensors"));
    assert_eq!(facts[1], row("low.safetensors", 0, 900, "mine-low", "dir/merged-low.safetensors"));
    // The boundary of one's own, in either spelling, and limits of one's own.
    for boundary in ["0.8", "800"] {
        typed.flags.insert("timestep_boundary", vec![boundary.into()]);
        let runs = wan_train::config::resolve_runs(&typed, "stamp").unwrap();
        assert_eq!((runs[0].config.min_timestep, runs[1].config.max_timestep), (Some(800), Some(800)));
    }
    typed.flags.insert("min_timestep", vec!["100".into()]);
    let runs = wan_train::config::resolve_runs(&typed, "stamp").unwrap();
    assert_eq!((runs[0].config.min_timestep, runs[0].config.max_timestep), (Some(100), None));
}

#[test]
fn planning_a_pair_plans_both() {
    let bench = bench();
    let out = both(&bench, "plan", &[]).output().unwrap();
    let said = text(&out);
    assert!(out.status.success() && said.contains("high noise:") && said.contains("low noise:"), "{said}");
}

#[test]
fn mistakes() {
    let bench = bench();
    let said = |args: &[&str]| both(&bench, "", args).output().unwrap();
    refused(&said(&["--resume", "x-state"]), 2, &["--resume", "both", "hint:"]);
    refused(&said(&["--resume_from", "x.safetensors"]), 2, &["--resume_from", "both", "hint:"]);
    refused(&said(&["--template", "demo"]), 2, &["demo", "single model", "hint:"]);
    refused(&both(&bench, "show", &[]).output().unwrap(), 2, &["one expert", "hint:", "shared"]);
    let bare = |args: &[&str]| wan_train(&bench.path(".")).args(["train"]).args(args).output().unwrap();
    refused(
        &bare(&["--task", "t2v-A14B", "--noise_level", "both", "--dit", "a"]),
        2,
        &["either expert", "--dit_high_noise"],
    );
    let two = ["--dit", "a", "--dit_high_noise", "b"];
    refused(&bare(&[&["--task", "t2v-14B", "--noise_level", "both"], &two[..]].concat()), 2, &["t2v-14B", "single"]);
    // The second expert's mistakes are found before the first one is trained.
    refused(&said(&["--dit", "nowhere.safetensors"]), 1, &["nowhere.safetensors", "does not exist"]);
    std::fs::write(bench.path("two.toml"), format!("{RECIPE}vae = \"other.safetensors\"\n")).unwrap();
    refused(&said(&[]), 2, &["vae", "other.safetensors", "hint:"]);
    assert!(bench.outputs(".safetensors").is_empty());
    std::fs::write(bench.path("two.toml"), RECIPE).unwrap();
    std::fs::create_dir_all(bench.path("base/outputs/two")).unwrap();
    std::fs::write(bench.path("base/outputs/two/two-both.json"), "{\"stamp\": 3").unwrap();
    refused(&said(&[]), 1, &["two-both.json", "hint:"]);
}
