//! umT5 encoder: whole outputs, what single layers give, contexts as the caches hold them, position buckets.

use anyhow::Result;
use candle_core::{DType, Device, IndexOp, Tensor};
use wan_kernels::Exec;
use wan_models::umt5::{relative_bucket, Residence, Storage, Umt5, Umt5Config, Umt5Options};

use super::json::{flag, integer, number};
use super::line::relative;
use super::{Case, Tolerance};

pub fn run(case: &Case<'_>) -> Result<()> {
    let c = &case.json["config"];
    let config = Umt5Config {
        vocab: integer(c, "vocab")?,
        dim: integer(c, "dim")?,
        dim_attn: integer(c, "dim_attn")?,
        dim_ffn: integer(c, "dim_ffn")?,
        heads: integer(c, "num_heads")?,
        layers: integer(c, "num_layers")?,
        buckets: integer(c, "num_buckets")?,
        max_distance: integer(&case.json, "max_dist")?,
        eps: number(&case.json, "eps")?,
        shared_bias: flag(c, "shared_pos")?,
    };
    let device = case.exec.device();
    let io = case.tensors(".io")?;
    let weights = case.tensors(".weights")?.part("").into_iter().collect::<std::collections::HashMap<_, _>>();
    case.check("sizes from shapes", Tolerance::Exact, |line| {
        let inferred = Umt5Config::from_shapes(&weights)?;
        let want = Umt5Config { max_distance: inferred.max_distance, eps: inferred.eps, ..config.clone() };
        line.equal("the configuration", &inferred, &want);
        Ok(())
    });

    let options = Umt5Options { exec: case.exec.clone(), ..Umt5Options::default() };
    let all = weights.clone();
    let encoder = Umt5::with_config(config.clone(), Box::new(weights), options)?;
    let (ids, mask) = (io.get("ids")?, io.get("mask")?);
    let mut traced = Vec::new();
    let output = encoder.encode_traced(ids, mask, &mut |name, t| {
        traced.push((name.to_string(), t.clone()));
        Ok(())
    })?;
    case.check("output", Tolerance::Abs(1e-4), |line| line.tensor("output", &output, &io.f32("output", device)?));
    if device.is_cuda() {
        // As a card makes caches; it may be twice as far off as bf16 throughout.
        let run = |exec: Exec, storage, residence| -> Result<Tensor> {
            let options = Umt5Options { exec: exec.with_compute(DType::BF16), storage, residence };
            let encoder = Umt5::with_config(config.clone(), Box::new(all.clone()), options)?;
            Ok(encoder.encode(&ids.to_device(exec.device())?, &mask.to_device(exec.device())?)?.to_dtype(DType::F32)?)
        };
        let want = io.f32("output", &Device::Cpu)?;
        for storage in [Storage::AsStored, Storage::Fp8] {
            let allowed = 2.0 * relative(&run(Exec::cpu(), storage, Residence::Resident)?, &want)?;
            let resident = run(case.exec.clone(), storage, Residence::Resident)?;
            case.check(&format!("output in BF16, weights {storage:?}"), Tolerance::L2(allowed), |line| {
                line.tensor("output", &resident, &want)
            });
            case.check(&format!("weights {storage:?} from elsewhere"), Tolerance::Exact, |line| {
                line.tensor("from host memory", &run(case.exec.clone(), storage, Residence::Host)?, &resident)?;
                line.tensor("from the source", &run(case.exec.clone(), storage, Residence::Source)?, &resident)
            });
        }
    }
    let prefix = "trace_row0.";
    if io.keys(prefix).next().is_some() {
        case.check("layers", Tolerance::Abs(1e-4), |line| {
            for (name, got) in &traced {
                let Some(want) = io.f32_if_any(&format!("{prefix}{name}"), device)? else { continue };
                // The recorded bias is cut to the first positions.
                let mut row0 = got.i(..1)?;
                for (axis, len) in want.dims().iter().enumerate() {
                    row0 = row0.narrow(axis, 0, *len)?;
                }
                line.tensor(name, &row0, &want)?;
            }
            Ok(())
        });
    }
    let ids = ids.to_dtype(DType::U32)?.to_vec2::<u32>()?;
    let contexts = io.sequence("context", device)?;
    let prompts: Vec<&[u32]> = ids.iter().zip(&contexts).map(|(ids, c)| &ids[..c.dims()[0]]).collect();
    case.check("contexts", Tolerance::Abs(1e-4), |line| {
        for (b, (got, want)) in encoder.contexts(&prompts)?.iter().zip(&contexts).enumerate() {
            line.tensor(&format!("context.{b}"), got, want)?;
        }
        if let Some(want) = io.f32_if_any("output_row0_unpadded_input", device)? {
            line.tensor("output_row0_unpadded_input", &encoder.context(prompts[0])?.unsqueeze(0)?, &want)?;
        }
        Ok(())
    });
    for (positions, buckets) in [("rel_pos", "rel_bucket"), ("rel_pos_far", "rel_bucket_far")] {
        let (Some(positions), Some(want)) = (io.find(positions), io.find(buckets)) else { continue };
        case.check(buckets, Tolerance::Exact, |line| {
            let positions = positions.to_vec1::<i64>()?;
            let bucket = |rel: &i64| i64::from(relative_bucket(*rel, config.buckets, config.max_distance));
            let got: Vec<i64> = positions.iter().map(bucket).collect();
            line.tensor(buckets, &Tensor::new(got, want.device())?, want)
        });
    }
    Ok(())
}
