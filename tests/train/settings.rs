//! From options to settings: the recipes' values arrive, mistakes are named before anything is loaded.

use wan_models::arch::{Conditioning, ModelConfig};
use wan_train::config::{registry, resolve, RunConfig, Typed};
use wan_train::error::UserError;
use wan_train::optim::OptimizerKind;
use wan_train::train::timesteps::Sampling;
use wan_train::train::{Compat, Length, TrainSettings};

use super::support::{arch, config, model_config};

fn from(change: impl FnOnce(&mut RunConfig)) -> Result<TrainSettings, UserError> {
    TrainSettings::from_config(&config(change), &model_config(arch(), Conditioning::None), 5)
}

fn template(name: &str, level: Option<&str>) -> TrainSettings {
    let mut typed = Typed::default();
    typed.flags.insert("template", vec![name.into()]);
    typed.flags.extend(level.map(|l| ("noise_level", vec![l.to_owned()])));
    let config = resolve(&typed, "20260101_0000").unwrap().config;
    let model = ModelConfig::from_toml(registry::text(&format!("models/{}.toml", config.task)).unwrap()).unwrap();
    TrainSettings::from_config(&config, &model, 42).unwrap()
}

#[test]
fn the_recipes_arrive() {
    let s = template("i2v-vanilla", Some("low"));
    assert_eq!(s.conditioning, Conditioning::FirstFrame);
    assert_eq!((s.timesteps.sampling, s.timesteps.flow_shift), (Sampling::Shift, 5.0));
    assert_eq!((s.timesteps.min, s.timesteps.max, s.timesteps.preserve_shape), (0.0, 900.0, true));
    assert_eq!((s.network.adapter.rank, s.network.alpha()), (42, 42.0));
    assert_eq!((s.optimizer.kind, s.optimizer.adamw.weight_decay), (OptimizerKind::AdamW8bit, 0.01));
    assert_eq!((s.length, s.save.epochs, s.schedule.lr), (Length::Epochs(50), Some(5), 8e-5));
    assert_eq!(s.compat, Compat::default());
    // Every recipe asks for a lowest rate that the old schedule ignored: said once.
    assert!(s.notes.len() == 1 && s.notes[0].contains("polynomial decay ends at 8.00e-7"), "{:?}", s.notes);
    let s = template("t2v-vanilla", Some("high"));
    assert_eq!((s.timesteps.min, s.timesteps.max, s.timesteps.flow_shift), (875.0, 1000.0, 3.0));
    assert_eq!((s.network.adapter.rank, s.schedule.lr), (8, 1e-4));
    let s = template("wan21-t2v-1.3b", None);
    assert_eq!((s.timesteps.min, s.timesteps.max, s.network.adapter.rank), (0.0, 1000.0, 16));
}

#[test]
fn mistakes_are_named_with_their_option() {
    let text = |change: fn(&mut RunConfig)| from(change).unwrap_err().to_string();
    type Mistake = (fn(&mut RunConfig), &'static str);
    let mistakes: [Mistake; 13] = [
        (|c: &mut RunConfig| c.gradient_accumulation_steps = 0, "gradient_accumulation_steps"),
        (|c: &mut RunConfig| c.save_every_n_epochs = Some(0), "save_every_n_epochs"),
        (|c: &mut RunConfig| c.max_train_epochs = Some(0), "max_train_epochs"),
        (|c: &mut RunConfig| c.lr_warmup_steps = "1.5".into(), "1.5"),
        (|c: &mut RunConfig| c.lr_scheduler = "cosin".into(), "did you mean `cosine`"),
        (|c: &mut RunConfig| c.lr_scheduler_args = vec!["nonsense".into()], "lr_scheduler_args"),
        (|c: &mut RunConfig| c.optimizer_type = "prodigy".into(), "adamw8bit"),
        (|c: &mut RunConfig| c.network_args = vec!["rank_dropot=0.1".into()], "did you mean `rank_dropout`"),
        (|c: &mut RunConfig| c.network_dropout = Some(1.5), "network_dropout"),
        (|c: &mut RunConfig| c.max_timestep = Some(2000), "0..1000"),
        (|c: &mut RunConfig| c.max_grad_norm = -1.0, "max_grad_norm"),
        (|c: &mut RunConfig| c.scale_weight_norms = Some(0.0), "scale_weight_norms"),
        (|c: &mut RunConfig| c.network_dim = 0, "network_dim"),
    ];
    for (change, want) in mistakes {
        assert!(text(change).contains(want), "{want}: {}", text(change));
    }
    let loha = from(|c| {
        c.network_module = "networks.loha".into();
        c.scale_weight_norms = Some(1.0);
    });
    assert!(loha.unwrap_err().to_string().contains("LoRA only"));
}

#[test]
fn adafactor_that_sets_its_own_rates_says_so() {
    let adafactor = |args: &[&str], network: &[&str]| {
        from(|c| {
            c.optimizer_type = "Adafactor".into();
            c.optimizer_args = args.iter().map(|a| a.to_string()).collect();
            c.network_args = network.iter().map(|a| a.to_string()).collect();
        })
    };
    let s = adafactor(&[], &[]).unwrap();
    assert!(s.notes.iter().any(|n| n.contains("sets its own rates")), "{:?}", s.notes);
    assert!(adafactor(&[], &["loraplus_lr_ratio=4"]).unwrap_err().to_string().contains("relative_step=False"));
    let s = adafactor(&["relative_step=False"], &["loraplus_lr_ratio=4"]).unwrap();
    assert!(s.optimizer.kind == OptimizerKind::Adafactor && s.notes.is_empty(), "{:?}", s.notes);
}

#[test]
fn the_compatibility_switch_sets_every_difference() {
    let s = from(|c| c.musubi_compat = true).unwrap();
    assert_eq!(s.compat, Compat::musubi());
    assert!(s.timesteps.compat && s.schedule.compat);
    let s = from(|_| {}).unwrap();
    assert!(!s.timesteps.compat && !s.schedule.compat);
}

#[test]
fn timesteps_outside_the_experts_range_are_noted() {
    let mut model = model_config(arch(), Conditioning::None);
    model.experts = Some(wan_models::arch::Experts { boundary: 0.9 });
    let run = |min: u64, max: u64, boundary: Option<f64>| {
        let c = config(|c| {
            c.noise_level = Some("high".into());
            (c.min_timestep, c.max_timestep, c.timestep_boundary) = (Some(min), Some(max), boundary);
        });
        TrainSettings::from_config(&c, &model, 5).unwrap().notes
    };
    assert!(run(900, 1000, None).is_empty());
    assert_eq!(run(0, 1000, None).len(), 1);
    assert_eq!(run(900, 1000, Some(0.95)).len(), 1);
}
