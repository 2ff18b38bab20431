//! A small data set in a temporary directory, tiny models, and the whole caching run over them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{bail, Result};
use candle_core::{DType, Device, Tensor};
use image::{Rgb, RgbImage};
use tempfile::TempDir;
use wan_kernels::Exec;
use wan_models::clip::{random_clip, ClipArch, ClipVision};
use wan_models::vae::{random_vae, Vae, VaeArch, VaeOptions};
use wan_train::cache::{
    cache_latents, cache_text, CacheOptions, CacheReport, CaptionTokens, LatentGeometry, LatentModels, Lazy, Survey,
    TextEncoder, TextModels,
};
use wan_train::data::{scan, DataOptions, DatasetConfig, ScanReport};
use wan_train::report::Silent;

/// Two pictures, and a video of frames that yields two clips of five.
pub struct Kitchen {
    pub root: PathBuf,
    /// Removed with the kitchen, unless somebody else owns it.
    pub _dir: Option<TempDir>,
    pub data: DataOptions,
    pub options: CacheOptions,
    pub stop: AtomicBool,
    /// Weights of the VAE; change them to spoil it.
    pub weights: BTreeMap<String, Tensor>,
    pub models: bool,
    /// Whether CLIP weights are at hand.
    pub with_clip: bool,
    /// Weights of a VAE of wider range, if there is one.
    pub wide_weights: Option<BTreeMap<String, Tensor>>,
    /// Files decoded at a time.
    pub decoders: usize,
    pub vae_loads: Cell<usize>,
    pub encoded_captions: Cell<usize>,
}

/// What a run left.
pub struct Meal {
    pub scan: ScanReport,
    pub survey: Survey,
    pub result: Result<()>,
}

impl Meal {
    pub fn report(&self) -> CacheReport {
        CacheReport::of(&self.scan, &self.survey)
    }

    pub fn table(&self) -> String {
        self.report().render()
    }

    /// The row of a file in the table.
    pub fn row(&self, file: &str) -> String {
        let table = self.table();
        table.lines().find(|l| l.contains(file)).unwrap_or_else(|| panic!("no row for {file}:\n{table}")).to_string()
    }

    pub fn ok(self) -> Self {
        if let Err(e) = &self.result {
            panic!("{e:#}\n{}", self.table());
        }
        self
    }

    pub fn error(&self) -> String {
        format!("{:#}", self.result.as_ref().expect_err("the run should have failed"))
    }
}

pub fn tiny_arch() -> VaeArch {
    VaeArch {
        base_dim: 4,
        dec_dim: 4,
        z_dim: 4,
        dim_mult: vec![1, 1, 1, 1],
        res_blocks: 1,
        latent_mean: vec![0.1, -0.2, 0.3, 0.0],
        latent_std: vec![1.5, 2.0, 0.7, 1.0],
        ..VaeArch::wan21()
    }
}

pub fn tiny_clip() -> ClipArch {
    ClipArch { image_size: 28, dim: 16, mlp_dim: 32, num_heads: 2, num_layers: 2, ..ClipArch::vit_h14() }
}

pub fn load_clip(at_hand: bool) -> Result<ClipVision> {
    if !at_hand {
        bail!("no model should be needed");
    }
    let weights = random_clip(&tiny_clip(), 3)?;
    Ok(ClipVision::load(tiny_clip(), &Device::Cpu, DType::F32, &mut |k| Ok(weights.get(k).cloned()))?)
}

/// A picture whose every pixel depends on its place and the seed.
pub fn picture(width: u32, height: u32, seed: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let v = |k: u32| ((x * (3 + k) + y * (7 + seed) + seed * 41 + k * 90) % 256) as u8;
        Rgb([v(0), v(1), v(2)])
    })
}

fn fill(root: &Path) {
    for sub in ["pictures", "frames/walk"] {
        fs::create_dir_all(root.join(sub)).unwrap();
    }
    picture(64, 48, 1).save(root.join("pictures/a_cat.png")).unwrap();
    picture(40, 40, 2).save(root.join("pictures/dog.png")).unwrap();
    fs::write(root.join("pictures/a_cat.txt"), "a cat").unwrap();
    fs::write(root.join("pictures/dog.txt"), "a dog").unwrap();
    for i in 0..11 {
        picture(48, 32, 10 + i).save(root.join(format!("frames/walk/{i:03}.png"))).unwrap();
    }
    let line = serde_json::json!({"video_path": root.join("frames/walk"), "caption": "a cat"});
    fs::write(root.join("videos.jsonl"), format!("{line}\n")).unwrap();
}

impl Kitchen {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_path_buf();
        fill(&root);
        let kitchen = Self { _dir: Some(dir), ..Self::at(root) };
        kitchen.write_config("resolution = [48, 32]", "target_frames = [5]\nframe_extraction = \"chunk\"");
        kitchen
    }

    /// Over the data set of another process.
    pub fn at(root: PathBuf) -> Self {
        Self {
            root,
            _dir: None,
            data: DataOptions::default(),
            options: CacheOptions {
                vae: Some("vae one".into()),
                umt5: Some("umt5 one".into()),
                tokenizer: Some("tokenizer one".into()),
                ..CacheOptions::new(LatentGeometry::from(&tiny_arch()))
            },
            stop: AtomicBool::new(false),
            weights: random_vae(&tiny_arch(), 5).unwrap(),
            models: true,
            wide_weights: None,
            decoders: 1,
            with_clip: false,
            vae_loads: Cell::new(0),
            encoded_captions: Cell::new(0),
        }
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn write_config(&self, general: &str, video: &str) {
        let root = self.root.display();
        let text = format!(
            "[general]\n{general}\ncaption_extension = \".txt\"\n\n\
             [[datasets]]\nimage_directory = \"{root}/pictures\"\ncache_directory = \"{root}/cache/pictures\"\n\
             num_repeats = 2\n\n\
             [[datasets]]\nvideo_jsonl_file = \"{root}/videos.jsonl\"\ncache_directory = \"{root}/cache/videos\"\n{video}\n"
        );
        fs::write(self.path("dataset.toml"), text).unwrap();
    }

    pub fn survey(&self) -> (ScanReport, Survey) {
        let config = DatasetConfig::load(&self.path("dataset.toml"), &self.data).unwrap();
        let scan = scan(&config, &self.data).unwrap();
        let survey = Survey::take(&config, &scan.items, &self.options).unwrap();
        (scan, survey)
    }

    pub fn load_vae(&self) -> Result<Vae> {
        if !self.models {
            bail!("no model should be needed");
        }
        self.vae_loads.set(self.vae_loads.get() + 1);
        Self::vae_of(&self.weights)
    }

    fn vae_of(weights: &BTreeMap<String, Tensor>) -> Result<Vae> {
        let options = VaeOptions::default().encoder_only();
        Ok(Vae::load(tiny_arch(), &Exec::cpu(), options, &mut |k| Ok(weights[k].clone()))?)
    }

    pub fn latent_models(&self) -> LatentModels<'_> {
        let fingerprint = self.options.vae.clone().unwrap_or_default();
        let clip = Lazy {
            fingerprint: self.options.clip_vision.clone().unwrap_or_default(),
            load: Box::new(|| load_clip(self.models)),
        };
        LatentModels {
            vae: Lazy { fingerprint, load: Box::new(|| self.load_vae()) },
            wide_vae: self
                .wide_weights
                .as_ref()
                .map(|weights| -> Box<dyn FnOnce() -> Result<Vae> + '_> { Box::new(|| Self::vae_of(weights)) }),
            clip: self.with_clip.then_some(clip),
            decoders: self.decoders,
        }
    }

    pub fn cook(&self) -> Meal {
        let (scan, survey) = self.survey();
        self.cook_what_was_found(scan, survey)
    }

    /// The rest of [`Kitchen::cook`].
    pub fn cook_what_was_found(&self, scan: ScanReport, mut survey: Survey) -> Meal {
        let result = self.run(&mut survey);
        Meal { scan, survey, result }
    }

    fn run(&self, survey: &mut Survey) -> Result<()> {
        cache_latents(survey, self.latent_models(), &Exec::cpu(), &Silent, &self.stop)?;
        let encoded = std::rc::Rc::new(Cell::new(0));
        let counter = encoded.clone();
        let models = TextModels {
            encoder: Lazy {
                fingerprint: self.options.umt5.clone().unwrap_or_default(),
                load: Box::new(move || match self.models {
                    true => Ok(Box::new(LetterEncoder(counter)) as Box<dyn TextEncoder>),
                    false => bail!("no model should be needed"),
                }),
            },
            tokenizer_fingerprint: self.options.tokenizer.clone().unwrap_or_default(),
            batch: 2,
        };
        let result = cache_text(survey, models, &Silent, &self.stop);
        self.encoded_captions.set(encoded.get());
        result?;
        survey.check()
    }

    /// Every file below the cache directories with its content.
    pub fn cache_files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for sub in ["pictures", "videos"] {
            for entry in fs::read_dir(self.path("cache").join(sub)).into_iter().flatten() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_string();
                files.insert(name, fs::read(path).unwrap());
            }
        }
        files
    }
}

/// Takes away our recipe, which makes the file one of the old trainer.
pub fn make_foreign(path: &Path) {
    let (mut metadata, tensors) = wan_train::cache::format::read_tensors(path).unwrap();
    assert!(metadata.remove("wan_train.recipe").is_some());
    fs::write(path, wan_train::cache::format::to_bytes(&tensors, &metadata).unwrap()).unwrap();
}

/// A text encoder whose tokens are letters, of which it reads ten.
struct LetterEncoder(std::rc::Rc<Cell<usize>>);

impl TextEncoder for LetterEncoder {
    fn tokenize(&self, caption: &str) -> Result<CaptionTokens> {
        let ids: Vec<u32> = caption.chars().map(|c| c as u32).chain([1]).collect();
        let full = ids.len();
        Ok(CaptionTokens { ids: ids.into_iter().take(10).collect(), full })
    }

    fn encode(&self, captions: &[Vec<u32>]) -> Result<Vec<Tensor>> {
        self.0.set(self.0.get() + captions.len());
        let row = |ids: &Vec<u32>| -> Result<Tensor> {
            let values: Vec<f32> = ids.iter().flat_map(|id| [*id as f32, 0.5, -1.0]).collect();
            Ok(Tensor::from_vec(values, (ids.len(), 3), &Device::Cpu)?.to_dtype(DType::F32)?)
        };
        captions.iter().map(row).collect()
    }
}
