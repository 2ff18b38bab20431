//! The difference of two DiTs as a LoRA: every linear of the blocks whose weights differ, by a randomised SVD of the
//! difference. Two matrices and their difference are in memory at a time.

use anyhow::Result;
use candle_core::DType;
use wan_models::keys;

use super::low_rank::{frobenius, reduce_matrix, Cut, Reduced};
use crate::error::UserError;
use crate::loader::{DitValues, Source};
use crate::report::{Progress, Work};

/// What came out of a comparison.
#[derive(Debug, Default)]
pub struct Extracted {
    /// Modules that differ, by name.
    pub modules: Vec<(String, Reduced)>,
    /// Linears of the blocks that are equal.
    pub equal: usize,
    /// Tensors outside a LoRA's reach that differ (embeddings, norms, biases, modulation, head), with the norm of the
    /// difference over that of the base.
    pub beyond: Vec<(String, f64)>,
}

/// `tuned − base` as low-rank modules under the cut. fp8 models are compared by the values they stand for, in fp32.
///
/// Errors: models of different tensors or shapes, files that cannot be read, numbers that are not finite, no difference at
/// all.
pub fn extract(base: &Source, tuned: &Source, cut: Cut, progress: &dyn Progress) -> Result<Extracted> {
    let (of_base, of_tuned) = (DitValues::new(base)?, DitValues::new(tuned)?);
    let differ = |what: String| -> anyhow::Error {
        let (a, b) = (base.path().display(), tuned.path().display());
        UserError::new(format!("{a} and {b} cannot be compared: {what}")).hint("give two DiTs of one model").into()
    };
    for (has, lacks, source) in [(&of_base, &of_tuned, tuned), (&of_tuned, &of_base, base)] {
        if let Some(name) = has.names().find(|n| !lacks.contains(n)) {
            return Err(differ(format!("{} has no {name}", source.path().display())));
        }
    }
    for name in of_base.names() {
        let (a, b) = (of_base.shape(name), of_tuned.shape(name));
        if a != b {
            return Err(differ(format!("{name} has the shapes {:?} and {:?}", a.unwrap_or(&[]), b.unwrap_or(&[]))));
        }
    }
    let mut found = Extracted::default();
    let mut task =
        progress.begin(Work { what: "comparing", unit: "tensor", start: 0, total: of_base.names().count() as u64 });
    for (seed, name) in of_base.names().enumerate() {
        task.advance(1, name);
        let before = of_base.read(name)?.to_dtype(DType::F32)?;
        let size = frobenius(&before)?;
        let change = (of_tuned.read(name)?.to_dtype(DType::F32)? - before)?;
        let norm = frobenius(&change)?;
        if !norm.is_finite() {
            return Err(differ(format!("{name} holds numbers that are not finite")));
        }
        let module = name.strip_suffix(".weight").filter(|_| keys::is_quantisable(name) && change.rank() == 2);
        match (module, norm > 0.0) {
            (Some(module), true) => {
                found.modules.push((module.to_owned(), reduce_matrix(&change, cut, seed as u64)?));
            }
            (Some(_), false) => found.equal += 1,
            (None, true) => found.beyond.push((name.to_owned(), if size > 0.0 { norm / size } else { f64::INFINITY })),
            (None, false) => {}
        }
    }
    drop(task);
    if found.modules.is_empty() {
        return Err(differ("no linear of a block differs".into()));
    }
    Ok(found)
}
