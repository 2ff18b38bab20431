//! `wan-train templates` and the options that every recipe takes.

use std::path::Path;
use std::process::Output;

use safetensors::SafeTensors;

use super::mistakes::refused;
use super::{text, wan_train, Bench};

fn templates(dir: &Path, args: &[&str]) -> Output {
    wan_train(dir).arg("templates").args(args).output().unwrap()
}

fn row<'a>(said: &'a str, name: &str) -> &'a str {
    said.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name}:\n{said}"))
}

#[test]
fn every_recipe_is_listed_with_what_it_needs() {
    let dir = tempfile::tempdir().unwrap();
    let out = templates(dir.path(), &["--base_dir", "base"]);
    let said = text(&out);
    assert!(out.status.success(), "{said}");
    for (name, words) in [
        (
            "t2v-vanilla",
            ["t2v-A14B", "high / low", "8 / 42", "1e-4 / 8e-5", "50", "polynomial", "4 of 4 missing"].as_slice(),
        ),
        ("i2v-lightning", &["i2v-A14B", "high / low", "6 of 6 missing"]),
        ("wan21-i2v-480p", &["i2v-14B", "24", "8e-5", "4 of 4 missing"]),
        ("wan21-t2v-1.3b", &["t2v-1.3B", "16", "3 of 3 missing"]),
        ("demo", &["25", "cosine_with_min_lr", "makes its own"]),
    ] {
        words.iter().for_each(|word| assert!(row(&said, name).contains(word), "{name}: {word}\n{said}"));
    }
    assert!(said.contains("wan_2.1_vae.safetensors  for"), "{said}");
    assert!(!dir.path().join("base").exists(), "listing makes nothing");

    std::fs::create_dir_all(dir.path().join("base/models")).unwrap();
    for name in ["wan2.1_t2v_1.3B_bf16", "wan_2.1_vae", "models_t5_umt5-xxl-enc-bf16"] {
        std::fs::write(dir.path().join(format!("base/models/{name}.safetensors")), "0123").unwrap();
    }
    let said = text(&templates(dir.path(), &["--base_dir", "base"]));
    assert!(row(&said, "wan21-t2v-1.3b").contains("all 3 there, 12 bytes"), "{said}");
    assert!(row(&said, "t2v-vanilla").contains("2 of 4 missing, 8 bytes there"), "{said}");
}

#[test]
fn templates_of_ones_own_are_listed_and_broken_ones_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("base/templates")).unwrap();
    let write = |path: &str, text: &str| std::fs::write(dir.path().join(path), text).unwrap();
    write("base/templates/mine.toml", "extends = \"wan21-t2v-14b\"\nnetwork_dim = 77\n");
    write("base/other.toml", "[general]\nresolution = [1, 2]\n");
    let out = templates(dir.path(), &["--base_dir", "base"]);
    assert!(out.status.success());
    assert!(row(&text(&out), "mine.toml").contains("77"), "{}", text(&out));
    assert!(!text(&out).contains("other.toml"));
    write("bad.toml", "extends = \"wan21-t2v-14c\"\n");
    write("worse.toml", "extends = \"demo\"\nnetwork_dmi = 3\n");
    let out = templates(dir.path(), &["--base_dir", "base", "bad.toml", "worse.toml", "nowhere.toml"]);
    let said = text(&out);
    assert_eq!(out.status.code(), Some(1), "{said}");
    for word in ["mine.toml", "did you mean `wan21-t2v-14b`?", "network_dmi", "nowhere.toml"] {
        assert!(said.contains(word), "{word}:\n{said}");
    }
}

#[test]
fn every_option_of_the_guide_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let options = "--lr 1e-5 --dim 4 --alpha 2 --epochs 3 --save_every 1 --scheduler linear --power 1.5 --min_lr 0.1 --optimizer adamw --seed 1 --flow_shift 2 --output_name x --dit a --vae b --t5 c --clip d --blocks_to_swap 3 --network_args loraplus_lr_ratio=4 --resume_from e --skip_lightning --base_dir f --dataset_config g --lr_scheduler_type CosineAnnealingLR";
    let args: Vec<&str> = options.split(' ').collect();
    let out = wan_train(dir.path())
        .args(["show", "i2v-lightning", "--noise_level", "low", "--json"])
        .args(&args)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let shown: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&shown["network_dim"], &shown["lr_scheduler"]), (&4.into(), &"linear".into()));
}

#[test]
fn the_merged_model_is_written_when_wanted_and_trains_alike() {
    let bench = Bench::new();
    let run = |args: &[&str]| {
        let out = bench.run("", &[&["--epochs", "1"], args].concat());
        assert!(out.status.success(), "{}", text(&out));
        text(&out)
    };
    let lora = |name: &str| {
        let all = bench.outputs(".safetensors");
        all.into_iter().find(|p| p.file_name().unwrap().to_string_lossy().starts_with(name)).unwrap()
    };
    run(&["--output_name", "first"]);
    let first = lora("first").to_string_lossy().into_owned();
    let said = run(&["--output_name", "second", "--base_weights", &first, "--save_merged", "new/merged.safetensors"]);
    assert!(said.contains("wrote the merged model new/merged.safetensors (30 tensors changed)"), "{said}");
    let merged = bench.path("new/merged.safetensors");
    let time = std::fs::metadata(&merged).unwrap().modified().unwrap();
    run(&["--output_name", "third", "--dit", "new/merged.safetensors"]);
    let bytes = |name: &str| {
        let bytes = std::fs::read(lora(name)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<_> = file.tensors().into_iter().map(|(n, t)| (n, t.data().to_vec())).collect();
        all.sort();
        all
    };
    assert!(bytes("second") == bytes("third"), "a run on the merged file is a run that merges");
    // What is there stays.
    let again = run(&["--output_name", "fourth", "--base_weights", &first, "--save_merged", "new/merged.safetensors"]);
    assert!(!again.contains("wrote the merged"), "{again}");
    assert_eq!(std::fs::metadata(&merged).unwrap().modified().unwrap(), time);
    refused(&bench.run("", &["--save_merged", "x.safetensors"]), 2, &["nothing to merge", "--base_weights"]);
    refused(&bench.run("", &["--save_merged", "x", "--base_weights", "no.safetensors"]), 1, &["no.safetensors"]);
}
