//! Kills and full disks while checkpoints are written. The writer runs in a process of its own: this test binary,
//! started again for one of the ignored tests below.

use super::state::sample;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use wan_train::checkpoint::TrainState;
use wan_train::fsio;

const DIR: &str = "WAN_TEST_CHECKPOINTS";
const FIRST: &str = "WAN_TEST_FIRST_STEP";

fn writer(name: &str, dir: &Path) -> Command {
    let mut c = Command::new(std::env::current_exe().unwrap());
    c.args(["--exact", &format!("checkpoint::faults::{name}"), "--ignored", "--nocapture"]).env(DIR, dir);
    c
}

#[test]
#[ignore = "started by a_kill_at_any_instant_leaves_a_whole_state"]
fn write_states_for_ever() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = Path::new(&dir);
    let first: u64 = std::env::var(FIRST).unwrap().parse().unwrap();
    for step in first.. {
        let mut state = sample(step);
        // Large enough that a kill mostly falls into the writing.
        state.buffers_u8.insert("bulk".into(), vec![step as u8; 400_000]);
        state.save(&dir.join("run-state")).unwrap();
        fsio::write_bytes(&dir.join("run.safetensors"), &vec![step as u8; 300_000]).unwrap();
    }
}

#[test]
fn a_kill_at_any_instant_leaves_a_whole_state() {
    let root = tempfile::tempdir().unwrap();
    let mut rng = StdRng::seed_from_u64(11);
    let (state, file) = (root.path().join("run-state"), root.path().join("run.safetensors"));
    let mut furthest = 0;
    let mut leftovers = 0;
    for round in 0..12 {
        let mut command = writer("write_states_for_ever", root.path());
        command.env(FIRST, (round * 1000 + 1).to_string());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Wait until this writer has finished something, then strike at random.
        let before = std::fs::metadata(&file).ok().and_then(|m| m.modified().ok());
        for _ in 0..2000 {
            if std::fs::metadata(&file).ok().and_then(|m| m.modified().ok()) != before {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..120_000)));
        child.kill().unwrap();
        child.wait().unwrap();

        leftovers += std::fs::read_dir(root.path()).unwrap().count() - 2;
        fsio::clean_leftovers(root.path());
        let mut found = TrainState::load(&state).unwrap_or_else(|e| panic!("round {round}: {e:#}"));
        let step = found.position.step;
        assert_eq!(found.buffers_u8.remove("bulk").unwrap(), vec![step as u8; 400_000]);
        assert_eq!(found, sample(step), "round {round}");
        let bytes = std::fs::read(&file).unwrap();
        assert!(bytes.len() == 300_000 && bytes.iter().all(|b| *b == bytes[0]), "round {round}: a torn file");
        assert!(step > round * 1000, "round {round}: step {step} is of an earlier writer");
        furthest += step - round * 1000;
    }
    // A kill between making something temporary and locking it leaves it empty, which nobody touches for a minute.
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(120);
    for entry in std::fs::read_dir(root.path()).unwrap().flatten().filter(|e| e.path() != state && e.path() != file) {
        let path = entry.path();
        let bytes = if path.is_dir() {
            std::fs::read_dir(&path).unwrap().count() as u64
        } else {
            path.metadata().unwrap().len()
        };
        assert_eq!(bytes, 0, "{} is left, and not empty", path.display());
        std::fs::File::open(&path).unwrap().set_modified(long_ago).unwrap();
    }
    fsio::clean_leftovers(root.path());
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2);
    println!("{furthest} states written in 12 lives, {leftovers} temporary entries left by kills and cleaned");
}

#[test]
#[ignore = "started by a_disk_that_takes_no_more_keeps_the_old_checkpoint"]
fn write_one_large_state() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = Path::new(&dir);
    let mut state = sample(2);
    state.buffers_u8.insert("bulk".into(), vec![2; 8 << 20]);
    for result in
        [state.save(&dir.join("run-state")), fsio::write_bytes(&dir.join("run.safetensors"), &vec![2; 8 << 20])]
    {
        println!("\nsaid: {}", result.unwrap_err());
    }
}

/// A limit on the size of files stops a write in its middle, as a full disk does, without needing a disk to fill.
#[test]
#[cfg(unix)]
fn a_disk_that_takes_no_more_keeps_the_old_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    sample(1).save(&root.path().join("run-state")).unwrap();
    fsio::write_bytes(&root.path().join("run.safetensors"), b"old").unwrap();
    let exe = std::env::current_exe().unwrap();
    let script = "trap '' XFSZ; ulimit -f 2000; exec \"$0\" \"$@\"";
    let out = Command::new("sh")
        .args(["-c", script])
        .arg(exe)
        .args(["--exact", "checkpoint::faults::write_one_large_state", "--ignored", "--nocapture"])
        .env(DIR, root.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let said: Vec<&str> = text.lines().filter_map(|l| l.split_once("said: ")).map(|(_, s)| s).collect();
    assert_eq!(said.len(), 2, "{text} {}", String::from_utf8_lossy(&out.stderr));
    assert!(said.iter().all(|s| s.contains("run") && s.contains("larger than this disk or user may hold")), "{said:?}");
    assert_eq!(TrainState::load(&root.path().join("run-state")).unwrap(), sample(1));
    assert_eq!(std::fs::read(root.path().join("run.safetensors")).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2, "nothing half-written is left");
}
