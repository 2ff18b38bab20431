//! What caching a large clip takes: two clips of bytes, a chunk of numbers, and what the VAE needs.

use std::fs;
use std::path::PathBuf;

use super::kitchen::Kitchen;

const ROOT: &str = "WAN_TRAIN_TEST_LARGE_CLIP";

/// The most this process ever had resident, in MB.
fn peak_mb() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1000
}

#[test]
#[ignore = "runs as the process that the test below measures"]
fn process_that_caches_a_large_clip() {
    let root = std::env::var(ROOT).expect("the parent sets it");
    let before = peak_mb();
    Kitchen::at(PathBuf::from(root)).cook().ok();
    println!("peak {} MB, {before} MB before", peak_mb());
}

/// A video of 1280x720, 21 frames: the limit is 1500 MB for the whole program.
#[cfg(all(target_os = "linux", feature = "video"))]
#[test]
fn a_large_clip_is_cached_in_little_memory() {
    let kitchen = Kitchen::new();
    let clip = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/demo/videos/bigbuckbunny.mp4");
    let line = serde_json::json!({"video_path": clip, "caption": "a rabbit"});
    fs::write(kitchen.path("videos.jsonl"), line.to_string()).unwrap();
    kitchen.write_config("resolution = [1280, 720]", "target_frames = [21]");
    fs::remove_dir_all(kitchen.path("pictures")).unwrap();
    fs::create_dir(kitchen.path("pictures")).unwrap();
    super::kitchen::picture(64, 64, 1).save(kitchen.path("pictures/one.png")).unwrap();
    fs::write(kitchen.path("pictures/one.txt"), "one").unwrap();
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cache::memory::process_that_caches_a_large_clip", "--ignored", "--nocapture"])
        .env(ROOT, kitchen.path(""))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}{}", String::from_utf8_lossy(&child.stderr));
    let number = |s: &str| s.split_whitespace().next().and_then(|n| n.parse::<u64>().ok());
    let peak = said.split("peak ").nth(1).and_then(number).expect("the child tells its peak");
    println!("a 1280x720 clip of 21 frames was cached in {peak} MB");
    assert!(peak < 1500, "{peak} MB");
}
