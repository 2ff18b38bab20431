//! Two runs that would write the same files.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{text, Bench};

fn started(bench: &Bench, args: &[&str]) -> Child {
    bench.command("", args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn wait_for(bench: &Bench, suffix: &str) {
    let waited = (0..6000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        !bench.outputs(suffix).is_empty()
    });
    assert!(waited, "no {suffix} within a minute");
}

fn end(mut child: Child) {
    assert!(Command::new("kill").args(["-9", &child.id().to_string()]).status().unwrap().success());
    child.wait().unwrap();
}

/// As a script for two cards starts them.
#[test]
fn runs_started_at_the_same_time_have_names_of_their_own() {
    let bench = Bench::new();
    let runs: Vec<Child> = (0..3).map(|_| started(&bench, &["--max_train_steps", "4", "--save_state"])).collect();
    let said: Vec<String> = runs
        .into_iter()
        .map(|run| {
            let out = run.wait_with_output().unwrap();
            assert!(out.status.success(), "{}", text(&out));
            text(&out)
        })
        .collect();
    let (reports, states) = (bench.outputs(".html"), bench.outputs("-state"));
    assert_eq!((reports.len(), states.len()), (3, 3), "{reports:?}\n{}", said.join("\n"));
    for report in &reports {
        let name = report.file_stem().unwrap().to_str().unwrap();
        let own = said.iter().filter(|said| said.contains(&format!("/{name}.safetensors"))).count();
        assert_eq!(own, 1, "{name} is of one run:\n{}", said.join("\n"));
        let log = report.parent().unwrap().join(format!("logs/{name}.jsonl"));
        assert_eq!(std::fs::read_to_string(&log).unwrap().lines().count(), 4, "{}", log.display());
    }
    // One after the other within a minute too; and what marks a name as taken is gone with the run.
    let out = bench.run("", &["--max_train_steps", "1"]);
    assert!(out.status.success() && bench.outputs(".html").len() == 4, "{}", text(&out));
    let dir = reports[0].parent().unwrap();
    let hidden =
        std::fs::read_dir(dir).unwrap().filter(|e| e.as_ref().unwrap().file_name().as_encoded_bytes()[0] == b'.');
    assert_eq!(hidden.count(), 0);
}

#[test]
fn a_run_that_is_going_on_is_not_resumed_by_another() {
    let bench = Bench::new();
    let args = ["--epochs", "4000", "--save_every_n_steps", "5", "--save_last_n_steps", "5", "--save_state"];
    let first = started(&bench, &args);
    wait_for(&bench, "-state");
    let state = bench.outputs("-state")[0].to_str().unwrap().to_owned();
    let resume = ["--epochs", "4000", "--max_grad_norm", "1", "--resume", &state];
    let out = bench.run("", &resume);
    let said = text(&out);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("a run is going on") && said.contains(&format!("process {}", first.id())), "{said}");
    assert!(said.contains("hint: wait for it"), "{said}");
    end(first);
    // Killed, it holds nothing.
    let state = bench.outputs("-state").pop().unwrap();
    let out = bench.run("", &["--epochs", "4", "--save_state", "--resume", state.to_str().unwrap()]);
    assert!(!text(&out).contains("a run is going on"), "{}", text(&out));
}

#[test]
fn files_that_a_typed_name_replaces_are_said() {
    let bench = Bench::new();
    let typed = |more: &[&str]| {
        let own = ["--output_name", "cat", "--run_dir", "base/here", "--max_train_steps", "1"];
        let out = bench.run("", &[&own[..], more].concat());
        assert!(out.status.success(), "{}", text(&out));
        text(&out)
    };
    let replaced = "files named cat in base/here are of an earlier run and will be replaced";
    // With a template names have the time in them.
    typed(&[]);
    assert!(!typed(&[]).contains(replaced));
    let plain = || {
        let (dit, vae, t5) = (
            "base/models/demo_dit.safetensors",
            "base/models/demo_vae.safetensors",
            "base/models/demo_umt5.safetensors",
        );
        let mut command = super::wan_train(&bench.path(""));
        command.args(["train", "--task", "demo", "--dit", dit, "--vae", vae, "--t5", t5, "--base_dir", "base"]);
        command.args(["--dataset_config", "base/datasets/demo/demo.toml", "--mixed_precision", "no"]);
        let out = command
            .args(["--output_dir", "base/here", "--output_name", "cat", "--max_train_steps", "1"])
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", text(&out));
        text(&out)
    };
    assert!(!plain().contains(replaced), "cat-… of other runs are not cat's");
    assert!(plain().contains(replaced));
}
