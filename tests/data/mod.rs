//! The data path: reference numbers, then real files of every kind, then everything that can be wrong with them.

mod golden;
mod pictures;
mod scan;
mod schema;
mod streams;

use std::fs;
use std::path::{Path, PathBuf};

use image::RgbImage;
use wan_train::data::{scan, DataOptions, DatasetConfig, Finding, ScanReport, Verdict};

/// Small files made for these tests; their sources are grey frames with a bright top left corner.
fn media(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/media").join(name)
}

/// A directory with a dataset file and what it needs.
struct Place {
    dir: tempfile::TempDir,
    options: DataOptions,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), options: DataOptions::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    fn copy(&self, from: &str, name: &str) -> PathBuf {
        self.write(name, fs::read(media(from)).unwrap())
    }

    /// A picture of one colour.
    fn picture(&self, name: &str, w: u32, h: u32) -> PathBuf {
        let path = self.write(name, b"");
        RgbImage::from_pixel(w, h, image::Rgb([90, 120, 30])).save(&path).unwrap();
        path
    }

    fn load(&self, toml: &str) -> anyhow::Result<DatasetConfig> {
        let path = self.write("set.toml", toml);
        DatasetConfig::load(&path, &self.options)
    }

    fn scan(&self, toml: &str) -> (DatasetConfig, ScanReport) {
        let config = self.load(toml).unwrap();
        let report = scan(&config, &self.options).unwrap();
        (config, report)
    }
}

/// The finding for a file of this name.
fn finding<'a>(report: &'a ScanReport, name: &str) -> &'a Finding {
    let found = report.findings.iter().find(|f| f.path.ends_with(name));
    found.unwrap_or_else(|| panic!("no finding for {name}: {:#?}", report.findings))
}

fn verdict(report: &ScanReport, name: &str) -> Verdict {
    finding(report, name).verdict
}

/// The text a user would read.
fn message<T>(result: anyhow::Result<T>) -> String {
    match result {
        Ok(_) => panic!("this should have failed"),
        Err(e) => format!("{e:#}"),
    }
}
