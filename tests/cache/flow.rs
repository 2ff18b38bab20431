//! The whole caching run: what it makes, what it keeps, what it makes again and why.

use std::fs::{self, File};
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use wan_train::cache::recipe::Freshness;
use wan_train::cache::{BucketKey, CacheIndex};

use super::kitchen::{make_foreign, picture, Kitchen};

const CAT: &str = "cache/pictures/a_cat_0064x0048_wan.safetensors";
const CAT_TEXT: &str = "cache/pictures/a_cat_wan_te.safetensors";
const WALK: &str = "cache/videos/walk_00000-005_0048x0032_wan.safetensors";
const WALK_2: &str = "cache/videos/walk_00005-005_0048x0032_wan.safetensors";

#[test]
fn what_overflows_is_encoded_in_a_wider_dtype() {
    let good = Kitchen::new();
    good.cook().ok();
    let mut spoilt = Kitchen::new();
    // As an overflow shows: numbers that are none.
    for weight in spoilt.weights.values_mut() {
        *weight = (&*weight * f64::NAN).unwrap();
    }
    let refused = Kitchen { weights: spoilt.weights.clone(), ..Kitchen::new() };
    assert!(refused.cook().table().contains("no proper numbers"));
    let rescued = Kitchen { wide_weights: Some(good.weights.clone()), ..spoilt };
    rescued.cook().ok();
    let latents = |kitchen: &Kitchen| {
        let cat = wan_train::cache::index::load_latents(&kitchen.path(CAT)).unwrap().latents;
        cat.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(latents(&rescued), latents(&good));
}

#[test]
fn decoding_several_files_at_a_time_changes_nothing() {
    let one = Kitchen::new();
    let alone = one.cook().ok();
    let several = Kitchen { decoders: 3, ..Kitchen::new() };
    let together = several.cook().ok();
    let without_paths = |table: String, root: &std::path::Path| table.replace(&root.display().to_string(), "");
    assert_eq!(without_paths(together.table(), &several.root), without_paths(alone.table(), &one.root));
    let latents = |kitchen: &Kitchen| {
        let files = kitchen.cache_files().into_keys().filter(|name| !name.ends_with("_te.safetensors"));
        let dirs = ["cache/pictures", "cache/videos"].map(|d| kitchen.path(d));
        let read = |name: String| {
            let path = dirs.iter().map(|d| d.join(&name)).find(|p| p.exists()).unwrap();
            (name, wan_train::cache::index::load_latents(&path).unwrap())
        };
        files.map(read).collect::<Vec<_>>()
    };
    let (alone, together) = (latents(&one), latents(&several));
    assert_eq!(alone.len(), 4);
    for ((name, a), (other, b)) in alone.iter().zip(&together) {
        let bits = |t: &candle_core::Tensor| {
            t.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!((name, bits(&a.latents)), (other, bits(&b.latents)));
    }
}

#[test]
fn a_first_run_makes_everything_and_a_second_nothing() {
    let kitchen = Kitchen::new();
    let mut first = kitchen.cook().ok();
    let files = kitchen.cache_files();
    assert_eq!(
        files.keys().map(String::as_str).collect::<Vec<_>>(),
        [
            "a_cat_0064x0048_wan.safetensors",
            "a_cat_wan_te.safetensors",
            "dog_0040x0040_wan.safetensors",
            "dog_wan_te.safetensors",
            "walk_00000-005_0048x0032_wan.safetensors",
            "walk_00005-005_0048x0032_wan.safetensors",
            "walk_wan_te.safetensors",
        ]
    );
    assert_eq!(kitchen.encoded_captions.get(), 2, "two of the three captions are the same");
    assert_eq!(kitchen.vae_loads.get(), 1);
    assert!(first.row("a_cat.png").contains("used") && first.row("a_cat.png").contains("cached"));
    assert!(first.row("frames/walk").contains("2 clips: 2 cached"), "{}", first.table());
    assert!(first.table().ends_with("3 files: 3 used\n"), "{}", first.table());

    let index = CacheIndex::build(&mut first.survey).unwrap();
    let shown: Vec<(&str, BucketKey, usize)> =
        index.items.iter().map(|i| (i.name.as_str(), i.bucket, i.repeats)).collect();
    let key = |frames| BucketKey { width: 48, height: 32, frames };
    assert_eq!(
        shown,
        [
            ("a_cat_0064x0048_wan".trim_end_matches("_wan"), key(1), 2),
            ("dog_0040x0040", key(1), 2),
            ("walk_00000-005_0048x0032", key(5), 1),
            ("walk_00005-005_0048x0032", key(5), 1),
        ]
    );
    assert_eq!(index.entries_per_epoch(), 6);
    let item = index.load_item(2).unwrap();
    assert_eq!(item.latents.dims(), [4, 2, 4, 6]);
    assert_eq!(item.latents.dtype(), candle_core::DType::BF16);
    assert_eq!(item.context.dims(), [6, 3]);
    assert!(item.latents_image.is_none() && item.clip.is_none() && item.control.is_none());

    let mut again = Kitchen { models: false, ..kitchen };
    let mut second = again.cook().ok();
    assert!(second.row("a_cat.png").contains("reused"));
    assert!(second.row("frames/walk").contains("2 clips: 2 reused"));
    assert_eq!(again.cache_files(), files, "nothing is written again");
    assert_eq!(CacheIndex::build(&mut second.survey).unwrap(), index);

    again.models = true;
    again.options.recache = true;
    let third = again.cook().ok();
    assert!(third.row("a_cat.png").contains("made again on request"), "{}", third.table());
}

/// Runs once, changes something, and looks at one file.
/// Two runs on one dataset, as two cards make them.
#[test]
fn what_another_run_has_made_since_the_survey_is_used() {
    let kitchen = Kitchen::new();
    let (scan, survey) = kitchen.survey();
    kitchen.cook().ok();
    // It has not come to all of it yet.
    fs::remove_file(kitchen.path(WALK)).unwrap();
    let made = kitchen.cache_files();
    let late = kitchen.cook_what_was_found(scan, survey).ok();
    assert!(late.table().ends_with("3 files: 3 used\n"), "{}", late.table());
    assert!(late.row("a_cat.png").contains("reused"), "{}", late.table());
    assert!(late.row("frames/walk").contains("1 cached") && late.row("frames/walk").contains("1 reused"));
    let both = kitchen.cache_files();
    assert_eq!(both.len(), made.len() + 1);
    let latents = made.iter().filter(|(name, _)| !name.ends_with("_te.safetensors"));
    let changed: Vec<&String> = latents.filter(|(name, bytes)| both[*name] != **bytes).map(|(name, _)| name).collect();
    assert!(changed.is_empty(), "{changed:?}");
}

fn state_after(file: &str, change: impl FnOnce(&mut Kitchen)) -> Freshness {
    let mut kitchen = Kitchen::new();
    kitchen.cook().ok();
    change(&mut kitchen);
    let path = kitchen.path(file);
    let (_, survey) = kitchen.survey();
    let clips = survey.entries.iter().flat_map(|e| &e.clips).map(|c| (&c.path, &c.state));
    let texts = survey.entries.iter().map(|e| (&e.text.path, &e.text.state));
    let found = clips.chain(texts).find(|(p, _)| **p == path).map(|(_, s)| s.clone());
    let state = found.unwrap_or_else(|| panic!("{file} is not called for"));
    if let Freshness::Stale(why) = &state {
        let meal = kitchen.cook().ok();
        assert!(meal.table().contains(why.as_str()), "the table says why:\n{}", meal.table());
        let (_, healed) = kitchen.survey();
        assert_eq!(healed.latents_to_make() + healed.texts_to_make(), 0);
    }
    state
}

fn assert_stale(file: &str, why: &str, change: impl FnOnce(&mut Kitchen)) {
    match state_after(file, change) {
        Freshness::Stale(said) => assert!(said.contains(why), "{said}\nshould say {why}"),
        other => panic!("{other:?} after a change that should say {why}"),
    }
}

#[test]
fn a_touch_alone_changes_nothing() {
    let touch = |k: &mut Kitchen| {
        let file = File::options().write(true).open(k.path("pictures/a_cat.png")).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000)).unwrap();
    };
    assert_eq!(state_after(CAT, touch), Freshness::Fresh);
}

#[test]
fn changed_media_make_latents_stale() {
    assert_stale(CAT, "a_cat.png has changed", |k| picture(64, 48, 7).save(k.path("pictures/a_cat.png")).unwrap());
    assert_stale(WALK_2, "walk has changed", |k| picture(48, 32, 99).save(k.path("frames/walk/007.png")).unwrap());
}

#[test]
fn changed_captions_make_texts_stale() {
    assert_stale(CAT_TEXT, "the caption has changed", |k| fs::write(k.path("pictures/a_cat.txt"), "a lion").unwrap());
    assert_stale(CAT_TEXT, "another text encoder", |k| k.options.umt5 = Some("umt5 two".into()));
    assert_stale(CAT_TEXT, "made without musubi_compat", |k| k.options.musubi_compat = true);
    assert_stale(CAT_TEXT, "another tokenizer", |k| k.options.tokenizer = Some("tokenizer two".into()));
}

#[test]
fn changed_settings_make_latents_stale() {
    assert_stale(CAT, "wanted [4, 1, 6, 8]", |k| {
        k.write_config("resolution = [64, 48]", "target_frames = [5]\nframe_extraction = \"chunk\"")
    });
    assert_stale(CAT, "made with another VAE", |k| k.options.vae = Some("vae two".into()));
    assert_stale(CAT, "first-frame condition", |k| k.options.i2v = true);
    assert_stale(CAT, "stored as bfloat16, now float32", |k| k.options.vae_dtype = candle_core::DType::F32);
    assert_stale(CAT, "made without musubi_compat", |k| k.options.musubi_compat = true);
    assert_stale(WALK, "source_fps none, now 16", |k| {
        let video = "target_frames = [5]\nframe_extraction = \"chunk\"\nsource_fps = 16.0";
        k.write_config("resolution = [48, 32]", video)
    });
}

/// Weights that are not at hand are not compared: cached data can be trained on without them.
#[test]
fn absent_models_leave_caches_fresh() {
    let forget = |k: &mut Kitchen| {
        k.options.vae = None;
        k.options.umt5 = None;
        k.options.tokenizer = None;
    };
    assert_eq!(state_after(CAT, forget), Freshness::Fresh);
    assert_eq!(state_after(CAT_TEXT, forget), Freshness::Fresh);
}

#[test]
fn torn_files_are_made_again() {
    let kitchen = Kitchen::new();
    kitchen.cook().ok();
    let whole = kitchen.cache_files();
    for file in [CAT, CAT_TEXT, WALK_2] {
        let bytes = fs::read(kitchen.path(file)).unwrap();
        fs::write(kitchen.path(file), &bytes[..bytes.len() - 3]).unwrap();
    }
    let meal = kitchen.cook().ok();
    assert!(meal.row("a_cat.png").contains("torn: "), "{}", meal.table());
    assert!(meal.row("frames/walk").contains("1 cached, 1 reused"), "{}", meal.table());
    let healed = kitchen.cache_files();
    assert_eq!(healed.keys().collect::<Vec<_>>(), whole.keys().collect::<Vec<_>>());
    for (name, bytes) in &healed {
        assert_eq!(bytes.len(), whole[name].len(), "{name}");
    }
}

/// Whole to look at, but its numbers were overwritten later: the recipe knows.
#[test]
fn overwritten_numbers_are_seen() {
    let kitchen = Kitchen::new();
    kitchen.cook().ok();
    let path = kitchen.path(CAT);
    let mut bytes = fs::read(&path).unwrap();
    let n = bytes.len();
    bytes[n - 8..].fill(0);
    fs::write(&path, bytes).unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(UNIX_EPOCH + Duration::from_secs(9)).unwrap();
    let meal = kitchen.cook().ok();
    assert!(meal.row("a_cat.png").contains("not those its recipe describes"), "{}", meal.table());
}

#[test]
fn caches_of_the_old_trainer_are_used_as_they_are() {
    let mut kitchen = Kitchen::new();
    kitchen.cook().ok();
    let names = [CAT, CAT_TEXT, WALK, WALK_2, "cache/videos/walk_wan_te.safetensors"];
    names.iter().for_each(|n| make_foreign(&kitchen.path(n)));
    let files = kitchen.cache_files();
    kitchen.models = false;
    let mut meal = kitchen.cook().ok();
    assert!(meal.row("a_cat.png").contains("cached by another program"), "{}", meal.table());
    assert!(meal.row("frames/walk").contains("2 clips: 2 foreign"), "{}", meal.table());
    assert_eq!(kitchen.cache_files(), files);
    assert_eq!(CacheIndex::build(&mut meal.survey).unwrap().items.len(), 4);

    kitchen.models = true;
    fs::write(kitchen.path("pictures/a_cat.txt"), "a lion").unwrap();
    kitchen.write_config("resolution = [32, 32]", "target_frames = [5]\nframe_extraction = \"chunk\"");
    let meal = kitchen.cook().ok();
    assert!(meal.row("a_cat.png").contains("the caption has changed"), "{}", meal.table());
    assert!(meal.row("a_cat.png").contains("wanted [4, 1, 4, 4]"), "{}", meal.table());
}

#[test]
fn leftovers_are_named_and_neither_used_nor_deleted() {
    let kitchen = Kitchen::new();
    kitchen.cook().ok();
    fs::copy(kitchen.path(CAT), kitchen.path("cache/pictures/old_0064x0048_wan.safetensors")).unwrap();
    fs::write(kitchen.path("cache/pictures/odd_wan.safetensors"), b"not a cache").unwrap();
    fs::copy(kitchen.path(CAT_TEXT), kitchen.path("cache/pictures/old_wan_te.safetensors")).unwrap();
    kitchen.write_config("resolution = [48, 32]", "target_frames = [9]");
    let mut meal = kitchen.cook().ok();
    for file in ["old_0064x0048", "odd_wan", "old_wan_te", "walk_00000-005", "walk_00005-005"] {
        assert!(meal.row(file).contains("unused cache file"), "{}", meal.table());
    }
    assert!(meal.table().ends_with("; 5 unused cache files\n"), "{}", meal.table());
    let index = CacheIndex::build(&mut meal.survey).unwrap();
    let names: Vec<&str> = index.items.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["a_cat_0064x0048", "dog_0040x0040", "walk_00000-009_0048x0032"]);
    assert!(kitchen.cache_files().contains_key("odd_wan.safetensors"));
}

#[test]
fn an_index_is_refused_while_anything_is_stale() {
    let mut kitchen = Kitchen::new();
    kitchen.cook().ok();
    kitchen.options.vae = Some("vae two".into());
    let (_, mut survey) = kitchen.survey();
    let error = format!("{:#}", CacheIndex::build(&mut survey).unwrap_err());
    assert!(error.starts_with("4 files of the dataset cannot be trained on:"), "{error}");
    assert_eq!(error.matches("stale: made with another VAE").count(), 4, "{error}");
    assert!(error.contains("wan-train cache"), "{error}");
}

#[test]
fn a_cache_directory_that_cannot_be_written_ends_the_run_at_once() {
    let kitchen = Kitchen::new();
    fs::write(kitchen.path("cache"), b"a file is in the way").unwrap();
    let config = kitchen.path("dataset.toml");
    let config = wan_train::data::DatasetConfig::load(&config, &kitchen.data).unwrap();
    let scan = wan_train::data::scan(&config, &kitchen.data).unwrap();
    let error = match wan_train::cache::Survey::take(&config, &scan.items, &kitchen.options) {
        Err(e) => format!("{e:#}"),
        Ok(mut survey) => {
            let exec = wan_kernels::Exec::cpu();
            let quiet = wan_train::report::Silent;
            let run =
                wan_train::cache::cache_latents(&mut survey, kitchen.latent_models(), &exec, &quiet, &kitchen.stop);
            format!("{:#}", run.unwrap_err())
        }
    };
    assert!(error.contains("cache") && error.contains("hint: "), "{error}");
    assert_eq!(kitchen.vae_loads.get(), 0, "found out before a model is loaded");
}

#[test]
fn damaged_media_are_listed_together_and_may_be_left_out() {
    let mut kitchen = Kitchen::new();
    for name in ["pictures/dog.png", "frames/walk/003.png"] {
        let bytes = fs::read(kitchen.path(name)).unwrap();
        fs::write(kitchen.path(name), &bytes[..bytes.len() / 2]).unwrap();
    }
    let meal = kitchen.cook();
    let scan_error = meal.scan.check().err().map(|e| format!("{e:#}")).unwrap_or_default();
    let said = format!("{scan_error}\n{}", meal.result.as_ref().err().map(|e| format!("{e:#}")).unwrap_or_default());
    assert!(said.contains("dog.png") && said.contains("walk"), "{said}");

    kitchen.options.allow_bad_media = true;
    kitchen.data.allow_bad_media = true;
    let mut meal = kitchen.cook().ok();
    assert!(meal.row("dog.png").contains("dropped"), "{}", meal.table());
    assert!(meal.table().contains("1 used, 2 dropped"), "{}", meal.table());
    assert_eq!(CacheIndex::build(&mut meal.survey).unwrap().items.len(), 1);
}

#[test]
fn a_stopped_run_leaves_the_rest_and_the_next_goes_on() {
    let kitchen = Kitchen::new();
    kitchen.stop.store(true, Ordering::Relaxed);
    let meal = kitchen.cook();
    assert!(meal.error().contains("7 files of the dataset cannot be trained on"), "{}", meal.error());
    assert_eq!(kitchen.cache_files().len(), 0);
    assert!(meal.row("dog.png").contains("not ready"), "{}", meal.table());
    kitchen.stop.store(false, Ordering::Relaxed);
    kitchen.cook().ok();
}

#[test]
fn long_captions_are_reported_also_when_reused() {
    let kitchen = Kitchen::new();
    fs::write(kitchen.path("pictures/dog.txt"), "a dog that is described at length").unwrap();
    for _ in 0..2 {
        let meal = kitchen.cook().ok();
        assert!(meal.row("dog.png").contains("the caption has 34 tokens"), "{}", meal.table());
    }
}

#[test]
fn a_model_that_gives_no_numbers_is_found_out() {
    let mut kitchen = Kitchen::new();
    let bias = kitchen.weights.get_mut("conv1.bias").unwrap();
    *bias = (&*bias * f64::NAN).unwrap();
    let meal = kitchen.cook();
    assert!(meal.error().contains("not finite"), "{}", meal.error());
    assert!(meal.error().contains("a_cat.png") && meal.error().contains("walk"), "{}", meal.error());
    assert!(kitchen.cache_files().keys().all(|n| n.ends_with("_te.safetensors")), "no latents are written");
}
