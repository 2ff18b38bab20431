//! One LoRA over both experts: `--noise_level shared`, or `--dit_high_noise` alone.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;
use wan_train::config::{resolve, Typed};

use super::mistakes::refused;
use super::{find, read_lora, text, wan_train, Bench};

/// A recipe with two experts of the demo's size, which are two different models.
const RECIPE: &str = r#"
extends = "demo"
output_name = "two"
max_train_epochs = 2
save_every_n_epochs = 1
timestep_boundary = 0.75
[high]
dit = "{base_dir}/models/demo_dit_high.safetensors"
network_dim = 8
network_alpha = 8
min_timestep = 750
[low]
min_timestep = 0
max_timestep = 750
"#;

fn bench() -> Bench {
    let bench = Bench::new();
    std::fs::write(bench.path("two.toml"), RECIPE).unwrap();
    bench
}

fn shared(bench: &Bench, verb: &str, args: &[&str]) -> Command {
    let mut command = wan_train(&bench.path("."));
    command.args((!verb.is_empty()).then_some(verb));
    command.args(["--template", "two.toml", "--base_dir", "base", "--noise_level", "shared"]).args(args);
    command
}

fn run(bench: &Bench, args: &[&str]) -> String {
    let out = shared(bench, "", args).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    text(&out)
}

/// The one finished LoRA whose name begins so.
fn lora(bench: &Bench, name: &str) -> PathBuf {
    let ours = |p: &PathBuf| {
        let file = p.file_name().unwrap().to_string_lossy().into_owned();
        file.strip_prefix(name).and_then(|n| n.strip_suffix(".safetensors")).is_some_and(|s| !s.contains('-'))
    };
    let all: Vec<_> = bench.outputs(".safetensors").into_iter().filter(ours).collect();
    assert_eq!(all.len(), 1, "{:?}", bench.outputs(".safetensors"));
    all[0].clone()
}

fn lines(bench: &Bench) -> Vec<Value> {
    let log = bench.outputs(".jsonl").remove(0);
    std::fs::read_to_string(log).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn one_lora_comes_of_two_models_and_says_so() {
    let bench = bench();
    let said = run(&bench, &[]);
    let models = bench.path("base/models");
    let [low, high] =
        ["demo_dit", "demo_dit_high"].map(|m| std::fs::read(models.join(m).with_extension("safetensors")));
    assert_ne!(low.unwrap(), high.unwrap(), "two models");
    let (tensors, metadata) = read_lora(&lora(&bench, "two-shared-"));
    assert_eq!(tensors.len(), 90);
    for (key, value) in [
        ("ss_expert", "both"),
        ("ss_sd_model_name", "demo_dit.safetensors"),
        ("ss_sd_model_name_high_noise", "demo_dit_high.safetensors"),
        ("ss_timestep_boundary", "0.75"),
        // The low expert's settings, over all timesteps.
        ("ss_network_dim", "16"),
        ("ss_min_timestep", "None"),
        ("ss_max_timestep", "None"),
    ] {
        assert_eq!(metadata.get(key).map(String::as_str), Some(value), "{key}");
    }
    // Every step was one expert's, by its timestep; and that is what the logs and the last lines say.
    let lines = lines(&bench);
    assert_eq!(lines.len(), 16);
    let mut steps = [0, 0];
    for line in &lines {
        let is_high = line["samples"][0][0].as_f64().unwrap() >= 750.0;
        let (own, other) = if is_high { ("loss/high", "loss/low") } else { ("loss/low", "loss/high") };
        assert_eq!(line[own], line["loss/current"], "{line}");
        assert!(line[other].is_null(), "{line}");
        steps[usize::from(is_high)] += 1;
    }
    assert!(steps[0] > 0 && steps[1] > 0, "{steps:?}");
    let html = std::fs::read_to_string(lora(&bench, "two-shared-").with_extension("html")).unwrap();
    for (name, n) in [("high noise", steps[1]), ("low noise", steps[0])] {
        let share = format!("{n} of 16 steps ({} %), mean loss", (100.0 * f64::from(n) / 16.0).round());
        assert!(said.contains(&format!("{name}: {share}")), "{share}:\n{said}");
        assert!(html.contains(&share) && html.contains(&format!("Loss, {name}")), "{share}");
    }
    assert!(html.contains("demo_dit_high.safetensors") && html.contains("0.75"));
    for row in ["low: resident blocks", "high: resident blocks"] {
        assert!(said.contains(row), "{said}");
    }
    // Weights to start from: what says that it is one expert's is passed over, what is for both is taken.
    let from = bench.path("base/resume_checkpoints");
    std::fs::create_dir_all(&from).unwrap();
    std::fs::copy(lora(&bench, "two-shared-"), from.join("mine.safetensors")).unwrap();
    let next = run(&bench, &["--epochs", "1", "--output_name", "next"]);
    assert!(next.contains("taking"), "{next}");
    let single = ["--noise_level", "low", "--epochs", "1", "--output_name", "single"];
    let next = run(&bench, &single);
    assert!(!next.contains("taking") && !next.contains("high-noise DiT"), "{next}");
}

/// Two samples a batch.
fn pairs(bench: &Bench) {
    let config = bench.path("base/datasets/demo/demo.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("batch_size = 1", "batch_size = 2")).unwrap();
}

#[test]
fn resumed_and_streamed_it_ends_the_same_and_other_models_are_refused() {
    let whole = bench();
    pairs(&whole);
    run(&whole, &["--save_state"]);
    let want = read_lora(&lora(&whole, "two-shared-")).0;
    let streamed = bench();
    pairs(&streamed);
    let said = run(&streamed, &["--blocks_to_swap", "1", "--gradient_checkpointing"]);
    assert!(said.contains("low: streamed blocks") && said.contains("high: streamed blocks"), "{said}");
    assert_eq!(read_lora(&lora(&streamed, "two-shared-")).0, want);

    let state = whole.outputs("-000001-state").remove(0).to_string_lossy().into_owned();
    let resumed = |args: &[&str]| shared(&whole, "", &[&["--resume", &state], args].concat()).output().unwrap();
    let out = resumed(&["--blocks_to_swap", "2"]);
    let said = text(&out);
    assert!(out.status.success() && said.contains("resuming"), "{said}");
    assert_eq!(read_lora(&lora(&whole, "two-shared-")).0, want);
    // The experts' shares are those of the whole run.
    let steps = lines(&whole).len();
    assert_eq!(said.matches(&format!(" of {steps} steps (")).count(), 2, "{steps} steps:\n{said}");

    let other = "base/models/other_high.safetensors";
    std::fs::copy(whole.path("base/models/demo_dit_high.safetensors"), whole.path(other)).unwrap();
    refused(&resumed(&["--dit_high_noise", other]), 1, &["base model", "demo_dit_high", "other_high", "hint:"]);
    refused(&resumed(&["--timestep_boundary", "0.8"]), 1, &["base model", "from 0.75 on", "from 0.8 on"]);
    refused(&resumed(&["--noise_level", "low"]), 1, &["base model", "from 0.75 on"]);
}

fn into(said: &str, which: &str) -> bool {
    said.contains(&format!("at strength 1 into the {which}-noise DiT"))
}

#[test]
fn loras_are_merged_into_both_models() {
    let bench = bench();
    run(&bench, &["--epochs", "1", "--output_name", "first"]);
    let first = lora(&bench, "first-shared-").to_string_lossy().into_owned();
    let merged = ["--epochs", "1", "--base_weights", &first, "--save_merged", "new/merged.safetensors"];
    let said = run(&bench, &[&merged[..], &["--output_name", "second"]].concat());
    assert!(into(&said, "low") && into(&said, "high"), "{said}");
    let files = ["new/merged-low.safetensors", "new/merged-high.safetensors"];
    assert_ne!(read_lora(&bench.path(files[0])).0, read_lora(&bench.path(files[1])).0);
    run(&bench, &["--epochs", "1", "--dit", files[0], "--dit_high_noise", files[1], "--output_name", "third"]);
    assert_eq!(read_lora(&lora(&bench, "second-shared-")).0, read_lora(&lora(&bench, "third-shared-")).0);
}

#[test]
fn loras_are_merged_into_one_model_where_that_is_meant() {
    let bench = bench();
    run(&bench, &["--epochs", "1", "--output_name", "first"]);
    let first = lora(&bench, "first-shared-").to_string_lossy().into_owned();
    // Its own for the high expert, and none for the low one.
    let own = ["--epochs", "1", "--base_weights_high_noise", &first, "--output_name", "second"];
    let said = run(&bench, &own);
    assert!(into(&said, "high") && !into(&said, "low"), "{said}");
    let merged = ["--epochs", "1", "--base_weights", &first, "--save_merged", "old/merged.safetensors"];
    let said = run(&bench, &[&merged[..], &["--output_name", "third", "--musubi_compat"]].concat());
    assert!(into(&said, "low") && !into(&said, "high"), "{said}");
    assert!(said.contains("nothing is merged into the high-noise DiT"), "{said}");
    assert_eq!(find(&bench.path("old"), ".safetensors").len(), 1);
    let wrong = ["--base_weights_high_noise", "nowhere.safetensors"];
    let out = shared(&bench, "", &wrong).output().unwrap();
    refused(&out, 1, &["nowhere.safetensors", "--base_weights_high_noise"]);
}

#[test]
fn a_step_of_several_batches_tells_the_loss_of_either_expert() {
    let bench = bench();
    run(&bench, &["--epochs", "3", "--gradient_accumulation_steps", "4"]);
    let (lines, mut both) = (lines(&bench), 0);
    assert_eq!(lines.len(), 6);
    for line in &lines {
        let samples: Vec<(f64, f64)> = line["samples"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| (s[0].as_f64().unwrap(), s[1].as_f64().unwrap()))
            .collect();
        assert_eq!(samples.len(), 4);
        let mut experts = 0;
        for (tag, is_high) in [("loss/high", true), ("loss/low", false)] {
            let own: Vec<f64> = samples.iter().filter(|s| (s.0 >= 750.0) == is_high).map(|s| s.1).collect();
            match line[tag].as_f64() {
                None => assert!(own.is_empty(), "{line}"),
                Some(loss) => {
                    assert!((own.iter().sum::<f64>() / own.len() as f64 - loss).abs() < 1e-4, "{line}");
                    experts += 1;
                }
            }
        }
        both += usize::from(experts == 2);
    }
    assert!(both > 0, "no step had batches of both");
}

fn typed(flags: &[(&'static str, &str)]) -> Typed {
    let flags = flags.iter().map(|(name, word)| (*name, word.split(' ').map(str::to_owned).collect())).collect();
    Typed { config_file: None, flags }
}

#[test]
fn what_is_typed_and_what_a_template_says_of_its_experts_come_together() {
    let of = |flags: &[(&'static str, &str)]| resolve(&typed(flags), "stamp").unwrap().config;
    let text = |p: &Option<PathBuf>| p.as_ref().map(|p| p.display().to_string()).unwrap_or_default();
    // Files of one's own: `--dit_high_noise` alone says it.
    let two = [("task", "i2v-A14B"), ("dit", "low"), ("dit_high_noise", "high"), ("output_name", "mine")];
    let c = of(&two);
    assert!(c.is_shared() && c.boundary() == Some(0.9) && c.output_name.as_deref() == Some("mine"));
    assert_eq!((text(&c.dit), text(&c.dit_high_noise), c.min_timestep), ("low".into(), "high".into(), None));
    for boundary in ["0.8", "800"] {
        assert_eq!(of(&[&two[..], &[("timestep_boundary", boundary)]].concat()).boundary(), Some(0.8));
    }
    // One expert of two keeps its meaning.
    let high = of(&[&two[..], &[("noise_level", "high"), ("base_weights_high_noise", "h")]].concat());
    assert_eq!(
        (text(&high.dit), text(&high.dit_high_noise), high.base_weights),
        ("high".to_owned(), String::new(), vec!["h".to_owned()])
    );
    let low = of(&[&two[..], &[("noise_level", "low"), ("base_weights_high_noise", "h")]].concat());
    assert_eq!((text(&low.dit), low.dit_high_noise, low.base_weights.len()), ("low".into(), None, 0));

    // A template with a part for either: the low one's settings, both models, each with its own Lightning LoRA.
    let lightning = [("template", "i2v-lightning"), ("noise_level", "shared"), ("base_dir", "b")];
    let c = of(&lightning);
    let model = |level: &str| format!("b/models/wan2.2_i2v_{level}_noise_14B_fp16.safetensors");
    let lora = |level: &str| vec![format!("b/lightning_loras/i2v_{level}_noise_model.safetensors")];
    assert_eq!((text(&c.dit), text(&c.dit_high_noise)), (model("low"), model("high")));
    assert_eq!((&c.base_weights, c.base_weights_high_noise.as_ref()), (&lora("low"), Some(&lora("high"))));
    assert_eq!((c.network_dim, c.learning_rate, c.min_timestep, c.max_timestep), (42, 8e-5, None, None));
    assert_eq!(c.output_name.as_deref(), Some("my-wan22-i2v-lightning-shared-stamp"));
    let plain = of(&[&lightning[..], &[("skip_lightning", "true")]].concat());
    assert!(plain.base_weights.is_empty() && plain.base_weights_high_noise.is_none());
    // A LoRA of one's own takes the place of both.
    let own = of(&[&lightning[..], &[("base_weights", "x")]].concat());
    assert_eq!((own.base_weights, own.base_weights_high_noise), (vec!["x".to_owned()], None));
    let c = of(&[("template", "i2v-lightning"), ("dit_high_noise", "mine"), ("base_dir", "b")]);
    assert_eq!((text(&c.dit), text(&c.dit_high_noise)), (model("low"), "mine".into()));

    // Templates of one's own: a part for the shared LoRA, both files without any part, and the level itself.
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let own = file("a.toml", "extends = \"t2v-lightning\"\nbase_weights = [\"x\"]\n[shared]\nnetwork_dim = 5\n");
    let c = of(&[("template", &own), ("noise_level", "shared")]);
    assert_eq!((c.network_dim, c.base_weights, c.base_weights_high_noise), (5, vec!["x".to_owned()], None));
    let own = file("b.toml", "task = \"t2v-A14B\"\ndit = \"l\"\ndit_high_noise = \"{base_dir}/h\"\n");
    let c = of(&[("template", &own), ("base_dir", "b")]);
    assert!(c.is_shared() && text(&c.dit_high_noise) == "b/h");
    for (level, rank) in [("shared", 42), ("high", 8)] {
        let own = file("c.toml", &format!("extends = \"t2v-vanilla\"\nnoise_level = \"{level}\"\n"));
        let c = of(&[("template", &own)]);
        assert_eq!((c.noise_level.as_deref(), c.network_dim), (Some(level), rank));
        assert_eq!(of(&[("template", &own), ("noise_level", "low")]).noise_level.as_deref(), Some("low"));
    }
}

#[test]
fn mistakes() {
    let bench = bench();
    let bare = |args: &[&str]| wan_train(&bench.path(".")).arg("train").args(args).output().unwrap();
    let two = ["--dit", "a", "--dit_high_noise", "b"];
    let of_task = |task: &str, more: &[&str]| bare(&[&["--task", task], &two[..], more].concat());
    refused(&of_task("t2v-14B", &[]), 2, &["t2v-14B", "single model", "--dit_high_noise", "hint:"]);
    refused(&of_task("t2v-A14B", &["--timestep_boundary", "1001"]), 2, &["timestep_boundary", "1.001", "0..1000"]);
    refused(&of_task("t2v-A14B", &["--timestep_boundary", "-0.5"]), 2, &["timestep_boundary", "-0.5"]);
    refused(&bare(&["--task", "t2v-A14B", "--noise_level", "shared", "--dit", "a"]), 2, &["either expert", "hint:"]);
    refused(&bare(&["--template", "wan21-t2v-14b", "--dit_high_noise", "b"]), 2, &["single model", "hint:"]);
    refused(&bare(&["--dit", "a", "--base_weights_high_noise", "b"]), 2, &["no second expert", "--base_weights"]);
    refused(&bare(&["--template", "t2v-vanilla"]), 2, &["needs to know which", "--noise_level shared"]);

    let of_high = |path: &str| -> Output { shared(&bench, "", &["--dit_high_noise", path]).output().unwrap() };
    refused(&of_high("nowhere.safetensors"), 1, &["nowhere.safetensors (--dit_high_noise) does not exist", "hint:"]);
    let high = std::fs::read(bench.path("base/models/demo_dit.safetensors")).unwrap();
    std::fs::write(bench.path("torn.safetensors"), &high[..high.len() / 2]).unwrap();
    refused(&of_high("torn.safetensors"), 1, &["torn.safetensors", "hint:"]);
    // A model of another shape, known by its header.
    let arch = wan_train::hub::model_config("t2v-1.3B").unwrap().arch;
    crate::loader::hollow(&bench.path("other.safetensors"), &arch, "F16", 2);
    refused(&of_high("other.safetensors"), 1, &["other.safetensors cannot be used for demo", "hint:"]);
    assert!(bench.outputs(".safetensors").is_empty());
    // `check` finds both of two things.
    let out = shared(&bench, "check", &["--dit", "no-low", "--dit_high_noise", "no-high"]).output().unwrap();
    refused(&out, 1, &["2 things are wrong", "no-low", "no-high"]);
}

#[test]
fn both_models_are_in_the_plan_and_in_the_check() {
    let bench = Bench::new();
    for level in ["high", "low"] {
        let path = bench.path(&format!("base/models/wan2.2_t2v_{level}_noise_14B_fp16.safetensors"));
        crate::loader::hollow(&path, &wan_train::hub::model_config("t2v-A14B").unwrap().arch, "F16", 2);
    }
    let verb = |verb: &str, args: &[&str]| -> Output {
        let fixed = ["--base_dir", "base", "--template", "t2v-vanilla", "--dataset_config"];
        let data = "base/datasets/demo/demo.toml";
        wan_train(&bench.path(".")).arg(verb).args(fixed).arg(data).args(args).output().unwrap()
    };
    let total = |level: &str| {
        let out = verb("plan", &["--noise_level", level, "--vram_budget", "64"]);
        let said = text(&out);
        assert!(out.status.success(), "{said}");
        let line = said.lines().find(|l| l.starts_with("total")).unwrap().to_owned();
        (said, line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap())
    };
    let ((said, both), (_, low)) = (total("shared"), total("low"));
    for row in ["low: resident blocks", "high: resident blocks", "high: embeddings, norms, biases"] {
        assert!(said.contains(row), "{said}");
    }
    assert!(both > low + 13.0 && both < low + 16.0, "{both} GiB for both, {low} for one");
    let streamed = verb("plan", &["--noise_level", "shared", "--vram_budget", "16", "--blocks_to_swap", "36"]);
    let said = text(&streamed);
    assert!(said.contains("low: streamed blocks") && said.contains("high: streamed blocks"), "{said}");
    let out = verb("check", &["--noise_level", "shared", "--vram_budget", "64"]);
    let said = text(&out);
    for word in ["DiT (low noise)", "DiT (high noise)", "one LoRA over both experts:"] {
        assert!(said.contains(word), "{word}:\n{said}");
    }
    assert_eq!(said.matches("GiB on the card").count(), 1, "{said}");
}

#[test]
fn a_command_line_of_the_old_tool_means_what_it_meant() {
    let bench = bench();
    pairs(&bench);
    // The models are made by the recipe, and caches as the old tool makes them.
    run(&bench, &["--epochs", "1", "--musubi_compat"]);
    let line = "python wan_train_network.py --task demo --base_dir base --dataset_config base/datasets/demo/demo.toml \
                --dit base/models/demo_dit.safetensors --dit_high_noise base/models/demo_dit_high.safetensors \
                --timestep_boundary 750 --offload_inactive_dit --sdpa --network_module networks.lora_wan --network_dim 4 \
                --network_alpha 4 --learning_rate 1e-3 --timestep_sampling shift --discrete_flow_shift 3.0 \
                --max_train_steps 8 --seed 1 --output_dir out --output_name old --logging_dir out --musubi_compat";
    let out = wan_train(&bench.path(".")).arg("musubi").args(line.split_whitespace()).output().unwrap();
    let said = text(&out);
    assert!(out.status.success(), "{said}");
    for word in ["one LoRA over both experts", "--offload_inactive_dit (both experts stay at hand", "high noise: "] {
        assert!(said.contains(word), "{word}:\n{said}");
    }
    let (tensors, metadata) = read_lora(&bench.path("out/old.safetensors"));
    assert!(tensors.keys().all(|k| k.starts_with("lora_unet_")) && !metadata.contains_key("ss_timestep_boundary"));
    // By the timestep that the old tool counts from 1, and all of a batch on one side.
    let log = find(&bench.path("out"), ".jsonl").remove(0);
    let (mut sizes, mut experts) = (Vec::new(), [0, 0]);
    for line in std::fs::read_to_string(log).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let is_high = line["loss/low"].is_null();
        let samples = line["samples"].as_array().unwrap();
        assert!(samples.iter().all(|s| (s[0].as_f64().unwrap() >= 750.0) == is_high), "{line}");
        sizes.push(samples.len());
        experts[usize::from(is_high)] += 1;
    }
    assert!(sizes.contains(&2) && experts[0] > 0 && experts[1] > 0, "{sizes:?} {experts:?}");

    // A side that one draw in a hundred reaches: step 7 of this seed draws it once and not in a hundred draws after that.
    let line =
        line.replace("boundary 750", "boundary 970").replace("seed 1", "seed 2").replace("_dir out", "_dir rare");
    let out = wan_train(&bench.path(".")).arg("musubi").args(line.split_whitespace()).output().unwrap();
    let said = text(&out);
    assert!(said.contains("warning: step 7: no timesteps of the high-noise expert were found"), "{said}");
    let log = std::fs::read_to_string(find(&bench.path("rare"), ".jsonl").remove(0)).unwrap();
    let step: Value = serde_json::from_str(log.lines().nth(6).unwrap()).unwrap();
    let samples = step["samples"].as_array().unwrap();
    assert!(samples.iter().any(|s| s[0].as_f64().unwrap() < 970.0), "{step}");
    assert!(step["loss/low"].is_null() && step["loss/high"] == step["loss/current"], "{step}");
}
