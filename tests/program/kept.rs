//! `--fp8_cache`: weights in fp8 that are kept for the next start.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::{find, text, wan_train, Bench};

fn lora(bench: &Bench) -> HashMap<String, Tensor> {
    let files = bench.outputs(".safetensors");
    assert_eq!(files.len(), 1, "{files:?}");
    let tensors = candle_core::safetensors::load(&files[0], &Device::Cpu).unwrap();
    std::fs::remove_dir_all(bench.path("base/outputs")).unwrap();
    tensors
}

#[test]
fn the_second_start_uses_what_the_first_has_kept() {
    let bench = Bench::new();
    let kept = bench.path("kept");
    let run = |cache: &Path| {
        let cache = cache.to_string_lossy().into_owned();
        let out = bench.run("", &["--epochs", "1", "--fp8_base", "--fp8_cache", &cache]);
        assert!(out.status.success(), "{}", text(&out));
        (text(&out), lora(&bench))
    };
    let same = |a: &HashMap<String, Tensor>, b: &HashMap<String, Tensor>| {
        let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        a.len() == b.len() && a.iter().all(|(k, t)| bits(t) == bits(&b[k]))
    };
    // A place that cannot be written is a note, not an end.
    std::fs::write(bench.path("file"), b"").unwrap();
    let (said, plain) = run(&bench.path("file"));
    assert!(said.contains("note: the weights in fp8 are not kept") && said.contains("a file is in the way"), "{said}");
    let (said, first) = run(&kept);
    assert!(said.contains("keeping the blocks in fp8 for the next start") && said.contains("KiB"), "{said}");
    let files = find(&kept, "");
    assert_eq!(files.len(), 1, "{files:?}");
    let (said, second) = run(&kept);
    assert!(said.contains("kept by an earlier start") && !said.contains("keeping"), "{said}");
    assert!(same(&plain, &first) && same(&plain, &second), "the same numbers to the bit");
    assert_eq!(find(&kept, ""), files);
}

/// The bench makes its files, and its second start reads what the first has kept.
#[test]
fn the_start_is_benched_on_the_cpu_too() {
    let dir = tempfile::tempdir().unwrap();
    let row = |more: &[&str], words: &[&str]| -> serde_json::Value {
        let bench = ["bench", "start", "--json", "--device", "cpu", "--task", "demo", "--base_dir", "base"];
        let out = wan_train(dir.path()).args(bench).args(["--file", "random.safetensors"]).args(more).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        let line = String::from_utf8_lossy(&out.stdout);
        let row = serde_json::from_str(line.trim()).unwrap_or_else(|e| panic!("{e}: {}", text(&out)));
        let said = text(&out);
        assert_eq!(said.contains("merging random.lightning.safetensors"), more.contains(&"--lightning"), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?} are not all in:\n{said}");
        row
    };
    let plain = row(&["--fp8_cache", "off"], &["writing random fp16 weights"]);
    let seconds = |row: &serde_json::Value| row["load_s"].as_f64().unwrap() > 0.0;
    assert!(seconds(&plain) && plain["kept"] == false && plain["lightning"] == false, "{plain}");
    let merged = row(&["--lightning"], &["writing a random LoRA"]);
    assert!(seconds(&merged) && merged["lightning"] == true && merged["file_gib"] == plain["file_gib"], "{merged}");
    let keep = ["--lightning", "--fp8_cache", "kept"];
    let first = row(&keep, &["keeping the blocks in fp8"]);
    assert!(first["kept_s"].is_number() && first["kept"] == true, "{first}");
    let second = row(&keep, &["kept by an earlier start"]);
    assert!(seconds(&second) && second["kept_s"].is_null() && second["kept"] == true, "{second}");
    // Torn: said, made again as it was, used again.
    let file = &find(&dir.path().join("kept"), ".fp8.safetensors")[0];
    let bytes = std::fs::read(file).unwrap();
    std::fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
    row(&keep, &["is made again", "keeping the blocks in fp8"]);
    assert!(std::fs::read(file).unwrap() == bytes);
    row(&keep, &["kept by an earlier start"]);
    row(
        &["--mixed_precision", "no", "--fp8_base=false", "--fp8_scaled=false", "--fp8_cache", "kept"],
        &["nothing to keep"],
    );
    // What it wrote is a LoRA for every linear.
    let lora = wan_train::checkpoint::LoraFile::open(&dir.path().join("random.lightning.safetensors")).unwrap();
    assert_eq!((lora.len(), lora.ranks().unwrap().into_iter().collect::<Vec<_>>()), (30, vec![64]));
}
