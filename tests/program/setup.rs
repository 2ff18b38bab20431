//! `wan-train setup` and what training downloads by itself, against a hub on this machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::mistakes::refused;
use super::{find, text, wan_train};
use crate::hub::{Fault, Server};

const COMFY22: &str = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged";
const COMFY21: &str = "Comfy-Org/Wan_2.1_ComfyUI_repackaged";
const OFFICIAL: &str = "Wan-AI/Wan2.1-I2V-14B-720P";
const LIGHTNING: &str = "lightx2v/Wan2.2-Lightning";

/// A small file that is a safetensors file.
fn weights(seed: u8, floats: usize) -> Vec<u8> {
    let header = format!("{{\"w\":{{\"dtype\":\"F32\",\"shape\":[{floats}],\"data_offsets\":[0,{}]}}}}", 4 * floats);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..4 * floats).map(|i| seed.wrapping_add(i as u8)));
    bytes
}

fn vae() -> String {
    format!("{COMFY21}/split_files/vae/wan_2.1_vae.safetensors")
}

fn dit(model: &str) -> String {
    format!("{COMFY22}/split_files/diffusion_models/wan2.2_{model}_noise_14B_fp16.safetensors")
}

fn hub() -> Server {
    let server = Server::start();
    for (i, model) in ["t2v_high", "t2v_low", "i2v_high", "i2v_low"].iter().enumerate() {
        server.add(&dit(model), &weights(i as u8, 50_000));
    }
    for (i, model) in ["t2v_14B", "t2v_1.3B", "i2v_480p_14B", "i2v_720p_14B"].iter().enumerate() {
        let path = format!("{COMFY21}/split_files/diffusion_models/wan2.1_{model}_bf16.safetensors");
        server.add(&path, &weights(10 + i as u8, 1000));
    }
    server.add(&vae(), &weights(20, 2000));
    server.add(&format!("{OFFICIAL}/models_t5_umt5-xxl-enc-bf16.pth"), &weights(21, 3000));
    server.add(&format!("{OFFICIAL}/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"), &weights(22, 500));
    for (model, seed) in [("T2V", 30), ("I2V", 40)] {
        for (level, seed) in [("high", seed), ("low", seed + 1)] {
            let path =
                format!("{LIGHTNING}/Wan2.2-{model}-A14B-4steps-lora-rank64-Seko-V1/{level}_noise_model.safetensors");
            server.add(&path, &weights(seed, 100));
        }
    }
    server
}

struct Place {
    dir: TempDir,
    server: Server,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), server: hub() }
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = wan_train(self.dir.path());
        command.args(args).env("HF_ENDPOINT", self.server.address()).env("HF_HOME", self.path("hf"));
        command.env_remove("HF_TOKEN").env_remove("HF_HUB_OFFLINE").env_remove("HF_HUB_CACHE");
        command
    }

    fn setup(&self, args: &[&str]) -> Output {
        self.command(&[&["setup", "--base_dir", "base"], args].concat()).output().unwrap()
    }

    fn models(&self) -> Vec<String> {
        names(&self.path("base/models"))
    }

    fn put(&self, path: &str, content: &[u8]) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn downloads(&self) -> usize {
        self.server.log().iter().filter(|l| l.starts_with("GET store/")).count()
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    all.sort();
    all
}

const T2V: [&str; 4] = [
    "models_t5_umt5-xxl-enc-bf16.pth",
    "wan2.2_t2v_high_noise_14B_fp16.safetensors",
    "wan2.2_t2v_low_noise_14B_fp16.safetensors",
    "wan_2.1_vae.safetensors",
];

fn fine(out: &Output) -> String {
    let said = text(out);
    assert!(out.status.success(), "{said}");
    said
}

#[test]
fn everything_arrives_and_a_second_time_nothing_is_done() {
    let place = Place::new();
    let said = fine(&place.setup(&[]));
    assert_eq!(place.models(), T2V);
    for word in ["RAM", "disk", "free", "GPU", "downloaded from Comfy-Org", "wan_2.1_vae.safetensors"] {
        assert!(said.contains(word), "`{word}` is not in:\n{said}");
    }
    assert_eq!(std::fs::read(place.path("base/models").join(T2V[2])).unwrap(), weights(1, 50_000));
    for dir in ["models", "datasets", "outputs", "lightning_loras", "merged_dits", "resume_checkpoints"] {
        assert!(place.path("base").join(dir).is_dir(), "{dir}");
    }
    // The example names real directories, and the program reads it.
    let dataset = std::fs::read_to_string(place.path("base/wan22-dataset-config-local.toml")).unwrap();
    let images = place.path("base/datasets/images");
    assert!(dataset.contains(&format!("image_directory = \"{}\"", images.display())), "{dataset}");
    assert!(images.is_dir());

    let before = place.downloads();
    place.put("base/wan22-dataset-config-local.toml", b"# mine\n");
    let said = fine(&place.setup(&[]));
    assert!(said.contains("there") && !said.contains("to download"), "{said}");
    assert_eq!(place.downloads(), before);
    assert_eq!(std::fs::read(place.path("base/wan22-dataset-config-local.toml")).unwrap(), b"# mine\n");
}

#[test]
fn other_models_on_request() {
    let place = Place::new();
    fine(&place.setup(&["--wan21", "i2v-480p", "t2v-1.3b"]));
    let models = place.models();
    for name in
        ["wan2.1_i2v_480p_14B_bf16", "wan2.1_t2v_1.3B_bf16", "models_clip_open-clip", "models_t5", "wan_2.1_vae"]
    {
        assert!(models.iter().any(|m| m.starts_with(name)), "{name}: {models:?}");
    }
    assert_eq!(models.len(), 5, "{models:?}");
    fine(&place.setup(&["--include_i2v"]));
    assert_eq!(place.models().iter().filter(|m| m.starts_with("wan2.2_")).count(), 4);
}

#[test]
fn a_dry_run_changes_nothing_and_a_full_disk_is_seen_before_the_first_byte() {
    let place = Place::new();
    let said = fine(&place.setup(&["--dry_run"]));
    assert!(said.contains("to download: 4") && said.contains("nothing was changed"), "{said}");
    assert!(!place.path("base").exists());
    // As large as no disk is: only the head of the answer says so.
    place.server.announce(&vae(), 1 << 60);
    refused(&place.setup(&[]), 1, &["1048576.", "TiB", "are free", "hint:"]);
    assert_eq!(place.downloads(), 0);
    assert!(place.models().is_empty());
}

#[test]
fn killed_at_any_instant_it_goes_on() {
    let place = Place::new();
    // Slowed down by answers that break off, so that there is something to kill.
    for model in ["t2v_high", "t2v_low"] {
        (0..4).for_each(|_| place.server.fault(&dit(model), Fault::CutAfter(30_000)));
    }
    for wait in [30, 400, 900, 1500] {
        let mut child = place
            .command(&["setup", "--base_dir", "base"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        child.kill().unwrap();
        child.wait().unwrap();
        for name in place.models().iter().filter(|n| !n.starts_with('.')) {
            assert!(T2V.contains(&name.as_str()), "half a file has its final name: {name}");
        }
    }
    fine(&place.setup(&[]));
    assert_eq!(place.models(), T2V);
    assert_eq!(std::fs::read(place.path("base/models").join(T2V[1])).unwrap(), weights(0, 50_000));
    let gone_on = place.server.log().iter().filter(|l| l.starts_with("GET store") && !l.contains("bytes=0-")).count();
    assert!(gone_on > 0, "{:?}", place.server.log());
}

#[test]
fn what_comfyui_and_the_hubs_cache_have_is_not_downloaded() {
    let place = Place::new();
    place.put("ComfyUI/models/vae/wan_2.1_vae.safetensors", &weights(1, 10));
    place.put("ComfyUI/models/diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", &weights(2, 10));
    // Torn: not taken.
    place.put("ComfyUI/models/diffusion_models/wan2.2_t2v_low_noise_14B_fp16.safetensors", &weights(3, 10)[..60]);
    let t5 = weights(21, 3000);
    let blob = "hf/hub/models--Wan-AI--Wan2.1-I2V-14B-720P/blobs/";
    let hash: String = <sha2::Sha256 as sha2::Digest>::digest(&t5).iter().map(|b| format!("{b:02x}")).collect();
    place.put(&format!("{blob}{hash}"), &t5);
    let snapshot = place.path("hf/hub/models--Wan-AI--Wan2.1-I2V-14B-720P/snapshots/abc");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::os::unix::fs::symlink(format!("../../blobs/{hash}"), snapshot.join(T2V[0])).unwrap();

    let said = fine(&place.setup(&["--comfyui_dir", "ComfyUI"]));
    assert!(said.contains("taken from ComfyUI") && said.contains("taken from the hub's cache"), "{said}");
    assert_eq!(place.downloads(), 1, "{said}");
    let models = place.models();
    assert!(models.contains(&"wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors".to_string()), "{models:?}");
    assert_eq!(std::fs::read(place.path("base/models").join(T2V[0])).unwrap(), t5);
    assert!(place.path("ComfyUI/models/vae/wan_2.1_vae.safetensors").exists());
    assert!(fine(&place.setup(&[])).contains("there as wan2.2_t2v_high_noise_14B_fp8_scaled"));
}

#[test]
fn every_file_that_fails_is_named_with_the_remedy() {
    let place = Place::new();
    place.server.gate(COMFY22, "secret");
    let out = place.setup(&[]);
    refused(
        &out,
        1,
        &["2 files could not be had", "high_noise", "low_noise", "accept the terms", "--hf_token", "hint:"],
    );
    assert_eq!(place.models().len(), 2, "the others have arrived");
    fine(&place.setup(&["--hf_token", "secret"]));
    assert_eq!(place.models(), T2V);

    place.put("base/models/wan_2.1_vae.safetensors", b"this is no model");
    refused(&place.setup(&[]), 1, &["wan_2.1_vae.safetensors", "delete", "run this again"]);
}

#[test]
fn without_a_network_it_says_what_is_missing() {
    let place = Place::new();
    let offline =
        |place: &Place| place.command(&["setup", "--base_dir", "base"]).env("HF_HUB_OFFLINE", "1").output().unwrap();
    refused(&offline(&place), 1, &["4 files", "HF_HUB_OFFLINE is set", "by hand", "wan_2.1_vae.safetensors"]);
    assert!(place.server.log().is_empty());
    fine(&place.setup(&[]));
    fine(&offline(&place));
}

#[test]
fn mistakes() {
    let place = Place::new();
    refused(&place.setup(&["--comfyui_dir", "nowhere"]), 2, &["nowhere", "not a directory", "hint:"]);
    refused(&place.setup(&["--wan21", "t2v-15b"]), 2, &["t2v-15b"]);
    refused(&place.setup(&["--wan21"]), 2, &["--wan21"]);
    refused(&place.setup(&["--include-i2v=x"]), 2, &["include_i2v"]);
    place.put("file", b"");
    refused(&place.command(&["setup", "--base_dir", "file/base"]).output().unwrap(), 1, &["file", "hint:"]);
}

#[test]
fn a_lightning_run_gets_the_right_lora_for_model_and_expert() {
    let place = Place::new();
    for level in ["high", "low"] {
        let path = place.path(&format!("base/models/wan2.2_t2v_{level}_noise_14B_fp16.safetensors"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        crate::loader::hollow(&path, &wan_train::hub::model_config("t2v-A14B").unwrap().arch, "F16", 2);
    }
    let run = |args: &[&str]| {
        place
            .command(&[&["train", "--template", "t2v-lightning", "--base_dir", "base"], args].concat())
            .output()
            .unwrap()
    };
    // A job whose dataset is missing downloads nothing.
    let loras = place.path("base/lightning_loras");
    refused(&run(&["--noise_level", "both"]), 1, &["dataset", "does not exist"]);
    assert!(!loras.exists());
    // With one that is empty it ends only after the LoRAs are there.
    std::fs::create_dir(place.path("void")).unwrap();
    place.put(
        "base/wan22-dataset-config-local.toml",
        b"[[datasets]]\nresolution = [64, 64]\nimage_directory = \"void\"\n",
    );
    refused(&run(&["--noise_level", "both"]), 1, &["dataset 1 is empty"]);
    assert_eq!(names(&loras), ["t2v_high_noise_model.safetensors", "t2v_low_noise_model.safetensors"]);
    assert_eq!(std::fs::read(loras.join("t2v_high_noise_model.safetensors")).unwrap(), weights(30, 100));
    assert_eq!(std::fs::read(loras.join("t2v_low_noise_model.safetensors")).unwrap(), weights(31, 100));

    // A download that fails ends the run, and says how to do without.
    std::fs::remove_dir_all(&loras).unwrap();
    place.server.gate(LIGHTNING, "secret");
    refused(&run(&["--noise_level", "low"]), 1, &["low_noise_model", "accept the terms", "--skip_lightning"]);
    refused(&run(&["--noise_level", "low", "--skip_lightning"]), 1, &["dataset 1 is empty"]);
    assert!(find(&loras, ".safetensors").is_empty());
}
