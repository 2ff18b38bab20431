//! Data: bucket lists and choices, the frames of clips, resized pixels.

use anyhow::{anyhow, Result};
use image::RgbImage;
use serde_json::Value;

use super::json::{flag, integer, integers, list, pair, text};
use super::{Case, Tolerance};
use crate::cache::names::CacheName;
use crate::data::bucket::{buckets, Selector};
use crate::data::frames::{resample, round_targets, Cut};
use crate::data::resize::{plan, to_bucket, Filter};
use crate::data::FrameExtraction;

/// Bucket lists; bucket, resized size, filter and crop of pictures.
pub fn sizes(case: &Case<'_>) -> Result<()> {
    let lists = list(&case.json, "bucket_lists")?;
    case.check(&format!("{} bucket lists", lists.len()), Tolerance::Exact, |line| {
        for entry in lists {
            let want: Vec<(u32, u32)> = serde_json::from_value(entry["buckets"].clone())?;
            let resolution = pair(entry, "resolution")?;
            line.equal(&format!("the list of {resolution:?}"), &buckets(resolution), &want);
        }
        Ok(())
    });
    let cases = list(&case.json, "cases")?;
    case.check(&format!("{} choices", cases.len()), Tolerance::Exact, |line| {
        for entry in cases {
            let size = pair(entry, "image_size")?;
            let (on, tight) = (flag(entry, "enable_bucket")?, flag(entry, "no_upscale")?);
            let bucket = Selector::new(pair(entry, "resolution")?, on, tight).choose(size);
            let plan = plan(size, bucket);
            let got = (bucket, plan.resized, (plan.crop_left, plan.crop_top), resizer(plan.filter));
            let crop = (integer(entry, "crop_left")? as u32, integer(entry, "crop_top")? as u32);
            let want = (pair(entry, "bucket")?, pair(entry, "resized")?, crop, text(entry, "resizer")?);
            line.equal(&format!("bucket, size, crop and filter of {entry}"), &got, &want);
        }
        Ok(())
    });
    Ok(())
}

fn resizer(filter: Filter) -> &'static str {
    match filter {
        Filter::None => "none",
        Filter::Area => "cv2.INTER_AREA",
        Filter::Lanczos => "PIL.LANCZOS",
    }
}

/// Pixels after resizing and cropping.
pub fn pixels(case: &Case<'_>) -> Result<()> {
    let io = case.tensors("")?;
    for entry in list(&case.json, "cases")? {
        let (i, bucket) = (integer(entry, "i")?, pair(entry, "bucket_wh")?);
        let (w, h) = pair(entry, "size_wh")?;
        case.check(&format!("{i} {w}x{h} to {}x{}", bucket.0, bucket.1), Tolerance::Exact, |line| {
            let source = io.get(&format!("img{i}.in"))?.flatten_all()?.to_vec1::<u8>()?;
            let picture = RgbImage::from_raw(w, h, source).ok_or_else(|| anyhow!("img{i}.in is not {w}x{h}"))?;
            let plan = plan((w, h), bucket);
            line.equal("size", &plan.resized, &pair(entry, "resized")?);
            line.equal("filter", &resizer(plan.filter), &text(entry, "resizer")?);
            let got: Vec<f64> = to_bucket(picture, bucket).into_raw().into_iter().map(f64::from).collect();
            line.values("pixels", &got, &super::line::numbers(io.get(&format!("img{i}.out"))?)?);
            Ok(())
        });
    }
    Ok(())
}

/// `[0, 2, …]` or `{start, count}`.
fn indices(item: &Value) -> Result<Vec<usize>> {
    match &item["frames"] {
        Value::Array(_) => integers(item, "frames"),
        range => {
            let start = integer(range, "start")?;
            Ok((start..start + integer(range, "count")?).collect())
        }
    }
}

/// Source frames, bucket and cache name of every clip that is cut out of a video.
pub fn frames(case: &Case<'_>) -> Result<()> {
    let cases = list(&case.json, "cases")?;
    case.check(&format!("{} videos", cases.len()), Tolerance::Exact, |line| {
        for entry in cases {
            let cut = Cut {
                extraction: serde_json::from_value(entry["frame_extraction"].clone())?,
                targets: round_targets(&integers(entry, "target_frames")?),
                stride: integer(entry, "frame_stride")?,
                sample: integer(entry, "frame_sample")?,
                max_frames: integer(entry, "max_frames")?,
            };
            line.equal("rounded targets", &cut.targets, &integers(entry, "target_frames_rounded")?);
            let effective: FrameExtraction = serde_json::from_value(entry["effective_extraction"].clone())?;
            line.equal("effective extraction", &cut.effective(), &effective);
            // Below 16 frames a second the old tool refuses to repeat frames.
            let source = resample(integer(entry, "frame_count")?, entry["source_fps"].as_f64(), true);
            let mut want = Vec::new();
            for item in list(entry, "items")? {
                want.push((text(item, "cache_name")?.to_string(), indices(item)?));
            }
            let mut got = Vec::new();
            for (start, frames) in cut.positions(source.len()) {
                let (base, width, height) = named(entry)?;
                let name = CacheName::Video { base, start, frames, width, height };
                got.push((name.file_name(), source[start..start + frames].to_vec()));
            }
            got.sort();
            want.sort();
            line.equal(&format!("the clips of {}", without_items(entry)), &got, &want);
            line.equal("the number of clips", &got.len(), &integer(entry, "n_items")?);
        }
        Ok(())
    });
    Ok(())
}

/// Stem and size that the recorded cache names show.
fn named(entry: &Value) -> Result<(String, usize, usize)> {
    let first = text(&entry["items"][0], "cache_name")?;
    match CacheName::parse_video(first) {
        Some(CacheName::Video { base, width, height, .. }) => Ok((base, width, height)),
        _ => Err(anyhow!("{first} is not the name of a video's cache file")),
    }
}

fn without_items(entry: &Value) -> Value {
    let mut entry = entry.clone();
    if let Some(fields) = entry.as_object_mut() {
        fields.remove("items");
    }
    entry
}
