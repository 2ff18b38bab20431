//! Which (width, height) a picture or clip is trained at. Pure functions; sizes are (width, height) in pixels.

/// Side lengths are multiples of this: 8 of the VAE times 2 of the patch.
pub const STEP: u32 = 16;

/// The choice of a bucket as the dataset describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector {
    resolution: (u32, u32),
    no_upscale: bool,
    /// Sorted; a single one, the resolution as written, when buckets are off.
    buckets: Vec<(u32, u32)>,
}

impl Selector {
    /// `no_upscale` only counts while buckets are on.
    pub fn new(resolution: (u32, u32), enable_bucket: bool, no_upscale: bool) -> Self {
        let buckets = if enable_bucket { buckets(resolution) } else { vec![resolution] };
        Self { resolution, no_upscale: no_upscale && enable_bucket, buckets }
    }

    /// The bucket of a source of this size: the one of nearest aspect ratio (difference of width/height, the first on
    /// a tie), or its own size cut down to multiples of 16 when it must not be enlarged and is small enough.
    ///
    /// A side is 0 only for a source under 16 pixels that must not be enlarged: see [`is_usable`].
    pub fn choose(&self, size: (u32, u32)) -> (u32, u32) {
        let area = |(w, h): (u32, u32)| u64::from(w) * u64::from(h);
        if self.no_upscale && area(size) <= area(self.resolution) {
            return (floor_step(size.0), floor_step(size.1));
        }
        let aspect = f64::from(size.0) / f64::from(size.1);
        nearest_aspect(&self.buckets, aspect)
    }
}

/// Whether latents can be made of this size.
pub fn is_usable((w, h): (u32, u32)) -> bool {
    w >= STEP && h >= STEP && w.is_multiple_of(STEP) && h.is_multiple_of(STEP)
}

/// All buckets of about the area of `resolution`, in order: widths in steps of 16 from half the square root of the area
/// to the square root, each with the largest height that stays within the area, both ways round.
pub fn buckets(resolution: (u32, u32)) -> Vec<(u32, u32)> {
    let area = u64::from(resolution.0) * u64::from(resolution.1);
    let side = area.isqrt() as u32;
    let mut all = Vec::new();
    let mut w = floor_step(side / 2);
    while w < side.saturating_add(STEP) {
        if w >= STEP {
            let h = floor_step((area / u64::from(w)) as u32);
            if h >= STEP {
                all.push((w, h));
                all.push((h, w));
            }
        }
        w += STEP;
    }
    all.sort_unstable();
    all.dedup();
    all
}

/// The size for a control picture that has a resolution of its own: five widths around the one of equal area.
pub fn control_bucket(size: (u32, u32), resolution: (u32, u32)) -> (u32, u32) {
    let area = f64::from(resolution.0) * f64::from(resolution.1);
    let aspect = f64::from(size.0) / f64::from(size.1);
    let middle = i64::from(floor_step((area * aspect).sqrt() as u32));
    let around: Vec<_> = (-2..=2)
        .map(|i| middle + i * i64::from(STEP))
        .filter(|w| *w >= i64::from(STEP))
        .map(|w| (w as u32, floor_step((area / w as f64) as u32)))
        .filter(|b| is_usable(*b))
        .collect();
    if around.is_empty() {
        return (STEP, STEP);
    }
    nearest_aspect(&around, aspect)
}

/// The largest multiple of 16 that is not above `x`.
pub fn floor_step(x: u32) -> u32 {
    x - x % STEP
}

fn nearest_aspect(buckets: &[(u32, u32)], aspect: f64) -> (u32, u32) {
    let error = |b: &(u32, u32)| (f64::from(b.0) / f64::from(b.1) - aspect).abs();
    // min_by keeps the first of equal elements, as argmin does.
    *buckets.iter().min_by(|a, b| error(a).total_cmp(&error(b))).expect("a selector has at least one bucket")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_the_usual_resolutions() {
        assert_eq!(buckets((960, 544)).len(), 47);
        assert_eq!(buckets((1280, 720)).len(), 61);
        assert_eq!(buckets((832, 480)).len(), 42);
    }

    /// Whatever the resolution: multiples of 16, within the area, sorted, each with its mirror image, aspect within 1:4.5.
    #[test]
    fn buckets_keep_their_bounds() {
        for w in (16..2100).step_by(37) {
            for h in (16..2100).step_by(53) {
                let list = buckets((w, h));
                let area = u64::from(w) * u64::from(h);
                assert!(!list.is_empty(), "{w}x{h}");
                assert!(list.windows(2).all(|p| p[0] < p[1]));
                for &(bw, bh) in &list {
                    assert!(is_usable((bw, bh)), "{w}x{h}: {bw}x{bh}");
                    assert!(u64::from(bw) * u64::from(bh) <= area, "{w}x{h}: {bw}x{bh}");
                    assert!(list.binary_search(&(bh, bw)).is_ok(), "{w}x{h}: {bw}x{bh} has no mirror image");
                }
            }
        }
    }

    #[test]
    fn chosen_bucket_is_in_the_list_or_never_larger() {
        let free = Selector::new((832, 480), true, false);
        let tight = Selector::new((832, 480), true, true);
        let list = buckets((832, 480));
        for w in (16..3000).step_by(61) {
            for h in (16..3000).step_by(47) {
                assert!(list.contains(&free.choose((w, h))));
                let b = tight.choose((w, h));
                assert!(is_usable(b));
                assert!(b.0 <= w && b.1 <= h || list.contains(&b), "{w}x{h} -> {b:?}");
            }
        }
    }

    #[test]
    fn off_means_the_resolution_as_written() {
        let off = Selector::new((854, 480), false, true);
        assert_eq!(off.choose((100, 100)), (854, 480));
        assert!(!is_usable(off.choose((100, 100))));
    }

    #[test]
    fn a_tiny_source_that_must_not_grow_is_unusable() {
        assert_eq!(Selector::new((960, 544), true, true).choose((15, 40)), (0, 32));
        assert!(!is_usable((0, 32)));
    }

    #[test]
    fn control_buckets() {
        assert_eq!(control_bucket((1920, 1080), (1024, 1024)), (1360, 768));
        assert_eq!(control_bucket((512, 512), (1024, 1024)), (1024, 1024));
        assert!(is_usable(control_bucket((10_000, 3), (64, 64))));
    }
}
