//! Weights in fp8 that are kept from one start to the next.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use candle_core::Tensor;
use wan_models::arch::WanArch;
use wan_models::linear::{Products, Weight};
use wan_models::wan::BlockWeights;
use wan_train::checkpoint::LoraFile;
use wan_train::fsio::{write_safetensors, TensorOut};
use wan_train::loader::{Found, Fp8, KeptFp8, LoadOptions, LoraMerge, Source};

use super::dit::{bytes, golden, linears, load, scaled_file};
use crate::golden_support::golden_dir;

fn options(arch: &WanArch, strength: Option<f64>) -> LoadOptions<'_> {
    let lora = || LoraFile::open(&golden_dir().join("03_lora_d4a2.network.safetensors")).unwrap();
    let merges = strength.map(|strength| LoraMerge { file: lora(), strength }).into_iter().collect();
    LoadOptions { merges, fp8: Fp8::Scaled, ..LoadOptions::new(arch, "demo") }
}

fn place(dir: &Path, dit: &Path, options: &LoadOptions<'_>) -> Option<KeptFp8> {
    KeptFp8::place(dir, &Source::open(dit).unwrap(), options).unwrap()
}

fn write(place: &KeptFp8, blocks: &[BlockWeights]) {
    let tensors = place.tensors(blocks).unwrap();
    place.write(&tensors, &mut |t| Ok(TensorOut::of("", t)?.data.into_owned())).unwrap();
}

/// Every number of every linear of the blocks.
fn content(blocks: &[BlockWeights]) -> BTreeMap<String, (Vec<u8>, Vec<u8>)> {
    let named = blocks.iter().enumerate().flat_map(|(i, b)| linears(i, b));
    let of = |weight: &Weight| match weight {
        Weight::Fp8(w) | Weight::Fp8Fast(w) => (bytes(w.codes_oi()), bytes(w.scale())),
        Weight::Dense(_) | Weight::Int8(_) => panic!("not in fp8"),
    };
    named.map(|(name, linear)| (name, of(&linear.weight))).collect()
}

fn whole(place: &KeptFp8) -> Box<Source> {
    match place.open() {
        Found::Whole(source) => source,
        other => panic!("{other:?}"),
    }
}

fn stale(place: &KeptFp8) -> String {
    match place.open() {
        Found::Stale(why) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn kept_weights_are_those_that_were_loaded_to_the_bit() {
    let (path, tensors, arch) = golden("01_dit_t2v_b");
    for strength in [None, Some(0.8)] {
        let dir = tempfile::tempdir().unwrap();
        // A 16-bit file of 16-bit scales, and ComfyUI's fp8 where a merge is quantised again.
        let mut files = vec![path.clone()];
        files.extend(strength.map(|_| scaled_file(dir.path(), &tensors, false).0));
        for file in files {
            for fast in [false, true] {
                let products = if fast { Products::Fp8 } else { Products::Full };
                let options = || LoadOptions { products, ..options(&arch, strength) };
                let place = place(dir.path(), &file, &options()).unwrap();
                let first = load(&file, &options()).unwrap();
                if !fast {
                    assert!(matches!(place.open(), Found::Absent));
                    write(&place, &first.1);
                }
                let kept = whole(&place);
                let again = load(&file, &LoadOptions { kept: Some(kept), ..options() }).unwrap();
                assert!(content(&first.1) == content(&again.1), "{strength:?} {}", file.display());
                let is_fast = |b: &BlockWeights| matches!(b.ffn_0.weight, Weight::Fp8Fast(_));
                assert!(first.1.iter().chain(&again.1).all(|b| is_fast(b) == fast));
                // The rest comes from the model itself, with what is merged into it.
                let mut rest: [Vec<Vec<u8>>; 2] = Default::default();
                for ((outside, blocks), all) in [&first, &again].into_iter().zip(&mut rest) {
                    let mut take = |t: &Tensor| {
                        all.push(bytes(t));
                        Ok(t.clone())
                    };
                    outside.map(&mut take).unwrap();
                    blocks.iter().for_each(|b| drop(b.map(&mut take).unwrap()));
                }
                assert!(rest[0] == rest[1]);
            }
        }
    }
}

#[test]
fn nothing_is_kept_where_nothing_is_quantised() {
    let dir = tempfile::tempdir().unwrap();
    let (path, tensors, arch) = golden("01_dit_t2v_b");
    for fp8 in [Fp8::Keep, Fp8::Cast] {
        assert!(place(dir.path(), &path, &LoadOptions { fp8, ..options(&arch, Some(1.0)) }).is_none());
    }
    let (scaled, _) = scaled_file(dir.path(), &tensors, true);
    assert!(place(dir.path(), &scaled, &options(&arch, None)).is_none(), "its codes are used as they are");
    assert!(place(dir.path(), &scaled, &options(&arch, Some(1.0))).is_some());
}

#[test]
fn another_recipe_or_a_damaged_file_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let (original, _, arch) = golden("01_dit_t2v_b");
    let dit = dir.path().join("dit.safetensors");
    std::fs::copy(&original, &dit).unwrap();
    let kept = dir.path().join("kept");
    let find = |strength| place(&kept, &dit, &options(&arch, strength)).unwrap();
    let (_, blocks) = load(&dit, &options(&arch, Some(1.0))).unwrap();
    let place = find(Some(1.0));
    write(&place, &blocks);
    let good = std::fs::read(place.path()).unwrap();
    whole(&find(Some(1.0)));

    // Another strength, or none, is another file.
    for other in [Some(0.5), None] {
        assert_ne!(find(other).path(), place.path());
        assert!(matches!(find(other).open(), Found::Absent));
    }
    // A model that was written again is the same place, and not the same recipe.
    let touch = |path: &Path, seconds| {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
    };
    touch(&dit, 1_000_000);
    assert_eq!(find(Some(1.0)).path(), place.path());
    assert!(stale(&find(Some(1.0))).contains("has changed"));
    let place = find(Some(1.0));
    write(&place, &blocks);
    whole(&find(Some(1.0)));
    // So is one of other content with the old time and size.
    let mut bytes = std::fs::read(&dit).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&dit, &bytes).unwrap();
    touch(&dit, 1_000_000);
    assert!(stale(&find(Some(1.0))).contains("has changed"));
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&dit, &bytes).unwrap();
    touch(&dit, 1_000_000);
    whole(&find(Some(1.0)));

    // Torn anywhere, empty, or not ours at all.
    let path = place.path().to_owned();
    let ours = std::fs::read(&path).unwrap();
    for cut in [0, 1, 7, 8, 100, ours.len() / 2, ours.len() - 1] {
        std::fs::write(&path, &ours[..cut]).unwrap();
        stale(&place);
    }
    std::fs::write(&path, &good).unwrap();
    assert!(stale(&place).contains("has changed"), "of the recipe before");
    std::fs::copy(&original, &path).unwrap();
    assert!(stale(&place).contains("has changed"));
    std::fs::write(&path, b"<html>").unwrap();
    stale(&place);
    // The right recipe over the wrong tensors.
    let metadata = {
        std::fs::write(&path, &ours).unwrap();
        Source::open(&path).unwrap().metadata().clone()
    };
    let tensors = place.tensors(&blocks).unwrap();
    let mut outs: Vec<TensorOut> = tensors.iter().map(|(name, t)| TensorOut::of(name, t).unwrap()).collect();
    for t in outs.iter_mut().filter(|t| t.name.ends_with(".weight")) {
        t.dtype = safetensors::Dtype::F8_E4M3;
    }
    write_safetensors(&path, outs.clone(), &metadata).unwrap();
    whole(&place);
    let mut short = outs.clone();
    short.retain(|t| t.name != "blocks.1.ffn.2.weight" && t.name != "blocks.1.ffn.2.scale_weight");
    write_safetensors(&path, short, &metadata).unwrap();
    assert!(stale(&place).contains("blocks.1.ffn.2.weight"));
    let mut bare = outs.clone();
    bare.retain(|t| t.name != "blocks.1.ffn.2.scale_weight");
    write_safetensors(&path, bare, &metadata).unwrap();
    assert!(stale(&place).contains("blocks.1.ffn.2.weight"));
    let mut turned = outs;
    turned.iter_mut().filter(|t| t.name == "blocks.0.ffn.0.weight").for_each(|t| t.shape.reverse());
    write_safetensors(&path, turned, &metadata).unwrap();
    assert!(stale(&place).contains("blocks.0.ffn.0"));
}
