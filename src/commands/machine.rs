//! What this machine has: card, driver, memory, disk. With figures, and with a word on what they are not enough for.

use std::path::Path;
#[cfg(not(feature = "cuda"))]
use std::process::Command;

use crate::fsio;
use crate::plan::device::{available_ram, total_ram};
use crate::report::Table;

const GIB: u64 = 1 << 30;
/// Below this the smallest plan for the 14B models does not fit.
const LEAST_VRAM: u64 = 11 * GIB;
/// A 14B model in fp8 waits in host memory while it is loaded and while its blocks are streamed.
const LEAST_RAM: u64 = 30 * GIB;
/// The first driver for CUDA 12.
const LEAST_DRIVER: u32 = 525;
const OLDEST: (u32, u32) = (8, 0);

/// A card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    pub name: String,
    pub driver: Option<String>,
    pub capability: Option<(u32, u32)>,
    pub total: u64,
    pub free: u64,
}

/// The machine's facts as a table, and the sentences that go with them.
pub fn describe(base_dir: &Path) -> (Table, Vec<String>) {
    let mut table = Table::new(["machine", "", ""]);
    let mut notes = Vec::new();
    match cards() {
        Ok(cards) => {
            for card in &cards {
                let driver = card.driver.as_deref().map_or(String::new(), |d| format!(", driver {d}"));
                let sm = card.capability.map_or(String::new(), |(major, minor)| format!(", sm_{major}{minor}"));
                let memory = format!("{} ({} free)", fsio::human(card.total), fsio::human(card.free));
                table.row(["GPU", &format!("{}{sm}{driver}", card.name), &memory]);
                notes.extend(complaints(card));
            }
            if cards.is_empty() {
                table.row(["GPU", "none", ""]);
                notes.push(
                    "no NVIDIA card is here: caching and the demo run on the CPU, training of real models needs a card"
                        .into(),
                );
            }
        }
        Err(why) => {
            table.row(["GPU", "none that can be used", ""]);
            notes.push(format!("no card can be used: {why}"));
        }
    }
    match (total_ram(), available_ram()) {
        (Some(total), Some(free)) => {
            table.row(["RAM", "", &format!("{} ({} free)", fsio::human(total), fsio::human(free))]);
            if total < LEAST_RAM {
                notes.push(format!(
                    "{} of RAM is little for the 14B models: what does not fit the card waits there",
                    fsio::human(total)
                ));
            }
        }
        _ => drop(table.row(["RAM", "this system does not say", ""])),
    }
    match fsio::free_space(base_dir) {
        Ok(free) => drop(table.row(["disk", &base_dir.display().to_string(), &format!("{} free", fsio::human(free))])),
        Err(e) => drop(table.row(["disk", &base_dir.display().to_string(), &format!("{e:#}")])),
    }
    (table, notes)
}

fn complaints(card: &Card) -> Vec<String> {
    let mut notes = Vec::new();
    if card.capability.is_some_and(|c| c < OLDEST) {
        notes.push(format!("{} is too old: the kernels run from sm_80 on (RTX 30 series, A100 and later)", card.name));
    }
    if card.total < LEAST_VRAM {
        notes.push(format!("{} on {} are too few for the 14B models", fsio::human(card.total), card.name));
    }
    let major = card.driver.as_ref().and_then(|d| d.split('.').next()?.parse::<u32>().ok());
    if major.is_some_and(|major| major < LEAST_DRIVER) {
        let driver = card.driver.as_deref().unwrap_or_default();
        notes.push(format!("driver {driver} is too old: CUDA 12 needs {LEAST_DRIVER} or later"));
    }
    notes
}

/// Through the driver.
#[cfg(feature = "cuda")]
fn cards() -> Result<Vec<Card>, String> {
    let gpu = wan_kernels::gpu::Gpu::new(0).map_err(|e| e.to_string())?;
    let memory = gpu.memory().map_err(|e| e.to_string())?;
    let (major, minor) = gpu.card().capability;
    // "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  …"
    let version = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    Ok(vec![Card {
        name: gpu.card().name.clone(),
        driver: version.split_whitespace().find(is_version).map(str::to_owned),
        capability: Some((major as u32, minor as u32)),
        total: memory.total,
        free: memory.free,
    }])
}

/// Through `nvidia-smi`, which comes with every driver: this build does not link to it.
#[cfg(not(feature = "cuda"))]
fn cards() -> Result<Vec<Card>, String> {
    let query = "--query-gpu=name,driver_version,memory.total,memory.free,compute_cap";
    match Command::new("nvidia-smi").args([query, "--format=csv,noheader,nounits"]).output() {
        Err(_) => Ok(Vec::new()),
        Ok(out) if out.status.success() => Ok(parse_smi(&String::from_utf8_lossy(&out.stdout))),
        Ok(out) => {
            let said = [out.stdout, out.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            Err(format!("nvidia-smi says: {}", said.lines().find(|l| !l.trim().is_empty()).unwrap_or("nothing").trim()))
        }
    }
}

/// Lines of `name, driver, MiB, MiB, major.minor`; old drivers answer some of them with `[N/A]`.
#[cfg_attr(feature = "cuda", allow(dead_code))]
fn parse_smi(text: &str) -> Vec<Card> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let [name, driver, total, free, capability] = fields[..] else { return None };
        let mib = |text: &str| text.parse::<u64>().ok().map(|n| n << 20);
        let capability = capability.split_once('.').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        Some(Card { name: name.into(), driver: Some(driver.into()), capability, total: mib(total)?, free: mib(free)? })
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nvidia_smi_prints_is_read() {
        let cards =
            parse_smi("NVIDIA GeForce RTX 3090, 550.54.14, 24576, 24111, 8.6\nTesla K80, 470.1, 11441, 1, 3.7\n\n");
        assert_eq!(cards.len(), 2);
        assert_eq!((cards[0].total, cards[0].capability), (24 * GIB, Some((8, 6))));
        assert!(complaints(&cards[0]).is_empty());
        let said = complaints(&cards[1]).join("; ");
        assert!(said.contains("too old") && said.contains("470.1"), "{said}");
        assert!(complaints(&Card { total: 8 * GIB, ..cards[0].clone() })[0].contains("8.0 GiB"));
    }
}
