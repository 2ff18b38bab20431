//! `--musubi_compat` through the built program.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::{text, Bench};

fn trained(bench: &Bench, args: &[&str]) -> (HashMap<String, Tensor>, String) {
    let out = bench.run("", &[&["--epochs", "1", "--output_dir", "out"], args].concat());
    assert!(out.status.success(), "{}", text(&out));
    let file = super::find(&bench.path("out"), ".safetensors").pop().unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let architecture = header.metadata().clone().unwrap()["modelspec.architecture"].clone();
    (candle_core::safetensors::load(&file, &Device::Cpu).unwrap(), architecture)
}

#[test]
fn the_switch_reaches_training_and_the_file() {
    let (bench, other) = (Bench::new(), Bench::new());
    let (ours, _) = trained(&bench, &[]);
    let (theirs, architecture) = trained(&other, &["--musubi_compat"]);
    assert_eq!(architecture, "wan2.1/lora");
    let flat = |m: &HashMap<String, Tensor>, key: &String| -> Vec<f32> {
        m[key].to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let differs = ours.keys().filter(|k| flat(&ours, k) != flat(&theirs, k)).count();
    assert!(ours.len() == theirs.len() && differs * 3 >= ours.len(), "{differs} of {} tensors differ", ours.len());
}
