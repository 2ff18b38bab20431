//! `wan-train templates`: the recipes, what they are, and whether their files are here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::config::{self, needs_level, registry, RunConfig, Typed};
use crate::fsio;
use crate::hub;
use crate::report::Table;

/// The built-in templates, those of the user, and what is missing for them under `base_dir`. Templates of the user are
/// the files named, and every TOML file with an `extends` in the base directory or its `templates` folder.
pub fn run(base_dir: &Path, files: &[PathBuf]) -> anyhow::Result<ExitCode> {
    let mut names = registry::template_names();
    let mut own: Vec<PathBuf> = files.to_vec();
    own.extend([base_dir.to_path_buf(), base_dir.join("templates")].iter().flat_map(|dir| extending(dir)));
    names.extend(own.iter().map(|path| path.to_string_lossy().into_owned()));

    let mut table = Table::new(["template", "task", "experts", "rank", "lr", "epochs", "schedule", "files"]);
    let mut missing: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    let mut broken = Vec::new();
    for name in &names {
        match Recipe::of(name, base_dir) {
            Ok(recipe) => {
                table.row(recipe.row(name));
                for path in recipe.missing() {
                    missing.entry(path).or_default().push(short(name));
                }
            }
            Err(e) => broken.push(format!("{name}: {e:#}")),
        }
    }
    print!("{}", table.render());
    if !missing.is_empty() {
        println!(
            "\nmissing (`wan-train setup` downloads them; Lightning LoRAs come by themselves when they are needed):"
        );
        for (path, templates) in &missing {
            println!("  {}  for {}", path.display(), templates.join(", "));
        }
    }
    println!("\ntrain one with `wan-train --template NAME`; `wan-train show NAME` prints every setting");
    if broken.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("\ncannot be used:\n  {}", broken.join("\n").replace('\n', "\n  "));
    Ok(ExitCode::FAILURE)
}

/// TOML files of a directory that extend a template.
fn extending(dir: &Path) -> Vec<PathBuf> {
    let is_template = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().any(|line| line.split_once('=').is_some_and(|(key, _)| key.trim() == "extends"))
    };
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    found.retain(|p| p.extension().is_some_and(|x| x == "toml") && is_template(p));
    found.sort();
    found
}

/// A path is shown as its file name.
fn short(name: &str) -> String {
    Path::new(name).file_name().map_or(name.into(), |n| n.to_string_lossy().into_owned())
}

/// A template, resolved: one configuration, or one for each expert.
struct Recipe {
    runs: Vec<RunConfig>,
}

impl Recipe {
    fn of(name: &str, base_dir: &Path) -> anyhow::Result<Self> {
        let mut typed = Typed::default();
        typed.flags.insert("template", vec![name.to_owned()]);
        typed.flags.insert("base_dir", vec![base_dir.to_string_lossy().into_owned()]);
        if needs_level(name)? {
            typed.flags.insert("noise_level", vec!["both".into()]);
        }
        let runs = config::resolve_runs(&typed, "")?;
        Ok(Self { runs: runs.into_iter().map(|r| r.config).collect() })
    }

    fn row(&self, name: &str) -> [String; 8] {
        let each = |show: &dyn Fn(&RunConfig) -> String| {
            let mut all: Vec<String> = self.runs.iter().map(show).collect();
            all.dedup();
            all.join(" / ")
        };
        let experts = each(&|c| c.noise_level.clone().unwrap_or_else(|| "-".into()));
        [
            short(name),
            each(&|c| c.task.clone()),
            experts,
            each(&|c| c.network_dim.to_string()),
            each(&|c| format!("{:e}", c.learning_rate)),
            each(&|c| c.max_train_epochs.map_or(format!("{} steps", c.max_train_steps), |n| n.to_string())),
            each(&|c| c.lr_scheduler.clone()),
            self.files(),
        ]
    }

    /// Every model file, once.
    fn wanted(&self) -> Vec<PathBuf> {
        let mut all = Vec::new();
        for c in &self.runs {
            let models = [&c.dit, &c.dit_high_noise, &c.vae, &c.t5, &c.clip].into_iter().flatten().cloned();
            for path in
                models.chain(c.base_weights.iter().chain(c.base_weights_high_noise.iter().flatten()).map(PathBuf::from))
            {
                if !all.contains(&path) {
                    all.push(path);
                }
            }
        }
        all
    }

    fn missing(&self) -> Vec<PathBuf> {
        // The demo makes its own.
        let of_demo = self.runs.iter().any(|c| c.task == super::demo::TASK);
        self.wanted().into_iter().filter(|path| !of_demo && here(path).is_none()).collect()
    }

    fn files(&self) -> String {
        let (wanted, missing) = (self.wanted(), self.missing());
        let bytes: u64 = wanted.iter().filter_map(|p| here(p)).filter_map(|p| Some(p.metadata().ok()?.len())).sum();
        match (missing.len(), bytes) {
            (0, 0) => "makes its own".into(),
            (0, bytes) => format!("all {} there, {}", wanted.len(), fsio::human(bytes)),
            (n, 0) => format!("{n} of {} missing", wanted.len()),
            (n, bytes) => format!("{n} of {} missing, {} there", wanted.len(), fsio::human(bytes)),
        }
    }
}

/// Where a file is, in whatever form will do.
fn here(path: &Path) -> Option<PathBuf> {
    if path.is_file() {
        return Some(path.to_path_buf());
    }
    hub::other_form(path)
}
