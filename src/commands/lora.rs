//! `wan-train lora …`: show, convert, merge, extract, resize, average.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::DType;

use crate::checkpoint::{convert, save_dtype, write_lora, Convert, Form, LoraFile, ModuleOut};
use crate::cli::lora::{CutArgs, LoraJob, Out};
use crate::error::UserError;
use crate::fsio;
use crate::loader::Source;
use crate::lora::ema::{average, Decay};
use crate::lora::low_rank::{Cut, Reduced, Rule};
use crate::lora::{self, extract, info, merge, resize};
use crate::report::{self, Table};

pub fn run(job: LoraJob) -> anyhow::Result<ExitCode> {
    match job {
        LoraJob::Info { file, modules, json } => show(&file, modules, json)?,
        LoraJob::Convert { input, out, to, fold_alpha } => {
            lora::check_output(&out.path, &[&input], out.overwrite)?;
            let form = match to.as_str() {
                "kohya" => Form::Kohya,
                "diffusers" => Form::Diffusers,
                _ => Form::Comfy,
            };
            convert(&input, &out.path, Convert { form, fold_alpha })?;
            written(&out.path)?;
        }
        LoraJob::Merge { files, weights, dit, cut: c, out } => merge_files(&files, &weights, dit.as_deref(), c, &out)?,
        LoraJob::Extract { base, tuned, cut: c, out } => extract_from(&base, &tuned, &c, &out)?,
        LoraJob::Resize { input, cut: c, out } => {
            lora::check_output(&out.path, &[&input], out.overwrite)?;
            let (file, cut) = (LoraFile::open(&input)?, cut(&c)?);
            let modules = resize::resize(&file, cut, report::for_stderr().as_ref())?;
            let note = format!("resized to rank {}{}", c.dim, dynamic(&c));
            let dtype = dtype(&out, std::slice::from_ref(&file))?;
            write_reduced(&out, &modules, form(&file), dtype, lora::with_rank(meta(&file), &ranks(&modules), &note))?;
        }
        LoraJob::Ema { mut files, beta, beta2, sigma_rel, no_sort, out } => {
            let decay = match sigma_rel {
                Some(sigma) => Decay::power(sigma)?,
                None => Decay::linear(beta, beta2)?,
            };
            let inputs: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
            lora::check_output(&out.path, &inputs, out.overwrite)?;
            if !no_sort {
                sort_by_time(&mut files)?;
            }
            let open = files.iter().map(|f| LoraFile::open(f)).collect::<anyhow::Result<Vec<_>>>()?;
            for (i, file) in files.iter().enumerate().skip(1) {
                println!("{}: weight of the past {:.6}", file.display(), decay.beta(i, files.len()));
            }
            let modules = average(&open, decay)?;
            let last = &open[open.len() - 1];
            write_lora(&out.path, &modules, form(last), dtype(&out, &open)?, meta(last))?;
            written(&out.path)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(path: &Path, modules: bool, json: bool) -> anyhow::Result<()> {
    let file = LoraFile::open(path)?;
    let rows = info::rows(&file)?;
    let bytes = std::fs::metadata(path).map_or(0, |m| m.len());
    if json {
        println!("{}", info::to_json(&file, &rows, bytes));
        return Ok(());
    }
    print!("{}", info::summary(&file, &rows, bytes));
    if modules {
        let mut table = Table::new(["module", "kind", "rank", "alpha", "scale", "out x in", "update"]);
        for r in &rows {
            table.row([
                r.module.clone(),
                r.kind.to_string(),
                r.rank.map_or("full".into(), |n| n.to_string()),
                r.alpha.map_or("none".into(), |a| a.to_string()),
                r.scale.to_string(),
                format!("{} x {}", r.shape[0], r.shape[1]),
                format!("{:.5}", r.norm),
            ]);
        }
        print!("\n{}", table.render());
    }
    if !file.metadata().is_empty() {
        let mut table = Table::new(["metadata", "value"]);
        for (key, value) in file.metadata() {
            table.row([key.as_str(), value.as_str()]);
        }
        print!("\n{}", table.render());
    }
    Ok(())
}

fn merge_files(
    files: &[PathBuf],
    weights: &[f64],
    dit: Option<&Path>,
    c: Option<CutArgs>,
    out: &Out,
) -> anyhow::Result<()> {
    let inputs: Vec<&Path> = files.iter().map(PathBuf::as_path).chain(dit).collect();
    lora::check_output(&out.path, &inputs, out.overwrite)?;
    let merges = merge::open(files, weights)?;
    if let Some(dit) = dit {
        if c.is_some() {
            return Err(UserError::usage("--dim is the rank of a LoRA: a DiT has none")
                .hint("leave it out, or leave --dit out")
                .into());
        }
        let source = Source::open(dit)?;
        let changed = merge::into_dit(&source, &merges, &out.path, save(out)?, report::for_stderr().as_ref())?;
        println!("{changed} tensors of {} changed", source.keys().count());
        return written(&out.path);
    }
    let c_cut = c.as_ref().map(cut).transpose()?;
    let merge::Sum { modules, cuts } = merge::sum(&merges, c_cut)?;
    let open: Vec<&LoraFile> = merges.iter().map(|m| &m.file).collect();
    let parts: Vec<String> = merges
        .iter()
        .map(|m| {
            let name = m.file.path().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            format!("{name} x {}", m.strength)
        })
        .collect();
    let dtype = match save(out)? {
        Some(dtype) => dtype,
        None => lora::widest(
            open.iter().map(|f| lora::modules(f)).collect::<anyhow::Result<Vec<_>>>()?.iter().flat_map(|m| m.values()),
        ),
    };
    let ranks: Vec<usize> = modules.iter().map(|m| m.params[0].1.dims()[0]).collect();
    let metadata = lora::with_rank(meta(open[0]), &ranks, &format!("merged of {}", parts.join(", ")));
    if !cuts.is_empty() {
        print!("{}", losses(&cuts));
    }
    write_lora(&out.path, &modules, form(open[0]), dtype, metadata)?;
    written(&out.path)
}

fn extract_from(base: &Path, tuned: &Path, c: &CutArgs, out: &Out) -> anyhow::Result<()> {
    lora::check_output(&out.path, &[base, tuned], out.overwrite)?;
    let cut = cut(c)?;
    let (before, after) = (Source::open(base)?, Source::open(tuned)?);
    let found = extract::extract(&before, &after, cut, report::for_stderr().as_ref())?;
    if found.equal > 0 {
        println!("{} linears are equal in both and have no module", found.equal);
    }
    if !found.beyond.is_empty() {
        println!(
            "warning: {} tensors outside a LoRA's reach differ and are lost; the largest differences:",
            found.beyond.len()
        );
        let mut beyond = found.beyond;
        beyond.sort_by(|a, b| b.1.total_cmp(&a.1));
        for (name, share) in beyond.iter().take(5) {
            println!("  {name}: {:.3} %", 100.0 * share);
        }
    }
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let note = format!("difference of {} and {}, rank {}{}", name(tuned), name(base), c.dim, dynamic(c));
    let metadata = lora::with_rank(Default::default(), &ranks(&found.modules), &note);
    write_reduced(out, &found.modules, Form::Comfy, save(out)?.unwrap_or(DType::F32), metadata)
}

fn write_reduced(
    out: &Out,
    modules: &[(String, Reduced)],
    form: Form,
    dtype: DType,
    metadata: std::collections::BTreeMap<String, String>,
) -> anyhow::Result<()> {
    let outs: Vec<ModuleOut> = modules.iter().map(|(name, r)| r.module(name)).collect();
    print!("{}", losses(modules));
    write_lora(&out.path, &outs, form, dtype, metadata)?;
    written(&out.path)
}

/// What the cut has cost: the share of the updates' Frobenius norm that is gone, in all and where it is most.
fn losses(modules: &[(String, Reduced)]) -> String {
    let total = |f: fn(&Reduced) -> f64| modules.iter().map(|(_, r)| f(r) * f(r)).sum::<f64>().sqrt();
    let (norm, lost) = (total(|r| r.norm), total(|r| r.lost));
    let share = if norm > 0.0 { 100.0 * lost / norm } else { 0.0 };
    let (low, high) = (modules.iter().map(|m| m.1.rank).min(), modules.iter().map(|m| m.1.rank).max());
    let mut text = format!(
        "{} modules of rank {} to {}; {share:.3} % of the update's Frobenius norm is lost\n",
        modules.len(),
        low.unwrap_or(0),
        high.unwrap_or(0)
    );
    let worst = modules.iter().max_by(|a, b| a.1.share_lost().total_cmp(&b.1.share_lost()));
    if let Some((name, r)) = worst.filter(|(_, r)| r.share_lost() > 1e-6) {
        text.push_str(&format!("most in {name}: {:.3} % at rank {}\n", 100.0 * r.share_lost(), r.rank));
    }
    text
}

fn cut(c: &CutArgs) -> Result<Cut, UserError> {
    let rule = c.dynamic.as_deref().map_or(Ok(Rule::Limit), Rule::parse)?;
    Ok(Cut { limit: c.dim as usize, rule })
}

fn dynamic(c: &CutArgs) -> String {
    c.dynamic.as_ref().map(|d| format!(" by {d}")).unwrap_or_default()
}

fn ranks(modules: &[(String, Reduced)]) -> Vec<usize> {
    modules.iter().map(|(_, r)| r.rank).collect()
}

fn save(out: &Out) -> anyhow::Result<Option<DType>> {
    out.precision.as_deref().map(|p| save_dtype(Some(p))).transpose()
}

fn dtype(out: &Out, files: &[LoraFile]) -> anyhow::Result<DType> {
    if let Some(dtype) = save(out)? {
        return Ok(dtype);
    }
    let all = files.iter().map(lora::modules).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(lora::widest(all.iter().flat_map(|m| m.values())))
}

/// The form of the input, but never one without an alpha.
fn form(file: &LoraFile) -> Form {
    match file.form() {
        Form::Diffusers => Form::Comfy,
        other => other,
    }
}

fn meta(file: &LoraFile) -> std::collections::BTreeMap<String, String> {
    file.metadata().clone()
}

fn sort_by_time(files: &mut [PathBuf]) -> anyhow::Result<()> {
    let mut timed = Vec::with_capacity(files.len());
    for file in files.iter() {
        let time = std::fs::metadata(file).and_then(|m| m.modified()).map_err(|e| fsio::explain(e, file))?;
        timed.push((time, file.clone()));
    }
    timed.sort();
    files.iter_mut().zip(timed).for_each(|(f, (_, path))| *f = path);
    Ok(())
}

fn written(path: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::metadata(path).map_err(|e| fsio::explain(e, path))?.len();
    println!("wrote {} ({})", path.display(), fsio::human(bytes));
    Ok(())
}
