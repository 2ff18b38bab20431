//! Buckets, frame choice and resized pixels against the recorded behaviour.

use std::fs;

use image::RgbImage;
use safetensors::SafeTensors;
use serde_json::Value;
use wan_train::data::bucket::{buckets, Selector};
use wan_train::data::frames::{resample, round_targets, Cut};
use wan_train::data::resize::{plan, to_bucket, Filter};
use wan_train::data::FrameExtraction;

use crate::golden_support::golden_dir;

fn json(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(golden_dir().join(name)).unwrap()).unwrap()
}

fn pair(v: &Value) -> (u32, u32) {
    (v[0].as_u64().unwrap() as u32, v[1].as_u64().unwrap() as u32)
}

fn numbers(v: &Value) -> Vec<usize> {
    v.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
}

fn resizer(filter: Filter) -> &'static str {
    match filter {
        Filter::None => "none",
        Filter::Area => "cv2.INTER_AREA",
        Filter::Lanczos => "PIL.LANCZOS",
    }
}

#[test]
fn bucket_lists_are_the_recorded_ones() {
    let golden = json("10_buckets.json");
    let lists = golden["bucket_lists"].as_array().unwrap();
    assert!(!lists.is_empty());
    for list in lists {
        let want: Vec<_> = list["buckets"].as_array().unwrap().iter().map(pair).collect();
        assert_eq!(buckets(pair(&list["resolution"])), want, "{}", list["resolution"]);
    }
}

#[test]
fn bucket_choice_size_and_crop_are_the_recorded_ones() {
    let golden = json("10_buckets.json");
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 40);
    for case in cases {
        let size = pair(&case["image_size"]);
        let flag = |k: &str| case[k].as_bool().unwrap();
        let selector = Selector::new(pair(&case["resolution"]), flag("enable_bucket"), flag("no_upscale"));
        let bucket = selector.choose(size);
        assert_eq!(bucket, pair(&case["bucket"]), "{case}");
        let plan = plan(size, bucket);
        assert_eq!(plan.resized, pair(&case["resized"]), "{case}");
        assert_eq!(u64::from(plan.crop_left), case["crop_left"].as_u64().unwrap(), "{case}");
        assert_eq!(u64::from(plan.crop_top), case["crop_top"].as_u64().unwrap(), "{case}");
        assert_eq!(resizer(plan.filter), case["resizer"].as_str().unwrap(), "{case}");
    }
}

#[test]
fn resized_pixels_are_byte_equal() {
    let golden = json("10_resize_pixels.json");
    let bytes = fs::read(golden_dir().join("10_resize_pixels.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let i = &case["i"];
        let source = tensors.tensor(&format!("img{i}.in")).unwrap();
        let want = tensors.tensor(&format!("img{i}.out")).unwrap();
        let (w, h) = pair(&case["size_wh"]);
        let bucket = pair(&case["bucket_wh"]);
        let got = to_bucket(RgbImage::from_raw(w, h, source.data().to_vec()).unwrap(), bucket);
        assert_eq!(got.dimensions(), bucket);
        let worst = got.as_raw().iter().zip(want.data()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert_eq!(worst, 0, "case {i}: largest difference {worst}");
    }
}

/// `[0, 2, …]` or `{start, count}`.
fn indices(v: &Value) -> Vec<usize> {
    match v {
        Value::Array(_) => numbers(v),
        _ => {
            let start = v["start"].as_u64().unwrap() as usize;
            (start..start + v["count"].as_u64().unwrap() as usize).collect()
        }
    }
}

#[test]
fn clips_are_cut_where_recorded() {
    let golden = json("10_frames.json");
    for case in golden["cases"].as_array().unwrap() {
        let number = |k: &str| case[k].as_u64().unwrap() as usize;
        let cut = Cut {
            extraction: serde_json::from_value(case["frame_extraction"].clone()).unwrap(),
            targets: round_targets(&numbers(&case["target_frames"])),
            stride: number("frame_stride"),
            sample: number("frame_sample"),
            max_frames: number("max_frames"),
        };
        assert_eq!(cut.targets, numbers(&case["target_frames_rounded"]), "{case}");
        let effective: FrameExtraction = serde_json::from_value(case["effective_extraction"].clone()).unwrap();
        assert_eq!(cut.effective(), effective);
        // Repeating frames below 16 a second is a departure: the recorded behaviour is the compatible one.
        let source = resample(number("frame_count"), case["source_fps"].as_f64(), true);
        let mut got: Vec<_> = cut
            .positions(source.len())
            .into_iter()
            .map(|(start, t)| {
                let name = format!("vid{:04}_{start:05}-{t:03}_0032x0032_wan.safetensors", number("frame_count"));
                (name, source[start..start + t].to_vec())
            })
            .collect();
        let mut want: Vec<_> = case["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| (i["cache_name"].as_str().unwrap().to_string(), indices(&i["frames"])))
            .collect();
        got.sort();
        want.sort();
        assert_eq!(got.len(), number("n_items"));
        assert_eq!(got, want, "{case}");
    }
}
