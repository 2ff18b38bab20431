use super::state::sample;
use crate::loader::user_error;
use std::path::{Path, PathBuf};
use wan_train::checkpoint::store::{newest_checkpoint, require_file};
use wan_train::checkpoint::{Names, Retention};

fn left(dir: &Path) -> Vec<String> {
    let mut v: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    v.sort();
    v
}

#[test]
fn names_are_the_old_ones() {
    let n = Names::new("out", "cat");
    let is = |p: std::path::PathBuf, want: &str| assert_eq!(p, Path::new("out").join(want));
    is(n.epoch_file(5), "cat-000005.safetensors");
    is(n.step_file(1200), "cat-step00001200.safetensors");
    is(n.final_file(), "cat.safetensors");
    is(n.epoch_state(5), "cat-000005-state");
    is(n.step_state(1200), "cat-step00001200-state");
    is(n.final_state(), "cat-state");
}

/// Names are told apart from those that begin alike.
#[test]
fn a_name_has_its_own_files_only() {
    let dir = tempfile::tempdir().unwrap();
    let [minute, second] = ["cat-20260101_1200", "cat-20260101_120030"].map(|name| Names::new(dir.path(), name));
    let plain = Names::new(dir.path(), "cat");
    sample(7).save(&second.final_state()).unwrap();
    sample(9).save(&second.epoch_state(9)).unwrap();
    std::fs::write(dir.path().join(".cat-20260101_1200.x.wtmp"), "").unwrap();
    assert!(second.taken() && second.latest_state().is_some());
    for other in [&minute, &plain] {
        assert!(!other.taken() && other.latest_state().is_none(), "{other:?}");
    }
    for file in [minute.final_file(), minute.epoch_file(5), minute.step_file(5), minute.final_state()] {
        std::fs::write(&file, "").unwrap();
        assert!(minute.taken() && !plain.taken(), "{}", file.display());
        std::fs::remove_file(file).unwrap();
        assert!(!minute.taken());
    }
}

#[test]
fn old_epochs_go_and_states_follow_their_own_number() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names::new(dir.path(), "cat");
    let keep = Retention {
        save_every_n_epochs: Some(5),
        save_last_n_epochs: Some(2),
        save_last_n_epochs_state: Some(1),
        ..Default::default()
    };
    for epoch in [5, 10, 15, 20] {
        std::fs::write(names.epoch_file(epoch), "lora").unwrap();
        sample(epoch).save(&names.epoch_state(epoch)).unwrap();
        keep.after_epoch(&names, epoch).unwrap();
    }
    assert_eq!(left(dir.path()), ["cat-000015.safetensors", "cat-000020-state", "cat-000020.safetensors"]);
    assert!(Retention::default().after_epoch(&names, 20).unwrap().is_empty());
    assert_eq!(names.latest_state().unwrap(), names.epoch_state(20));
}

#[test]
fn steps_are_counted_in_steps() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names::new(dir.path(), "cat");
    let keep = Retention { save_every_n_steps: Some(100), save_last_n_steps: Some(250), ..Default::default() };
    for step in (100..=600).step_by(100) {
        std::fs::write(names.step_file(step), "lora").unwrap();
        keep.after_step(&names, step).unwrap();
    }
    // At 600: 600 - 250 - 1 = 349, the checkpoint of step 300 goes.
    assert_eq!(
        left(dir.path()),
        ["cat-step00000400.safetensors", "cat-step00000500.safetensors", "cat-step00000600.safetensors"]
    );
}

#[test]
fn a_directory_that_is_no_state_of_ours_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names::new(dir.path(), "cat");
    std::fs::create_dir(names.epoch_state(1)).unwrap();
    std::fs::write(names.epoch_state(1).join("notes.txt"), "mine").unwrap();
    let keep = Retention { save_every_n_epochs: Some(1), save_last_n_epochs: Some(1), ..Default::default() };
    assert!(keep.after_epoch(&names, 2).unwrap().is_empty());
    assert!(names.epoch_state(1).join("notes.txt").exists());
    assert_eq!(names.latest_state(), None);
}

#[test]
fn the_latest_state_is_the_one_that_got_furthest_and_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names::new(dir.path(), "cat");
    sample(20).save(&names.epoch_state(2)).unwrap();
    sample(25).save(&names.step_state(25)).unwrap();
    sample(90).save(&names.epoch_state(9)).unwrap();
    std::fs::remove_file(names.epoch_state(9).join("COMPLETE")).unwrap();
    sample(99).save(&Names::new(dir.path(), "catfish").final_state()).unwrap();
    sample(99).save(&Names::new(dir.path(), "cat-two").final_state()).unwrap();
    assert_eq!(names.latest_state().unwrap(), names.step_state(25));
}

#[test]
fn what_interruptions_left_goes_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names::new(dir.path(), "cat");
    let other = Names::new(dir.path(), "catfish");
    let lora = |path: PathBuf| std::fs::write(path, b"lora").unwrap();
    for step in [5, 7, 9] {
        sample(step).save(&names.step_state(step)).unwrap();
        lora(names.step_file(step));
    }
    sample(7).save(&other.step_state(7)).unwrap();
    lora(other.step_file(7));
    other.mark_interrupt(7).unwrap();
    lora(names.step_file(3));
    lora(names.final_file());
    assert!(names.remove_interrupts().is_empty());
    names.mark_interrupt(5).unwrap();
    names.mark_interrupt(9).unwrap();
    names.unmark_interrupt(9);
    names.unmark_interrupt(9);
    assert_eq!(names.latest_state().unwrap(), names.step_state(9), "a mark changes nothing about the state");
    wan_train::checkpoint::TrainState::load(&names.step_state(5)).unwrap();
    assert_eq!(names.remove_interrupts(), [names.step_file(5), names.step_state(5)]);
    let left = [names.step_file(3), names.step_file(7), names.step_file(9), names.final_file(), other.step_file(7)];
    assert!(left.iter().all(|p| p.is_file()));
    assert!([names.step_state(7), names.step_state(9), other.step_state(7)].iter().all(|p| p.is_dir()));
    // A state that is saved again in its turn is no longer an interruption's.
    names.mark_interrupt(7).unwrap();
    sample(7).save(&names.step_state(7)).unwrap();
    assert!(names.remove_interrupts().is_empty());
}

#[test]
fn the_newest_checkpoint_to_start_from() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(newest_checkpoint(&dir.path().join("none"), |_| true).unwrap(), None);
    assert_eq!(newest_checkpoint(dir.path(), |_| true).unwrap(), None);
    let put = |name: &str, age: u64| {
        let path = dir.path().join(name);
        std::fs::write(&path, name).unwrap();
        let when = std::time::SystemTime::now() - std::time::Duration::from_secs(age);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(when).unwrap();
        path
    };
    put("a.safetensors", 100);
    let newest = put("b.safetensors", 10);
    put("c.safetensors", 50);
    put("notes.txt", 0);
    put(".hidden.safetensors", 0);
    assert_eq!(newest_checkpoint(dir.path(), |_| true).unwrap(), Some(newest));
    let err = user_error(require_file("--resume_from", &dir.path().join("typo.safetensors")));
    assert!(err.contains("--resume_from") && err.contains("typo.safetensors does not exist"), "{err}");
    require_file("--resume_from", &dir.path().join("a.safetensors")).unwrap();
}
