//! `wan-train setup`: looks at the machine, makes the directories, gets the model files, writes the example dataset. What
//! is there stays as it is, so that it can be run again at any time and goes on where it was interrupted.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::Mutex;

use wan_models::arch::{ModelFile, Role};

use super::machine;
use crate::cli::SetupOptions;
use crate::config::registry;
use crate::error::UserError;
use crate::fsio;
use crate::hub::reuse::{self, Lent, Placed};
use crate::hub::{self, fetch, Hub, Remote, Transfer};
use crate::loader::Source;
use crate::report::{self, progress as pace, Progress, Table, Work};

const DIRECTORIES: &[&str] = &[
    "models",
    "lightning_loras",
    "merged_dits",
    "resume_checkpoints",
    "outputs",
    "datasets/images",
    "datasets/videos-short",
    "datasets/videos-long",
];
/// Files downloaded at once.
const AT_ONCE: usize = 4;
const MIB: u64 = 1 << 20;

/// A file that is wanted, and what is to be done for it.
struct Want {
    file: ModelFile,
    dir: PathBuf,
    state: State,
}

enum State {
    There(PathBuf),
    /// There, but not a model file.
    Broken(PathBuf, String),
    /// To be linked, or copied.
    Lent(Lent, &'static str),
    /// To be downloaded; so many bytes have arrived before.
    Download(Remote, u64),
    /// It cannot be had.
    Unknown(anyhow::Error),
}

pub fn run(options: &SetupOptions) -> anyhow::Result<ExitCode> {
    let progress = report::for_stderr();
    let hub = Hub::from_env().with_token(options.hf_token.clone());
    if let Some(dir) = options.comfyui_dir.as_ref().filter(|dir| !dir.is_dir()) {
        return Err(UserError::usage(format!("--comfyui_dir {} is not a directory", dir.display()))
            .hint("give the folder that holds ComfyUI's `models`")
            .into());
    }
    let (table, notes) = machine::describe(&options.base_dir);
    println!("{}", table.render());
    notes.iter().for_each(|note| println!("note: {note}"));

    let mut wants = Vec::new();
    let files = wanted(options)?;
    let mut looking =
        progress.begin(Work { what: "looking for files", unit: "file", start: 0, total: files.len() as u64 });
    for (file, dir) in files {
        let state = look(&file, &dir, &hub, options.comfyui_dir.as_deref());
        looking.advance(1, &file.name);
        wants.push(Want { file, dir, state });
    }
    drop(looking);
    println!("{}", plan(&wants).render());
    let missing: u64 = wants.iter().map(Want::missing).sum();
    let models = options.base_dir.join(hub::folder(Role::Dit));
    let free = fsio::free_space(&models)?;
    if missing > 0 {
        println!("to download: {} ({} free on the disk)", fsio::human(missing), fsio::human(free));
    }
    if missing > free {
        return Err(UserError::new(format!(
            "the downloads need {}, but only {} are free on the disk of {}",
            fsio::human(missing),
            fsio::human(free),
            models.display()
        ))
        .hint("free some space, give another --base_dir, or lend what ComfyUI has with --comfyui_dir")
        .into());
    }
    if options.dry_run {
        println!("nothing was changed (--dry_run)");
        return problems(wants.into_iter().filter_map(Want::problem).collect());
    }

    for dir in DIRECTORIES {
        fsio::create_dir(&options.base_dir.join(dir))?;
    }
    fsio::ensure_writable_dir(&options.base_dir.join("models"))?;
    let datasets = write_datasets(&options.base_dir)?;
    let mut failed: Vec<anyhow::Error> = Vec::new();
    for want in &wants {
        if let State::Lent(lent, _) = &want.state {
            match reuse::place(lent, &want.dir) {
                Ok(Placed::Linked) => {
                    println!("linked {} to {}", want.dir.join(&lent.name).display(), lent.from.display())
                }
                Ok(Placed::Copied) => {
                    println!("copied {} to {}", lent.from.display(), want.dir.join(&lent.name).display())
                }
                Err(e) => failed.push(e),
            }
        }
    }
    failed.extend(download(&wants, &hub, progress.as_ref()));
    failed.extend(wants.into_iter().filter_map(Want::problem));
    for path in datasets {
        println!("wrote the example dataset {}", path.display());
    }
    if failed.is_empty() {
        println!("everything is there; `wan-train templates` lists what can be trained");
    }
    problems(failed)
}

fn problems(failed: Vec<anyhow::Error>) -> anyhow::Result<ExitCode> {
    match failed.len() {
        0 => Ok(ExitCode::SUCCESS),
        1 => Err(failed.into_iter().next().expect("there is one")),
        n => {
            let list: Vec<String> =
                failed.iter().map(|e| format!("  {}", format!("{e:#}").replace('\n', "\n  "))).collect();
            Err(UserError::new(format!("{n} files could not be had:\n{}", list.join("\n")))
                .hint("run the same command again: what is there stays, and what has begun goes on")
                .into())
        }
    }
}

/// The files for what was asked for, each once.
fn wanted(options: &SetupOptions) -> anyhow::Result<Vec<(ModelFile, PathBuf)>> {
    let mut tasks: Vec<(&str, Option<&str>)> = Vec::new();
    for name in &options.wan21 {
        tasks.push(match name.as_str() {
            "t2v-14b" => ("t2v-14B", None),
            "t2v-1.3b" => ("t2v-1.3B", None),
            "i2v-480p" => ("i2v-14B", Some("480p")),
            "i2v-720p" => ("i2v-14B", Some("720p")),
            other => return Err(UserError::usage(format!("--wan21 {other} is no Wan 2.1 model")).into()),
        });
    }
    if options.wan21.is_empty() {
        tasks.push(("t2v-A14B", None));
    }
    if options.include_i2v {
        tasks.push(("i2v-A14B", None));
    }
    let mut files: Vec<(ModelFile, PathBuf)> = Vec::new();
    for (task, variant) in tasks {
        let model = hub::model_config(task)?;
        for file in &model.files {
            let other = file.variant.is_some() && file.variant.as_deref() != variant;
            // A run with a Lightning template gets its own.
            let later = matches!(file.role, Role::LightningHigh | Role::LightningLow);
            let dir = options.base_dir.join(hub::folder(file.role));
            if !other && !later && !files.iter().any(|(f, d)| (&f.name, d) == (&file.name, &dir)) {
                files.push((file.clone(), dir));
            }
        }
    }
    Ok(files)
}

/// What is to be done for a file: nothing, where it is here; else what costs least.
fn look(file: &ModelFile, dir: &Path, hub: &Hub, comfyui: Option<&Path>) -> State {
    if let Some(path) = hub::find_local(file, dir) {
        return match Source::open(&path) {
            Ok(_) => State::There(path),
            Err(e) => State::Broken(path, format!("{e:#}")),
        };
    }
    let lent = comfyui.and_then(|dir| reuse::from_comfyui(file, dir)).filter(|lent| Source::open(&lent.from).is_ok());
    if let Some(lent) = lent {
        return State::Lent(lent, "ComfyUI");
    }
    let remote = match hub.describe(file, dir) {
        Ok(remote) => remote,
        // Without the hub, its cache will do as it is.
        Err(e) => {
            return match reuse::from_hub_cache(file, None) {
                Some(lent) => State::Lent(lent, "the hub's cache"),
                None => State::Unknown(e),
            }
        }
    };
    match reuse::from_hub_cache(file, Some(&remote)) {
        Some(lent) => State::Lent(lent, "the hub's cache"),
        None => {
            let there = fetch::waiting(file, &remote, dir);
            State::Download(remote, there)
        }
    }
}

impl Want {
    /// Bytes still to be downloaded.
    fn missing(&self) -> u64 {
        match &self.state {
            State::Download(remote, there) => remote.size.saturating_sub(*there),
            _ => 0,
        }
    }

    /// What keeps a file from being had, for the end of the run.
    fn problem(self) -> Option<anyhow::Error> {
        match self.state {
            State::Broken(path, why) => {
                Some(UserError::new(why).hint(format!("delete {} and run this again", path.display())).into())
            }
            State::Unknown(error) => Some(error),
            _ => None,
        }
    }
}

fn plan(wants: &[Want]) -> Table {
    let mut table = Table::new(["file", "size", "what happens"]);
    for want in wants {
        let size = |path: &Path| path.metadata().map(|m| fsio::human(m.len())).unwrap_or_default();
        let (size, what) = match &want.state {
            State::There(path) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let other = if name == want.file.name { String::new() } else { format!(" as {name}") };
                (size(path), format!("there{other}"))
            }
            State::Broken(path, _) => (size(path), "there, but it cannot be read".into()),
            State::Lent(lent, whose) => (size(&lent.from), format!("taken from {whose}: {}", lent.from.display())),
            State::Download(remote, 0) => (fsio::human(remote.size), format!("downloaded from {}", want.file.repo)),
            State::Download(remote, there) => {
                (fsio::human(remote.size), format!("downloaded further, {} are there", fsio::human(*there)))
            }
            State::Unknown(_) => (String::new(), "cannot be had, see below".into()),
        };
        table.row([want.file.name.clone(), size, what]);
    }
    table
}

/// Downloads what is to be downloaded, several files at once; one that fails does not keep the others from arriving.
fn download(wants: &[Want], hub: &Hub, progress: &dyn Progress) -> Vec<anyhow::Error> {
    let todo = |w: &'_ Want| matches!(w.state, State::Download(..));
    let queue: Mutex<VecDeque<&Want>> = Mutex::new(wants.iter().filter(|w| todo(w)).collect());
    let failed = Mutex::new(Vec::new());
    let take = || queue.lock().unwrap_or_else(|e| e.into_inner()).pop_front();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(wants.iter().filter(|w| todo(w)).count()) {
            scope.spawn(|| {
                while let Some(want) = take() {
                    let State::Download(remote, there) = &want.state else { continue };
                    if let Err(e) = one(&want.file, remote, *there, &want.dir, hub, progress, &AtomicBool::new(false)) {
                        failed.lock().unwrap_or_else(|e| e.into_inner()).push(e);
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(|e| e.into_inner())
}

/// Gets one file: from the hub's cache, or by a download with its progress bar.
pub fn get(
    file: &ModelFile,
    dir: &Path,
    hub: &Hub,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> anyhow::Result<PathBuf> {
    let (remote, there) = match look(file, dir, hub, None) {
        State::There(path) => return Ok(path),
        State::Lent(lent, _) => {
            reuse::place(&lent, dir)?;
            return Ok(dir.join(lent.name));
        }
        State::Download(remote, there) => (remote, there),
        State::Broken(_, why) => return Err(UserError::new(why).into()),
        State::Unknown(error) => return Err(error),
    };
    fsio::require_space(dir, remote.size.saturating_sub(there), &format!("the download of {}", file.name))?;
    one(file, &remote, there, dir, hub, progress, stop)
}

fn one(
    file: &ModelFile,
    remote: &Remote,
    there: u64,
    dir: &Path,
    hub: &Hub,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> anyhow::Result<PathBuf> {
    let work = Work { what: &file.name, unit: pace::MIB, start: there / MIB, total: remote.size.div_ceil(MIB) };
    let mut task = progress.begin(work);
    let mut shown = there / MIB;
    let mut watch = |have: u64, size: u64| {
        let now = if have == size { size.div_ceil(MIB) } else { have / MIB };
        if now > shown {
            task.advance(now - shown, "");
            shown = now;
        }
    };
    let path = hub.fetch(file, remote, dir, Transfer { progress: &mut watch, stop })?;
    drop(task);
    progress.say(&format!("downloaded {}", path.display()));
    Ok(path)
}

/// The example datasets with this base directory's paths; a file that is there is the user's.
fn write_datasets(base_dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let here = std::path::absolute(base_dir)?.to_string_lossy().replace('\\', "/");
    let mut written = Vec::new();
    for name in ["wan22-dataset-config-local.toml", "wan21-dataset-config-local.toml"] {
        let path = base_dir.join(name);
        let Some(text) = registry::text(&format!("datasets/{name}")).filter(|_| !path.exists()) else { continue };
        fsio::write_bytes(&path, text.replace("\"./local_training", &format!("\"{}", toml_escape(&here))).as_bytes())?;
        written.push(path);
    }
    Ok(written)
}

/// A path inside a TOML string.
pub fn toml_escape(path: &str) -> String {
    path.replace('\\', "\\\\").replace('"', "\\\"")
}
