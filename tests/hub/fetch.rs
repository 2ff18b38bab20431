use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use wan_models::arch::{ModelFile, Role};
use wan_train::error::UserError;
use wan_train::hub::{fetch, reuse, Hub, Remote, Transfer};

use super::{Fault, Server};

const KEY: &str = "Someone/Models/folder/vae.safetensors";

struct Case {
    server: Server,
    dir: TempDir,
    file: ModelFile,
    content: Vec<u8>,
}

fn case() -> Case {
    let server = Server::start();
    let content: Vec<u8> = (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect();
    server.add(KEY, &content);
    let file = ModelFile {
        role: Role::Vae,
        variant: None,
        repo: "Someone/Models".into(),
        path: "folder/vae.safetensors".into(),
        name: "my_vae.safetensors".into(),
    };
    Case { server, dir: tempfile::tempdir().unwrap(), file, content }
}

impl Case {
    fn hub(&self) -> Hub {
        Hub::at(self.server.address()).with_patience(Duration::from_millis(1))
    }

    fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn get_with(&self, hub: &Hub, progress: &mut dyn FnMut(u64, u64), stop: &AtomicBool) -> anyhow::Result<PathBuf> {
        let remote = hub.describe(&self.file, self.dir())?;
        hub.fetch(&self.file, &remote, self.dir(), Transfer { progress, stop })
    }

    fn get(&self) -> anyhow::Result<PathBuf> {
        self.get_with(&self.hub(), &mut |_, _| (), &AtomicBool::new(false))
    }

    fn remote(&self) -> Remote {
        self.hub().describe(&self.file, self.dir()).unwrap()
    }

    fn waiting(&self) -> u64 {
        fetch::waiting(&self.file, &self.remote(), self.dir())
    }

    /// The download ended well: the file, and nothing else.
    fn assert_done(&self, got: anyhow::Result<PathBuf>) {
        let path = got.unwrap();
        assert_eq!(path, self.dir().join("my_vae.safetensors"));
        assert!(std::fs::read(&path).unwrap() == self.content);
        assert_eq!(std::fs::read_dir(self.dir()).unwrap().count(), 1, "nothing else is left");
    }

    /// It failed, said so well, and left no file of that name.
    fn assert_failed(&self, got: anyhow::Result<PathBuf>, words: &[&str]) {
        let said = got.unwrap_err().downcast::<UserError>().expect("a user error").to_string();
        let place = self.dir().join("my_vae.safetensors");
        for word in
            words.iter().chain(&["folder/vae.safetensors", place.to_str().unwrap(), "huggingface.co/Someone/Models"])
        {
            assert!(said.contains(word), "`{word}` is not in: {said}");
        }
        assert!(!place.exists());
    }
}

#[test]
fn a_file_arrives_with_its_size_and_hash_through_a_redirect() {
    let case = case();
    let mut seen = Vec::new();
    let got = case.get_with(&case.hub(), &mut |have, of| seen.push((have, of)), &AtomicBool::new(false));
    case.assert_done(got);
    assert_eq!((seen[0], *seen.last().unwrap()), ((0, 300_000), (300_000, 300_000)));
    assert!(seen.is_sorted());
    let remote = case.remote();
    assert_eq!((remote.size, remote.sha256.map(|h| h.len())), (300_000, Some(64)));
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_broke() {
    let case = case();
    case.server.fault(KEY, Fault::CutAfter(100_000));
    case.server.fault(KEY, Fault::CutAfter(50_000));
    case.assert_done(case.get());
    let ranges: Vec<String> = case
        .server
        .log()
        .iter()
        .filter(|l| l.starts_with("GET store"))
        .map(|l| l.rsplit(' ').next().unwrap().into())
        .collect();
    assert_eq!(ranges, ["bytes=0-299999", "bytes=100000-299999", "bytes=150000-299999"]);
}

#[test]
fn many_breaks_are_borne_as_long_as_something_arrives() {
    let case = case();
    (0..12).for_each(|_| case.server.fault(KEY, Fault::CutAfter(20_000)));
    case.assert_done(case.get());
}

#[test]
fn a_download_that_was_stopped_goes_on_later() {
    let case = case();
    let stop = AtomicBool::new(false);
    let mut watch = |have: u64, _| stop.store(have > 50_000, Ordering::Relaxed);
    let error = case.get_with(&case.hub(), &mut watch, &stop).unwrap_err().downcast::<UserError>().unwrap();
    assert_eq!(error.exit, 130);
    let waiting = case.waiting();
    assert!((50_000..300_000).contains(&waiting), "{waiting}");
    let mut first = 0;
    let got = case.get_with(
        &case.hub(),
        &mut |have, _| first = if first == 0 { have } else { first },
        &AtomicBool::new(false),
    );
    case.assert_done(got);
    assert_eq!(first, waiting);
}

#[test]
fn what_a_power_cut_tore_is_noticed_and_fetched_again() {
    let case = case();
    case.server.fault(KEY, Fault::CutAfter(100_000));
    (0..5).for_each(|_| case.server.fault(KEY, Fault::Status("500 Internal Server Error", "")));
    case.assert_failed(case.get(), &["out of order (500"]);
    assert_eq!(case.waiting(), 100_000);
    let part = std::fs::read_dir(case.dir().join(".download")).unwrap().next().unwrap().unwrap().path();
    let mut torn = std::fs::read(&part).unwrap();
    torn[60_000..].fill(0);
    std::fs::write(&part, torn).unwrap();
    case.assert_done(case.get());
}

#[test]
fn another_content_than_announced_is_refused_and_not_kept() {
    let case = case();
    case.server.fault(KEY, Fault::Garbage);
    case.assert_failed(case.get(), &["damaged", "hash"]);
    assert_eq!(case.waiting(), 0);
    case.assert_done(case.get());
}

#[test]
fn a_file_that_changes_on_the_hub_starts_anew() {
    let mut case = case();
    case.server.fault(KEY, Fault::CutAfter(100_000));
    (0..5).for_each(|_| case.server.fault(KEY, Fault::Status("503 Service Unavailable", "")));
    assert!(case.get().is_err());
    case.content.reverse();
    case.server.add(KEY, &case.content);
    assert_eq!(case.waiting(), 0);
    let got = case.get().unwrap();
    assert!(std::fs::read(got).unwrap() == case.content);
}

#[test]
fn a_busy_hub_is_asked_again_after_the_time_it_names() {
    let case = case();
    case.server.fault(KEY, Fault::Status("429 Too Many Requests", "Retry-After: 1\r\n"));
    case.server.fault(KEY, Fault::Status("503 Service Unavailable", ""));
    let began = std::time::Instant::now();
    case.assert_done(case.get());
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[test]
fn a_server_without_ranges_never_damages_what_is_there() {
    let case = case();
    case.server.fault(KEY, Fault::CutAfter(100_000));
    case.server.fault(KEY, Fault::IgnoresRange);
    case.assert_failed(case.get(), &["more than was asked for"]);
    case.assert_done(case.get());
}

#[test]
fn gated_files_say_what_to_do() {
    let case = case();
    case.server.gate("Someone/Models", "right");
    case.assert_failed(
        case.get(),
        &["accept the terms on https://huggingface.co/Someone/Models", "--hf_token", "HF_TOKEN"],
    );
    let with = |token: &str| {
        case.get_with(&case.hub().with_token(Some(token.into())), &mut |_, _| (), &AtomicBool::new(false))
    };
    case.assert_failed(with("wrong"), &["this token may not read it", "accept the terms"]);
    case.assert_done(with("right"));
}

#[test]
fn absent_unreachable_and_renamed() {
    let mut case = case();
    case.file.path = "folder/vae.safetensors".into();
    let nowhere = Hub::at("http://127.0.0.1:1").with_patience(Duration::from_millis(1));
    case.assert_failed(case.get_with(&nowhere, &mut |_, _| (), &AtomicBool::new(false)), &["cannot be reached"]);
    let empty = Server::start();
    let hub = Hub::at(empty.address()).with_patience(Duration::from_millis(1));
    case.assert_failed(case.get_with(&hub, &mut |_, _| (), &AtomicBool::new(false)), &["no such file"]);
    // The hub answers for the old name with the place of the new one.
    case.server.add("New/Name/folder/vae.safetensors", &case.content);
    case.file.repo = "Old/Name".into();
    case.assert_done(case.get());
}

#[test]
fn a_hub_that_stays_silent_is_asked_once_for_every_further_file() {
    let case = case();
    let door = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let hub = Hub::at(format!("http://{}", door.local_addr().unwrap())).with_patience(Duration::from_millis(1));
    let knocks = std::sync::Arc::new(AtomicUsize::new(0));
    let seen = knocks.clone();
    // Counts connections and says nothing on any.
    std::thread::spawn(move || {
        for _ in door.incoming() {
            seen.fetch_add(1, Ordering::SeqCst);
        }
    });
    for expected in [5, 6, 7] {
        case.assert_failed(hub.clone().describe(&case.file, case.dir()).map(|_| PathBuf::new()), &[]);
        assert_eq!(knocks.load(Ordering::SeqCst), expected);
    }
}

#[test]
fn two_programs_do_not_write_one_file() {
    let case = case();
    let mut nested = None;
    let got = case.get_with(
        &case.hub(),
        &mut |have, _| {
            if have > 0 && nested.is_none() {
                let other = std::thread::scope(|s| s.spawn(|| case.get().map_err(|e| e.to_string())).join().unwrap());
                nested = Some(other);
            }
        },
        &AtomicBool::new(false),
    );
    assert!(nested.unwrap().unwrap_err().contains("another program is downloading it"));
    case.assert_done(got);
}

#[test]
fn comfyui_lends_what_fits_under_the_name_that_is_looked_for() {
    let comfy = tempfile::tempdir().unwrap();
    let put = |path: &str| {
        let path = comfy.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "weights").unwrap();
        path
    };
    let lookup = |role| wan_train::hub::lookup("t2v-A14B", role, None).unwrap();
    assert_eq!(reuse::from_comfyui(&lookup(Role::Vae), comfy.path()), None);
    let vae = put("models/vae/wan_2.1_vae.safetensors");
    let t5 = put("models/text_encoders/wan/umt5_xxl_fp16.safetensors");
    put("models/diffusion_models/wan2.2_i2v_high_noise_14B_fp16.safetensors");
    let dit = put("models/diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors");
    for (role, from, name) in [
        (Role::Vae, vae, "wan_2.1_vae.safetensors"),
        (Role::T5, t5, "models_t5_umt5-xxl-enc-bf16.safetensors"),
        (Role::DitHigh, dit, "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"),
    ] {
        let lent = reuse::from_comfyui(&lookup(role), comfy.path()).unwrap();
        assert_eq!((lent.from.as_path(), lent.name.as_str()), (from.as_path(), name));
        let here = tempfile::tempdir().unwrap();
        reuse::place(&lent, here.path()).unwrap();
        assert_eq!(wan_train::hub::find_local(&lookup(role), here.path()), Some(here.path().join(name)));
        assert!(from.exists());
    }
    assert_eq!(reuse::from_comfyui(&lookup(Role::DitLow), comfy.path()), None);
    // The folder `models` itself may be given.
    assert!(reuse::from_comfyui(&lookup(Role::Vae), &comfy.path().join("models")).is_some());
}
