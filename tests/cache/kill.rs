//! A caching process killed at any moment leaves nothing that is taken for a finished file.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use wan_train::cache::format;

use super::kitchen::{picture, Kitchen};

const ROOT: &str = "WAN_TRAIN_TEST_KITCHEN";

#[test]
#[ignore = "runs as the process that the test below kills"]
fn process_that_caches() {
    let root = std::env::var(ROOT).expect("the parent sets it");
    Kitchen::at(PathBuf::from(root)).cook().ok();
}

fn tensors_of(kitchen: &Kitchen) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for name in kitchen.cache_files().into_keys().filter(|n| !n.starts_with('.')) {
        let sub = if name.starts_with("walk") { "videos" } else { "pictures" };
        let (_, tensors) = format::read_tensors(&kitchen.path("cache").join(sub).join(&name)).unwrap();
        all.extend(tensors.iter().map(|(k, t)| (format!("{name}/{k}"), safetensors::View::data(&t).to_vec())));
    }
    all
}

#[test]
fn a_killed_run_is_completed_by_the_next() {
    let make = || {
        let kitchen = Kitchen::new();
        for i in 0..12 {
            picture(64, 48, 20 + i).save(kitchen.path(&format!("pictures/more_{i}.png"))).unwrap();
            fs::write(kitchen.path(&format!("pictures/more_{i}.txt")), format!("number {i}")).unwrap();
        }
        kitchen
    };
    let unbroken = make();
    unbroken.cook().ok();

    let kitchen = make();
    let root = kitchen.path("");
    let (mut delay, mut killed_midway) = (Duration::from_millis(15), 0);
    loop {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "cache::kill::process_that_caches", "--ignored", "--nocapture"])
            .env(ROOT, &root)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(delay);
        // Kill is SIGKILL: nothing in the child gets to tidy up.
        let finished = child.try_wait().unwrap();
        child.kill().ok();
        let status = child.wait().unwrap();
        let files = kitchen.cache_files();
        let done = files.keys().filter(|n| n.ends_with(".safetensors") && !n.starts_with('.')).count();
        tensors_of(&kitchen);
        if finished.is_some() {
            assert!(status.success());
            break;
        }
        killed_midway += usize::from((1..31).contains(&done));
        delay = delay.mul_f64(1.4);
        assert!(delay < Duration::from_secs(100), "the child never finishes");
    }
    assert!(killed_midway > 0, "no kill fell into the run");
    let meal = Kitchen { models: false, ..kitchen };
    meal.cook().ok();
    assert!(tensors_of(&meal) == tensors_of(&unbroken), "the pieces give what one run gives");
}
