//! Command lines of musubi-tuner through the built program.

use super::mistakes::refused;
use super::{find, text, wan_train, Bench};

fn run(bench: &Bench, line: &str) -> std::process::Output {
    wan_train(&bench.path(".")).arg("musubi").args(line.split_whitespace()).output().unwrap()
}

const CACHES: &str = "--dataset_config base/datasets/demo/demo.toml --task demo --base_dir base";

#[test]
fn a_job_of_the_old_scripts_runs_from_caching_to_conversion() {
    let bench = Bench::new();
    let cache = bench.path("base/datasets/demo/cache");
    std::fs::remove_dir_all(&cache).unwrap();
    // Each caching program is given its own model only.
    let latents = run(
        &bench,
        &format!("python src/musubi_tuner/wan_cache_latents.py {CACHES} --vae base/models/demo_vae.safetensors --vae_cache_cpu"),
    );
    assert!(latents.status.success(), "{}", text(&latents));
    assert!(text(&latents).contains("note: caches that are still right are reused"), "{}", text(&latents));
    let found = |suffix: &str| find(&cache, suffix).len();
    assert!(found("_wan.safetensors") >= 5 && found("_wan_te.safetensors") == 0, "{}", text(&latents));
    let texts = run(
        &bench,
        &format!(
            "python src/musubi_tuner/wan_cache_text_encoder_outputs.py {CACHES} --t5 base/models/demo_umt5.safetensors --batch_size 16"
        ),
    );
    assert!(texts.status.success(), "{}", text(&texts));
    assert!(found("_wan_te.safetensors") >= 5, "{}", text(&texts));

    let out = run(
        &bench,
        &format!(
            "accelerate launch --num_cpu_threads_per_process 1 --mixed_precision no src/musubi_tuner/wan_train_network.py \
             {CACHES} --dit base/models/demo_dit.safetensors --sdpa --network_module networks.lora_wan --network_dim 4 \
             --network_alpha 2 --learning_rate 1e-3 --optimizer_type adamw8bit --optimizer_args weight_decay=0.01 \
             --timestep_sampling shift --discrete_flow_shift 3.0 --max_train_steps 3 --gradient_checkpointing --seed 1 \
             --output_dir out --output_name old"
        ),
    );
    let said = text(&out);
    assert!(out.status.success(), "{said}");
    assert!(said.contains("not used here: --sdpa (attention has its own kernels)"), "{said}");
    assert!(said.contains("--musubi_compat gives the old ones") && said.contains("lora_unet_"), "{said}");
    let lora = bench.path("out/old.safetensors");
    let keys = |path: &std::path::Path| {
        let bytes = std::fs::read(path).unwrap();
        let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        all.names().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(keys(&lora).iter().all(|k| k.starts_with("lora_unet_blocks_")), "{:?}", keys(&lora));

    let out =
        run(&bench, "python convert_lora.py --input out/old.safetensors --output out/comfy.safetensors --target other");
    assert!(out.status.success(), "{}", text(&out));
    let comfy = keys(&bench.path("out/comfy.safetensors"));
    assert!(comfy.len() == 60 && comfy.iter().all(|k| k.starts_with("diffusion_model.")), "{comfy:?}");
}

#[test]
fn mistakes_are_named() {
    let bench = Bench::new();
    let train = "python wan_train_network.py --dataset_config base/datasets/demo/demo.toml --dit base/models/demo_dit.safetensors";
    refused(&run(&bench, &format!("{train} --sage_attn")), 2, &["--sage_attn", "hint:"]);
    refused(&run(&bench, &format!("{train} --network_dimm 4")), 2, &["--network_dimm", "network_dim"]);
    refused(&run(&bench, &format!("{train} --network_dim four")), 2, &["network_dim", "four"]);
    refused(&run(&bench, &format!("{train} --config_file nowhere.toml")), 2, &["nowhere.toml"]);
    refused(
        &run(&bench, "python qwen_image_train_network.py --dit x"),
        2,
        &["qwen_image_train_network.py", "wan_train_network.py"],
    );
    refused(&run(&bench, "python convert_lora.py --input nowhere --output o --target default"), 1, &["nowhere"]);
    let out = run(&bench, "");
    assert_eq!(out.status.code(), Some(2), "{}", text(&out));
}
