//! Linking with feature `cuda`: where the toolkit's libraries are, and what to do where the driver is not. Without the
//! feature there is nothing to do.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rustc-env=WAN_COMMIT={}", commit());
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let Some(home) = env::var_os("CUDA_HOME").map(PathBuf::from) else { return };
    let (libraries, stubs) = (home.join("lib64"), home.join("lib64/stubs"));
    for folder in [&libraries, &stubs] {
        println!("cargo:rustc-link-search=native={}", folder.display());
    }
    // Found when the program starts, also where the toolkit is a folder that the system does not know.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libraries.display());
    // A toolkit's own stub names all the driver's functions. The placeholder that kernels/toolkit.sh makes names none:
    // they are then found when the program starts, on the machine with the card.
    let placeholder = fs::read(stubs.join("libcuda.so")).is_ok_and(|stub| !contains(&stub, b"cuInit"));
    if placeholder {
        println!("cargo:rustc-link-arg=-Wl,--unresolved-symbols=ignore-all");
        // Nothing is taken from the placeholder, so the linker would leave the driver out.
        println!("cargo:rustc-link-arg=-Wl,--push-state,--no-as-needed,-lcuda,--pop-state");
    }
}

/// The commit that is built, for rows of measurements; empty outside a clone.
fn commit() -> String {
    let git = |args: &[&str]| {
        let out = std::process::Command::new("git").args(args).output().ok().filter(|o| o.status.success());
        out.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string()).unwrap_or_default()
    };
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"]);
    if fs::exists(&log).unwrap_or(false) {
        println!("cargo:rerun-if-changed={log}");
    }
    git(&["rev-parse", "--short", "HEAD"])
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}
