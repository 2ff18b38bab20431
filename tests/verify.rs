//! The verifier on the reference numbers, on damaged copies of them, and on its own subset.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::SafeTensors;
use serde_json::{json, Value};
use wan_kernels::Exec;
use wan_train::error::UserError;
use wan_train::verify::{pack, run, GoldenSource, Summary};

use crate::golden_support::golden_dir;

fn verify(source: &GoldenSource) -> (Summary, String) {
    let mut out = Vec::new();
    let summary = run(source, &Exec::cpu(), &mut out).unwrap();
    (summary, String::from_utf8(out).unwrap())
}

fn verify_dir(dir: &Path) -> (Summary, String) {
    verify(&GoldenSource::Dir(dir.to_path_buf()))
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(golden_dir().join(name)).unwrap()
}

/// A directory with copies of the golden files whose names start with one of `prefixes`.
fn copy_of(prefixes: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden_dir()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if prefixes.iter().any(|p| name.starts_with(p)) {
            std::fs::write(dir.path().join(&name), golden(&name)).unwrap();
        }
    }
    dir
}

/// The same safetensors file with the tensors that `keep` names, their bytes passed through `edit`.
fn rewritten(file: &[u8], keep: impl Fn(&str) -> bool, edit: impl Fn(&str, &mut Vec<u8>)) -> Vec<u8> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let data: Vec<(String, Vec<u8>)> = tensors
        .iter()
        .filter(|(key, _)| keep(key))
        .map(|(key, t)| {
            let mut bytes = t.data().to_vec();
            edit(key, &mut bytes);
            (key.to_string(), bytes)
        })
        .collect();
    let views = data.iter().map(|(key, bytes)| {
        let t = tensors.tensor(key).unwrap();
        (key.as_str(), TensorView::new(t.dtype(), t.shape().to_vec(), bytes).unwrap())
    });
    let (_, header) = SafeTensors::read_metadata(file).unwrap();
    let metadata: Option<HashMap<String, String>> = header.metadata().clone();
    safetensors::serialize(views, metadata).unwrap()
}

#[test]
fn every_reference_number_is_reproduced() {
    let (summary, text) = verify_dir(&golden_dir());
    println!("{text}");
    let failures: Vec<&str> = text.lines().filter(|line| line.contains("FAIL")).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(summary.passed > 150 && summary.failed == 0, "{summary:?}");
    assert_eq!(text.lines().last().unwrap(), format!("{} passed, 0 failed", summary.passed));
    for kind in 1..=13 {
        assert!(text.lines().any(|line| line.starts_with(&format!("{kind:02}_"))), "no line of kind {kind}");
    }
}

#[test]
fn numbers_of_unrelated_implementations_are_reproduced() {
    let (summary, text) = verify_dir(&golden_dir().join("diffusers"));
    let failures: Vec<&str> = text.lines().filter(|line| line.contains("FAIL")).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(summary.passed > 150 && summary.failed == 0, "{summary:?}");
    for kind in 1..=10 {
        assert!(text.lines().any(|line| line.starts_with(&format!("{kind:02}_"))), "no line of kind {kind}");
    }
}

#[test]
fn the_subset_inside_the_program_passes() {
    let (summary, text) = verify(&GoldenSource::Embedded);
    assert!(summary.failed == 0 && summary.passed > 60, "{text}");
    for kind in 1..=13 {
        assert!(text.lines().any(|line| line.starts_with(&format!("{kind:02}_"))), "no line of kind {kind}");
    }
}

/// Adds one to the last byte but one of a tensor: an fp32 number off by half a percent or so, an fp8 code off by one.
fn nudge(key: &str) -> impl Fn(&str, &mut Vec<u8>) + '_ {
    move |k, bytes| {
        if k == key {
            let at = bytes.len().saturating_sub(2);
            bytes[at] = bytes[at].wrapping_add(64);
        }
    }
}

#[test]
fn one_wrong_number_is_found() {
    for (prefixes, file, key, line) in [
        (&["02_dit_i2v_22"][..], "02_dit_i2v_22.io.safetensors", "case0.pred", "case0 pred "),
        (&["02_dit_i2v_22", "03_lora_i2v22"], "03_lora_i2v22_d4.io.safetensors", "loss", "loss"),
        (
            &["02_dit_i2v_22", "03_lora_i2v22"],
            "03_lora_i2v22_d4.io.safetensors",
            "grad.lora_unet_blocks_1_ffn_2.lora_up.weight",
            "gradients",
        ),
        (&["04_fp8_matrices"], "04_fp8_matrices.safetensors", "bf16.w_b.q_u8", "bf16.w_b"),
        (&["06_"], "06_umt5.io.safetensors", "output", "output"),
        (&["06_"], "06_umt5.weights.safetensors", "blocks.1.ffn.fc2.weight", "output"),
        (&["08_"], "08_clip_vision.io.safetensors", "img1.penultimate", "image 1"),
        (&["10_resize"], "10_resize_pixels.safetensors", "img2.out", "2 50x70"),
        (&["11_merge_native"], "11_merge_native.safetensors", "merged.blocks.0.ffn.0.weight", "merged weights"),
        (&["12_"], "12_samplers.safetensors", "unipc.s4.sh3.linear.final", "unipc 4 steps shift 3 linear"),
    ] {
        let dir = copy_of(prefixes);
        let path = dir.path().join(file);
        std::fs::write(&path, rewritten(&std::fs::read(&path).unwrap(), |_| true, nudge(key))).unwrap();
        let (summary, text) = verify_dir(dir.path());
        assert!(summary.failed >= 1 && summary.passed >= 1, "{file} {key}:\n{text}");
        let found = text.lines().any(|l| l.contains("FAIL") && l.contains(line));
        assert!(found, "{file} {key}: no failing line `{line}`:\n{text}");
    }
}

#[test]
fn one_wrong_entry_of_a_json_is_found() {
    let edits: [(&str, &str, Value, &str); 9] = [
        ("07_tokenizer.json", "/cases/4/ids/3", json!(17), "prompts' ids"),
        ("07_tokenizer.json", "/cases/4/cleaned", json!("something else"), "cleaned prompts"),
        ("07_tokenizer_raw.json", "/cases/3/ids/0", json!(17), "prompts' ids"),
        ("09_lr_schedules.json", "/schedules/5/lr/120", json!(9e-5), "5 cosine"),
        ("09_timestep_sampling.json", "/cases/0/timesteps/2", json!(500.0), "uniform"),
        ("10_buckets.json", "/cases/7/crop_left", json!(4000), "choices"),
        ("10_buckets.json", "/bucket_lists/0/buckets/3/0", json!(16), "bucket lists"),
        ("10_frames.json", "/cases/20/items/1/frames/start", json!(1), "videos"),
        ("11_merge_native.json", "/changed", json!(19), "what is merged"),
    ];
    for (file, pointer, value, line) in edits {
        let stem = file.trim_end_matches(".json");
        let dir = copy_of(&[stem]);
        let mut json: Value = serde_json::from_slice(&golden(file)).unwrap();
        *json.pointer_mut(pointer).unwrap_or_else(|| panic!("{file} has no {pointer}")) = value;
        std::fs::write(dir.path().join(file), json.to_string()).unwrap();
        let (summary, text) = verify_dir(dir.path());
        assert!(summary.failed >= 1, "{file} {pointer}:\n{text}");
        assert!(text.lines().any(|l| l.contains("FAIL") && l.contains(line)), "{file} {pointer}:\n{text}");
    }
}

#[test]
fn cases_may_have_other_names() {
    let dir = tempfile::tempdir().unwrap();
    for end in [".json", ".io.safetensors", ".weights.safetensors"] {
        std::fs::write(dir.path().join(format!("77_text{end}")), golden(&format!("06_umt5{end}"))).unwrap();
        std::fs::write(dir.path().join(format!("a_picture{end}")), golden(&format!("08_clip_vision{end}"))).unwrap();
    }
    let (summary, text) = verify_dir(dir.path());
    assert!(summary.failed == 0 && summary.passed >= 8, "{text}");
    assert!(text.contains("77_text output") && text.contains("a_picture image 0"), "{text}");
}

#[test]
fn what_is_not_known_or_damaged_is_a_failure_and_never_silence() {
    let dir = copy_of(&["07_tokenizer_raw"]);
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    write("14_mystery.json", b"{\"cases\": [{\"what\": 1}]}");
    write("15_broken.json", b"{\"cases\": [");
    write("16_alone.safetensors", &golden("11_merge_noalpha.safetensors"));
    write("11_torn.json", &golden("11_merge_noalpha.json"));
    let whole = golden("11_merge_noalpha.safetensors");
    write("11_torn.safetensors", &whole[..whole.len() / 2]);
    write("06_half.json", &golden("06_umt5.json"));
    let (summary, text) = verify_dir(dir.path());
    assert_eq!(summary, Summary { passed: 1, failed: 5 }, "{text}");
    for (name, why) in [
        ("14_mystery", "unknown kind of case"),
        ("15_broken", "not JSON"),
        ("16_alone.safetensors", "opened by no case"),
        ("11_torn", "not a safetensors file"),
        ("06_half", "06_half.io.safetensors"),
    ] {
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no line {name}:\n{text}"));
        assert!(line.contains("FAIL") && line.contains(why), "{line}");
    }
    assert_eq!(text.lines().last(), Some("1 passed, 5 failed"));
}

/// A tensor that nothing compares would be a gap in the self-test.
#[test]
fn a_tensor_that_is_not_looked_at_is_named() {
    let dir = copy_of(&["08_"]);
    let mut json: Value = serde_json::from_slice(&golden("08_clip_vision.json")).unwrap();
    json["cases"].as_array_mut().unwrap().pop();
    std::fs::write(dir.path().join("08_clip_vision.json"), json.to_string()).unwrap();
    let (summary, text) = verify_dir(dir.path());
    assert_eq!(summary.failed, 1, "{text}");
    assert!(text.contains("img1.full_depth of 08_clip_vision.io.safetensors (and 2 more) was not looked at"), "{text}");
}

#[test]
fn a_directory_that_cannot_be_read_is_a_usage_error() {
    let empty = tempfile::tempdir().unwrap();
    let file = empty.path().join("README.md");
    for dir in [Path::new("/nonexistent/golden"), empty.path(), file.as_path()] {
        let source = GoldenSource::Dir(dir.to_path_buf());
        let error = run(&source, &Exec::cpu(), &mut Vec::new()).unwrap_err();
        let user: &UserError = error.downcast_ref().expect("a UserError");
        assert_eq!(user.exit, 2);
        assert!(user.what.contains(&dir.display().to_string()) && user.hint.is_some(), "{user}");
        std::fs::write(&file, "no case").unwrap();
    }
}

/// Writes `configs/golden/subset.bin.zst` from the reference numbers: every kind of case, as few tensors as make sense.
#[test]
#[ignore = "writes the archive that is compiled into the program"]
fn make_the_embedded_subset() {
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut json = |name: &str, edit: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_slice(&golden(name)).unwrap();
        edit(&mut value);
        files.insert(name.to_string(), value.to_string().into_bytes());
    };
    let only = |keep: &'static [usize]| {
        move |v: &mut Value| {
            let mut at = 0..;
            v["cases"].as_array_mut().unwrap().retain(|_| keep.contains(&at.next().unwrap()));
        }
    };
    let whole = |_: &mut Value| {};
    json("01_dit_t2v_b.json", &|v| {
        only(&[0])(v);
        v["acts_for_case"] = Value::Null;
    });
    json("02_dit_flf2v_21.json", &whole);
    json("03_lora_d4a2.json", &|v| drop(v.as_object_mut().unwrap().remove("traj_clip")));
    json("03_lokr_d4.json", &whole);
    json("04_fp8_matrices.json", &whole);
    json("05_vae21.json", &|v| {
        let cases = v["cases"].as_array_mut().unwrap();
        cases.retain(|c| (c["kind"] == "encode" && c["idx"] == 1) || (c["kind"] == "decode" && c["idx"] == 0));
    });
    json("06_umt5.json", &whole);
    json("07_tokenizer.json", &whole);
    json("07_tokenizer_raw.json", &whole);
    json("08_clip_vision.json", &only(&[0]));
    json("09_lr_schedules.json", &whole);
    json("09_timestep_sampling.json", &whole);
    json("10_buckets.json", &whole);
    json("10_frames.json", &whole);
    json("10_resize_pixels.json", &only(&[0, 3]));
    json("11_merge_kohya_unmapped.json", &whole);
    json("11_merge_noalpha.json", &whole);
    json("12_samplers.json", &|v| {
        v["cases"].as_array_mut().unwrap().retain(|c| c["steps"] == 4 && c["shift"] == 5.0);
    });
    json("13_cache.json", &|v| v["latent_cases"].as_array_mut().unwrap().truncate(1));

    let starts = |prefixes: &'static [&'static str]| move |key: &str| prefixes.iter().any(|p| key.starts_with(p));
    let all = |_: &str| true;
    type Keep<'a> = (&'a str, &'a dyn Fn(&str) -> bool);
    let keeps: [Keep<'_>; 19] = [
        ("01_dit_t2v_b.weights.safetensors", &all),
        ("01_dit_t2v_b.io.safetensors", &starts(&["case0."])),
        ("02_dit_flf2v_21.weights.safetensors", &all),
        ("02_dit_flf2v_21.io.safetensors", &all),
        ("03_lora_d4a2.network.safetensors", &all),
        ("03_lora_d4a2.io.safetensors", &|key| !key.starts_with("traj.clip")),
        ("03_lora_d4a2.traj_noclip.final.safetensors", &all),
        ("03_lokr_d4.network.safetensors", &all),
        ("03_lokr_d4.io.safetensors", &all),
        (
            "04_fp8_matrices.safetensors",
            &starts(&["fp32.w_a", "bf16.w_edge", "fp16.w_oddcols", "castcases", "table", "bf16.w_oddcols"]),
        ),
        ("05_vae21.weights.safetensors", &all),
        ("05_vae21.io.safetensors", &starts(&["enc1.", "dec0.", "latent_"])),
        ("06_umt5.weights.safetensors", &all),
        ("06_umt5.io.safetensors", &|key| !key.starts_with("output_row0")),
        ("08_clip_vision.weights.safetensors", &all),
        ("08_clip_vision.io.safetensors", &starts(&["img0."])),
        ("10_resize_pixels.safetensors", &starts(&["img0.", "img3."])),
        ("12_samplers.safetensors", &|key| ["noise", "w1", "w2"].contains(&key) || key.contains(".s4.sh5.")),
        ("13_latent_cache.safetensors", &starts(&["case0.float32", "case0.frames"])),
    ];
    for (name, keep) in keeps {
        files.insert(name.to_string(), rewritten(&golden(name), keep, |_, _| {}));
    }
    // The saved file is compared byte by byte.
    for name in
        ["03_lora_d4a2.saved_bf16.safetensors", "11_merge_kohya_unmapped.safetensors", "11_merge_noalpha.safetensors"]
    {
        files.insert(name.to_string(), golden(name));
    }
    let archive = pack(&files).unwrap();
    assert!(archive.len() < 3_500_000, "{} bytes", archive.len());
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/golden/subset.bin.zst"), archive).unwrap();
}
