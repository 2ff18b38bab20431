//! From pictures and a clip to a LoRA, a log and a curve.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;

use super::{text, Bench};

#[test]
fn the_demo_trains_and_leaves_what_it_says() {
    let bench = Bench::new();
    let out = bench.run("", &["--epochs", "6", "--save_every", "3"]);
    let said = text(&out);
    assert!(out.status.success(), "{said}");

    let loras = bench.outputs(".safetensors");
    assert_eq!(loras.len(), 2, "{loras:?}\n{said}");
    let last = loras.iter().find(|p| !p.to_string_lossy().contains("-000003.")).unwrap();
    assert!(said.contains(last.file_name().unwrap().to_str().unwrap()), "{said}");
    let bytes = std::fs::read(last).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    // ComfyUI's rule: diffusion_model.<module>.lora_A.weight, lora_B.weight, alpha, for every module.
    let mut parts: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for name in tensors.names() {
        let rest = name.strip_prefix("diffusion_model.").unwrap_or_else(|| panic!("{name}"));
        let (module, part) =
            ["lora_A.weight", "lora_B.weight", "alpha"].iter().find_map(|p| Some((rest.strip_suffix(p)?, *p))).unwrap();
        parts.entry(module.to_owned()).or_default().push(part);
    }
    assert_eq!(parts.len(), 3 * 10, "ten linears in each of three blocks");
    assert!(parts.values().all(|p| p.len() == 3), "{parts:?}");
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!(metadata["ss_network_dim"], "16");
    assert_eq!(metadata["ss_steps"], "48");
    assert!(metadata.contains_key("sshs_model_hash") && metadata.contains_key("modelspec.date"));

    let log = bench.outputs(".jsonl");
    let lines: Vec<Value> =
        std::fs::read_to_string(&log[0]).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 48);
    let mean =
        |lines: &[Value]| lines.iter().map(|l| l["loss/current"].as_f64().unwrap()).sum::<f64>() / lines.len() as f64;
    let (first, final_) = (mean(&lines[..8]), mean(&lines[40..]));
    assert!(final_ < 0.9 * first, "the loss went from {first} to {final_}");

    assert!(
        said.contains(&format!(
            "report:     {}",
            last.with_extension("html").strip_prefix(bench.path("")).unwrap().display()
        )),
        "{said}"
    );
    // A report beside each checkpoint, with what was trained on, planned and set.
    for lora in &loras {
        let html = std::fs::read_to_string(lora.with_extension("html")).unwrap();
        let step = if lora == last { "48 of 48" } else { "24 of 48" };
        for word in
            [step, "chelsea.png", "memory plan for the largest batch", "peak host memory", "learning_rate", "<polyline"]
        {
            assert!(html.contains(word), "`{word}` is not in the report of {}", lora.display());
        }
    }
    let line = &lines[5];
    for tag in ["grad_norm", "perf/s_per_step", "perf/tokens_per_s", "mem/host_peak_gib"] {
        assert!(line[tag].as_f64().is_some_and(|v| v > 0.0), "{tag}: {line}");
    }
    assert_eq!(line["samples"].as_array().unwrap().len(), 1, "{line}");

    let curve = image::open(&bench.outputs("-loss.png")[0]).unwrap().to_rgb8();
    let colours: std::collections::BTreeSet<_> = curve.pixels().map(|p| p.0).collect();
    assert!(curve.width() >= 320 && colours.len() > 3, "a drawn picture");
    assert_eq!(
        super::find(&bench.path("base/outputs"), "")
            .iter()
            .filter(|p| p.to_string_lossy().contains("tfevents"))
            .count(),
        1
    );
}

#[test]
fn reports_go_with_their_checkpoints() {
    let bench = Bench::new();
    let out = bench.run("", &["--epochs", "4", "--save_every", "1", "--save_last_n_epochs", "1"]);
    assert!(out.status.success(), "{}", text(&out));
    assert!(text(&out).contains("removed "), "{}", text(&out));
    let stems = |suffix: &str| -> Vec<String> {
        let names = bench.outputs(suffix).into_iter().map(|p| p.to_string_lossy().into_owned());
        names.map(|n| n.trim_end_matches(suffix).to_owned()).collect()
    };
    assert_eq!(stems(".html"), stems(".safetensors"));
    assert_eq!(stems(".html").len(), 2, "the last epoch's and the final one");
}

fn tensors(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    tensors.into_iter().map(|(name, t)| (name, t.data().to_vec())).collect()
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let run = || {
        let bench = Bench::new();
        let out = bench.run("", &["--epochs", "1", "--no_metadata", "--logging_dir", "log"]);
        assert!(out.status.success(), "{}", text(&out));
        tensors(&bench.outputs(".safetensors")[0])
    };
    assert_eq!(run(), run());
}

#[test]
fn caches_are_reused_and_a_changed_caption_is_encoded_again() {
    let bench = Bench::new();
    let first = text(&bench.run("cache", &[]));
    assert!(first.contains("reused"), "{first}");
    std::fs::write(bench.path("base/datasets/demo/images/coffee.txt"), "A cup of tea.").unwrap();
    let second = text(&bench.run("cache", &[]));
    assert!(second.contains("coffee") && second.contains("caption"), "{second}");
    let third = bench.run("train", &["--epochs", "1"]);
    assert!(third.status.success(), "{}", text(&third));
}

#[test]
fn the_phases_are_told_to_whoever_asks() {
    let bench = Bench::new();
    let with = |log: &str| {
        let out = bench.command("", &["--epochs", "1"]).env("RUST_LOG", log).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        text(&out)
    };
    let said = with("wan_train=debug");
    for phase in ["survey", "encode", "train: load the DiT", "train: save", "train"] {
        let told = said.lines().any(|l| l.starts_with(&format!("debug: {phase}: close")) && l.contains("time.busy="));
        assert!(told, "{phase}:\n{said}");
    }
    assert!(!with("").contains("debug:"));
    assert!(with("=,=").contains("warning: RUST_LOG cannot be read"));
}

#[test]
fn plan_prints_a_table_and_train_does_not_need_the_encoders() {
    let bench = Bench::new();
    let plan = bench.run("plan", &[]);
    assert!(plan.status.success() && text(&plan).contains("total"), "{}", text(&plan));
    std::fs::remove_file(bench.path("base/models/demo_umt5.safetensors")).unwrap();
    // The demo makes its models anew when they are missing, so the paths are given by hand.
    let out = bench
        .run("train", &["--epochs", "1", "--dit", "base/models/demo_dit.safetensors", "--t5", "none", "--vae", "none"]);
    assert!(out.status.success(), "{}", text(&out));
}

/// `--disable_numpy_memmap`: every model file of a run is read by position, and the numbers are the same.
#[test]
fn model_files_are_read_through_a_mapping_or_by_position() {
    let run = |more: &[&str]| {
        let bench = Bench::new();
        let mut args = vec!["--epochs", "1", "--no_metadata", "--recache", "--fp8_base", "--fp8_cache", "kept"];
        args.extend(more);
        let said = [(); 2].map(|()| {
            let out = bench.command("", &args).env("RUST_LOG", "wan_train=debug").output().unwrap();
            assert!(out.status.success(), "{}", text(&out));
            text(&out)
        });
        let by_position = |name: &str| {
            said[1].lines().any(|line| line.contains(name) && line.ends_with("is read by position: as asked"))
        };
        let files = ["demo_dit.safetensors", "demo_vae.safetensors", "demo_umt5.safetensors", ".fp8.safetensors"];
        let files = files.map(by_position);
        assert!(said[1].contains("kept by an earlier start"), "{}", said[1]);
        (files, tensors(&bench.outputs(".safetensors")[0]))
    };
    let (mapped, lora) = run(&[]);
    assert_eq!(mapped, [false; 4]);
    for name in ["--disable_numpy_memmap", "--disable_mmap"] {
        let (files, same) = run(&[name]);
        assert_eq!(files, [true; 4], "{name}");
        assert!(same == lora, "{name}");
    }
}

#[test]
fn how_long_it_trains_is_what_was_asked_for_last() {
    let bench = Bench::new();
    let out = bench.run("", &["--max_train_steps", "3"]);
    assert!(out.status.success() && text(&out).contains("finished after 3 steps"), "{}", text(&out));
    assert!(!text(&out).contains("note: --max_train_epochs"), "{}", text(&out));
    let out = bench.run("", &["--max_train_steps", "3", "--epochs", "1"]);
    let said = "note: --max_train_epochs 1 says how long it trains, so --max_train_steps 3 is not used";
    assert!(out.status.success() && text(&out).contains(said), "{}", text(&out));
}

#[test]
fn a_rate_that_is_not_used_is_not_announced() {
    let bench = Bench::new();
    let announced = |more: &[&str]| {
        let out = bench.run("", &[&["--epochs", "1", "--optimizer_type", "adafactor"], more].concat());
        assert!(out.status.success(), "{}", text(&out));
        (text(&out).contains("learning rate: 0 %"), text(&out).contains("note: adafactor sets its own rates"))
    };
    assert_eq!(announced(&[]), (false, true));
    let given = ["--optimizer_args", "relative_step=False", "scale_parameter=False"];
    assert_eq!(announced(&given), (true, false));
}
