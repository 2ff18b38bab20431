//! Video files of every kind, decoded as a stream of clips.
#![cfg(feature = "video")]

use std::path::Path;
use std::sync::{Arc, Weak};

use image::RgbImage;
use wan_train::data::frames::resample;
use wan_train::data::video::{self, Reader};
use wan_train::data::{check_media, decode_image, decode_video, scan, Clip, Verdict};

use super::{media, message, Place};

/// The number that a frame of a fixture carries: its grey is 40 + 5·number.
fn number(picture: &RgbImage) -> usize {
    let (w, h) = picture.dimensions();
    let grey = f64::from(picture.get_pixel(w * 3 / 4, h * 3 / 4).0[1]);
    ((grey - 40.0) / 5.0).round() as usize
}

fn all(path: &Path) -> Vec<RgbImage> {
    let mut reader = Reader::open(path, true, true).unwrap();
    let mut out = Vec::new();
    while reader.advance().unwrap().is_some() {
        out.push(reader.picture().unwrap());
    }
    out
}

/// Decodes the only item of a dataset, and returns its clips by start and length.
fn clips(place: &Place, toml: &str) -> Vec<Clip> {
    let (config, report) = place.scan(toml);
    report.check().unwrap();
    assert_eq!(report.items.len(), 1);
    let item = &report.items[0];
    let mut out = Vec::new();
    let n = decode_video(item, &config.entries[item.dataset], &mut |clip| {
        out.push(clip);
        Ok(())
    })
    .unwrap();
    assert_eq!(n, out.len());
    for clip in &out {
        assert!(clip.frames.iter().all(|f| f.dimensions() == clip.size));
        let same = out.iter().filter(|c| (c.start, c.frames.len()) == (clip.start, clip.frames.len()));
        assert_eq!(same.count(), 1);
    }
    // What the table promises is what comes.
    let mut planned: Vec<_> = config.entries[0].plan(&item.probe).iter().map(|p| (p.start, p.frames, p.size)).collect();
    let mut got: Vec<_> = out.iter().map(|c| (c.start, c.frames.len(), c.size)).collect();
    planned.sort_unstable();
    got.sort_unstable();
    assert_eq!(got, planned);
    out.sort_by_key(|c| (c.start, c.frames.len()));
    out
}

fn numbers(clip: &Clip) -> Vec<usize> {
    clip.frames.iter().map(|f| number(f)).collect()
}

/// A place with one video called `clip` with a caption, and its dataset text with `keys` added.
fn one_video(fixture: &str, keys: &str) -> (Place, String) {
    let place = Place::new();
    let extension = Path::new(fixture).extension().unwrap().to_str().unwrap();
    place.copy(fixture, &format!("videos/clip.{extension}"));
    place.write("videos/clip.txt", "a clip");
    let dir = place.path("videos");
    let toml = format!("[[datasets]]\nvideo_directory = '{}'\nresolution = [64, 48]\n{keys}\n", dir.display());
    (place, toml)
}

#[test]
fn every_container_gives_its_frames_in_order() {
    for (name, size, n) in [
        ("plain.mp4", (64, 48), 40),
        ("odd.webm", (67, 45), 9),
        ("clip.mov", (64, 48), 9),
        ("clip.avi", (64, 48), 9),
        ("vfr.mkv", (64, 48), 20),
    ] {
        let frames = all(&media(name));
        assert_eq!(frames.iter().map(number).collect::<Vec<_>>(), (0..n).collect::<Vec<_>>(), "{name}");
        assert!(frames.iter().all(|f| f.dimensions() == size), "{name}");
        assert!(frames[0].get_pixel(3, 3).0[0] > 235, "{name}: the bright corner is not at the top left");
        let facts = video::probe(&media(name), true, true).unwrap();
        assert_eq!((facts.size, facts.frames), (size, n), "{name}");
        assert_eq!(facts.variable.is_some(), name == "vfr.mkv", "{name}");
    }
    let gif = all(&media("anim.gif"));
    assert_eq!(gif.len(), 10);
    assert!(gif[9].get_pixel(30, 25).0[1] > 200);
}

#[test]
fn rotation_is_honoured_unless_compat() {
    // The matrix of a phone held upright: turn clockwise; the bright corner comes to the top right.
    let frames = all(&media("rotated.mp4"));
    assert_eq!(frames[0].dimensions(), (48, 64));
    let bright = |x, y| frames[0].get_pixel(x, y).0[0] > 200;
    assert!(bright(44, 3) && !bright(3, 3) && !bright(44, 60) && !bright(3, 60));

    let (mut place, toml) = one_video("rotated.mp4", "target_frames = [5]\nenable_bucket = true");
    let clip = &clips(&place, &toml)[0];
    assert!(clip.size.0 < clip.size.1);
    assert_eq!(clip.original, (48, 64));
    place.options.musubi_compat = true;
    let clip = &clips(&place, &toml)[0];
    assert!(clip.size.0 > clip.size.1);
}

#[test]
fn colours_follow_the_tag_unless_compat() {
    // Made as (200, 30, 60), converted and tagged BT.709.
    let colour = |tagged| {
        let mut reader = Reader::open(&media("bt709.mp4"), true, tagged).unwrap();
        reader.advance().unwrap();
        reader.picture().unwrap().get_pixel(30, 20).0
    };
    let near = |c: [u8; 3], want: [u8; 3]| c.iter().zip(want).all(|(a, b)| a.abs_diff(b) <= 4);
    assert!(near(colour(true), [200, 30, 60]), "{:?}", colour(true));
    assert!(!near(colour(false), [200, 30, 60]), "{:?}", colour(false));
}

#[test]
fn without_source_fps_every_frame_is_taken() {
    let (place, toml) = one_video("plain.mp4", "target_frames = [1, 13, 25]");
    let clips = clips(&place, &toml);
    assert_eq!(clips.iter().map(|c| c.frames.len()).collect::<Vec<_>>(), [1, 13, 25]);
    assert_eq!(numbers(&clips[2]), (0..25).collect::<Vec<_>>());
    // Frames are shared, not copied.
    assert!(Arc::ptr_eq(&clips[0].frames[0], &clips[2].frames[0]));
}

#[test]
fn extraction_modes_on_a_real_file() {
    let starts = |keys: &str| -> Vec<(usize, usize)> {
        let (place, toml) = one_video("plain.mp4", keys);
        let clips = clips(&place, &toml);
        for clip in &clips {
            let want: Vec<usize> = (clip.start..clip.start + clip.frames.len()).collect();
            assert_eq!(numbers(clip), want, "{keys}");
        }
        clips.iter().map(|c| (c.start, c.frames.len())).collect()
    };
    assert_eq!(starts("target_frames = [13]\nframe_extraction = 'chunk'"), [(0, 13), (13, 13), (26, 13)]);
    assert_eq!(
        starts("target_frames = [13, 21]\nframe_extraction = 'slide'\nframe_stride = 10"),
        [(0, 13), (0, 21), (10, 13), (10, 21), (20, 13)]
    );
    assert_eq!(
        starts("target_frames = [9]\nframe_extraction = 'uniform'\nframe_sample = 4"),
        [(0, 9), (10, 9), (20, 9), (31, 9)]
    );
    assert_eq!(starts("frame_extraction = 'full'\nmax_frames = 30"), [(0, 29)]);
    assert_eq!(starts("frame_extraction = 'full'"), [(0, 37)]);
}

/// Nothing but the longest target's frames is alive while clips are handed out, however many clips there are.
#[test]
fn only_the_frames_of_the_longest_clip_are_held() {
    for keys in [
        "target_frames = [5, 9]\nframe_extraction = 'slide'",
        "target_frames = [5, 9]\nframe_extraction = 'chunk'",
        "target_frames = [9]\nframe_extraction = 'uniform'\nframe_sample = 12",
    ] {
        let (place, toml) = one_video("plain.mp4", keys);
        let (config, report) = place.scan(&toml);
        let mut seen: Vec<Weak<RgbImage>> = Vec::new();
        let mut most = 0;
        decode_video(&report.items[0], &config.entries[0], &mut |clip| {
            seen.extend(clip.frames.iter().map(Arc::downgrade));
            seen.retain(|w| w.strong_count() > 0);
            seen.sort_by_key(|w| w.as_ptr());
            seen.dedup_by_key(|w| w.as_ptr());
            most = most.max(seen.len());
            Ok(())
        })
        .unwrap();
        assert!(0 < most && most <= 9, "{keys}: {most} frames were alive");
    }
}

#[test]
fn a_sink_that_fails_ends_the_decoding() {
    let (place, toml) = one_video("plain.mp4", "target_frames = [5]\nframe_extraction = 'chunk'");
    let (config, report) = place.scan(&toml);
    let mut calls = 0;
    let error = message(decode_video(&report.items[0], &config.entries[0], &mut |_| {
        calls += 1;
        anyhow::bail!("the disk is full")
    }));
    assert_eq!((calls, error.as_str()), (1, "the disk is full"));
}

#[test]
fn source_fps_thins_and_repeats() {
    let (place, toml) = one_video("plain.mp4", "target_frames = [25]\nsource_fps = 25");
    assert_eq!(numbers(&clips(&place, &toml)[0]), resample(40, Some(25.0), true)[..25]);
    let (mut place, toml) = one_video("plain.mp4", "target_frames = [13]\nsource_fps = 12.0");
    assert_eq!(numbers(&clips(&place, &toml)[0]), [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9]);
    // The old tool counts to 13 by an index that runs ahead, and keeps 10 frames: too short.
    place.options.musubi_compat = true;
    place.options.allow_bad_media = true;
    let (_, report) = place.scan(&toml);
    assert!(report.items.is_empty());
    assert!(report.findings[0].why.contains("too short: 10 frames"), "{}", report.findings[0].why);
}

#[test]
fn timestamps_decide_where_the_rate_varies() {
    // Ten frames of 1/25 s, then ten of 1/10 s.
    let (mut place, toml) = one_video("vfr.mkv", "target_frames = [21]\nsource_fps = 25.0");
    let got = numbers(&clips(&place, &toml)[0]);
    let time = |i: usize| if i < 10 { i as f64 * 0.04 } else { 0.4 + (i - 10) as f64 * 0.1 };
    for (slot, frame) in got.iter().enumerate() {
        let t = slot as f64 / 16.0 + 0.002;
        assert!(time(*frame) <= t && t < time(frame + 1) + 0.004, "slot {slot} shows frame {frame}");
    }
    place.options.musubi_compat = true;
    let toml = toml.replace("[21]", "[13]");
    assert_eq!(numbers(&clips(&place, &toml)[0]), resample(20, Some(25.0), true)[..13]);
}

#[test]
fn buckets_of_videos_follow_the_file_unless_compat() {
    let (mut place, toml) =
        one_video("odd.webm", "target_frames = [9]\nenable_bucket = true\nbucket_no_upscale = true");
    let toml = toml.replace("[64, 48]", "[256, 256]");
    let clip = &clips(&place, &toml)[0];
    assert_eq!((clip.size, clip.original), ((64, 32), (67, 45)));
    place.options.musubi_compat = true;
    assert_eq!(clips(&place, &toml)[0].size, (304, 208));
    place.options.musubi_compat = false;
    let off = toml.replace("enable_bucket = true", "enable_bucket = false");
    assert_eq!(clips(&place, &off)[0].size, (256, 256));
}

#[test]
fn a_directory_of_frames_is_a_video() {
    let place = Place::new();
    for i in 0..12u8 {
        let path = place.write(&format!("frames/f{i}.png"), b"");
        RgbImage::from_pixel(64, 48, image::Rgb([40 + 5 * i; 3])).save(path).unwrap();
    }
    place.write("list.jsonl", "{\"video_path\": \"frames\", \"caption\": \" kept as it is \"}\n");
    let toml = "[[datasets]]\nvideo_jsonl_file = 'list.jsonl'\ncache_directory = 'cache'\n\
                resolution = [64, 48]\ntarget_frames = [9]\n";
    let (config, report) = place.scan(toml);
    report.check().unwrap();
    assert_eq!(report.items[0].caption.as_deref(), Some(" kept as it is "));
    assert_eq!(report.items[0].stem, "frames");
    assert_eq!(config.entries[0].cache_directory, place.path("cache"));
    // By number, not f0 f1 f10 f11 f2.
    assert_eq!(numbers(&clips(&place, toml)[0]), (0..9).collect::<Vec<_>>());
    assert!(report.findings[0].why.contains("in the order of their numbers"));
}

#[test]
fn controls_go_along_and_stand_still_at_their_end() {
    let (place, toml) = one_video("plain.mp4", "target_frames = [21]");
    place.copy("clip.avi", "control/clip.avi");
    let toml = format!("{toml}control_directory = '{}'\n", place.path("control").display());
    let clips = clips(&place, &toml);
    let control = clips[0].control.as_ref().unwrap();
    let want: Vec<usize> = (0..21).map(|i| i.min(8)).collect();
    assert_eq!(control.iter().map(|f| number(f)).collect::<Vec<_>>(), want);
    assert_eq!(numbers(&clips[0]), (0..21).collect::<Vec<_>>());
}

#[test]
fn pictures_with_controls() {
    let place = Place::new();
    place.picture("pictures/a.png", 100, 60);
    place.write("pictures/a.txt", "a");
    place.picture("control/a.png", 50, 70);
    let base = format!(
        "[[datasets]]\nimage_directory = '{}'\ncontrol_directory = '{}'\nresolution = [64, 48]\n",
        place.path("pictures").display(),
        place.path("control").display()
    );
    let decode = |keys: &str| {
        let (config, report) = place.scan(&format!("{base}{keys}"));
        report.check().unwrap();
        decode_image(&report.items[0], &config.entries[0]).unwrap()
    };
    let clip = decode("");
    assert_eq!((clip.size, clip.original, clip.frames.len()), ((64, 48), (100, 60), 1));
    assert_eq!(clip.control.unwrap()[0].dimensions(), (64, 48));
    assert_eq!(decode("no_resize_control = true").control.unwrap()[0].dimensions(), (48, 64));
    assert_eq!(decode("control_resolution = 128").control.unwrap()[0].dimensions(), (112, 144));
}

#[test]
fn damaged_videos_are_found() {
    let place = Place::new();
    let whole = std::fs::read(media("plain.mp4")).unwrap();
    place.write("videos/cut.mp4", &whole[..whole.len() * 2 / 3]);
    place.write("videos/headless.mp4", &std::fs::read(media("clip.mov")).unwrap()[..700]);
    let matroska = std::fs::read(media("vfr.mkv")).unwrap();
    place.write("videos/cut2.mkv", &matroska[..matroska.len() * 3 / 4]);
    place.write("videos/empty.mp4", b"");
    place.write("videos/text.mp4", b"no video");
    for name in ["cut", "cut2", "headless", "empty", "text"] {
        place.write(&format!("videos/{name}.txt"), "x");
    }
    let toml = format!("[[datasets]]\nvideo_directory = '{}'\nresolution = [64, 48]\n", place.path("videos").display());
    let (_, report) = place.scan(&toml);
    for name in ["headless.mp4", "empty.mp4", "text.mp4"] {
        assert_eq!(super::verdict(&report, name), Verdict::Error, "{name}");
    }
    let all = message(report.check());
    assert!(all.contains("headless.mp4") && all.contains("the file is empty (0 bytes)") && all.contains("text.mp4"));
    assert!(all.contains("--allow_bad_media"));

    // The header of the cut file is whole: only reading it through tells.
    let mut place = place;
    place.options.allow_bad_media = true;
    let (config, report) = place.scan(&toml);
    report.check().unwrap();
    let items: Vec<_> = report.items.iter().collect();
    assert_eq!(items.iter().map(|i| i.stem.as_str()).collect::<Vec<_>>(), ["cut", "cut2"]);
    let bad = check_media(&config, &items);
    assert_eq!(bad.len(), 2);
    assert!(bad.iter().all(|f| f.why.contains("truncated")), "{bad:?}");
    // A head that lies before the damage is still read; the whole file is not.
    let full = toml.clone() + "frame_extraction = 'full'\n";
    let config = place.load(&full).unwrap();
    let items = scan(&config, &place.options).unwrap().items;
    let error = message(decode_video(&items[0], &config.entries[0], &mut |_| Ok(())));
    assert!(error.contains("cut.mp4"), "{error}");
}

/// Files with bytes changed at random end in frames or in an error, never in a crash or a hang.
#[test]
fn hostile_bytes_are_survived() {
    let place = Place::new();
    let mut state = 7u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let (mut good, mut bad) = (0, 0);
    for name in ["plain.mp4", "vfr.mkv", "odd.webm", "anim.gif", "clip.avi", "exif6.jpg", "plain.tiff", "plain.webp"] {
        let whole = std::fs::read(media(name)).unwrap();
        for round in 0..12 {
            let mut bytes = whole.clone();
            for _ in 0..1 + round * 2 {
                let at = random(bytes.len());
                bytes[at] = random(256) as u8;
            }
            let path = place.write(name, bytes);
            let still = matches!(name.rsplit('.').next(), Some("jpg" | "tiff" | "webp"));
            let result = match still {
                true => wan_train::data::picture::read(&path, true).map(|_| ()),
                false => video::read_through(&path).and_then(|()| {
                    let mut reader = Reader::open(&path, true, true)?;
                    while reader.advance()?.is_some() {
                        reader.picture()?;
                    }
                    Ok(())
                }),
            };
            match result {
                Ok(()) => good += 1,
                Err(_) => bad += 1,
            }
        }
    }
    assert!(good > 0 && bad > 0, "{good} read, {bad} refused");
}
