//! Names that belong to one run: two that are started in the same minute, on two cards, or by mistake twice must not write
//! each other's files.

use std::path::Path;
use std::time::Duration;

use super::job::Job;
use super::train;
use crate::checkpoint::Names;
use crate::config::Layer;
use crate::error::UserError;
use crate::fsio::{self, Claim};

/// A time stamp to the minute, and to the second, as names have them.
pub const MINUTE: &str = "%Y%m%d_%H%M";
pub const SECOND: &str = "%Y%m%d_%H%M%S";

/// Claims the name that `job` will write under, until the claim is dropped. A new run whose name was made of the time gets
/// another one where that is taken. `None` where there is no place to save.
///
/// Errors: a run that is going on under the same name.
pub fn claim(job: &mut Job) -> anyhow::Result<Option<Claim>> {
    let Some(names) = train::names(job)? else { return Ok(None) };
    let resumed = job.config.resume.is_some();
    let timed = matches!(job.resolved.origin.get("output_name"), Some(Layer::Derived));
    if timed && !resumed && !job.of_pair {
        return anew(job, names).map(Some);
    }
    let owner = match fsio::claim(&names.final_file())? {
        Ok(claim) => {
            if !resumed && !job.of_pair && names.taken() {
                let what = format!("note: files named {} in {}", names.output_name, names.output_dir.display());
                job.progress.say(&format!("{what} are of an earlier run and will be replaced"));
            }
            return Ok(Some(claim));
        }
        Err(owner) => owner,
    };
    Err(busy(&names.output_dir, &names.output_name, owner).into())
}

fn busy(dir: &Path, name: &str, owner: Option<u32>) -> UserError {
    let who = owner.map_or("another process".into(), |id| format!("process {id}"));
    UserError::new(format!("a run is going on that writes files named {name} in {}: {who}", dir.display()))
        .hint("wait for it or stop it, or give this one another --output_name")
}

fn anew(job: &mut Job, names: Names) -> anyhow::Result<Claim> {
    // The stamp is ASCII, so what comes before it ends at a character.
    let stem = names.output_name.len().saturating_sub(chrono::Local::now().format(MINUTE).to_string().len());
    let stem = names.output_name.get(..stem).unwrap_or_default().to_owned();
    let mut candidate = names.clone();
    // As many as may be started at once; each second has one name.
    for _ in 0..120 {
        if !candidate.taken() {
            if let Ok(claim) = fsio::claim(&candidate.final_file())? {
                if candidate != names {
                    let (old, new) = (&names.output_name, &candidate.output_name);
                    job.progress.say(&format!("note: there is a run named {old}: this one is named {new}"));
                    job.config.output_name = Some(new.clone());
                }
                return Ok(claim);
            }
        }
        let output_name = format!("{stem}{}", chrono::Local::now().format(SECOND));
        if output_name == candidate.output_name {
            std::thread::sleep(Duration::from_millis(200));
        }
        candidate.output_name = output_name;
    }
    Err(busy(&names.output_dir, &names.output_name, None).into())
}
