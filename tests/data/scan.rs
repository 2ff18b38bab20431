//! Scans: one finding for every file, one error for all faults.

use wan_train::data::{scan, table, Verdict};

use super::{finding, message, verdict, Place};

fn images(place: &Place) -> String {
    format!("[[datasets]]\nimage_directory = '{}'\nresolution = [64, 48]\n", place.path("p").display())
}

#[test]
fn every_file_has_its_row() {
    let place = Place::new();
    place.picture("p/b.png", 100, 60);
    place.write("p/b.txt", "\u{feff}a cat\r\non a mat\r\n");
    place.picture("p/A.JPG", 640, 480);
    place.write("p/A.txt", "x");
    place.write("p/lonely.txt", "no picture");
    place.write("p/notes.md", "notes");
    place.write("p/movie.mp4", "x");
    place.write("p/.hidden.png", "x");
    place.write("p/b_0100x0060_wan.safetensors", "cache");
    place.write("p/b_wan_te.safetensors", "cache");
    place.write("p/other.safetensors", "x");
    place.picture("p/sub/c.png", 20, 20);
    let (config, report) = place.scan(&images(&place));
    report.check().unwrap();
    assert_eq!(report.items.iter().map(|i| i.stem.as_str()).collect::<Vec<_>>(), ["A", "b"]);
    assert_eq!(report.items[1].caption.as_deref(), Some("a cat\non a mat"));
    assert_eq!(report.items[1].probe.size, (100, 60));
    assert_eq!(finding(&report, "b.png").why, "100x60 -> 64x48, 12 tokens");
    for (name, why) in [
        ("lonely.txt", "a caption without its picture or video"),
        ("notes.md", "neither picture nor video nor caption"),
        ("movie.mp4", "a video: it needs a dataset with video_directory"),
        (".hidden.png", "a hidden file"),
        ("other.safetensors", "neither picture nor video nor caption"),
        ("sub", "a directory: subdirectories are not searched"),
    ] {
        assert_eq!(verdict(&report, name), Verdict::Dropped);
        assert_eq!(finding(&report, name).why, why);
    }
    assert_eq!(report.findings.len(), 8);
    let text = table(&config, &report.findings);
    assert!(text.contains("dataset 1: ") && text.contains("2 used, 6 dropped, 0 in error"), "{text}");
}

#[test]
fn all_faults_come_at_once() {
    let place = Place::new();
    for name in ["p/good.png", "p/nocaption1.png", "p/nocaption2.png", "p/latin.png", "p/same.png", "p/same.bmp"] {
        place.picture(name, 100, 60);
    }
    place.write("p/empty.png", "");
    place.write("p/broken.jpg", "not a picture, whatever its name says");
    for name in ["good", "same", "empty", "broken"] {
        place.write(&format!("p/{name}.txt"), "a caption");
    }
    place.write("p/latin.txt", b"gr\xf6\xdfe");
    let (_, report) = place.scan(&images(&place));
    let text = message(report.check());
    for part in [
        "7 files of the dataset cannot be used:",
        "nocaption1.png: no caption file nocaption1.txt",
        "nocaption2.png: no caption file nocaption2.txt",
        "latin.txt is not UTF-8 (byte 2 is wrong); save it as UTF-8",
        "same.png: 2 files are called `same`: ",
        "same.bmp: 2 files are called `same`: ",
        "empty.png: the file is empty (0 bytes)",
        "broken.jpg: the file holds no picture",
        "--allow_missing_captions",
        "--allow_bad_media",
    ] {
        assert!(text.contains(part), "missing: {part}\n{text}");
    }
    assert_eq!(report.items.len(), 1);
}

#[test]
fn flags_allow_what_they_name() {
    let mut place = Place::new();
    place.picture("p/good.png", 100, 60);
    place.write("p/good.txt", "  \n");
    place.picture("p/mute.png", 100, 60);
    place.write("p/empty.png", "");
    let toml = images(&place);
    place.options.allow_missing_captions = true;
    let (_, report) = place.scan(&toml);
    assert!(report.check().is_err());
    place.options.allow_bad_media = true;
    let (_, report) = place.scan(&toml);
    report.check().unwrap();
    assert_eq!(report.items.len(), 2);
    assert_eq!(report.items[1].caption, None);
    assert!(finding(&report, "mute.png").why.contains("no caption file mute.txt: an empty one is used"));
    assert!(finding(&report, "good.png").why.contains("its caption is empty"));
    assert_eq!(verdict(&report, "empty.png"), Verdict::Dropped);
    assert_eq!(finding(&report, "empty.png").why, "the file is empty (0 bytes)");
}

#[test]
fn empty_datasets_are_errors() {
    let place = Place::new();
    place.write("p/notes.md", "x");
    let config = place.load(&images(&place)).unwrap();
    let text = message(scan(&config, &place.options));
    assert!(text.contains("dataset 1 is empty: no picture in ") && text.contains("put pictures there"), "{text}");
    place.write("p/movie.mp4", "x");
    let text = message(scan(&config, &place.options));
    assert!(text.contains("movie.mp4 is a video: it needs a dataset with video_directory"), "{text}");
}

#[test]
fn tiny_pictures_cannot_stay_tiny() {
    let place = Place::new();
    place.picture("p/dot.png", 10, 40);
    place.write("p/dot.txt", "x");
    let toml = images(&place);
    place.scan(&toml).1.check().unwrap();
    let (_, report) = place.scan(&format!("{toml}enable_bucket = true\nbucket_no_upscale = true\n"));
    assert!(finding(&report, "dot.png").why.contains("10x40 is too small"));
}

#[test]
fn jsonl_lists() {
    let place = Place::new();
    place.picture("media/a.png", 100, 60);
    place.picture("media/b.png", 100, 60);
    place.picture("media/c.png", 50, 50);
    place.write(
        "list.jsonl",
        "\u{feff}{\"image_path\": \"media/a.png\", \"caption\": \" A \", \"control_path\": \"media/c.png\", \"id\": 7}\n\n\
         {\"image_path\": \"media/b.png\", \"caption\": \"B\", \"control_path_1\": \"media/b.png\", \"control_path_0\": \"media/c.png\"}\r\n",
    );
    let toml = "[[datasets]]\nimage_jsonl_file = 'list.jsonl'\ncache_directory = 'cache'\nresolution = [64, 48]\n";
    let (_, report) = place.scan(toml);
    report.check().unwrap();
    assert_eq!(report.items[0].caption.as_deref(), Some(" A "));
    assert_eq!(report.items[0].controls, [place.path("media/c.png")]);
    assert_eq!(report.items[1].controls, [place.path("media/c.png")]);
    let (_, report) = place.scan(&format!("{toml}fp_1f_clean_indices = [0, 1]\n"));
    assert_eq!(report.items[0].controls, [place.path("media/c.png"), place.path("media/b.png")]);
    assert!(message(report.check()).contains("a.png: 1 of 2 controls in line 1 of "));

    let failing = |line: &str| {
        place.write("list.jsonl", format!("{{\"image_path\": \"media/a.png\", \"caption\": \"x\"}}\n{line}\n"));
        let config = place.load(toml).unwrap();
        message(scan(&config, &place.options).and_then(|r| r.check()))
    };
    for (line, part) in [
        ("{\"image_path\": \"media/b.png\", ", "list.jsonl, line 2: column "),
        ("[1]", "list.jsonl, line 2: not a JSON object"),
        ("{\"video_path\": \"x\"}", "the line has `video_path`"),
        ("{\"image_path\": 3}", "list.jsonl, line 2: `image_path` must be a text"),
        ("{\"image_path\": \"media/b.png\"}", "no `caption` in line 2 of "),
        ("{\"image_path\": \"media/none.png\", \"caption\": \"x\"}", "media/none.png: the file does not exist"),
        ("{\"image_path\": \"media/a.png\", \"caption\": \"x\"}", "2 files are called `a`"),
        (
            "{\"image_path\": \"media/b.png\", \"caption\": \"x\", \"control_path\": \"none.png\"}",
            "its control none.png does not exist",
        ),
    ] {
        let text = failing(line);
        assert!(text.contains(part), "expected: {part}\ngot: {text}");
    }
    place.write("list.jsonl", "\n\n");
    let config = place.load(toml).unwrap();
    assert!(message(scan(&config, &place.options)).contains("dataset 1 is empty"));
}

#[test]
fn missing_controls_are_errors() {
    let place = Place::new();
    for stem in ["a", "b"] {
        place.picture(&format!("p/{stem}.png"), 100, 60);
        place.write(&format!("p/{stem}.txt"), "x");
    }
    for name in ["p/control/a_10.png", "p/control/a_2.png", "p/control/ab.png", "p/control/b_x.png"] {
        place.picture(name, 40, 40);
    }
    let toml = format!("{}control_directory = '{}'\n", images(&place), place.path("p/control").display());
    let (_, report) = place.scan(&toml);
    let text = message(report.check());
    assert!(text.contains("b.png: 0 of 1 control pictures in "), "{text}");
    // The control directory inside the source needs no row.
    assert_eq!(report.findings.len(), 2);
    let (_, report) = place.scan(&format!("{toml}fp_1f_clean_indices = [0, 1]\n"));
    assert_eq!(report.items[0].controls, [place.path("p/control/a_2.png"), place.path("p/control/a_10.png")]);
}

#[test]
fn two_datasets_may_share_a_directory() {
    let place = Place::new();
    place.picture("p/a.png", 100, 60);
    place.write("p/a.txt", "x");
    place.copy("plain.mp4", "p/v.mp4");
    place.write("p/v.txt", "x");
    let dir = place.path("p");
    let toml = format!(
        "[general]\nresolution = [64, 48]\n[[datasets]]\nimage_directory = '{0}'\ncache_directory = '{0}/cache_i'\n\
         [[datasets]]\nvideo_directory = '{0}'\ncache_directory = '{0}/cache_v'\ntarget_frames = [9]\n\
         [[datasets]]\nvideo_directory = '{0}'\ncache_directory = '{0}/cache_l'\ntarget_frames = [81]\n",
        dir.display()
    );
    std::fs::create_dir(place.path("p/cache_i")).unwrap();
    if cfg!(not(feature = "video")) {
        return;
    }
    let (_, report) = place.scan(&toml);
    report.check().unwrap();
    assert_eq!(report.items.len(), 2);
    let rows: Vec<_> = report.findings.iter().map(|f| (f.dataset, f.verdict)).collect();
    assert_eq!(rows, [(0, Verdict::Used), (1, Verdict::Used), (2, Verdict::Dropped)]);
    assert_eq!(report.findings[2].why, "too short: 40 frames, the shortest target has 81");
    assert!(report.findings[1].why.contains("64x48, 40 frames at 25 fps -> 64x48, clips: 1 of 9 frames, 36 tokens"));

    // Used nowhere: an error, unless allowed.
    let long_only = toml.replace("[9]", "[77]");
    let (_, report) = place.scan(&long_only);
    let text = message(report.check());
    assert!(text.contains("the shortest target has 77") && text.contains("lower target_frames"), "{text}");
}
