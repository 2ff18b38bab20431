//! `wan-train check` and `wan-train init-dataset`.

use std::path::Path;
use std::process::Output;

use super::mistakes::refused;
use super::{text, wan_train, Bench};

fn init(dir: &Path, args: &[&str]) -> Output {
    wan_train(dir).arg("init-dataset").args(args).output().unwrap()
}

#[test]
fn a_good_job_is_said_to_be_one_with_all_its_figures() {
    let bench = Bench::new();
    let out = bench.run("check", &[]);
    let said = text(&out);
    assert!(out.status.success() && said.contains("nothing is wrong"), "{said}");
    for word in ["DiT", "VAE", "umT5", "5 files: 5 used", "to be encoded: 0 latents", "144x80", "25 epochs, 200 steps"]
    {
        assert!(said.contains(word), "{word}:\n{said}");
    }
    assert!(bench.outputs("").is_empty(), "nothing is written");
}

/// The 14B model with nothing but its header, and the demo's media.
fn large(bench: &Bench) -> Vec<&'static str> {
    for level in ["high", "low"] {
        let path = bench.path(&format!("base/models/wan2.2_t2v_{level}_noise_14B_fp16.safetensors"));
        crate::loader::hollow(&path, &wan_train::hub::model_config("t2v-A14B").unwrap().arch, "F16", 2);
    }
    vec!["check", "--base_dir", "base", "--template", "t2v-vanilla", "--noise_level", "both", "--vram_budget", "23"]
}

#[test]
fn everything_that_is_wrong_is_listed_at_once() {
    let bench = Bench::new();
    let args = large(&bench);
    let images = bench.path("base/datasets/demo/images");
    std::fs::remove_file(images.join("coffee.txt")).unwrap();
    std::fs::write(images.join("zero.png"), b"").unwrap();
    std::fs::write(images.join("zero.txt"), "nothing").unwrap();
    std::fs::write(bench.path("blocked"), b"").unwrap();
    let more = ["--dataset_config", "base/datasets/demo/demo.toml", "--output_dir", "blocked/out"];
    let out = wan_train(&bench.path(".")).args(&args).args(more).output().unwrap();
    refused(&out, 1, &["4 things are wrong", "wan_2.1_vae", "models_t5", "blocked", "coffee", "zero.png"]);
    let said = text(&out);
    // The figures are there all the same, for each expert.
    assert_eq!(said.matches("GiB on the card").count(), 2, "{said}");
    assert!(said.contains("high noise:") && said.contains("low noise:"), "{said}");
    assert!(bench.outputs("").is_empty(), "nothing is written");
}

#[test]
fn faults_of_several_datasets_are_listed_and_fixed_together() {
    let bench = Bench::new();
    let demo = bench.path("base/datasets/demo").to_string_lossy().into_owned();
    let toml = format!(
        "[general]\nresolution = [130, 96] # odd\ncaption_extension = \"txt\"\n\n# pictures\n[[datasets]]\nimage_directry = \"{demo}/images\"\ncache_directory = \"c\"\n\n# clips\n[[datasets]]\nvideo_directory = \"{demo}/videos\"\ncache_directory = \"c\"\ntarget_frames = [1, 8]\n"
    );
    std::fs::write(bench.path("mine.toml"), &toml).unwrap();
    let check = |more: &[&str]| bench.run("check", &[&["--dataset_config", "mine.toml"], more].concat());
    refused(&check(&[]), 1, &["image_directry", "130x96"]);
    let out = check(&["--fix"]);
    let said = text(&out);
    assert!(out.status.success(), "{said}");
    for word in ["`image_directry` is spelled `image_directory`", "[128, 96]", "\"c-2\"", "[1, 5]", "\".txt\""] {
        assert!(said.contains(word), "{word}:\n{said}");
    }
    let now = std::fs::read_to_string(bench.path("mine.toml")).unwrap();
    assert!(now.contains("# odd") && now.contains("# pictures\n") && now.contains("# clips\n"), "{now}");
    assert!(text(&check(&["--fix"])).contains("nothing in mine.toml that can be put right"));
}

#[test]
fn mistakes() {
    let bench = Bench::new();
    refused(&bench.run("check", &["--dataset_config", "no.toml"]), 1, &["one thing is wrong", "no.toml", "hint:"]);
    refused(&bench.run("check", &["--dim", "0"]), 2, &["network_dim"]);
    refused(
        &bench.run("check", &["--optimizer", "sgdd", "--dit", "no.safetensors"]),
        1,
        &["2 things", "sgdd", "no.safe"],
    );
    std::fs::write(bench.path("set.json"), "{\"datasets\": []}").unwrap();
    refused(&bench.run("check", &["--fix", "--dataset_config", "set.json"]), 1, &["JSON", "no dataset"]);
    std::fs::write(bench.path("torn.toml"), "[general\n").unwrap();
    refused(&bench.run("check", &["--fix", "--dataset_config", "torn.toml"]), 1, &["torn.toml", "line 1"]);
}

#[test]
fn a_folder_becomes_a_dataset_that_trains() {
    let bench = Bench::new();
    let out = init(&bench.path("."), &["base/datasets/demo", "-o", "mine.toml"]);
    let said = text(&out);
    assert!(out.status.success() && said.contains("wrote mine.toml with 2 datasets"), "{said}");
    let toml = std::fs::read_to_string(bench.path("mine.toml")).unwrap();
    for word in
        ["image_directory = \"/", "video_directory = \"/", "frame_extraction = \"head\"", "resolution = [960, 544]"]
    {
        assert!(toml.contains(word), "{word}:\n{toml}");
    }
    let check = bench.run("check", &["--dataset_config", "mine.toml"]);
    assert!(check.status.success(), "{}", text(&check));
    assert!(text(&check).contains("5 files: 0 used, 5 not ready"), "{}", text(&check));

    // A file that is there is the user's.
    let before = std::fs::read(bench.path("mine.toml")).unwrap();
    refused(&init(&bench.path("."), &["base/datasets/demo/images", "-o", "mine.toml"]), 1, &["mine.toml", "--force"]);
    assert_eq!(std::fs::read(bench.path("mine.toml")).unwrap(), before);
    std::fs::remove_file(bench.path("base/datasets/demo/images/coffee.txt")).unwrap();
    let out = init(&bench.path("."), &["base/datasets/demo/images", "-o", "mine.toml", "--force"]);
    assert!(out.status.success() && text(&out).contains("1 files in"), "{}", text(&out));
    assert!(!std::fs::read_to_string(bench.path("mine.toml")).unwrap().contains("video_directory"));
    // Without -o it goes beside the media.
    assert!(init(&bench.path("."), &["base/datasets/demo/videos"]).status.success());
    assert!(bench.path("base/datasets/demo/videos/dataset.toml").is_file());
}

#[test]
fn folders_that_make_no_dataset() {
    let dir = tempfile::tempdir().unwrap();
    refused(&init(dir.path(), &["nowhere"]), 2, &["nowhere", "does not exist", "hint:"]);
    std::fs::write(dir.path().join("file"), "").unwrap();
    refused(&init(dir.path(), &["file"]), 2, &["is a file", "hint:"]);
    std::fs::create_dir(dir.path().join("void")).unwrap();
    refused(&init(dir.path(), &["void"]), 1, &["no picture and no clip", "hint:"]);
    assert!(!dir.path().join("void/dataset.toml").exists());
    refused(&init(dir.path(), &[]), 2, &["DIR"]);
    std::fs::write(dir.path().join("void/a.png"), "x").unwrap();
    std::fs::write(dir.path().join("blocked"), "").unwrap();
    refused(&init(dir.path(), &["void", "-o", "blocked/d.toml"]), 1, &["blocked"]);
    assert!(init(dir.path(), &["void", "-o", "new/d.toml"]).status.success());
    assert!(dir.path().join("new/d.toml").is_file());
}
