//! Compiles every `.cu` file of this crate for every supported card and embeds the results. Runs nvcc only with feature
//! `cuda`; without it nothing is looked for.
//!
//! One fatbin a file: machine code for sm_80, 86, 89 and 90, and PTX of compute_90 for cards that came later. A file whose
//! name ends in `_sm90a` uses instructions that only Hopper has, and is compiled for it alone. What a fatbin was made from
//! is noted beside it: a file is compiled again when it, any header, the options or the compiler are not the same.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::{env, fs, io, thread};

const CARDS: [&str; 4] = ["80", "86", "89", "90"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in ["CUDA_HOME", "NVCC"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    // The whole folder: a kernel file may be new.
    println!("cargo:rerun-if-changed={}", root.display());
    let [mut sources, mut headers] = [Vec::new(), Vec::new()];
    find(&root, &mut sources, &mut headers).expect("the crate's folder can be read");
    sources.sort();
    headers.sort();
    let mut common = DefaultHasher::new();
    headers.iter().for_each(|header| fs::read(header).expect("a header can be read").hash(&mut common));
    // Where it does not start, the first file says so.
    let version = Command::new(compiler()).arg("--version").output().map(|v| v.stdout).unwrap_or_default();
    version.hash(&mut common);
    println!("cargo:rustc-env=WAN_CUDA={}", release(&String::from_utf8_lossy(&version)));

    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(4usize).clamp(1, 16);
    thread::scope(|scope| {
        for _ in 0..workers.min(sources.len()) {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(what) = compile(&root, source, &out, common.clone()) {
                        failures.lock().expect("no worker panics").push(what);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no worker panics");
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));

    let mut table = String::from("/// (path without extension, fatbin) of every kernel file.\n");
    table += "static IMAGES: &[(&str, &[u8])] = &[\n";
    for source in &sources {
        let image = out.join(name(&root, source).replace('/', "_")).with_extension("fatbin");
        table += &format!("    ({:?}, include_bytes!({:?})),\n", name(&root, source), image);
    }
    table += "];\n";
    fs::write(out.join("images.rs"), table).expect("OUT_DIR can be written");
}

/// `attention/forward` for `<root>/attention/forward.cu`.
fn name(root: &Path, source: &Path) -> String {
    let relative = source.strip_prefix(root).expect("found below the root").with_extension("");
    relative.to_string_lossy().replace('\\', "/")
}

/// All `.cu` and `.cuh` files below `folder`.
fn find(folder: &Path, sources: &mut Vec<PathBuf>, headers: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, sources, headers)?;
            continue;
        }
        match path.extension().and_then(|e| e.to_str()) {
            Some("cu") => sources.push(path),
            Some("cuh") => headers.push(path),
            _ => {}
        }
    }
    Ok(())
}

/// `made_of` has taken in what all files have in common.
fn compile(root: &Path, source: &Path, out: &Path, mut made_of: DefaultHasher) -> Result<(), String> {
    let image = out.join(name(root, source).replace('/', "_")).with_extension("fatbin");
    let (part, note) = (image.with_extension("part"), image.with_extension("made_of"));
    let mut options = vec!["-fatbin".into(), "-std=c++17".into(), "-O3".into(), "--expt-relaxed-constexpr".into()];
    options.push("-lineinfo".to_string());
    if name(root, source).ends_with("_sm90a") {
        options.push("-gencode=arch=compute_90a,code=sm_90a".into());
    } else {
        options.extend(CARDS.map(|card| format!("-gencode=arch=compute_{card},code=sm_{card}")));
        options.push("-gencode=arch=compute_90,code=compute_90".into());
    }
    let io = |what: &str| {
        let what = format!("{what} {}", source.display());
        move |e: io::Error| format!("{what}: {e}")
    };
    (&options, fs::read(source).map_err(io("reading"))?).hash(&mut made_of);
    let made_of = format!("{:016x}", made_of.finish());
    if image.exists() && fs::read_to_string(&note).is_ok_and(|before| before == made_of) {
        return Ok(());
    }
    let mut nvcc = Command::new(compiler());
    match nvcc.args(&options).arg(source).arg("-o").arg(&part).output() {
        // The note last: whatever is interrupted is done again.
        Ok(Output { status, .. }) if status.success() => {
            let _ = fs::remove_file(&note);
            fs::rename(&part, &image).and_then(|()| fs::write(&note, made_of)).map_err(io("keeping what was made of"))
        }
        Ok(Output { stdout, stderr, .. }) => {
            let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
            Err(format!("nvcc could not compile {}:\n{stdout}{stderr}", source.display()))
        }
        Err(e) => Err(format!(
            "nvcc does not start: {e}\nhint: eval \"$(kernels/toolkit.sh)\" finds or installs a CUDA compiler"
        )),
    }
}

/// "13.0" of "Cuda compilation tools, release 13.0, V13.0.88"; empty where nothing like that is said.
fn release(version: &str) -> &str {
    version.split_once("release ").and_then(|(_, rest)| rest.split(',').next()).unwrap_or_default()
}

fn compiler() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    match env::var_os("CUDA_HOME") {
        Some(home) => PathBuf::from(home).join("bin/nvcc"),
        None => "nvcc".into(),
    }
}
