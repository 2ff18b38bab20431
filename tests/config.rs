//! The option layers and `show`, through the built program.

use assert_cmd::Command;
use serde_json::Value;

fn wan_train(args: &[&str]) -> assert_cmd::assert::Assert {
    Command::cargo_bin("wan-train").unwrap().args(args).assert()
}

fn show(args: &[&str]) -> Value {
    let out = wan_train(&[&["show"], args, &["--json"]].concat()).success();
    serde_json::from_slice(&out.get_output().stdout).unwrap()
}

fn stderr_of(args: &[&str], code: i32) -> String {
    String::from_utf8(wan_train(args).code(code).get_output().stderr.clone()).unwrap()
}

/// The rows of the recipe table: template, level, task, shift, min, max, lr, dim, precision, fp8, scaled, output name.
type Row = (&'static str, Option<&'static str>, &'static str, f64, u64, u64, f64, u64, &'static str, bool, bool);
const RECIPES: &[Row] = &[
    ("t2v-vanilla", Some("high"), "t2v-A14B", 3.0, 875, 1000, 1e-4, 8, "fp16", true, true),
    ("t2v-vanilla", Some("low"), "t2v-A14B", 3.0, 0, 875, 8e-5, 42, "fp16", true, true),
    ("i2v-vanilla", Some("high"), "i2v-A14B", 5.0, 900, 1000, 1e-4, 8, "fp16", true, true),
    ("i2v-vanilla", Some("low"), "i2v-A14B", 5.0, 0, 900, 8e-5, 42, "fp16", true, true),
    ("t2v-lightning", Some("high"), "t2v-A14B", 3.0, 875, 1000, 1e-4, 8, "fp16", true, true),
    ("t2v-lightning", Some("low"), "t2v-A14B", 3.0, 0, 875, 8e-5, 42, "fp16", true, true),
    ("i2v-lightning", Some("high"), "i2v-A14B", 5.0, 900, 1000, 1e-4, 8, "fp16", true, true),
    ("i2v-lightning", Some("low"), "i2v-A14B", 5.0, 0, 900, 8e-5, 42, "fp16", true, true),
    ("wan21-t2v-14b", None, "t2v-14B", 3.0, 0, 1000, 8e-5, 24, "bf16", true, false),
    ("wan21-t2v-1.3b", None, "t2v-1.3B", 3.0, 0, 1000, 8e-5, 16, "bf16", false, false),
    ("wan21-i2v-720p", None, "i2v-14B", 5.0, 0, 1000, 8e-5, 24, "bf16", true, false),
    ("wan21-i2v-480p", None, "i2v-14B", 5.0, 0, 1000, 8e-5, 24, "bf16", true, false),
];

#[test]
fn every_recipe_shows_its_hyperparameters() {
    for &(template, level, task, shift, min, max, lr, dim, precision, fp8, scaled) in RECIPES {
        let args: Vec<&str> =
            [template].into_iter().chain(level.into_iter().flat_map(|l| ["--noise_level", l])).collect();
        let c = show(&args);
        assert_eq!(c["task"], task, "{template}");
        assert_eq!(c["discrete_flow_shift"], shift);
        assert_eq!((&c["min_timestep"], &c["max_timestep"]), (&min.into(), &max.into()));
        assert_eq!(c["learning_rate"], lr);
        assert_eq!((&c["network_dim"], &c["network_alpha"]), (&dim.into(), &(dim as f64).into()));
        assert_eq!(c["mixed_precision"], precision);
        assert_eq!((&c["fp8_base"], &c["fp8_scaled"]), (&fp8.into(), &scaled.into()));
        assert_eq!(c["preserve_distribution_shape"], Value::Bool(level.is_some()));
        for (key, value) in [
            ("lr_scheduler", "polynomial".into()),
            ("lr_scheduler_power", Value::from(2.0)),
            ("lr_scheduler_min_lr_ratio", 0.01.into()),
            ("optimizer_type", "adamw8bit".into()),
            ("max_train_epochs", 50.into()),
            ("save_every_n_epochs", 5.into()),
            ("seed", 42.into()),
            ("timestep_sampling", "shift".into()),
            ("gradient_checkpointing", true.into()),
        ] {
            assert_eq!(c[key], value, "{template} {key}");
        }
        assert_eq!(c["base_weights"].as_array().unwrap().len(), template.ends_with("lightning") as usize);
        assert_eq!(c["clip"].is_null(), !template.starts_with("wan21-i2v"), "{template}");
    }
}

#[test]
fn flags_win_over_the_file_and_the_file_over_the_template() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mine.toml");
    std::fs::write(&file, "learning_rate = 3e-5\n[network]\nnetwork_dim = 16\nlr_warmup_steps = 10\n").unwrap();
    let c = show(&["wan21-t2v-14b", "--config_file", file.to_str().unwrap(), "--dim", "12"]);
    assert_eq!(c["learning_rate"], 3e-5);
    assert_eq!(c["network_dim"], 12);
    assert_eq!(c["network_alpha"], 24.0);
    assert_eq!(c["lr_warmup_steps"], "10");
}

#[test]
fn steps_asked_for_take_the_place_of_a_templates_epochs() {
    let length = |args: &[&str]| {
        let c = show(args);
        (c["max_train_steps"].clone(), c["max_train_epochs"].clone())
    };
    assert_eq!(length(&["wan21-t2v-14b"]), (1600.into(), 50.into()));
    assert_eq!(length(&["wan21-t2v-14b", "--max_train_steps", "300"]), (300.into(), Value::Null));
    // Asked for in one place, epochs count, as in the old tool.
    let both = ["wan21-t2v-14b", "--max_train_steps", "300", "--epochs", "7"];
    assert_eq!(length(&both), (300.into(), 7.into()));
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let file = write("mine.toml", "max_train_epochs = 9\n");
    let with_file = ["wan21-t2v-14b", "--config_file", &file];
    assert_eq!(length(&with_file), (1600.into(), 9.into()));
    assert_eq!(length(&[&with_file[..], &["--max_train_steps", "300"]].concat()), (300.into(), Value::Null));
    let own = write("own.toml", "extends = \"t2v-vanilla\"\nmax_train_steps = 40\n[high]\nmax_train_epochs = 3\n");
    assert_eq!(length(&["--template", &own, "--noise_level", "low"]), (40.into(), Value::Null));
    assert_eq!(length(&["--template", &own, "--noise_level", "high"]), (40.into(), 3.into()));
    let shared = write("shared.toml", "extends = \"t2v-vanilla\"\n[shared]\nmax_train_steps = 50\n");
    assert_eq!(length(&["--template", &shared, "--noise_level", "shared"]), (50.into(), Value::Null));
}

#[test]
fn hyphens_equal_underscores_and_aliases_reach_the_option() {
    let c = show(&["i2v-vanilla", "--noise-level=low", "--flow-shift", "4", "--min-lr=0.1", "--save-every", "2"]);
    assert_eq!(c["discrete_flow_shift"], 4.0);
    assert_eq!(c["lr_scheduler_min_lr_ratio"], 0.1);
    assert_eq!(c["save_every_n_epochs"], 2);
}

#[test]
fn a_template_of_ones_own_extends_a_built_in_one() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mine.toml");
    std::fs::write(&file, "extends = \"t2v-vanilla\"\noutput_name = \"x\"\n[low]\nlearning_rate = 1e-6\n").unwrap();
    let c = show(&["--template", file.to_str().unwrap(), "--noise_level", "low"]);
    assert_eq!((&c["learning_rate"], &c["network_dim"]), (&1e-6.into(), &42.into()));
    assert!(c["output_name"].as_str().unwrap().starts_with("x-low-"));
}

#[test]
fn mistakes_exit_2_and_name_the_nearest_word() {
    assert!(stderr_of(&["show", "i2v-vanila"], 2).contains("did you mean `i2v-vanilla`?"));
    assert!(stderr_of(&["--template", "t2v-vanilla"], 2).contains("--noise_level high"));
    assert!(stderr_of(&["--template", "wan21-t2v-14b", "--noise_level", "low"], 2).contains("Wan 2.2 templates"));
    assert!(stderr_of(&["show", "--learning_rat", "1"], 2).contains("--learning_rate"));
    assert!(stderr_of(&["show", "--lr_scheduler", "polynomal"], 2).contains("did you mean `polynomial`?"));
    assert!(stderr_of(&["show", "--epochs", "many"], 2).contains("whole number"));
    assert!(stderr_of(&["show", "--min_timestep", "900", "--max_timestep", "100"], 2).contains("900 to 100"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    std::fs::write(&file, "seed = 1\nlearning_rat = 1\n").unwrap();
    let text = stderr_of(&["show", "--config_file", file.to_str().unwrap()], 2);
    assert!(text.contains("line 2") && text.contains("learning_rate"), "{text}");
    std::fs::write(&file, "seed = 1\nlr = = 1\n").unwrap();
    assert!(stderr_of(&["show", "--config_file", file.to_str().unwrap()], 2).contains("line 2, column 6"));
}
