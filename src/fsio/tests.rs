use super::*;

fn names(dir: &Path) -> Vec<String> {
    let mut v: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    v.sort();
    v
}

#[test]
fn a_file_appears_whole_and_replaces_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/er/file.bin");
    write_bytes(&path, b"one").unwrap();
    write_bytes(&path, b"two, longer").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"two, longer");
    assert_eq!(names(path.parent().unwrap()), ["file.bin"]);
}

#[test]
fn a_failed_write_leaves_the_old_file_and_no_temporary_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.bin");
    write_bytes(&path, b"old").unwrap();
    let err = write_atomic(&path, |w| {
        w.write_all(&[0u8; 5_000_000])?;
        anyhow::bail!("the source ended early")
    })
    .unwrap_err();
    assert_eq!(err.to_string(), "the source ended early");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["file.bin"]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_named_with_its_remedy() {
    // /dev/full answers every write with "no space left".
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let err = write_atomic(&path, |_| {
        let mut full = OpenOptions::new().write(true).open("/dev/full")?;
        Ok(full.write_all(b"x")?)
    })
    .unwrap_err();
    let user = err.downcast_ref::<UserError>().expect("a user error");
    assert!(user.what.contains("disk is full") && user.what.contains("x.safetensors"), "{user}");
    assert!(user.hint.as_deref().unwrap().contains("free some space"));
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_parent_that_is_a_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("out"), "i am a file").unwrap();
    let err = write_bytes(&dir.path().join("out/name/x.bin"), b"x").unwrap_err();
    let user = err.downcast_ref::<UserError>().expect("a user error");
    assert!(user.what.contains("out"), "{user}");
    let err = ensure_writable_dir(&dir.path().join("out")).unwrap_err();
    assert!(err.downcast_ref::<UserError>().unwrap().what.contains("file is in the way"));
}

#[test]
#[cfg(target_os = "linux")]
fn a_place_that_takes_no_files_is_refused_at_the_start() {
    let err = ensure_writable_dir(Path::new("/proc/wan-train-cannot-write-here")).unwrap_err();
    assert!(format!("{err:#}").contains("/proc/wan-train"), "{err:#}");
}

#[test]
fn leftovers_of_dead_writers_go_and_those_of_living_ones_stay() {
    let dir = tempfile::tempdir().unwrap();
    let dead = dir.path().join(".x.safetensors.1-0-0.wtmp");
    std::fs::write(&dead, "half").unwrap();
    let dead_dir = dir.path().join(".run-state.1-1-0.wtmp");
    std::fs::create_dir(&dead_dir).unwrap();
    std::fs::write(dead_dir.join(dir::LOCK), "being written\n").unwrap();
    std::fs::write(dead_dir.join("params.bin"), "half").unwrap();
    std::fs::write(dir.path().join(".hidden"), "someone else's").unwrap();
    write_atomic(&dir.path().join("y.safetensors"), |w| {
        w.write_all(&[1u8; 3_000_000])?;
        assert_eq!(clean_leftovers(dir.path()), 2);
        Ok(())
    })
    .unwrap();
    assert_eq!(names(dir.path()), [".hidden", "y.safetensors"]);
}

#[test]
fn a_directory_is_replaced_in_one_step_and_comes_back_after_a_kill_between_renames() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("run-state");
    let put = |text: &str| write_dir_atomic(&state, |d| Ok(std::fs::write(d.join("a"), text)?));
    put("first").unwrap();
    put("second").unwrap();
    assert_eq!(std::fs::read_to_string(state.join("a")).unwrap(), "second");
    assert_eq!(names(&state), ["a"]);
    write_dir_atomic(&state, |d| {
        std::fs::write(d.join("a"), "third")?;
        anyhow::bail!("stop")
    })
    .unwrap_err();
    assert_eq!(std::fs::read_to_string(state.join("a")).unwrap(), "second");
    assert_eq!(names(root.path()), ["run-state"]);

    std::fs::rename(&state, root.path().join(".run-state.77-3-9.wold")).unwrap();
    clean_leftovers(root.path());
    assert_eq!(names(root.path()), ["run-state"]);
    remove_dir(&state).unwrap();
    assert!(names(root.path()).is_empty());
}

#[test]
fn free_space_is_that_of_the_nearest_existing_parent() {
    let dir = tempfile::tempdir().unwrap();
    let free = free_space(&dir.path().join("not/yet/there")).unwrap();
    assert!(free > 0);
    require_space(dir.path(), 1, "a byte").unwrap();
    let err = require_space(dir.path(), u64::MAX, "everything").unwrap_err().to_string();
    assert!(err.contains("everything needs") && err.contains("hint:"), "{err}");
    assert_eq!(human(1536), "1.5 KiB");
}
