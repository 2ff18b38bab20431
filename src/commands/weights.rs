//! The DiT's weights: opened and checked by their header first, then loaded with LoRAs merged and quantised as asked.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use wan_kernels::Exec;
use wan_models::arch::{ModelFile, Role};
#[cfg(any(feature = "cuda", test))]
use wan_models::linear::Products;
use wan_models::wan::{BlockWeights, WanWeights};

use super::job::{Dit, Job};
use super::keep::{self, Keeping};
use super::setup;
use crate::checkpoint::store::require_file;
use crate::checkpoint::LoraFile;
use crate::config::{Layer, RunConfig};
use crate::error::UserError;
use crate::fsio;
use crate::hub::{self, Hub};
use crate::loader::{check_precision, load_dit_by_block, DitTable, Fp8, LoadOptions, LoraMerge, Progress, Source};
use crate::lora::merge;
use crate::report::Work;
use crate::train::Expert;

/// Opens every DiT of the run, the low expert's first.
pub fn open_dits(job: &Job) -> anyhow::Result<Vec<(Dit, Source)>> {
    job.dits().into_iter().map(|dit| open_dit(job, &dit).map(|source| (dit, source))).collect()
}

/// Opens a DiT and holds it against the task: a wrong file is found here, before anything is read.
pub fn open_dit(job: &Job, dit: &Dit) -> anyhow::Result<Source> {
    let path = job.model_file(dit.option, dit.role, dit.path.as_ref())?;
    let source = Source::open_by(&path, job.config.reading())?;
    let table = DitTable::new(&source, &job.model.arch, &job.config.task)?;
    if let Some(note) = check_precision(&source, &job.config.mixed_precision, job.config.musubi_compat)? {
        job.progress.say(&format!("note: {note}"));
    }
    table.notes().iter().for_each(|note| job.progress.say(&format!("note: {note}")));
    Ok(source)
}

/// Refuses `--fp8_fast`, `--int8_fast` and `--fast_attention` on a card that has no tensor cores for them.
pub fn check_fast(config: &RunConfig, exec: &Exec) -> anyhow::Result<()> {
    #[cfg(feature = "cuda")]
    if let Exec::Cuda { gpu, .. } = exec {
        let card = gpu.card();
        if let Some(needs) = lacking(config, card.capability) {
            let (major, minor) = card.capability;
            return Err(UserError::usage(format!("{needs}; {} is sm_{major}{minor}", card.name))
                .hint("leave it out: fp8 weights and attention in full work on every card")
                .into());
        }
    }
    let _ = (config, exec);
    Ok(())
}

/// The LoRA that a run starts from (`--resume_from`).
pub fn start_from(path: &Path, config: &RunConfig) -> anyhow::Result<LoraFile> {
    require_file("--resume_from", path)?;
    LoraFile::open_by(path, config.reading())
}

/// What 8-bit products need that a card of this compute capability does not have.
#[cfg(any(feature = "cuda", test))]
fn lacking(config: &RunConfig, capability: (i32, i32)) -> Option<&'static str> {
    match config.products() {
        Products::Fp8 if capability < (8, 9) => Some("--fp8_fast needs fp8 tensor cores (sm_89 or later)"),
        Products::Int8 if capability < (8, 0) => Some("--int8_fast needs tensor cores of sm_80 or later"),
        _ if config.fast_attention && capability < (8, 0) => {
            Some("--fast_attention needs tensor cores of sm_80 or later")
        }
        _ => None,
    }
}

/// The DiT's weights, loaded.
pub struct Loaded {
    pub rest: WanWeights,
    pub blocks: Vec<BlockWeights>,
    /// They are being written to disk for the next start.
    pub keeping: Option<Keeping>,
}

/// Reads the weights tensor by tensor to where they will be: blocks that stream to host memory, all others to `device`.
#[tracing::instrument(level = "debug", skip_all, name = "load the DiT")]
pub fn load(
    job: &Job,
    config: &RunConfig,
    (dit, source): (&Dit, &Source),
    device: &Device,
    streamed: &[usize],
) -> anyhow::Result<Loaded> {
    let mut options = LoadOptions {
        fp8: fp8(config),
        products: config.products(),
        merges: merges(job, dit)?,
        upcast: if config.mixed_precision == "fp16" { DType::F16 } else { DType::BF16 },
        device: device.clone(),
        ..LoadOptions::new(&job.model.arch, &config.task)
    };
    let place = keep::find(job, config, source, &mut options);
    let total = source.keys().count() as u64;
    let what = match dit.expert {
        None => "loading the DiT",
        Some(Expert::Low) => "loading the low-noise DiT",
        Some(Expert::High) => "loading the high-noise DiT",
    };
    let mut task = job.progress.begin(Work { what, unit: "tensor", start: 0, total });
    let mut blocks = Vec::with_capacity(job.model.arch.num_layers);
    let mut read = |read: Progress| {
        task.advance(1, &format!("{} of {}", fsio::human(read.done), fsio::human(read.total)));
    };
    let rest = load_dit_by_block(source, &options, &mut read, &mut |index, block| {
        blocks.push(match streamed.contains(&index) {
            true => block.map(&mut |t| Ok(t.to_device(&Device::Cpu)?))?,
            false => block,
        });
        Ok(())
    })?;
    drop(task);
    let keeping = place.and_then(|place| Keeping::start(job, place, &blocks));
    Ok(Loaded { rest, blocks, keeping })
}

/// Plain `--fp8_base` means block scales too, except where the old tool's unscaled cast of everything is wanted. Weights
/// that become int8 are rounded once, from what the file has.
fn fp8(config: &RunConfig) -> Fp8 {
    if config.int8_fast {
        return Fp8::Keep;
    }
    match (config.fp8_scaled || config.fp8_fast, config.fp8_base) {
        (true, _) => Fp8::Scaled,
        (false, true) if config.musubi_compat => Fp8::Cast,
        (false, true) => Fp8::Scaled,
        (false, false) => Fp8::Keep,
    }
}

/// The Lightning LoRA of a template where it is missing: the one of this model and this expert, and where it goes.
pub fn lightning_to_fetch<'a>(job: &'a Job, dit: &Dit) -> Option<(Role, &'a ModelFile, PathBuf)> {
    let role = dit.lightning?;
    let file = hub::file(&job.model, role)?;
    let dir = job.config.base_dir.join(hub::folder(role));
    let path = dir.join(&file.name);
    let wanted = dit.merges.iter().any(|wanted| Path::new(wanted) == path);
    (wanted && !path.exists()).then_some((role, file, dir))
}

/// Gets those that the run needs, checked. An error says how to do without.
pub fn fetch_lightning(job: &Job) -> anyhow::Result<()> {
    job.dits().iter().try_for_each(|dit| fetch_lightning_of(job, dit))
}

fn fetch_lightning_of(job: &Job, dit: &Dit) -> anyhow::Result<()> {
    let Some((role, file, dir)) = lightning_to_fetch(job, dit) else { return Ok(()) };
    job.progress.say(&format!("the {} is not here yet and is downloaded", hub::role_name(role)));
    let got = setup::get(file, &dir, &Hub::from_env(), job.progress.as_ref(), &job.stop);
    got.map(drop).map_err(|error| match error.downcast::<UserError>() {
        Ok(user) if user.exit != 130 => {
            let hint = format!(
                "{}, or train on the plain weights with --skip_lightning",
                user.hint.clone().unwrap_or_default()
            );
            user.hint(hint).into()
        }
        Ok(user) => user.into(),
        Err(other) => other,
    })
}

/// Finds out whether every LoRA that is to be merged is there, before anything long is begun.
pub fn check_merges(job: &Job, dit: &Dit) -> anyhow::Result<()> {
    let from_template = matches!(job.resolved.origin.get(dit.merges_option), Some(Layer::Template(_)));
    let Some(file) = dit.merges.iter().find(|file| !Path::new(file).is_file()) else {
        return Ok(());
    };
    let error = UserError::new(format!("the LoRA {file} (--{}) does not exist", dit.merges_option));
    Err(match (from_template, dit.lightning) {
        (true, Some(role)) => error.hint(format!(
            "{}, or train on the plain weights with --skip_lightning",
            hub::where_to_get(&job.model, role)
        )),
        _ => error.hint("check the path"),
    }
    .into())
}

/// Writes each DiT with its LoRAs merged to the file of `--save_merged`, tensor by tensor, if it is not there yet.
pub fn save_merged(job: &Job) -> anyhow::Result<()> {
    job.dits().iter().filter(|dit| !dit.merges.is_empty()).try_for_each(|dit| save_merged_of(job, dit))
}

fn save_merged_of(job: &Job, dit: &Dit) -> anyhow::Result<()> {
    let Some(path) = dit.save_merged.as_ref().filter(|path| !path.exists()) else { return Ok(()) };
    let files: Vec<PathBuf> = dit.merges.iter().map(PathBuf::from).collect();
    let strengths = (0..files.len()).map(|i| strength(&job.config, i)).collect::<anyhow::Result<Vec<_>>>()?;
    let source = open_dit(job, dit)?;
    let changed = merge::into_dit(&source, &merge::open(&files, &strengths)?, path, None, job.progress.as_ref())?;
    job.progress.say(&format!("wrote the merged model {} ({changed} tensors changed)", path.display()));
    Ok(())
}

/// A file for the merged model needs something to merge.
pub fn check_save_merged(job: &Job) -> Result<(), UserError> {
    match (&job.config.save_merged, job.dits().iter().all(|dit| dit.merges.is_empty())) {
        (Some(path), true) => Err(UserError::usage(format!("there is nothing to merge into {}", path.display()))
            .hint("--save_merged goes with a Lightning template or with --base_weights")),
        _ => Ok(()),
    }
}

fn merges(job: &Job, dit: &Dit) -> anyhow::Result<Vec<LoraMerge>> {
    check_merges(job, dit)?;
    let mut merges = Vec::new();
    let into = dit.expert.map(|_| format!(" into the {}", dit.name())).unwrap_or_default();
    for (i, file) in dit.merges.iter().enumerate() {
        let strength = strength(&job.config, i)?;
        job.progress.say(&format!("merging {file} at strength {strength}{into} while loading"));
        merges.push(LoraMerge { file: LoraFile::open_by(Path::new(file), job.config.reading())?, strength });
    }
    if dit.expert == Some(Expert::High) && merges.is_empty() && !job.config.base_weights.is_empty() {
        job.progress.say("note: nothing is merged into the high-noise DiT");
    }
    Ok(merges)
}

/// The strength of the LoRA at a position of `--base_weights`.
fn strength(c: &RunConfig, index: usize) -> anyhow::Result<f64> {
    Ok(c.base_weights_multiplier.get(index).map_or(Ok(1.0), |w| w.parse())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_fp8_is_scaled_except_in_compatibility_mode() {
        let of = |fp8_base, fp8_scaled, musubi_compat| {
            fp8(&RunConfig { fp8_base, fp8_scaled, musubi_compat, ..RunConfig::default() })
        };
        for compat in [false, true] {
            assert_eq!(of(false, false, compat), Fp8::Keep);
            assert_eq!(of(true, true, compat), Fp8::Scaled);
        }
        assert_eq!(of(true, false, false), Fp8::Scaled);
        assert_eq!(of(true, false, true), Fp8::Cast);
        let int8 = RunConfig { int8_fast: true, fp8_base: true, fp8_scaled: true, ..RunConfig::default() };
        assert_eq!(fp8(&int8), Fp8::Keep);
    }

    #[test]
    fn eight_bit_products_are_of_one_kind_and_need_their_tensor_cores() {
        let of = |fp8_fast, int8_fast| RunConfig { fp8_fast, int8_fast, ..RunConfig::default() }.products();
        assert_eq!(of(false, false), Products::Full);
        assert_eq!(of(true, false), Products::Fp8);
        assert_eq!(of(false, true), Products::Int8);
        let full = RunConfig::default();
        let fp8 = RunConfig { fp8_fast: true, ..full.clone() };
        let int8 = RunConfig { int8_fast: true, ..full.clone() };
        let attention = RunConfig { fast_attention: true, ..full.clone() };
        assert!(lacking(&int8, (7, 5)).unwrap().contains("--int8_fast needs tensor cores of sm_80"));
        assert!(lacking(&attention, (7, 5)).unwrap().contains("--fast_attention needs tensor cores of sm_80"));
        assert!(lacking(&fp8, (8, 6)).unwrap().contains("sm_89"));
        assert_eq!(lacking(&int8, (8, 6)), None);
        assert_eq!(lacking(&attention, (8, 6)), None);
        assert_eq!(lacking(&full, (7, 5)), None);
    }
}
