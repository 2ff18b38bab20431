//! The state of every cache file a data set calls for, found out before anything is computed: what can be used, what
//! must be made again and why, and what lies in the cache directories without belonging to any item.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::format::{self, FormatError, Header, LatentInfo};
use super::listing::Listing;
use super::names::CacheName;
use super::one_frame::Positions;
use super::options::CacheOptions;
use super::recipe::{self, Freshness, LatentRecipe, LatentSettings, LatentWish, TextRecipe, TextWish};
use crate::data::{count_frames, Cut, DatasetConfig, Entry, Item, Kind, Planned};
use crate::error::UserError;

/// What a run did with a cache file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Not looked at yet, or given up on: see the reason.
    Pending,
    /// Made in this run.
    Cached,
    /// Found as it should be.
    Reused,
}

/// One latent file: a picture's, or one clip's of a video.
#[derive(Debug, Clone)]
pub struct LatentEntry {
    pub path: PathBuf,
    pub span: Planned,
    pub state: Freshness,
    pub outcome: Outcome,
    /// What was wrong with the file that this run replaced.
    pub remade: Option<String>,
}

/// The latent files of one item.
#[derive(Debug, Clone)]
pub struct ItemEntry {
    /// Position in the scan's items.
    pub item: usize,
    pub clips: Vec<LatentEntry>,
    /// Whether `clips` is the truth: the clips of a video that was never read through are an estimate.
    pub settled: bool,
    /// Why the medium cannot be used, once that is known.
    pub fault: Option<String>,
    pub text: TextEntry,
}

impl ItemEntry {
    pub fn needs_latents(&self) -> bool {
        self.fault.is_none() && self.clips.iter().any(|c| !c.state.is_usable())
    }
}

/// The caption file of an item.
#[derive(Debug, Clone)]
pub struct TextEntry {
    pub path: PathBuf,
    pub state: Freshness,
    pub outcome: Outcome,
    /// What was wrong with the file that this run replaced.
    pub remade: Option<String>,
    /// Tokens of the caption where they were more than the model takes.
    pub cut_from: Option<usize>,
}

/// All items of all data sets with their cache files.
#[derive(Debug, Clone)]
pub struct Survey {
    pub config: DatasetConfig,
    pub items: Vec<Item>,
    pub options: CacheOptions,
    pub entries: Vec<ItemEntry>,
    /// What lay in the cache directory of each data set at the start.
    listings: Vec<Listing>,
}

impl Survey {
    /// Looks at every cache file. Reads headers, compares recipes, and reads media only whose time of change differs.
    pub fn take(config: &DatasetConfig, items: &[Item], options: &CacheOptions) -> Result<Self> {
        let mut survey = Self {
            config: config.clone(),
            items: items.to_vec(),
            options: options.clone(),
            entries: Vec::new(),
            listings: config.entries.iter().map(Listing::of).collect::<Result<_>>()?,
        };
        if options.one_frame {
            config.entries.iter().try_for_each(|entry| Positions::of(entry).map(drop))?;
        }
        survey.entries = items.iter().enumerate().map(|(i, item)| survey.item_entry(i, item)).collect();
        Ok(survey)
    }

    /// Entry of the configuration an item belongs to.
    pub fn dataset(&self, item: &Item) -> &Entry {
        &self.config.entries[item.dataset]
    }

    /// Where the item's frames stand in time; one-frame training only.
    pub fn positions(&self, item: &Item) -> Option<Positions> {
        // `take` has refused data sets that have none.
        self.options.one_frame.then(|| Positions::of(self.dataset(item)).ok()).flatten()
    }

    /// Pixel frames of which the VAE would make as many latent frames as a file holds.
    pub fn pixel_frames(&self, item: &Item, span: Planned) -> usize {
        match (self.positions(item), item.kind) {
            (Some(positions), _) => 1 + (positions.frames() - 1) * self.options.geometry.temporal,
            (None, Kind::Image) => 1,
            (None, Kind::Video) => span.frames,
        }
    }

    /// Latent files to make; a video whose clips are not known yet counts as one at least.
    pub fn latents_to_make(&self) -> usize {
        let known = |e: &ItemEntry| e.clips.iter().filter(|c| !c.state.is_usable()).count();
        let to_make = |e: &ItemEntry| known(e).max(usize::from(!e.settled));
        self.entries.iter().filter(|e| e.fault.is_none()).map(to_make).sum()
    }

    /// Caption files to make.
    pub fn texts_to_make(&self) -> usize {
        self.entries.iter().filter(|e| e.fault.is_none() && !e.text.state.is_usable()).count()
    }

    /// What to know about the settings, one sentence each.
    pub fn notes(&self) -> Vec<String> {
        let idle = |e: &&Entry| !self.options.one_frame && e.fp_1f_target_index.is_some();
        let idle = self.config.entries.iter().filter(idle).map(|e| {
            let path = e.source.path().display();
            format!("dataset {} ({path}) sets fp_1f_target_index, which counts with --one_frame only", e.index + 1)
        });
        self.stills_note().into_iter().chain(idle).collect()
    }

    /// Pictures trained as image-to-video: the first-frame condition of a picture is the picture, so that the model
    /// learns to copy it. `i2v_images_as_t2v` leaves the condition empty.
    fn stills_note(&self) -> Option<String> {
        let stills = self.items.iter().filter(|i| i.kind == Kind::Image).count();
        (self.options.i2v && !self.options.i2v_images_as_t2v && !self.options.one_frame && stills > 0).then(|| {
            format!(
                "{stills} still images are trained as image-to-video with themselves as the given first frame, which \
                 teaches to copy; --i2v_images_as_t2v gives them an empty first frame instead"
            )
        })
    }

    fn item_entry(&self, index: usize, item: &Item) -> ItemEntry {
        let (entry, listing) = (self.dataset(item), &self.listings[item.dataset]);
        let bucket = entry.selector().choose(item.probe.size);
        let (spans, settled) = match item.kind {
            Kind::Image => (entry.plan(&item.probe), true),
            Kind::Video => match self.recorded_clips(item, entry, listing) {
                Some(spans) => (spans, true),
                None => (entry.plan(&item.probe), false),
            },
        };
        let mut clips: Vec<LatentEntry> = spans.into_iter().map(|span| self.latent_entry(item, span)).collect();
        clips.sort_by(|a, b| a.path.cmp(&b.path));
        let settled = settled || (!clips.is_empty() && clips.iter().all(|c| c.state.is_usable()));
        let side = 2 * self.options.geometry.spatial as u32;
        let fits = bucket.0.is_multiple_of(side) && bucket.1.is_multiple_of(side) && bucket.0 > 0 && bucket.1 > 0;
        let fault = (!fits).then(|| {
            let (w, h) = bucket;
            format!("would be trained at {w}x{h}, but this model needs sides that are multiples of {side}")
        });
        ItemEntry { item: index, clips, settled, fault, text: self.text_entry(item) }
    }

    /// One latent file, looked at now.
    pub fn latent_entry(&self, item: &Item, span: Planned) -> LatentEntry {
        let path = latent_path(self.dataset(item), item, span);
        let state = match self.options.recache {
            true => Freshness::Stale("made again on request".to_string()),
            false => self.latent_state(&path, item, span),
        };
        let outcome = if state.is_usable() { Outcome::Reused } else { Outcome::Pending };
        LatentEntry { path, span, state, outcome, remade: None }
    }

    /// The settings under which a latent file is made now.
    pub fn settings(&self, item: &Item, span: Planned) -> Result<LatentSettings> {
        let o = &self.options;
        Ok(LatentSettings {
            bucket: span.size,
            start: span.start,
            frames: span.frames,
            source_fps: self.dataset(item).source_fps,
            dtype: format::dtype_name(o.vae_dtype)?.to_string(),
            i2v: o.i2v,
            last_frame: o.i2v && o.last_frame && span.frames > 1,
            images_as_t2v: o.i2v && o.i2v_images_as_t2v && item.kind == Kind::Image,
            one_frame: self.positions(item).map(|p| p.record()),
            musubi_compat: o.musubi_compat,
        })
    }

    fn latent_state(&self, path: &Path, item: &Item, span: Planned) -> Freshness {
        let found = format::read_header(path).and_then(|h| LatentInfo::from_header(&h).map(|info| (h, info)));
        let (header, info) = match found {
            Ok(found) => found,
            Err(e) if e.is_missing() => return Freshness::Missing,
            Err(e) => return Freshness::Torn(e.to_string()),
        };
        let o = &self.options;
        if let Some(why) = other_architecture(&header) {
            return Freshness::Stale(why);
        }
        let wanted = o.geometry.shape(span.size, self.pixel_frames(item, span));
        if info.shape != wanted {
            return Freshness::Stale(format!("holds latents of shape {:?}, wanted {wanted:?}", info.shape));
        }
        let clip_images = if o.last_frame { 2 } else { 1 };
        let lacking = [
            (o.i2v && !info.image, "the first-frame condition that image-to-video needs"),
            (o.clip && info.clip_images != clip_images, "the CLIP features that this task needs"),
            (o.one_frame && !info.positions, "the positions that one-frame training needs"),
            (!o.one_frame && !item.controls.is_empty() && !info.control, "the latents of its control"),
        ];
        if let Some((_, what)) = lacking.iter().find(|(lacks, _)| *lacks) {
            return Freshness::Stale(format!("lacks {what}"));
        }
        let recipe: LatentRecipe = match recipe::read(&header) {
            Ok(Some(recipe)) => recipe,
            Ok(None) => return Freshness::Foreign,
            Err(why) => return Freshness::Stale(why),
        };
        let settings = match self.settings(item, span) {
            Ok(settings) => settings,
            Err(e) => return Freshness::Stale(e.to_string()),
        };
        let wish = LatentWish {
            source: &item.path,
            controls: &item.controls,
            settings: &settings,
            vae: o.vae.as_deref(),
            clip: o.clip_vision.as_deref().filter(|_| o.clip),
        };
        match recipe.difference(&wish) {
            Some(why) => Freshness::Stale(why),
            None => intact(recipe::check_payload(path, &recipe.stamp, |_| true)),
        }
    }

    /// The clips of a video as recorded in any of its files by a run that read it through, if nothing about it changed.
    fn recorded_clips(&self, item: &Item, entry: &Entry, listing: &Listing) -> Option<Vec<Planned>> {
        let cut = cut_rule(entry);
        listing.of_base(&item.stem).find_map(|path| {
            let header = format::read_header(path).ok()?;
            let recipe: LatentRecipe = recipe::read(&header).ok()??;
            let clips = recipe.clips.filter(|list| list.cut == cut && !list.all.is_empty())?;
            let unchanged = recipe.source.difference(&item.path, recipe.stamp.made_ns).is_none();
            let size = entry.selector().choose(item.probe.size);
            unchanged.then(|| clips.all.into_iter().map(|(start, frames)| Planned { start, frames, size }).collect())
        })
    }

    fn text_entry(&self, item: &Item) -> TextEntry {
        let name = CacheName::Text { base: item.stem.clone() };
        let path = self.dataset(item).cache_directory.join(name.file_name());
        let (state, cut_from) = match self.options.recache {
            true => (Freshness::Stale("made again on request".to_string()), None),
            false => self.text_state(&path, item),
        };
        let outcome = if state.is_usable() { Outcome::Reused } else { Outcome::Pending };
        TextEntry { path, state, outcome, remade: None, cut_from }
    }

    fn text_state(&self, path: &Path, item: &Item) -> (Freshness, Option<usize>) {
        let found = format::read_header(path).and_then(|h| format::text_info(&h).map(|info| (h, info)));
        let (header, (name, [rows, width])) = match found {
            Ok(found) => found,
            Err(e) if e.is_missing() => return (Freshness::Missing, None),
            Err(e) => return (Freshness::Torn(e.to_string()), None),
        };
        let o = &self.options;
        if let Some(why) = other_architecture(&header) {
            return (Freshness::Stale(why), None);
        }
        if o.text_width.is_some_and(|wanted| wanted != width) {
            return (Freshness::Stale(format!("{name} is {width} wide, the model reads {:?}", o.text_width)), None);
        }
        let caption = item.caption.as_deref().unwrap_or_default();
        // The old trainer records the caption, stripped or not according to where it came from.
        if header.metadata.get("caption1").is_some_and(|c| c.trim() != caption.trim()) {
            return (Freshness::Stale("the caption has changed".to_string()), None);
        }
        let recipe: TextRecipe = match recipe::read(&header) {
            Ok(Some(recipe)) => recipe,
            Ok(None) => return (Freshness::Foreign, None),
            Err(why) => return (Freshness::Stale(why), None),
        };
        let dtype = format::dtype_name(o.text_dtype).unwrap_or_default();
        let wish = TextWish {
            caption,
            umt5: o.umt5.as_deref(),
            tokenizer: o.tokenizer.as_deref(),
            dtype,
            musubi_compat: o.musubi_compat,
        };
        let state = match recipe.difference(&wish) {
            Some(why) => Freshness::Stale(why),
            None => intact(recipe::check_payload(path, &recipe.stamp, |n| format::base_key(n) == "varlen_t5")),
        };
        (state, (recipe.tokens > rows).then_some(recipe.tokens))
    }

    /// Files named like caches that belong to no item, with their data set: never trained on, never deleted. As long as
    /// a video has not been read through, files of its name are not counted.
    pub fn unused(&self) -> Vec<(usize, PathBuf)> {
        let mut known = BTreeSet::new();
        let mut undecided = BTreeSet::new();
        for entry in &self.entries {
            known.extend(entry.clips.iter().map(|c| &c.path));
            known.insert(&entry.text.path);
            if !entry.settled {
                let item = &self.items[entry.item];
                undecided.insert((item.dataset, item.stem.as_str()));
            }
        }
        let mut unused = Vec::new();
        for (dataset, listing) in self.listings.iter().enumerate() {
            let may_be_wanted =
                |base: &Option<String>| base.as_ref().is_some_and(|b| undecided.contains(&(dataset, b)));
            let files = listing.files.iter().filter(|(path, base)| !known.contains(path) && !may_be_wanted(base));
            unused.extend(files.map(|(path, _)| (dataset, path.clone())));
        }
        unused
    }

    /// Reads the videos through whose clips are only estimated, so that `entries` is the truth. Needs no model.
    pub fn settle(&mut self) {
        for i in 0..self.entries.len() {
            if self.entries[i].settled || self.entries[i].fault.is_some() {
                continue;
            }
            let item = &self.items[self.entries[i].item];
            let entry = self.dataset(item);
            match count_frames(&item.path, entry) {
                Ok(n) => self.settle_clips(i, &entry.clips_of(n, item.probe.size)),
                Err(e) => self.entries[i].fault = Some(format!("{e:#}")),
            }
        }
    }

    /// Replaces the estimated clips of entry `i` by those the video yields. What is known of the
    /// files stays.
    pub fn settle_clips(&mut self, i: usize, found: &[Planned]) {
        let item = self.items[self.entries[i].item].clone();
        let mut old: BTreeMap<PathBuf, LatentEntry> =
            std::mem::take(&mut self.entries[i].clips).into_iter().map(|c| (c.path.clone(), c)).collect();
        let mut clips: Vec<LatentEntry> = Vec::new();
        for &span in found {
            let path = latent_path(self.dataset(&item), &item, span);
            clips.push(old.remove(&path).unwrap_or_else(|| self.latent_entry(&item, span)));
        }
        clips.sort_by(|a, b| a.path.cmp(&b.path));
        let entry = &mut self.entries[i];
        entry.clips = clips;
        entry.settled = true;
        if entry.clips.is_empty() {
            entry.fault = Some("too short for every target length: it yields no clip".to_string());
        }
    }

    /// Everything that keeps the items from being trained on: (path, why).
    pub fn obstacles(&self) -> Vec<(PathBuf, String)> {
        let mut found = Vec::new();
        for entry in &self.entries {
            let item = &self.items[entry.item];
            if let Some(fault) = &entry.fault {
                if !self.options.allow_bad_media {
                    found.push((item.path.clone(), fault.clone()));
                }
                continue;
            }
            let clips = entry.clips.iter().map(|c| (&c.path, &c.state));
            for (path, state) in clips.chain([(&entry.text.path, &entry.text.state)]) {
                if !state.is_usable() {
                    found.push((path.clone(), state.why()));
                }
            }
        }
        found
    }
}

impl Survey {
    /// One error that lists everything in the way of training, if anything is.
    pub fn check(&self) -> Result<()> {
        let obstacles = self.obstacles();
        if obstacles.is_empty() {
            return Ok(());
        }
        let media = self.entries.iter().any(|e| e.fault.is_some()) && !self.options.allow_bad_media;
        let mut what = format!("{} files of the dataset cannot be trained on:", obstacles.len());
        for (path, why) in &obstacles {
            what.push_str(&format!("\n  {}: {why}", path.display()));
        }
        let hint = match media {
            true => "repair or remove these media, or leave them out with --allow_bad_media",
            false => "run `wan-train cache` with the models this task needs: it makes these files again",
        };
        Err(UserError::new(what).hint(hint).into())
    }
}

fn intact(payload: Result<(), FormatError>) -> Freshness {
    match payload {
        Ok(()) => Freshness::Fresh,
        Err(e) => Freshness::Torn(e.to_string()),
    }
}

/// Caches of other model families share the directory layout.
fn other_architecture(header: &Header) -> Option<String> {
    let architecture = header.metadata.get("architecture").filter(|a| *a != format::ARCHITECTURE)?;
    Some(format!("made for the model family {architecture:?}"))
}

/// Where the latents of a clip go.
pub fn latent_path(entry: &Entry, item: &Item, span: Planned) -> PathBuf {
    let base = item.stem.clone();
    let name = match item.kind {
        Kind::Image => {
            let (width, height) = item.probe.size;
            CacheName::Image { base, width: width as usize, height: height as usize }
        }
        Kind::Video => {
            let (width, height) = (span.size.0 as usize, span.size.1 as usize);
            CacheName::Video { base, start: span.start, frames: span.frames, width, height }
        }
    };
    entry.cache_directory.join(name.file_name())
}

/// What decides which clips a given video yields, as text.
pub fn cut_rule(entry: &Entry) -> String {
    let cut = Cut::of(entry);
    let fps = entry.source_fps.map_or("as it is".to_string(), |f| f.to_string());
    format!(
        "{:?} of {:?}, stride {}, samples {}, at most {}, source_fps {fps}, compat {}",
        cut.effective(),
        cut.targets,
        cut.stride,
        cut.sample,
        cut.max_frames,
        entry.musubi_compat
    )
}
