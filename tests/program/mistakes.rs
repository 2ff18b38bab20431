//! Every mistake ends in one clear sentence that names the file or key and the remedy, with a code that is not 0 and
//! nothing half-written.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Output;

use super::{find, text, wan_train, Bench};

/// Asserts failure with `code`, an `error:` that contains every word, and a hint.
pub fn refused(out: &Output, code: i32, words: &[&str]) {
    let said = text(out);
    assert_eq!(out.status.code(), Some(code), "{said}");
    let error = said.split("error:").nth(1).unwrap_or_else(|| panic!("no error line:\n{said}"));
    for word in words {
        assert!(error.contains(word), "`{word}` is not in:\n{said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

fn no_output(bench: &Bench) {
    assert!(bench.outputs(".safetensors").is_empty(), "nothing may be half-written");
    assert!(find(&bench.path("base"), ".tmp").is_empty());
}

fn with_dataset(bench: &Bench, toml: &str) -> Output {
    std::fs::write(bench.path("mine.toml"), toml).unwrap();
    bench.run("", &["--dataset_config", "mine.toml"])
}

#[test]
fn model_files_that_are_missing_wrong_or_torn() {
    let bench = Bench::new();
    refused(&bench.run("", &["--dit", "nowhere.safetensors"]), 1, &["nowhere.safetensors", "does not exist", "hint:"]);
    // Cut in the middle.
    let dit = std::fs::read(bench.path("base/models/demo_dit.safetensors")).unwrap();
    std::fs::write(bench.path("torn.safetensors"), &dit[..dit.len() / 2]).unwrap();
    refused(&bench.run("", &["--dit", "torn.safetensors"]), 1, &["torn.safetensors"]);
    std::fs::write(bench.path("empty.safetensors"), b"").unwrap();
    refused(&bench.run("", &["--dit", "empty.safetensors"]), 1, &["empty.safetensors"]);
    std::fs::write(bench.path("text.safetensors"), b"this is not a model at all, just some words").unwrap();
    refused(&bench.run("", &["--dit", "text.safetensors"]), 1, &["text.safetensors"]);
    // Another model in the DiT's place.
    refused(&bench.run("", &["--dit", "base/models/demo_vae.safetensors"]), 1, &["demo_vae.safetensors"]);
    refused(&bench.run("cache", &["--recache", "--vae", "base/models/demo_dit.safetensors"]), 1, &["demo_dit"]);
    no_output(&bench);
}

#[test]
fn what_training_will_refuse_is_refused_before_anything_is_encoded() {
    let bench = Bench::new();
    let cache = bench.path("base/datasets/demo/cache");
    std::fs::remove_dir_all(&cache).unwrap();
    let args = |args: &[&str]| bench.run("", args);
    refused(&args(&["--resume", "nowhere-state"]), 1, &["nowhere-state does not exist", "hint:"]);
    refused(&args(&["--resume_from", "nowhere.safetensors"]), 1, &["nowhere.safetensors does not exist", "hint:"]);
    std::fs::write(bench.path("file"), b"").unwrap();
    for option in ["--output_dir", "--logging_dir"] {
        refused(&args(&[option, "file/here"]), 1, &[option, "file/here", "is a file", "hint:"]);
    }
    for name in ["../mine", "a/b", "a\\b"] {
        refused(&args(&["--output_name", name]), 2, &["output_name", "must not be a path", "hint: --output_dir"]);
    }
    refused(&args(&["--blocks_to_swap", "4"]), 2, &["--blocks_to_swap 4 is more than the model's 3 blocks"]);
    refused(&bench.run("plan", &["--blocks_to_swap", "4"]), 2, &["more than the model's 3 blocks"]);
    // Batches that no machine holds.
    let demo = std::fs::read_to_string(bench.path("base/datasets/demo/demo.toml")).unwrap();
    let huge = demo
        .replace("resolution = [128, 96]", "resolution = [16384, 16384]")
        .replace("batch_size = 1", "batch_size = 64\nnum_repeats = 64");
    refused(&with_dataset(&bench, &huge), 1, &["this run does not fit", "batch_size 1: saves", "hint: use smaller"]);
    assert!(!cache.exists());
    // One that fits is announced before it is encoded.
    let said = text(&args(&["--max_train_steps", "1"]));
    let [planned, encoded] = ["training will take", "latents 1/"].map(|what| said.find(what).expect(what));
    assert!(planned < encoded && cache.exists(), "{said}");
}

#[test]
fn values_that_an_option_does_not_take() {
    let bench = Bench::new();
    let args = |args: &[&str]| bench.run("plan", args);
    refused(&args(&["--noise_level", "medium"]), 2, &["`--noise_level` cannot be `medium`", "high, low, both, shared"]);
    refused(&args(&["--vram_budget", "24GB"]), 2, &["`--vram_budget` cannot be `24GB`", "a number", "hint:", "GiB"]);
    std::fs::write(bench.path("mine.toml"), "vram_budget = \"much\"\n").unwrap();
    refused(&args(&["--config_file", "mine.toml"]), 2, &["mine.toml: `vram_budget` cannot be `much`"]);
}

#[test]
fn two_ways_of_8_bit_products_exclude_each_other_in_every_verb() {
    let bench = Bench::new();
    for verb in ["", "plan", "show"] {
        let out = bench.run(verb, &["--fp8_fast", "--int8_fast"]);
        refused(&out, 2, &["--fp8_fast and --int8_fast", "hint: choose"]);
    }
    no_output(&bench);
}

#[test]
fn weights_of_another_task_are_named() {
    let bench = Bench::new();
    let out = bench.run("", &["--task", "t2v-1.3B", "--dit", "base/models/demo_dit.safetensors"]);
    refused(&out, 1, &["t2v-1.3B", "demo"]);
}

#[test]
fn datasets_that_are_not_there_or_empty_or_misspelled() {
    let bench = Bench::new();
    refused(&bench.run("", &["--dataset_config", "nowhere.toml"]), 1, &["nowhere.toml", "does not exist", "hint:"]);
    let general = "[general]\nresolution = [128, 96]\ncaption_extension = \".txt\"\n[[datasets]]\n";
    let missing =
        with_dataset(&bench, &format!("{general}image_directory = \"no-such-dir\"\ncache_directory = \"c\"\n"));
    refused(&missing, 2, &["no-such-dir", "hint:"]);
    std::fs::create_dir(bench.path("void")).unwrap();
    let empty = with_dataset(&bench, &format!("{general}image_directory = \"void\"\ncache_directory = \"c\"\n"));
    refused(&empty, 1, &["void"]);
    let unknown = with_dataset(&bench, &format!("{general}image_directry = \"void\"\n"));
    refused(&unknown, 2, &["image_directry", "image_directory", "line 5"]);
    let syntax = with_dataset(&bench, "[general]\nresolution = [128, \n[[datasets]]\n");
    refused(&syntax, 2, &["mine.toml", "line"]);
    no_output(&bench);
}

#[test]
fn media_and_captions_that_cannot_be_used_are_listed_together() {
    let bench = Bench::new();
    let images = bench.path("base/datasets/demo/images");
    std::fs::write(images.join("zero.png"), b"").unwrap();
    std::fs::write(images.join("zero.txt"), "nothing").unwrap();
    let png = std::fs::read(images.join("chelsea.png")).unwrap();
    std::fs::write(images.join("torn.png"), &png[..png.len() / 3]).unwrap();
    std::fs::write(images.join("torn.txt"), "half a cat").unwrap();
    std::fs::write(images.join("latin.txt"), b"caf\xe9").unwrap();
    std::fs::copy(images.join("coffee.jpg"), images.join("latin.jpg")).unwrap();
    std::fs::copy(images.join("coffee.jpg"), images.join("bare.jpg")).unwrap();
    let out = bench.run("", &[]);
    refused(&out, 1, &["zero.png", "latin.txt", "bare"]);
    no_output(&bench);
    std::fs::remove_file(images.join("latin.txt")).unwrap();
    std::fs::write(images.join("latin.txt"), "a cup").unwrap();
    let allowed = bench.run("cache", &["--allow_bad_media", "--allow_missing_captions"]);
    let said = text(&allowed);
    assert!(allowed.status.success(), "{said}");
    assert!(said.contains("zero.png") && said.contains("torn.png") && said.contains("dropped"), "{said}");
}

#[test]
fn two_files_for_one_cache_name() {
    let bench = Bench::new();
    let images = bench.path("base/datasets/demo/images");
    std::fs::copy(images.join("coffee.jpg"), images.join("coffee.jpeg")).unwrap();
    refused(&bench.run("", &[]), 1, &["coffee.jpeg", "coffee.jpg"]);
}

/// Root ignores permissions, so these two only mean something for other users.
fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

fn lock(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn places_that_cannot_be_written() {
    let bench = Bench::new();
    // A file where a directory should be: refused for root too.
    std::fs::write(bench.path("blocked"), b"").unwrap();
    refused(&bench.run("", &["--output_dir", "blocked/here"]), 1, &["blocked"]);
    let toml = std::fs::read_to_string(bench.path("base/datasets/demo/demo.toml")).unwrap();
    let cache = bench.path("base/datasets/demo/cache/images").to_string_lossy().into_owned();
    let moved = toml.replace(&cache, &bench.path("blocked/cache").to_string_lossy());
    assert_ne!(moved, toml);
    refused(&with_dataset(&bench, &moved), 1, &["blocked"]);
    if !is_root() {
        std::fs::create_dir(bench.path("locked")).unwrap();
        lock(&bench.path("locked"), 0o555);
        let out = bench.run("", &["--output_dir", "locked/here"]);
        lock(&bench.path("locked"), 0o755);
        refused(&out, 1, &["locked"]);
    }
    no_output(&bench);
}

#[test]
fn a_disk_that_is_full() {
    let bench = Bench::new();
    // No file may grow beyond 8 KiB: the kernel refuses as it does on a full disk.
    let command = bench.command("", &["--epochs", "1"]);
    let program = command.get_program().to_string_lossy().into_owned();
    let args: Vec<String> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    let line = "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\"";
    let out = std::process::Command::new("bash")
        .args(["-c", line, &program])
        .args(&args)
        .current_dir(bench.path("."))
        .output()
        .unwrap();
    assert!(!out.status.success(), "{}", text(&out));
    refused(&out, 1, &[".safetensors"]);
    no_output(&bench);
}

#[test]
fn resuming_what_does_not_fit() {
    let bench = Bench::new();
    let out = bench.run("", &["--epochs", "1", "--save_state"]);
    assert!(out.status.success(), "{}", text(&out));
    let state = bench.outputs("-state")[0].to_string_lossy().into_owned();
    let lora = bench.outputs(".safetensors").into_iter().find(|p| !p.to_string_lossy().contains("-state")).unwrap();
    let lora = lora.to_string_lossy().into_owned();
    refused(&bench.run("", &["--resume", &state, "--dim", "8"]), 1, &["16", "8", "hint:"]);
    refused(&bench.run("", &["--resume_from", &lora, "--dim", "8"]), 1, &["16", "8"]);
    refused(&bench.run("", &["--resume", "nowhere-state"]), 1, &["nowhere-state"]);
    refused(&bench.run("", &["--resume_from", "nowhere.safetensors"]), 1, &["nowhere.safetensors", "does not exist"]);
    std::fs::remove_file(Path::new(&state).join("COMPLETE")).unwrap();
    refused(&bench.run("", &["--resume", &state]), 1, &["-state"]);
    refused(&bench.run("", &["--resume", &state, "--resume_from", &lora]), 2, &["--resume_from"]);
}

#[test]
fn plans_that_fit_nowhere_and_cards_that_nobody_knows() {
    let dir = tempfile::tempdir().unwrap();
    let said = |args: &[&str]| wan_train(dir.path()).args(args).output().unwrap();
    refused(&said(&["bench", "--project", "rtx3091"]), 2, &["rtx3091", "did you mean `rtx3090`?"]);
    let small = ["plan", "--task", "t2v-14B", "--fp8_base", "--mixed_precision", "bf16", "--vram_budget", "3"];
    refused(&said(&small), 1, &["does not fit", "more than the 3.00 GiB there are", "hint:", "--network_dim"]);
    // Predictions say that they are.
    let out = said(&["bench", "--project", "rtx4090"]);
    assert!(out.status.success(), "{}", text(&out));
    assert!(text(&out).contains("predictions, not measurements"), "{}", text(&out));
    // A build without CUDA measures nothing, and says what to build.
    if cfg!(not(feature = "cuda")) {
        refused(&said(&["bench", "--case", "v21"]), 1, &["computes on the CPU only", "make cuda"]);
    }
}

#[test]
fn a_disk_without_room_for_the_checkpoints_is_found_before_the_first_step() {
    let bench = Bench::new();
    let many = ["--max_train_steps", "1000000000", "--save_every_n_steps", "1", "--save_state"];
    let out = bench.run("", &many);
    refused(
        &out,
        1,
        &["the disk of base/outputs/demo has", "free", "1012499999 LoRAs of", "states of", "hint: free some"],
    );
    assert!(!text(&out).contains("training 1/"), "{}", text(&out));
    no_output(&bench);
    // What does not stay is not counted.
    let out = bench.run("", &["--max_train_steps", "4", "--save_every_n_steps", "1", "--save_last_n_steps", "2"]);
    let said = "in base/outputs/demo: 4 LoRAs of 9";
    assert!(out.status.success() && text(&out).contains(said), "{}", text(&out));
}
