//! How much memory loading takes beside its result.

use super::{hollow, published};
use std::path::Path;
use wan_models::arch::WanArch;
use wan_train::loader::{load_dit_by_block, Fp8, LoadOptions, Reading, Source};

/// Peak resident memory of this process in bytes.
fn peak_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// The work of `loading_holds_a_few_tensors_beside_the_result`, in a process of its own so that the peak is its own.
#[test]
#[ignore = "started by loading_holds_a_few_tensors_beside_the_result"]
fn loading_in_a_process_of_its_own() {
    let Some(path) = std::env::var_os("WAN_TEST_SPARSE") else { return };
    let arch = large_arch();
    let before = peak_rss();
    let way = if std::env::var_os("WAN_TEST_POSITIONAL").is_some() { Reading::Positional } else { Reading::Mapped };
    let source = Source::open_by(Path::new(&path), way).unwrap();
    assert_eq!(source.is_mapped(), way == Reading::Mapped);
    let options = LoadOptions { fp8: Fp8::Scaled, ..LoadOptions::new(&arch, "demo") };
    let mut result = 0;
    let mut blocks = Vec::new();
    let rest = load_dit_by_block(&source, &options, &mut |_| {}, &mut |_, b| {
        result += b.linears().iter().map(|l| l.weight.bytes() as u64).sum::<u64>();
        blocks.push(b);
        Ok(())
    })
    .unwrap();
    let rest = [&rest.text_in, &rest.text_out, &rest.time_in, &rest.time_out, &rest.time_projection, &rest.head.linear];
    result += rest.iter().map(|l| l.weight.bytes() as u64).sum::<u64>();
    println!("\npeak-over-result {} {} {}", peak_rss() - before, result, blocks.len());
}

/// 2.2 GB in fp32, 0.6 GB in fp8; its largest tensor has 67 MB in fp32.
fn large_arch() -> WanArch {
    WanArch {
        dim: 2048,
        ffn_dim: 8192,
        num_heads: 16,
        num_layers: 8,
        in_dim: 16,
        out_dim: 16,
        text_dim: 64,
        ..published("t2v-14B")
    }
}

#[test]
fn loading_holds_a_few_tensors_beside_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.safetensors");
    hollow(&path, &large_arch(), "F32", 4);
    let size = path.metadata().unwrap().len();
    assert!(size > 2 << 30, "{size}");
    for way in ["WAN_TEST_MAPPED", "WAN_TEST_POSITIONAL"] {
        let out = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "loader::memory::loading_in_a_process_of_its_own", "--ignored", "--nocapture"])
            .env("WAN_TEST_SPARSE", &path)
            .env(way, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        let line = text.lines().find_map(|l| l.split_once("peak-over-result ")).unwrap_or_else(|| panic!("{out:?}")).1;
        let n: Vec<u64> = line.split_whitespace().map(|w| w.parse().unwrap()).collect();
        let (peak, result) = (n[0], n[1]);
        assert!(result > 1 << 29, "{line}");
        // The largest matrix of the blocks has 67 MB in fp32; the embeddings are read whole.
        let largest = 2048 * 8192 * 4;
        assert!(peak < result + 2 * largest, "{way}: peak {} MB over a result of {} MB", peak >> 20, result >> 20);
    }
}
