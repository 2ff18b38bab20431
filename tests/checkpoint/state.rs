use crate::loader::user_error;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use std::path::Path;
use wan_train::checkpoint::state::{config_hash, peek};
use wan_train::checkpoint::{Identity, Master, Position, TrainState};

/// A state whose every part follows from `step`, so that a mixture of two is recognised.
pub fn sample(step: u64) -> TrainState {
    let mut rng = StdRng::seed_from_u64(step);
    let mut floats = |n: usize| (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect::<Vec<f32>>();
    let config = json!({"learning_rate": 1e-4, "network_dim": 8, "step": step});
    let mut s = TrainState {
        position: Position { step, epoch: step / 10, micro_batch: step % 10, items: step * 4 },
        identity: Identity {
            task: "i2v-A14B".into(),
            base: "wan2.2_i2v_high.safetensors".into(),
            network: "lora".into(),
            rank: 8,
            alpha: 8.0,
            optimizer: "adamw8bit".into(),
            dataset: "abc".into(),
        },
        meta: json!({"seed": 42, "loss_scale_bits": 65536f64.to_bits(), "step": step}),
        config_hash: config_hash(&config),
        config,
        ..Default::default()
    };
    for site in ["blocks.0.self_attn.q", "blocks.1.ffn.2"] {
        s.adapters.insert(format!("{site}.lora_down.weight"), Master { shape: vec![8, 16], data: floats(128) });
        s.adapters.insert(format!("{site}.lora_up.weight"), Master { shape: vec![16, 8], data: floats(128) });
    }
    s.buffers_f32.insert("adam.m.absmax".into(), floats(3));
    s.buffers_f32.insert("empty".into(), vec![]);
    s.buffers_u8.insert("adam.m.codes".into(), (0..600).map(|i| (i * step) as u8).collect());
    s
}

#[test]
fn a_state_comes_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run-000003-state");
    let mut state = sample(33);
    // Bits that text would lose: a NaN payload, a subnormal, minus zero.
    state.buffers_f32.insert("odd".into(), vec![f32::from_bits(0x7fc0_1234), f32::from_bits(1), -0.0]);
    state.save(&path).unwrap();
    let back = TrainState::load(&path).unwrap();
    let bits = |s: &TrainState| s.buffers_f32["odd"].iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&back), bits(&state));
    for s in [&mut state, &mut back.clone()] {
        s.buffers_f32.remove("odd");
    }
    let mut back = back;
    back.buffers_f32.remove("odd");
    assert_eq!(back, state);
    assert_eq!(peek(&path), Some((33, 3)));
    // Replacing leaves nothing of the old one.
    sample(34).save(&path).unwrap();
    assert_eq!(TrainState::load(&path).unwrap(), sample(34));
    let mut names: Vec<_> = std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["COMPLETE", "adapter.safetensors", "optimizer.safetensors", "state.json"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn equal_states_are_equal_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a-state"), dir.path().join("b-state"));
    sample(7).save(&a).unwrap();
    sample(7).save(&b).unwrap();
    for file in ["COMPLETE", "adapter.safetensors", "optimizer.safetensors", "state.json"] {
        assert!(std::fs::read(a.join(file)).unwrap() == std::fs::read(b.join(file)).unwrap(), "{file}");
    }
    assert_eq!(
        config_hash(&json!({"a": 1, "b": {"d": 2, "c": 3}})),
        config_hash(&json!({"b": {"c": 3, "d": 2}, "a": 1}))
    );
    assert_ne!(config_hash(&json!({"a": 1})), config_hash(&json!({"a": 2})));
}

fn damaged(dir: &Path, edit: impl Fn(&Path)) -> String {
    let path = dir.join("run-state");
    sample(5).save(&path).unwrap();
    edit(&path);
    user_error(TrainState::load(&path))
}

#[test]
fn every_kind_of_damage_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let flip = |p: &Path, file: &str, at: usize| {
        let mut bytes = std::fs::read(p.join(file)).unwrap();
        let at = at % bytes.len();
        bytes[at] ^= 4;
        std::fs::write(p.join(file), bytes).unwrap();
    };
    let err = damaged(dir.path(), |p| std::fs::remove_file(p.join("COMPLETE")).unwrap());
    assert!(err.contains("no finished training state") && err.contains("run-state"), "{err}");
    let err = damaged(dir.path(), |p| flip(p, "adapter.safetensors", 900));
    assert!(err.contains("content of adapter.safetensors has changed"), "{err}");
    let err = damaged(dir.path(), |p| flip(p, "optimizer.safetensors", 500));
    assert!(err.contains("content of optimizer.safetensors has changed"), "{err}");
    let err = damaged(dir.path(), |p| flip(p, "state.json", 40));
    assert!(err.contains("state.json"), "{err}");
    let err = damaged(dir.path(), |p| std::fs::write(p.join("COMPLETE"), "{").unwrap());
    assert!(err.contains("COMPLETE does not parse"), "{err}");
    let err = damaged(dir.path(), |p| std::fs::write(p.join("COMPLETE"), "").unwrap());
    assert!(err.contains("COMPLETE does not parse"), "{err}");
    let err = damaged(dir.path(), |p| std::fs::write(p.join("COMPLETE"), r#"{"format": 99}"#).unwrap());
    assert!(err.contains("state format 99; this program reads format 1"), "{err}");
    let err = damaged(dir.path(), |p| std::fs::remove_file(p.join("optimizer.safetensors")).unwrap());
    assert!(err.contains("optimizer.safetensors cannot be read"), "{err}");
    let err = damaged(dir.path(), |p| std::fs::write(p.join("adapter.safetensors"), "short").unwrap());
    assert!(err.contains("adapter.safetensors has 5 bytes"), "{err}");
    let err = user_error(TrainState::load(&dir.path().join("absent-state")));
    assert!(err.contains("absent-state does not exist"), "{err}");
    std::fs::write(dir.path().join("file"), "x").unwrap();
    assert!(user_error(TrainState::load(&dir.path().join("file"))).contains("is a file, not a state directory"));
}

#[test]
fn random_damage_is_always_an_error_and_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = StdRng::seed_from_u64(3);
    let path = dir.path().join("run-state");
    sample(5).save(&path).unwrap();
    let files = ["COMPLETE", "adapter.safetensors", "optimizer.safetensors", "state.json"];
    for _ in 0..300 {
        let file = path.join(files[rng.random_range(0..4)]);
        let sound = std::fs::read(&file).unwrap();
        let mut bytes = sound.clone();
        if rng.random_bool(0.5) {
            bytes.truncate(rng.random_range(0..bytes.len()));
        } else {
            let at = rng.random_range(0..bytes.len());
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, &bytes).unwrap();
        match TrainState::load(&path) {
            // The marker has words in it that nothing depends on (the program's version).
            Ok(s) => assert!(file.ends_with("COMPLETE") && s == sample(5), "{}", file.display()),
            Err(e) => assert!(format!("{e:#}").contains("run-state"), "{e:#}"),
        }
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, &sound).unwrap();
    }
    assert_eq!(TrainState::load(&path).unwrap(), sample(5));
}

#[test]
fn another_rank_or_model_is_named_on_both_sides() {
    let state = sample(5);
    let dir = Path::new("out/run-state");
    let same = state.identity.clone();
    state.check_identity(dir, &same).unwrap();
    let cases: [(&str, &str, Identity); 5] = [
        ("lora of rank 8 (alpha 8)", "lora of rank 42 (alpha 42)", Identity { rank: 42, alpha: 42.0, ..same.clone() }),
        (
            "wan2.2_i2v_high.safetensors",
            "wan2.2_i2v_low.safetensors",
            Identity { base: "wan2.2_i2v_low.safetensors".into(), ..same.clone() },
        ),
        ("i2v-A14B", "t2v-A14B", Identity { task: "t2v-A14B".into(), ..same.clone() }),
        ("adamw8bit", "adamw", Identity { optimizer: "adamw".into(), ..same.clone() }),
        ("abc", "def", Identity { dataset: "def".into(), ..same.clone() }),
    ];
    for (saved, now, run) in cases {
        let err = user_error(state.check_identity(dir, &run));
        assert!(err.contains(saved) && err.contains(now) && err.contains("out/run-state"), "{err}");
        assert!(err.contains("hint:"));
    }
}
