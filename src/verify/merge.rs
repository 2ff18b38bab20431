//! A LoRA merged into base weights, where the run computes, as the old merge script does it.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::json::{flag, integer, number};
use super::line::numbers;
use super::{Case, Tolerance};
use crate::checkpoint::LoraFile;
use crate::loader::merge_map;

pub fn run(case: &Case<'_>) -> Result<()> {
    let io = case.tensors("")?;
    let (base, want) = (io.part("base."), io.part("merged."));
    let on_device = base.iter().map(|(key, t)| Ok((key.clone(), t.to_device(case.exec.device())?)));
    let mut got = on_device.collect::<Result<std::collections::BTreeMap<_, _>>>()?;
    let lora = LoraFile::from_tensors(&case.stem, io.part("lora."), true)?;
    let changed = merge_map(&mut got, lora, number(&case.json, "strength")?)?;
    for t in got.values_mut() {
        *t = t.to_device(&Device::Cpu)?;
    }
    case.check("what is merged", Tolerance::Exact, |line| {
        line.equal("the number of changed tensors", &changed, &integer(&case.json, "changed")?);
        line.equal("whether anything was", &(changed > 0), &flag(&case.json, "returned")?);
        line.equal("the changed tensors", &changed, &want.len());
        for (key, base) in base.iter().filter(|(key, _)| !want.contains_key(*key)) {
            line.tensor(&format!("{key}, which no LoRA touches,"), &got[key], base)?;
        }
        Ok(())
    });
    if want.is_empty() {
        return Ok(());
    }
    // The fp32 sum may differ in its last bit by the order of additions: one unit after rounding to 16 bit.
    let units = if base.values().all(|t| t.dtype() == DType::F32) { 8.0 } else { 1.0 };
    case.check("merged weights, last places", Tolerance::Abs(units), |line| {
        for (key, want) in &want {
            line.equal(&format!("the dtype of {key}"), &got[key].dtype(), &want.dtype());
            let (units, relative) = last_places(&got[key], want)?;
            line.error(key, units, relative);
        }
        Ok(())
    });
    Ok(())
}

/// Largest difference in units of the last place of the dtype, and relative to the largest number.
fn last_places(got: &Tensor, want: &Tensor) -> Result<(f64, f64)> {
    let (bits, smallest) = match want.dtype() {
        DType::F16 => (10, -14),
        DType::BF16 => (7, -126),
        _ => (23, -126),
    };
    let (mut units, mut worst, mut largest) = (0f64, 0f64, 0f64);
    for (got, want) in numbers(got)?.into_iter().zip(numbers(want)?) {
        let exponent = want.abs().max(f64::MIN_POSITIVE).log2().floor().max(f64::from(smallest));
        let unit = (exponent - f64::from(bits)).exp2();
        let difference = (got - want).abs();
        let difference = if difference.is_nan() { f64::INFINITY } else { difference };
        units = units.max(difference / unit);
        worst = worst.max(difference);
        largest = largest.max(want.abs());
    }
    Ok((units, if worst == 0.0 { 0.0 } else { worst / largest }))
}
