//! Previews through the built program: files, rates, faults, and that the training does not notice them.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use wan_train::data::video;

use super::mistakes::refused;
use super::{find, read_lora, text, Bench};

const PROMPTS: &str = "# two\nA cat. --w 64 --h 48 --f 5 --s 3 --d 7\nI see a dog. --w 70 --h 48 --s 2 --l 2\n";

fn bench(prompts: &str) -> Bench {
    let bench = Bench::new();
    std::fs::write(bench.path("p.txt"), prompts).unwrap();
    bench
}

fn samples(bench: &Bench, suffix: &str) -> Vec<PathBuf> {
    let all = bench.outputs(suffix).into_iter();
    all.filter(|p| p.parent().is_some_and(|dir| dir.ends_with("sample"))).collect()
}

fn final_lora(bench: &Bench) -> super::Tensors {
    let all = bench.outputs(".safetensors");
    let last: Vec<_> = all.iter().filter(|p| !p.to_string_lossy().contains("-step")).collect();
    assert_eq!(last.len(), 1, "{all:?}");
    read_lora(last[0]).0
}

fn losses(bench: &Bench) -> Vec<serde_json::Value> {
    let log = std::fs::read_to_string(&bench.outputs(".jsonl")[0]).unwrap();
    log.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["loss/current"].clone()).collect()
}

#[test]
fn pictures_and_clips_are_made_and_the_training_is_the_same_to_the_bit() {
    let plain = Bench::new();
    let args = ["--epochs", "2", "--network_dropout", "0.1"];
    let out = plain.run("", &args);
    assert!(out.status.success(), "{}", text(&out));
    let bench = bench(PROMPTS);
    let more = [
        "--sample_prompts",
        "p.txt",
        "--sample_every_n_epochs",
        "1",
        "--sample_every_n_steps",
        "8",
        "--sample-at-first",
    ];
    let out = bench.run("", &[&args[..], &more].concat());
    let said = text(&out);
    assert!(out.status.success(), "{said}");
    assert_eq!(final_lora(&bench), final_lora(&plain));
    assert_eq!(losses(&bench), losses(&plain));

    // Before the first step, after steps 8 and 16, which end the epochs: three occasions, a clip and a picture each.
    let (clips, pictures) = (samples(&bench, ".mp4"), samples(&bench, "_000.png"));
    assert_eq!((clips.len(), pictures.len()), (3, 3), "{said}");
    let name = |p: &Path| p.file_name().unwrap().to_string_lossy().into_owned();
    let digits = |s: &str| s.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect::<String>();
    for (clip, tag) in clips.iter().zip(["000008", "000016", "e000000"]) {
        let name = name(clip);
        assert!(name.contains(&format!("_{tag}_00_")), "{name}");
        assert!(digits(&name).ends_with("_99_99999999999999_9.mp9") && name.ends_with("_7.mp4"), "{name}");
        let facts = video::probe(clip, true, true).unwrap();
        assert_eq!((facts.size, facts.frames, facts.fps, facts.variable), ((64, 48), 5, Some(16.0), None));
        assert!(said.contains(&name), "{said}");
    }
    for picture in &pictures {
        assert!(digits(&name(picture)).ends_with("_99_99999999999999_999.png"), "{picture:?}");
        assert_eq!(image::open(picture).unwrap().into_rgb8().dimensions(), (64, 48));
    }
    assert!(said.contains("note: p.txt, line 3: width 70 becomes 64"), "{said}");
    let events = find(&bench.path("base/outputs"), "").into_iter().find(|p| p.to_string_lossy().contains("tfevents"));
    let events = std::fs::read(events.unwrap()).unwrap();
    let count = |needle: &[u8]| events.windows(needle.len()).filter(|w| *w == needle).count();
    assert_eq!((count(b"preview/00"), count(b"preview/01"), count(b"\x89PNG\r\n")), (3, 3, 6));
}

#[test]
fn compatibility_mode_writes_24_frames_a_second() {
    let bench = bench("A cat. --w 64 --h 48 --f 5 --s 2\n");
    let args = ["--epochs", "1", "--musubi_compat", "--sample_prompts", "p.txt", "--sample_every_n_epochs", "1"];
    let out = bench.run("", &args);
    assert!(out.status.success(), "{}", text(&out));
    let clips = samples(&bench, ".mp4");
    assert_eq!(clips.len(), 1);
    assert_eq!(video::probe(&clips[0], true, true).unwrap().fps, Some(24.0));
}

#[test]
fn ctrl_c_in_a_preview_ends_at_its_next_step_and_the_run_goes_on_from_there() {
    let bench = bench("A cat. --w 128 --h 96 --f 17 --s 1000\n");
    let args = ["--epochs", "2", "--sample_prompts", "p.txt", "--sample_every_n_steps", "3"];
    let log = std::fs::File::create(bench.path("log")).unwrap();
    let mut command = bench.command("", &args);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::from(log)).spawn().unwrap();
    let said = || std::fs::read_to_string(bench.path("log")).unwrap();
    for _ in 0..1500 {
        if said().contains("previews 1/1000") {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let interrupt = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupt.success());
    let status = child.wait().unwrap();
    let said = said();
    assert_eq!(status.code(), Some(130), "{said}");
    for words in ["stopped in the previews after step 3", "stopped after step 3", "to go on:"] {
        assert!(said.contains(words), "{words}:\n{said}");
    }
    assert!(samples(&bench, ".mp4").is_empty());
    let state = bench.outputs("-state")[0].to_string_lossy().into_owned();
    std::fs::write(bench.path("p.txt"), "A cat. --w 64 --h 48 --s 1\n").unwrap();
    let out = bench.run("", &[&args[..], &["--resume", &state]].concat());
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(samples(&bench, ".png").len(), 4, "steps 6, 9, 12 and 15: {}", text(&out));
    let plain = Bench::new();
    assert!(plain.run("", &["--epochs", "2"]).status.success());
    assert_eq!(final_lora(&bench), final_lora(&plain));
}

#[test]
fn a_preview_that_cannot_be_written_is_a_warning() {
    let bench = bench("A cat. --w 64 --h 48 --s 1\n");
    std::fs::create_dir_all(bench.path("out")).unwrap();
    std::fs::write(bench.path("out/sample"), b"in the way").unwrap();
    let args = ["--epochs", "1", "--output_dir", "out", "--sample_prompts", "p.txt", "--sample_every_n_epochs", "1"];
    let out = bench.run("", &args);
    let said = text(&out);
    assert!(out.status.success(), "{said}");
    assert!(said.contains("warning: previews cannot be written"), "{said}");
    assert!(
        said.contains("warning: no preview after epoch 1 of p.txt, line 1") && said.contains("training goes on"),
        "{said}"
    );
    assert!(said.contains("finished after 8 steps"), "{said}");
}

#[test]
fn mistakes_are_found_before_anything_is_loaded() {
    let bench = bench("A cat --width 5\nA dog --s 0\n");
    let run = |args: &[&str]| bench.run("", &[&["--sample_every_n_epochs", "1"], args].concat());
    refused(&run(&[]), 2, &["no prompts are given", "hint: add --sample_prompts FILE"]);
    refused(&run(&["--sample_prompts", "nowhere.txt"]), 1, &["nowhere.txt", "--sample_prompts", "hint:"]);
    refused(&run(&["--sample_prompts", "p.txt"]), 2, &["2 things are wrong", "line 1", "did you mean `--w`", "line 2"]);
    refused(&bench.run("", &["--sample_every_n_steps", "0"]), 2, &["sample_every_n_steps is 0"]);
    std::fs::write(bench.path("p.txt"), "A cat\nA dog --w 15\n").unwrap();
    let missing = ["--sample_prompts", "p.txt", "--t5", "no-t5.pth", "--vae", "no-vae.pth"];
    refused(&run(&missing), 1, &["3 things are wrong", "line 2: width 15", "no-vae.pth", "no-t5.pth"]);
    refused(&bench.run("check", &[&["--sample_at_first"], &missing[..]].concat()), 1, &["line 2: width 15"]);
    // More than any machine has.
    std::fs::write(bench.path("p.txt"), "A cat --w 8192 --h 8192 --f 4093\n").unwrap();
    refused(&run(&["--sample_prompts", "p.txt"]), 1, &["previews do not fit", "p.txt, line 1", "--w, --h, --f"]);
    refused(&bench.run("plan", &["--sample_prompts", "p.txt", "--sample_at_first"]), 1, &["previews do not fit"]);
    std::fs::write(bench.path("p.txt"), "A cat --w 64 --h 48\n").unwrap();
    let plan = text(&bench.run("plan", &["--sample_prompts", "p.txt", "--sample_at_first"]));
    assert!(plan.contains("previews: up to"), "{plan}");
    assert!(bench.outputs(".safetensors").is_empty());
    // Prompts without an occasion are no mistake, and nothing is loaded for them.
    let out = bench.run("train", &["--epochs", "1", "--sample_prompts", "p.txt", "--vae", "none", "--t5", "none"]);
    assert!(text(&out).contains("--sample_prompts alone makes no previews"), "{}", text(&out));
}
