//! The dataset file: every key, every default, every complaint.

use wan_train::data::{known_keys, DataOptions, DatasetConfig, FrameExtraction, Kind, Source};
use wan_train::error::UserError;

use super::{message, Place};

fn place() -> Place {
    let place = Place::new();
    for dir in ["pictures", "videos", "control"] {
        std::fs::create_dir(place.path(dir)).unwrap();
    }
    place.write("list.jsonl", "");
    place
}

fn error(place: &Place, toml: &str) -> String {
    let error = place.load(toml).expect_err("this should have been refused");
    assert_eq!(error.downcast_ref::<UserError>().expect("a user error").exit, 2);
    format!("{error:#}").replace(&format!("{}/", place.dir.path().display()), "")
}

#[test]
fn the_guide_names_every_key_and_its_example_is_read() {
    let guide = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/datasets.md")).unwrap();
    let missing: Vec<_> = known_keys().filter(|key| !guide.contains(&format!("`{key}`"))).collect();
    assert!(missing.is_empty(), "docs/datasets.md does not explain {missing:?}");
    let example = guide.split("```toml").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let place = Place::new();
    for dir in ["media/pictures", "media/clips"] {
        std::fs::create_dir_all(place.path(dir)).unwrap();
    }
    let config = place.load(example).unwrap();
    assert_eq!(config.entries.len(), 2);
    assert_eq!(config.entries[1].target_frames, [25, 45]);
}

#[test]
fn defaults_and_fallbacks() {
    let place = place();
    let config = place
        .load(
            "[general]\nresolution = 512\nbatch_size = 2\ncaption_extension = '.caption'\nenable_bucket = true\n\
             [[datasets]]\nimage_directory = 'pictures'\nnum_repeats = 3\n\
             [[datasets]]\nvideo_directory = 'videos'\nresolution = [832, 480]\nenable_bucket = false\n\
             target_frames = [25, 47]\nsource_fps = 30\n",
        )
        .unwrap();
    let [a, b] = config.entries.as_slice() else { panic!("two datasets") };
    assert_eq!((a.kind, a.resolution, a.batch_size, a.num_repeats), (Kind::Image, (512, 512), 2, 3));
    assert!(a.enable_bucket && !a.bucket_no_upscale);
    assert_eq!((a.caption_extension.as_str(), a.target_frames.as_slice()), (".caption", [1].as_slice()));
    assert_eq!(a.cache_directory, place.path("pictures"));
    assert_eq!((b.kind, b.resolution, b.enable_bucket), (Kind::Video, (832, 480), false));
    assert_eq!((b.target_frames.as_slice(), b.source_fps), ([25, 45].as_slice(), Some(30.0)));
    assert_eq!((b.frame_extraction, b.frame_stride, b.frame_sample, b.max_frames), (FrameExtraction::Head, 1, 1, 129));
    assert_eq!(b.source, Source::Directory(place.path("videos")));
    assert!(config.notes.iter().any(|n| n.contains("[25, 47] become [25, 45]")), "{:?}", config.notes);

    let bare = place.load("[[datasets]]\nvideo_directory = 'videos'\n").unwrap();
    assert_eq!(bare.entries[0].resolution, (960, 544));
    assert_eq!(bare.entries[0].caption_extension, ".txt");
    assert!(bare.notes.iter().any(|n| n.contains("no caption_extension")));
    assert!(bare.notes.iter().any(|n| n.contains("no target_frames")));
}

#[test]
fn every_key_is_taken() {
    let place = place();
    let config = place
        .load(
            "[general]\nbucket_no_upscale = true\nenable_bucket = true\n\
             [[datasets]]\nimage_jsonl_file = 'list.jsonl'\ncache_directory = 'cache/a'\ncontrol_directory = 'control'\n\
             multiple_target = false\nflux_kontext_no_resize_control = true\ncontrol_resolution = [1024, 768]\n\
             fp_latent_window_size = 5\nfp_1f_clean_indices = [0, 3]\nfp_1f_target_index = 9\nfp_1f_no_post = true\n\
             [[datasets]]\nvideo_jsonl_file = 'list.jsonl'\ncache_directory = 'cache/b'\ntarget_frames = [81]\n\
             frame_extraction = 'uniform'\nframe_stride = 2\nframe_sample = 4\nmax_frames = 81\nsource_fps = 23.976\n",
        )
        .unwrap();
    let [a, b] = config.entries.as_slice() else { panic!("two datasets") };
    assert!(a.no_resize_control && a.fp_1f_no_post && a.bucket_no_upscale);
    assert_eq!((a.control_resolution, a.fp_latent_window_size), (Some((1024, 768)), 5));
    assert_eq!((a.fp_1f_clean_indices.as_deref(), a.fp_1f_target_index), (Some([0, 3].as_slice()), Some(9)));
    assert_eq!((b.frame_extraction, b.frame_stride, b.frame_sample), (FrameExtraction::Uniform, 2, 4));
    assert!(config.notes.iter().any(|n| n.contains("`flux_kontext_no_resize_control` is an old name")));
    assert!(config.notes.iter().any(|n| n.contains("`frame_stride` has no effect")));
    assert!(config.notes.iter().any(|n| n.contains("`max_frames` has no effect")));
}

#[test]
fn json_says_the_same() {
    let place = place();
    let json = r#"{
  "general": {"resolution": [512, 512], "enable_bucket": true},
  "datasets": [{"image_directory": "pictures", "batch_size": 4, "control_directory": null}]
}"#;
    let path = place.write("set.json", json);
    let config = DatasetConfig::load(&path, &DataOptions::default()).unwrap();
    assert_eq!(config.entries[0].batch_size, 4);
    assert_eq!(config.entries[0].control_directory, None);
    let bad = json.replace("batch_size", "batchsize");
    let path = place.write("bad.json", bad);
    let error = message(DatasetConfig::load(&path, &DataOptions::default()));
    assert!(error.contains("bad.json, line 3: unknown key `batchsize`") && error.contains("`batch_size`"), "{error}");
    let path = place.write("worse.json", "{\n  \"general\": {,}\n}");
    let error = message(DatasetConfig::load(&path, &DataOptions::default()));
    assert!(error.contains("worse.json, line 2, column 15: "), "{error}");
}

#[test]
fn syntax_errors_say_line_and_column() {
    let place = place();
    let text = error(&place, "[general]\nresolution = 512\n[[datasets]\nimage_directory = 'pictures'\n");
    assert!(text.starts_with("set.toml, line 3, column 12: "), "{text}");
    let text = error(&place, "[general]\nresolution = 960x544\n");
    assert!(text.starts_with("set.toml, line 2, column "), "{text}");
    let path = place.write("latin.toml", b"# gr\xf6\xdfe\n[general]\n");
    let text = message(DatasetConfig::load(&path, &DataOptions::default()));
    assert!(text.contains("latin.toml is not UTF-8 text (byte 4 is wrong)"), "{text}");
    let text = message(DatasetConfig::load(&place.path("none.toml"), &DataOptions::default()));
    assert!(text.contains("none.toml does not exist"), "{text}");
}

/// (file, what must be said, what the hint must name)
#[test]
fn every_mistake_has_its_sentence() {
    let place = place();
    let image = "[[datasets]]\nimage_directory = 'pictures'\n";
    let video = "[[datasets]]\nvideo_directory = 'videos'\n";
    let cases = [
        ("[general]\nresolutoin = 512\n".to_string(), "line 2: unknown key `resolutoin` in [general]", "`resolution`"),
        (format!("{image}batchsize = 1\n"), "line 3: unknown key `batchsize` in dataset 1", "`batch_size`"),
        (format!("{image}zzzz = 1\n"), "line 3: unknown key `zzzz` in dataset 1", "it takes "),
        ("[[dataset]]\nimage_directory = 'pictures'\n".into(), "line 1: unknown key `dataset`", "`datasets`"),
        ("resolution = 512\n".into(), "line 1: `resolution` stands outside of any table", "[general]"),
        ("[general]\ntarget_frames = [1]\n".into(), "line 2: `target_frames` does not belong in [general]", "move it"),
        ("[general]\nbatch_size = 1\n".into(), "describes no dataset", "[[datasets]]"),
        ("[datasets]\nimage_directory = 'x'\n".into(), "`datasets` must be a list of tables", "[[datasets]]"),
        ("general = 3\n".into(), "line 1: `general` must be a table", "[general]"),
        ("[[datasets]]\nbatch_size = 1\n".into(), "line 1: dataset 1 names no source", "image_directory"),
        (
            format!("{image}video_directory = 'videos'\n"),
            "line 3: dataset 1 has both `image_directory` and `video_directory`",
            "of its own",
        ),
        (format!("{image}target_frames = [1]\n"), "line 3: `target_frames` belongs to video datasets", "remove"),
        (format!("{video}control_resolution = 512\n"), "line 3: `control_resolution` belongs to image", "remove"),
        (format!("{image}multiple_target = true\n"), "line 3: `multiple_target` is not for Wan", "remove"),
        (format!("{image}batch_size = 0\n"), "line 3: `batch_size` must be a whole number of at least 1, not 0", ""),
        (format!("{image}batch_size = 1.5\n"), "not 1.5", ""),
        (
            format!("{image}num_repeats = -2\n"),
            "line 3: `num_repeats` must be a whole number of at least 1, not -2",
            "",
        ),
        (format!("{image}enable_bucket = 1\n"), "line 3: `enable_bucket` must be true or false, not 1", ""),
        (format!("{image}resolution = '512'\n"), "line 3: `resolution` must be one side or [width, height]", "\"512\""),
        (format!("{image}resolution = [512]\n"), "line 3: `resolution` must be one side", "[512]"),
        (format!("{image}resolution = [512, 0]\n"), "line 3: `resolution` must be one side", "[512, 0]"),
        (format!("{image}resolution = 8\n"), "from 16 to 16384, not 8", ""),
        (format!("{image}resolution = [854, 480]\n"), "line 3: `resolution` 854x480: both sides", "[848, 480]"),
        (format!("{image}caption_extension = ''\n"), "line 3: `caption_extension` cannot be \"\"", ".txt"),
        (format!("{video}target_frames = []\n"), "line 3: `target_frames` is empty", ""),
        (
            format!("{video}target_frames = [1,\n0]\n"),
            "line 4: `target_frames` takes whole numbers of at least 1, not 0",
            "",
        ),
        (format!("{video}target_frames = ['a']\n"), "not \"a\"", ""),
        (format!("{video}frame_extraction = 'heads'\n"), "line 3: `frame_extraction` cannot be \"heads\"", "\"head\""),
        (format!("{video}frame_extraction = 'xyz'\n"), "cannot be \"xyz\"", "head, chunk, slide, uniform, full"),
        (format!("{video}frame_stride = 0\n"), "line 3: `frame_stride` must be", "not 0"),
        (format!("{video}frame_sample = 0\n"), "line 3: `frame_sample` must be", "not 0"),
        (format!("{video}max_frames = 0\n"), "line 3: `max_frames` must be", "not 0"),
        (format!("{video}source_fps = 0\n"), "line 3: `source_fps` must be a number above 0, not 0", ""),
        (format!("{video}source_fps = -1.0\n"), "line 3: `source_fps` must be a number above 0, not -1", ""),
        (format!("{video}source_fps = nan\n"), "line 3: `source_fps` must be a number above 0", ""),
        (format!("{video}source_fps = '25'\n"), "line 3: `source_fps` must be a number above 0, not \"25\"", ""),
        (
            "[[datasets]]\nimage_directory = 'nowhere'\n".into(),
            "line 2: `image_directory` nowhere does not exist",
            "path",
        ),
        ("[[datasets]]\nimage_directory = 'list.jsonl'\n".into(), "list.jsonl is a file, not a directory", "jsonl"),
        (
            "[[datasets]]\nimage_jsonl_file = 'pictures'\n".into(),
            "line 2: `image_jsonl_file` pictures is not a file",
            "",
        ),
        ("[[datasets]]\nvideo_jsonl_file = 'list.jsonl'\n".into(), "dataset 1 needs a `cache_directory`", "add"),
        (format!("{image}control_directory = 'none'\n"), "line 3: `control_directory` none does not exist", "path"),
        (format!("{image}cache_directory = 'list.jsonl'\n"), "list.jsonl is a file, not a directory", "another"),
        (format!("{image}cache_directory = 3\n"), "line 3: `cache_directory` must be a text in quotes, not 3", ""),
        (format!("{image}{image}"), "dataset 1 and dataset 2 share the cache directory pictures", "of its own"),
        (
            format!("{image}cache_directory = 'c/x'\n{video}cache_directory = './c/y/../x'\n"),
            "dataset 1 and dataset 2 share the cache directory c/x",
            "of its own",
        ),
    ];
    for (toml, what, hint) in &cases {
        let text = error(&place, toml);
        assert!(text.contains(what) && text.contains(hint), "for\n{toml}\nexpected: {what} … {hint}\ngot: {text}");
        assert!(text.starts_with("set.toml"), "{text}");
    }
}

#[test]
fn compat_accepts_odd_resolutions_for_videos_which_it_buckets_anyway() {
    let mut place = place();
    let toml = "[[datasets]]\nvideo_directory = 'videos'\nresolution = [854, 480]\n";
    assert!(place.load(toml).is_err());
    place.options.musubi_compat = true;
    assert_eq!(place.load(toml).unwrap().entries[0].selector().choose((1280, 720)), (848, 480));
}

/// The commented examples, as they are printed, load once their directories exist.
#[test]
fn the_examples_load() {
    for name in ["wan22-dataset-config-local.toml", "wan21-dataset-config-local.toml"] {
        let place = Place::new();
        for dir in ["images", "videos-short", "videos-long"] {
            std::fs::create_dir_all(place.path("local_training/datasets").join(dir)).unwrap();
        }
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/datasets").join(name);
        let config = place.load(&std::fs::read_to_string(path).unwrap()).unwrap();
        let kinds: Vec<Kind> = config.entries.iter().map(|e| e.kind).collect();
        assert_eq!(kinds, [Kind::Image, Kind::Video, Kind::Video]);
        assert!(config.entries.iter().all(|e| e.cache_directory.starts_with(place.dir.path())));
        assert_eq!(config.entries[1].target_frames, [1, 25, 45]);
        assert!(config.notes.is_empty(), "{name}: {:?}", config.notes);
    }
}
