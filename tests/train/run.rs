//! The loop on a tiny model: counting, saving, accumulation, faults, and bit-equality of everything that must not matter.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use wan_models::wan::{BlockPlan, Home, SavePlan, SavePolicy};
use wan_train::residency::{CpuCopy, Residency, ResidencySpec};
use wan_train::train::{Items, Models, Outcome, When};

use super::support::{arch, bits, data, model, settings, Bench};

#[test]
fn training_lowers_the_loss() {
    let bench = Bench::new(data(2, 0, 2));
    let ended = bench
        .run(
            settings(|c| {
                c.max_train_epochs = Some(150);
                c.lr_scheduler = "constant".into();
                c.network_dim = 8;
                c.network_alpha = 8.0;
            }),
            None,
            None,
        )
        .unwrap();
    let losses = ended.record.losses();
    let mean = |l: &[f32]| l.iter().sum::<f32>() / l.len() as f32;
    let (first, last) = (mean(&losses[..15]), mean(&losses[135..]));
    assert!(last < 0.8 * first, "the loss went from {first} to {last}");
    assert_eq!(ended.record.skipped, 0);
}

#[test]
fn steps_epochs_and_checkpoints_are_counted_as_the_recipes_expect() {
    // Seven small and four large items in batches of two: 4 + 2 batches, in groups of four: 2 steps an epoch.
    let bench = Bench::new(data(7, 4, 2));
    let ended = bench
        .run(
            settings(|c| {
                c.max_train_epochs = Some(5);
                c.gradient_accumulation_steps = 4;
                c.save_every_n_epochs = Some(2);
                c.save_every_n_steps = Some(3);
                c.save_state = true;
            }),
            None,
            None,
        )
        .unwrap();
    let facts = ended.record.facts;
    assert_eq!((facts.batches_per_epoch, facts.total_steps, facts.total_epochs), (6, 10, 5));
    assert_eq!((facts.samples_per_epoch, facts.sites), (11, 30));
    assert_eq!(ended.record.epochs, [1, 2, 3, 4, 5]);
    assert_eq!(ended.record.micro.len(), 30);
    // A micro-batch belongs to the step it goes into; the group that the epoch's end cuts short is a step.
    let steps: Vec<u64> = ended.record.micro.iter().take(12).map(|m| m.0).collect();
    assert_eq!(steps, [1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4]);
    use When::{End, Epoch, Step};
    let asked: Vec<When> = ended.saver.asked.iter().map(|(when, _)| *when).collect();
    assert_eq!(asked, [Step(3), Epoch(2), Step(6), Epoch(4), Step(9), End]);
    assert!(ended.saver.asked.iter().all(|(_, state)| *state));
    assert_eq!(ended.outcome, Outcome::Finished { step: 10, lora: None });
    assert_eq!((ended.state.position.step, ended.state.position.epoch, ended.state.position.items), (10, 5, 55));

    let by_steps = settings(|c| {
        c.max_train_epochs = None;
        c.max_train_steps = 7;
    });
    let ended = bench.run(by_steps, None, None).unwrap();
    assert_eq!((ended.record.facts.total_epochs, ended.record.micro.len()), (2, 7));
    assert_eq!((ended.state.position.epoch, ended.state.position.micro_batch), (1, 1));
}

#[test]
fn two_batches_of_one_make_one_batch_of_two() {
    let run = |batch_size: usize, accumulation: u64| {
        let bench = Bench::new(data(2, 0, batch_size));
        let settings = settings(|c| {
            c.gradient_accumulation_steps = accumulation;
            c.max_grad_norm = 0.05;
        });
        bench.run(settings, None, None).unwrap().state
    };
    let (one, two) = (run(2, 1), run(1, 2));
    for (name, a) in &one.adapters {
        for (x, y) in a.data.iter().zip(&two.adapters[name].data) {
            assert!((x - y).abs() < 2e-4, "{name}: {x} against {y}");
        }
    }
}

#[test]
fn residency_saving_policy_and_ring_size_change_no_bit() {
    let reference = Bench::new(data(3, 2, 2));
    let options = || {
        settings(|c| {
            c.gradient_accumulation_steps = 2;
            c.network_dropout = Some(0.2);
            c.network_args = vec!["rank_dropout=0.2".into(), "module_dropout=0.2".into()];
        })
    };
    let want = bits(&reference.run(options(), None, None).unwrap().state);
    let plans = [
        SavePlan::uniform(SavePolicy::Recompute),
        SavePlan::uniform(SavePolicy::KeepAttention),
        SavePlan::per_block(vec![
            BlockPlan { keep: SavePolicy::KeepAll, home: Home::Host },
            BlockPlan { keep: SavePolicy::Recompute, home: Home::Device },
            BlockPlan { keep: SavePolicy::KeepAttention, home: Home::Host },
        ]),
    ];
    for plan in plans {
        let bench = Bench { plan: plan.clone(), ..Bench::new(data(3, 2, 2)) };
        assert_eq!(bits(&bench.run(options(), None, None).unwrap().state), want, "{plan:?}");
    }
    for (blocks_to_swap, ring_size) in [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (3, 9)] {
        let (_, resident) = model(&arch());
        let spec = ResidencySpec { blocks_to_swap, ring_size };
        spec.check(3).unwrap();
        let blocks = Arc::new(Residency::new(resident.0, spec, Arc::new(CpuCopy)));
        let plan = SavePlan::uniform(SavePolicy::Recompute);
        let bench = Bench { blocks, plan, ..Bench::new(data(3, 2, 2)) };
        assert_eq!(bits(&bench.run(options(), None, None).unwrap().state), want, "{spec:?}");
    }
}

#[test]
fn noise_and_timesteps_do_not_depend_on_batch_size_or_order() {
    use wan_train::train::order;
    let by_item = |batch_size: usize| {
        let bench = Bench::new(data(3, 0, batch_size));
        let settings = settings(|_| {});
        let assembler = wan_train::train::Assembler {
            settings: &settings,
            arch: bench.model.arch(),
            items: &bench.items,
            exec: &bench.exec,
        };
        let mut seen = std::collections::BTreeMap::new();
        for plan in order::epoch(&bench.items.buckets, 5, 4, 0) {
            let batch = assembler.assemble(&plan, 4).unwrap();
            for (i, item) in batch.items.iter().enumerate() {
                let noise = batch.noise.get(i).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                seen.insert(*item, (noise, batch.timesteps[i]));
            }
        }
        seen
    };
    let (one, three) = (by_item(1), by_item(3));
    assert_eq!(one, three);
    assert_ne!(one[&0].0, one[&1].0);
}

/// Latents that make the loss a NaN.
fn poisoned(items: usize, bad: &[usize]) -> Bench {
    let mut data = data(items, 0, 1);
    for i in bad {
        let shape = data.items[*i].latents.dims().to_vec();
        data.items[*i].latents = Tensor::full(f32::NAN, shape, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    }
    Bench::new(data)
}

#[test]
fn a_loss_that_is_not_finite_skips_the_step_and_is_counted() {
    let ended = poisoned(6, &[4]).run(settings(|_| {}), None, None).unwrap();
    assert_eq!(ended.record.skipped, 3);
    assert_eq!(ended.state.position.step, 18);
    assert!(bits(&ended.state)
        .iter()
        .filter(|(k, _)| k != "loss_history")
        .all(|(_, v)| { v.iter().all(|b| f32::from_bits(*b).is_finite()) }));
    assert!(
        ended.record.micro.iter().skip(6).all(|m| f64::from_bits(m.3).is_finite()),
        "the average stays one of real losses"
    );
    assert_eq!(ended.state.meta["bad_steps"], 3);
}

#[test]
fn five_bad_steps_in_a_row_stop_the_run_and_name_the_items() {
    let bench = poisoned(6, &[0, 1, 2, 3, 4, 5]);
    let error = bench.run(settings(|_| {}), None, None).err().unwrap();
    let text = format!("{error:#}");
    assert!(text.contains("5 steps in a row") && text.contains("item"), "{text}");
    assert!(text.contains("hint"), "{text}");
    // A good step in between starts the count again: of two items each epoch trains one that is good.
    assert!(poisoned(2, &[0]).run(settings(|c| c.max_train_epochs = Some(10)), None, None).is_ok());
}

#[test]
fn max_norm_and_lora_plus_reach_the_run() {
    let bench = Bench::new(data(2, 0, 1));
    let limited = bench
        .run(
            settings(|c| {
                c.scale_weight_norms = Some(0.05);
                c.learning_rate = 5e-2;
            }),
            None,
            None,
        )
        .unwrap();
    let state = &limited.state;
    for site in bench.model.arch().sites() {
        let part = |name: &str| {
            let m = &state.adapters[&format!("{}.{name}", site.name)];
            Tensor::from_slice(&m.data, (m.shape[0], m.shape[1]), &Device::Cpu).unwrap()
        };
        let product = part("lora_up.weight").matmul(&part("lora_down.weight")).unwrap();
        let norm = product.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        assert!(norm < 0.0501, "{}: {norm}", site.name);
    }
    let plain = bench.run(settings(|_| {}), None, None).unwrap().state;
    let plus = bench.run(settings(|c| c.network_args = vec!["loraplus_lr_ratio=4".into()]), None, None).unwrap().state;
    let size = |s: &wan_train::checkpoint::TrainState| -> f32 {
        s.adapters
            .iter()
            .filter(|(k, _)| k.ends_with("lora_up.weight"))
            .flat_map(|(_, m)| &m.data)
            .map(|v| v.abs())
            .sum()
    };
    assert!(size(&plus) > 2.0 * size(&plain));
}

#[test]
fn an_empty_data_set_and_a_selection_of_nothing_are_refused() {
    let bench = Bench::new(data(0, 0, 1));
    let parts = wan_train::train::Parts {
        exec: &bench.exec,
        models: Models::one(&bench.model, &*bench.blocks),
        save_plan: &bench.plan,
        items: &bench.items,
    };
    let make =
        |settings| wan_train::train::Trainer::new(parts, settings, Default::default(), serde_json::json!({})).err();
    assert!(make(settings(|_| {})).unwrap().to_string().contains("nothing to train on"));
    let bench = Bench::new(data(1, 0, 1));
    let parts = wan_train::train::Parts { items: &bench.items, ..parts };
    let none = settings(|c| c.network_args = vec!["exclude_patterns=['.*']".into()]);
    let error = wan_train::train::Trainer::new(parts, none, Default::default(), serde_json::json!({})).err().unwrap();
    assert!(error.to_string().contains("no module"), "{error}");
}

#[test]
fn sixteen_bit_compute_trains_and_fp16_scales_its_loss() {
    let run = |compute: DType| {
        let exec = wan_kernels::Exec::Reference { device: Device::Cpu, compute };
        let bench = Bench { exec, ..Bench::new(data(2, 0, 1)) };
        bench.run(settings(|_| {}), None, None).unwrap()
    };
    let full = run(DType::F32).record.losses();
    for (dtype, tolerance) in [(DType::BF16, 0.03), (DType::F16, 0.01)] {
        let ended = run(dtype);
        for (got, want) in ended.record.losses().iter().zip(&full) {
            assert!((got / want - 1.0).abs() < tolerance, "{dtype:?}: {got} against {want}");
        }
        let scale = f64::from_bits(ended.state.meta["loss_scale_bits"].as_u64().unwrap());
        assert_eq!(scale > 1.0, dtype == DType::F16, "{dtype:?}: loss scale {scale}");
    }
}

/// Items whose file is gone, or whose reader panics.
struct Broken<'a>(&'a super::support::Synthetic, bool);

impl Items for Broken<'_> {
    fn buckets(&self) -> &[wan_train::cache::index::Bucket] {
        &self.0.buckets
    }
    fn load(&self, item: usize) -> anyhow::Result<wan_train::cache::index::ItemTensors> {
        match (item, self.1) {
            (2, true) => panic!("a reader that panics, on purpose"),
            (2, false) => anyhow::bail!("item2.safetensors is gone"),
            _ => self.0.load(item),
        }
    }
    fn name(&self, item: usize) -> String {
        self.0.name(item)
    }
}

#[test]
fn a_cache_that_cannot_be_read_ends_the_run_with_its_name() {
    let bench = Bench::new(data(4, 0, 1));
    for panics in [false, true] {
        let items = Broken(&bench.items, panics);
        let parts = wan_train::train::Parts {
            exec: &bench.exec,
            models: Models::one(&bench.model, &*bench.blocks),
            save_plan: &bench.plan,
            items: &items,
        };
        let mut trainer =
            wan_train::train::Trainer::new(parts, settings(|_| {}), Default::default(), serde_json::json!({})).unwrap();
        let error = trainer.run(&mut (), &mut (), &Default::default()).unwrap_err();
        let want = if panics { "has died" } else { "item2.safetensors is gone" };
        assert!(format!("{error:#}").contains(want), "{error:#}");
        assert!(panics || format!("{error:#}").contains("batch of item2"));
    }
}
