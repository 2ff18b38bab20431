//! Names of cache files: what the old trainer writes and reads, so that caches travel both ways.
//!
//! | kind | name |
//! |---|---|
//! | picture | `{base}_{W:04d}x{H:04d}_wan.safetensors`, W and H of the picture as it was before resizing |
//! | clip | `{base}_{start:05d}-{T:03d}_{W:04d}x{H:04d}_wan.safetensors`, W and H of the bucket |
//! | caption | `{base}_wan_te.safetensors` |

/// Ends every file of latents.
pub const LATENT_SUFFIX: &str = "_wan.safetensors";
/// Ends every file of caption embeddings.
pub const TEXT_SUFFIX: &str = "_wan_te.safetensors";

/// What a cache file's name says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum CacheName {
    /// Latents of a picture; `width`, `height` are the picture's own.
    Image { base: String, width: usize, height: usize },
    /// Latents of a clip: `frames` frames from frame `start` on, at the bucket's `width` and `height`.
    Video { base: String, start: usize, frames: usize, width: usize, height: usize },
    /// Embeddings of a caption.
    Text { base: String },
}

impl CacheName {
    pub fn file_name(&self) -> String {
        match self {
            CacheName::Image { base, width, height } => format!("{base}_{width:04}x{height:04}{LATENT_SUFFIX}"),
            CacheName::Video { base, start, frames, width, height } => {
                format!("{base}_{start:05}-{frames:03}_{width:04}x{height:04}{LATENT_SUFFIX}")
            }
            CacheName::Text { base } => format!("{base}{TEXT_SUFFIX}"),
        }
    }

    /// Stem of the media file this was made from.
    pub fn base(&self) -> &str {
        match self {
            CacheName::Image { base, .. } | CacheName::Video { base, .. } | CacheName::Text { base } => base,
        }
    }

    /// Reads a name of an image data set: everything before the last two `_` is the stem.
    pub fn parse_image(file_name: &str) -> Option<Self> {
        let rest = file_name.strip_suffix(LATENT_SUFFIX)?;
        let (base, size) = rest.rsplit_once('_')?;
        let (width, height) = parse_size(size)?;
        Some(CacheName::Image { base: base.to_string(), width, height })
    }

    /// Reads a name of a video data set: everything before the last three `_` is the stem.
    pub fn parse_video(file_name: &str) -> Option<Self> {
        let rest = file_name.strip_suffix(LATENT_SUFFIX)?;
        let (rest, size) = rest.rsplit_once('_')?;
        let (base, span) = rest.rsplit_once('_')?;
        let (width, height) = parse_size(size)?;
        let (start, frames) = span.split_once('-')?;
        let (start, frames) = (parse_padded(start, 5)?, parse_padded(frames, 3)?);
        Some(CacheName::Video { base: base.to_string(), start, frames, width, height })
    }

    pub fn parse_text(file_name: &str) -> Option<Self> {
        let base = file_name.strip_suffix(TEXT_SUFFIX)?;
        Some(CacheName::Text { base: base.to_string() })
    }
}

fn parse_size(text: &str) -> Option<(usize, usize)> {
    let (width, height) = text.split_once('x')?;
    Some((parse_padded(width, 4)?, parse_padded(height, 4)?))
}

/// A number written with at least `digits` digits, as `{:0digits}` writes it.
fn parse_padded(text: &str, digits: usize) -> Option<usize> {
    let canonical = text.len() == digits || (text.len() > digits && !text.starts_with('0'));
    (canonical && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_as_they_were_written() {
        let names = [
            CacheName::Image { base: "a_b_c".into(), width: 64, height: 10240 },
            CacheName::Image { base: "".into(), width: 1, height: 1 },
            CacheName::Image { base: "x_00001-021".into(), width: 1280, height: 720 },
        ];
        for name in names {
            assert_eq!(CacheName::parse_image(&name.file_name()), Some(name));
        }
        let video = CacheName::Video { base: "my_clip_01".into(), start: 123456, frames: 21, width: 1280, height: 720 };
        assert_eq!(video.file_name(), "my_clip_01_123456-021_1280x0720_wan.safetensors");
        assert_eq!(CacheName::parse_video(&video.file_name()), Some(video));
        let text = CacheName::Text { base: "my_clip_01".into() };
        assert_eq!(text.file_name(), "my_clip_01_wan_te.safetensors");
        assert_eq!(CacheName::parse_text(&text.file_name()), Some(text));
    }

    #[test]
    fn other_files_are_not_taken_for_caches() {
        for name in [
            "a_wan.safetensors",
            "a_64x0064_wan.safetensors",
            "a_0064x0064_wan_te.safetensors",
            "a_0064x_wan.safetensors",
            "a_+064x0064_wan.safetensors",
            "a_0064x0064x0064_wan.safetensors",
            "0064x0064_wan.safetensors",
            "a_0064x0064_wan.safetensors.tmp",
        ] {
            assert_eq!(CacheName::parse_image(name), None, "{name}");
            assert_eq!(CacheName::parse_video(name), None, "{name}");
        }
        assert_eq!(CacheName::parse_video("a_0000-021_0064x0064_wan.safetensors"), None);
        assert_eq!(CacheName::parse_video("a_99999999999999999999-021_0064x0064_wan.safetensors"), None);
    }
}
