//! The two 256-entry code maps.

use std::sync::LazyLock;

/// Decades of the tree; the top one spans 0.1 to 1.
const DECADES: i32 = 7;

/// 256 ascending values in [−1, 1] and the points halfway between neighbours.
pub struct Map {
    values: [f32; 256],
    midpoints: [f32; 255],
    zero: u8,
}

impl Map {
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    pub fn value(&self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }

    /// The point halfway between the values of codes `i` and `i + 1`.
    #[cfg(feature = "cuda")]
    pub(super) fn midpoint(&self, i: usize) -> f32 {
        self.midpoints[i]
    }

    /// The code of 0.
    pub fn zero(&self) -> u8 {
        self.zero
    }

    /// The code nearest to `full / max`, the lower one of two equally near; the code of 0 in a block of zeros.
    pub fn nearest(&self, full: f32, max: f32) -> u8 {
        if max == 0.0 {
            return self.zero;
        }
        let x = full / max;
        self.midpoints.partition_point(|&midpoint| x > midpoint) as u8
    }

    /// [`Self::nearest`], moved to a code of the sign of `full`: a small negative moment must not become 0, which counts
    /// as positive.
    pub fn nearest_of_sign(&self, full: f32, max: f32) -> u8 {
        let code = self.nearest(full, max);
        match (full < 0.0, self.value(code) < 0.0) {
            (true, false) => code - 1,
            (false, true) if full > 0.0 => code + 1,
            _ => code,
        }
    }
}

/// The map of the first moment.
pub fn signed_map() -> &'static Map {
    static MAP: LazyLock<Map> = LazyLock::new(|| dynamic_map(true));
    &MAP
}

/// The map of the second moment.
pub fn unsigned_map() -> &'static Map {
    static MAP: LazyLock<Map> = LazyLock::new(|| dynamic_map(false));
    &MAP
}

/// Decade i (0 lowest) holds the midpoints of 2^i (signed, for each sign) or 2^(i+1) (unsigned) equal parts of
/// [0.1, 1], times 10^(i−6). With 0 and 1 that makes 256.
fn dynamic_map(signed: bool) -> Map {
    let mut list = vec![0.0, 1.0];
    for decade in 0..DECADES {
        let parts = 1usize << if signed { decade } else { decade + 1 };
        let scale = 10f64.powi(decade - (DECADES - 1)) as f32;
        for part in 0..parts {
            let value = scale * ((boundary(part, parts) + boundary(part + 1, parts)) / 2.0);
            list.push(value);
            if signed {
                list.push(-value);
            }
        }
    }
    list.sort_by(f32::total_cmp);
    let values: [f32; 256] = list.try_into().expect("2·127 or 254 values and two more");
    let midpoints = std::array::from_fn(|i| (values[i] + values[i + 1]) * 0.5);
    let zero = values.iter().position(|&value| value == 0.0).expect("0 is in the list") as u8;
    Map { values, midpoints, zero }
}

/// The boundary before part `i` of [0.1, 1], in fp32 counted from the nearer end.
fn boundary(i: usize, parts: usize) -> f32 {
    let step = (1.0 - 0.1f32) / parts as f32;
    if i < parts.div_ceil(2) {
        0.1 + step * i as f32
    } else {
        1.0 - step * (parts - i) as f32
    }
}
