//! The built program, doing whole jobs: the demo from pictures to a LoRA, stopping and resuming, every mistake.

mod browser;
mod check;
mod compat;
mod demo;
mod kept;
mod lora;
mod lora_fp8;
mod mistakes;
mod musubi;
mod names;
mod pair;
mod previews;
mod resume;
mod setup;
mod shared;
mod templates;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use safetensors::SafeTensors;
use tempfile::TempDir;

/// Bytes by name.
pub type Tensors = BTreeMap<String, Vec<u8>>;

/// The tensors and the metadata of a LoRA.
pub fn read_lora(path: &Path) -> (Tensors, BTreeMap<String, String>) {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter().map(|(name, t)| (name, t.data().to_vec())).collect();
    (tensors, header.metadata().clone().unwrap_or_default().into_iter().collect())
}

/// A folder with the demo's models and dataset, copied from one that is made once for all tests.
pub struct Bench {
    dir: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        static MADE: OnceLock<TempDir> = OnceLock::new();
        let made = MADE.get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let out =
                wan_train(dir.path()).args(["cache", "--template", "demo", "--base_dir", "base"]).output().unwrap();
            assert!(out.status.success(), "{}", text(&out));
            dir
        });
        let dir = tempfile::tempdir().unwrap();
        copy(made.path(), dir.path());
        let bench = Self { dir };
        // The dataset file names its folders by path: those of the copy.
        let config = bench.path("base/datasets/demo/demo.toml");
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, text.replace(made.path().to_str().unwrap(), bench.dir.path().to_str().unwrap()))
            .unwrap();
        bench
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// The program with `verb` (may be empty), the demo template and this folder.
    pub fn command(&self, verb: &str, args: &[&str]) -> Command {
        let mut command = wan_train(self.dir.path());
        if !verb.is_empty() {
            command.arg(verb);
        }
        command.args(["--template", "demo", "--base_dir", "base"]).args(args);
        command
    }

    pub fn run(&self, verb: &str, args: &[&str]) -> Output {
        self.command(verb, args).output().unwrap()
    }

    /// Files of the run's directory whose name ends so, sorted.
    pub fn outputs(&self, suffix: &str) -> Vec<PathBuf> {
        find(&self.path("base/outputs"), suffix)
    }
}

pub fn wan_train(cwd: &Path) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("wan-train"));
    command.current_dir(cwd);
    command
}

/// Everything a run printed.
pub fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Every file or directory below `dir` whose name ends with `suffix`, sorted.
pub fn find(dir: &Path, suffix: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.file_name().is_some_and(|n| n.to_string_lossy().ends_with(suffix)) {
            found.push(path.clone());
        }
        if path.is_dir() {
            found.extend(find(&path, suffix));
        }
    }
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => {
                std::fs::copy(entry.path(), &target).unwrap();
                let time = entry.metadata().unwrap().modified().unwrap();
                let file = std::fs::File::options().write(true).open(&target).unwrap();
                file.set_modified(time).unwrap();
            }
        }
    }
}
