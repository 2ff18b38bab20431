use super::*;
use crate::loader::Reading;

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn ok(line: &str) -> Translation {
    translate(&words(line)).unwrap_or_else(|e| panic!("{line}: {e}"))
}

fn error(line: &str) -> String {
    translate(&words(line)).err().unwrap_or_else(|| panic!("{line}")).to_string()
}

fn flags(t: &Translation) -> &BTreeMap<&'static str, Vec<String>> {
    match &t.invocation {
        Invocation::Train(typed) | Invocation::Cache { typed, .. } => &typed.flags,
        other => panic!("{other:?}"),
    }
}

/// The line that the local recipes for Wan 2.2 pass.
const RECIPE: &str = "python -m accelerate.commands.accelerate_cli launch --num_cpu_threads_per_process 1 \
    --mixed_precision fp16 src/musubi_tuner/wan_train_network.py --task i2v-A14B --dit low.safetensors --vae v.safetensors \
    --t5 t5.pth --dataset_config d.toml --sdpa --mixed_precision fp16 --fp8_base --fp8_scaled --vae_cache_cpu \
    --min_timestep 0 --max_timestep 900 --preserve_distribution_shape --optimizer_type adamw8bit \
    --optimizer_args weight_decay=0.01 --learning_rate 8e-5 --gradient_checkpointing --max_data_loader_n_workers 2 \
    --persistent_data_loader_workers --network_module networks.lora_wan --network_dim 42 --network_alpha 42 \
    --timestep_sampling shift --discrete_flow_shift 5.0 --max_train_epochs 50 --save_every_n_epochs 5 --seed 42 \
    --lr_scheduler polynomial --lr_scheduler_power 2 --lr_scheduler_min_lr_ratio 0.01 --output_dir out --output_name n \
    --log_with tensorboard --logging_dir logs --blocks_to_swap 10 --disable_numpy_memmap \
    --network_args loraplus_lr_ratio=4 rank_dropout=0.1";

#[test]
fn a_recipe_arrives_whole() {
    let t = ok(RECIPE);
    let f = flags(&t);
    assert_eq!(f["task"], ["i2v-A14B"]);
    assert_eq!(f["network_args"], ["loraplus_lr_ratio=4", "rank_dropout=0.1"]);
    assert_eq!((&f["mixed_precision"][..], &f["discrete_flow_shift"][..]), (&["fp16".into()][..], &["5.0".into()][..]));
    assert!(f["gradient_checkpointing"].is_empty() && f["lora_format"] == ["kohya"]);
    let idle = t.notes.iter().find(|n| n.starts_with("not used here")).unwrap();
    assert!(idle.contains("--sdpa (attention has its own kernels)") && idle.contains("num_cpu_threads"), "{idle}");
    assert_eq!(t.notes.iter().filter(|n| n.starts_with("not used here")).count(), 1, "one line");
    assert!(!idle.contains("memmap"), "{idle}");
    // And every value is one that the configuration takes.
    let Invocation::Train(typed) = t.invocation else { panic!() };
    let config = crate::config::resolve(&typed, "20260101_0000").unwrap().config;
    assert_eq!((config.network_dim, config.max_timestep, config.blocks_to_swap), (42, Some(900), 10));
    assert_eq!(config.reading(), Reading::Positional);
}

#[test]
fn every_way_to_start_a_program_is_understood() {
    for start in [
        "wan_train_network.py",
        "src/musubi_tuner/wan_train_network.py",
        "src\\musubi_tuner\\wan_train_network.py",
        "python3 wan_train_network.py",
        "C:\\Python\\python.exe -u wan_train_network.py",
        "python -m musubi_tuner.wan_train_network",
        "accelerate launch --num_processes 1 --num-machines=1 wan_train_network.py",
        "uv run accelerate launch wan_train_network.py",
    ] {
        let t = ok(&format!("{start} --task t2v-14B --sdpa"));
        assert_eq!(flags(&t)["task"], ["t2v-14B"], "{start}");
    }
    let t = ok("accelerate launch --mixed_precision bf16 wan_train_network.py");
    assert_eq!(flags(&t)["mixed_precision"], ["bf16"], "the launcher's counts where the program has none");
    assert!(error("accelerate launch --multi_gpu wan_train_network.py").contains("one card"));
    assert!(error("accelerate launch --num_processes 2 wan_train_network.py").contains("one card"));
    assert!(error("bash train.sh").contains("no program of musubi-tuner"));
    assert!(error("python hv_train_network.py --dit x").contains("hv_train_network.py has no counterpart"));
    assert!(error("sudo rm wan_train_network.py").contains("`sudo`"));
}

#[test]
fn nothing_is_ignored_in_silence() {
    for (line, want) in [
        ("--sage_attn", "cannot be done here"),
        ("--resume_from_huggingface", "states of musubi-tuner"),
        ("--dim_from_weights", "lora info"),
        ("--learning_rte 1e-4", "did you mean `--learning_rate`"),
        ("--flash_att", "did you mean `--flash_attn`"),
        ("--learning_rate", "needs a value"),
        ("--learning_rate --sdpa", "needs a value"),
        ("stray --sdpa", "`stray` belongs to no option"),
    ] {
        assert!(error(&format!("wan_train_network.py {line}")).contains(want), "{line}");
    }
    let t = ok("wan_train_network.py --sample_prompts p.txt --sample_every_n_epochs 1 --huggingface_repo_id a/b --log_with wandb");
    let idle = t.notes.iter().find(|n| n.starts_with("not used here")).unwrap();
    for word in ["--huggingface_repo_id", "--log_with wandb"] {
        assert!(idle.contains(word), "{idle}");
    }
    let Invocation::Train(typed) = &t.invocation else { panic!("{:?}", t.invocation) };
    assert_eq!(typed.flags["sample_prompts"], ["p.txt"]);
    assert_eq!(typed.flags["sample_every_n_epochs"], ["1"]);
    // Every row is a name that ours does not have under another meaning, and fates point at options that exist.
    for table in [options::TRAIN, options::LATENTS, options::TEXT] {
        for (name, _, fate) in table {
            if let Fate::Ours(ours) = fate {
                assert!(find(ours).is_some(), "{name}");
            }
        }
    }
}

#[test]
fn one_lora_over_both_experts_stays_one() {
    let t = ok("wan_train_network.py --task t2v-A14B --dit low --dit_high_noise high --timestep_boundary 875 --offload_inactive_dit");
    let Invocation::Train(typed) = &t.invocation else { panic!("{t:?}") };
    let c = crate::config::resolve(typed, "stamp").unwrap().config;
    assert!(c.is_shared() && c.boundary() == Some(0.875), "{:?} {:?}", c.noise_level, c.timestep_boundary);
    assert!(t.notes.iter().any(|n| n.contains("one LoRA over both experts")), "{:?}", t.notes);
    assert!(t.notes.iter().any(|n| n.contains("--offload_inactive_dit (both experts stay at hand")), "{:?}", t.notes);
    let t = ok("wan_train_network.py --task t2v-A14B --dit low --dit_high_noise high --noise_level both");
    assert!(!t.notes.iter().any(|n| n.contains("one LoRA over both")), "{:?}", t.notes);
    let t = ok("wan_train_network.py --musubi_compat --lora_format comfyui");
    assert!(t.notes.is_empty(), "{:?}", t.notes);
    assert_eq!(flags(&t)["lora_format"], ["comfyui"]);
}

#[test]
fn a_configuration_file_gives_way_to_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.toml");
    std::fs::write(
        &file,
        "[model]\ntask = \"t2v-A14B\"\nsdpa = true\ncompile = false\nfp8_base = true\n[train]\nlearning_rate = 1e-4\n\
         network_args = [\"a=1\", \"b=2\"]\nlr_warmup_steps = \"10%\"\nmax_train_epochs = 3\n",
    )
    .unwrap();
    let name = file.with_extension("");
    let t = ok(&format!("wan_train_network.py --config_file {} --learning_rate 5e-5 --fp8_base=false", name.display()));
    let f = flags(&t);
    assert_eq!((&f["learning_rate"][0][..], &f["lr_warmup_steps"][0][..]), ("5e-5", "10%"));
    assert_eq!((f["network_args"].len(), &f["fp8_base"][0][..]), (2, "false"));
    assert!(t.notes.iter().any(|n| n.contains("--sdpa")) && !t.notes.iter().any(|n| n.contains("--compile")));
    std::fs::write(&file, "learning_rte = 1e-4\n").unwrap();
    assert!(error(&format!("wan_train_network.py --config_file {}", file.display())).contains("learning_rate"));
    std::fs::write(&file, "learning_rate = \n").unwrap();
    assert!(error(&format!("wan_train_network.py --config_file {}", file.display())).contains("line 1"));
    assert!(error("wan_train_network.py --config_file /nowhere/x").contains("cannot be read"));
}

#[test]
fn caching_programs_choose_the_task_by_what_is_stored() {
    for (line, task) in
        [("", "t2v-14B"), ("--i2v", "i2v-A14B"), ("--i2v --clip c.pth", "i2v-14B"), ("--task flf2v-14B", "flf2v-14B")]
    {
        let t = ok(&format!("python src/musubi_tuner/wan_cache_latents.py --dataset_config d.toml --vae v --batch_size 4 --num_workers 3 --device cuda:0 {line}"));
        assert_eq!(flags(&t)["task"], [task]);
        assert_eq!((&flags(&t)["max_data_loader_n_workers"][0][..], &flags(&t)["device"][0][..]), ("3", "cuda"));
        assert!(matches!(t.invocation, Invocation::Cache { what: CacheWhat::Latents, .. }));
        assert!(t.notes.iter().any(|n| n.contains("--recache")) && t.notes.iter().any(|n| n.contains("--batch_size")));
    }
    let t = ok("wan_cache_text_encoder_outputs.py --dataset_config d.toml --t5 t5.pth --fp8_t5 --batch_size 16 --skip_existing");
    assert!(matches!(t.invocation, Invocation::Cache { what: CacheWhat::Text, .. }));
    assert_eq!(flags(&t)["t5"], ["t5.pth"]);
    assert!(error("wan_cache_latents.py --debug_mode console").contains("cannot be done here"));
    assert!(error("wan_cache_latents.py --device mps").contains("mps"));
}

#[test]
fn tools_become_lora_verbs() {
    let t = ok("python convert_lora.py --input a --output b --target other --diffusers_prefix diffusion_model");
    let Invocation::Lora(LoraJob::Convert { to, fold_alpha, .. }) = &t.invocation else { panic!() };
    assert_eq!((to.as_str(), *fold_alpha), ("comfyui", true));
    let t = ok("python convert_lora.py --input a --output b --target default");
    let Invocation::Lora(LoraJob::Convert { to, fold_alpha, .. }) = &t.invocation else { panic!() };
    assert_eq!((to.as_str(), *fold_alpha), ("kohya", false));
    assert!(error("convert_lora.py --input a --target other").contains("--output is not given"));
    assert!(error("convert_lora.py --input a --output b --target comfy").contains("default or other"));
    assert!(error("convert_lora.py --input a --output b --target other --diffusers_prefix x").contains("lora convert"));
    assert!(error("convert_lora.py --input a --output b --target other --learning_rate 1").contains("no option"));
    let t = ok("lora_post_hoc_ema.py a.safetensors b.safetensors --sigma_rel 0.2 --output_file c");
    let Invocation::Lora(LoraJob::Ema { files, sigma_rel, .. }) = &t.invocation else { panic!() };
    assert_eq!((files.len(), *sigma_rel), (2, Some(0.2)));
    assert!(error("lora_post_hoc_ema.py a --output_file c").contains("two files"));
}
