//! `wan-train bench --project CARD`: what a step would take on a card that is not here, from its data sheet and from what
//! the kernels reached of the peak on the card that was measured. A prediction, and printed as one.

use std::process::ExitCode;

use serde_json::json;

use super::bench::{latent, pixels};
use super::job::Job;
use super::plan::wishes;
use crate::adapter::select;
use crate::config::Typed;
use crate::error::{nearest, UserError};
use crate::plan::{self, Budget, Card, RunShape, Target};
use crate::train::TrainSettings;

const CASES: [&str; 3] = ["img720", "v21", "v45"];
const GIB: f64 = (1u64 << 30) as f64;
/// Host memory that a machine with such a card is taken to have for a run.
const HOST_GIB: u64 = 48;

pub fn run(typed: &Typed, wanted: &str, as_json: bool) -> anyhow::Result<ExitCode> {
    let cards = cards(wanted)?;
    let job = Job::new(typed)?;
    let settings = TrainSettings::from_config(&job.config, &job.model, job.config.seed.unwrap_or(1))?;
    if !as_json {
        println!("predictions, not measurements: data-sheet peaks times what the kernels reach on an H200");
        println!("{:10} {:8} {:>9}  {:>9}  arrangement", "card", "case", "s/step", "GiB");
    }
    for card in cards {
        for case in CASES {
            let [_, f, h, w] = latent(pixels(case)?).map(|n| n as u64);
            let shape = RunShape {
                target: Target::Cuda,
                checkpoint_bytes: 2,
                latent: [f, h, w],
                batch: 1,
                adapter: settings.network.adapter,
                sites: select(&job.model.arch, &settings.network.patterns)?,
            };
            let work = plan::Job::from_config(&job.config, &job.model.arch, &shape);
            if card.rates().products(work.products).is_none() {
                eprintln!("note: {} has no fp8 tensor cores for --fp8_fast", card.name);
                continue;
            }
            let gib = job.config.vram_budget.unwrap_or(card.free_gib());
            let budget = Budget { device: (gib * GIB) as u64, host: HOST_GIB << 30 };
            match plan::choose(&work, budget, wishes(&job, &job.config), &card.rates()) {
                Ok(plan) if as_json => println!(
                    "{}",
                    json!({
                        "prediction": true, "card": card.name, "case": case, "s_per_step": plan.step_seconds,
                        "planned_gib": plan.memory.held() as f64 / GIB, "host_gib": plan.memory.host() as f64 / GIB,
                        "blocks_to_swap": plan.arrangement.blocks_to_swap,
                    })
                ),
                Ok(plan) => {
                    let device = plan.memory.held() as f64 / GIB;
                    println!("{:10} {case:8} {:9.2}  {device:9.1}  {}", card.name, plan.step_seconds, plan.in_words());
                }
                Err(shortfall) => println!("{:10} {case:8} does not fit: {shortfall}", card.name),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `rtx3090` means "RTX 3090"; `all` every card of the table.
fn cards(wanted: &str) -> Result<Vec<Card>, UserError> {
    let plain = |name: &str| name.to_lowercase().replace([' ', '-', '_'], "");
    let all = Card::all();
    if plain(wanted) == "all" {
        return Ok(all);
    }
    let names: Vec<String> = all.iter().map(|c| plain(&c.name)).collect();
    let found: Vec<Card> = all.into_iter().filter(|c| plain(&c.name) == plain(wanted)).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let error = UserError::usage(format!("there is no card named `{wanted}` in the table"));
    Err(match nearest(&plain(wanted), names.iter().map(String::as_str)) {
        Some(near) => error.hint(format!("did you mean `{near}`? the cards are: {}", names.join(", "))),
        None => error.hint(format!("the cards are: {}", names.join(", "))),
    })
}

#[cfg(test)]
mod tests {
    use super::cards;

    #[test]
    fn cards_are_found_by_plain_names_and_others_are_refused() {
        assert_eq!(cards("RTX-3090").unwrap()[0].name, "RTX 3090");
        assert!(cards("all").unwrap().len() >= 5);
        assert!(cards("rtx3091").unwrap_err().to_string().contains("rtx3091"));
    }
}
