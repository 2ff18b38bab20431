//! How the norms' kernels go through rows: threads, and rows on their way to shared memory.

use candle_core::DType;

/// Threads of a block there are kernels for; each thread holds 16 values of a row.
const THREADS: [usize; 5] = [64, 128, 192, 320, 512];
/// The widest row that there is a kernel for.
pub(super) const WIDEST: usize = 16 * THREADS[4];
/// Two rows at a time are on their way to a block where they take no more shared memory than this, else one.
const TWO_STAGES: usize = 64 << 10;

/// For rows of one width.
pub(super) struct Rows {
    pub threads: usize,
    /// Rows on their way at a time.
    pub stages: usize,
    /// Bytes of shared memory for them.
    pub shared: usize,
}

impl Rows {
    /// For `d` values, [`WIDEST`] at most, of each of the tensors that a row is read from.
    pub fn new<const N: usize>(d: usize, read: [Option<DType>; N]) -> Self {
        let threads = THREADS.into_iter().find(|t| 16 * t >= d).unwrap_or(THREADS[4]);
        let row: usize = read.iter().flatten().map(|dtype| 16 * threads * dtype.size_in_bytes()).sum();
        let stages = if 2 * row <= TWO_STAGES { 2 } else { 1 };
        Rows { threads, stages, shared: stages * row }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a block may ask for on sm_86 and sm_89, the smallest of the cards supported.
    const SMALLEST: usize = 99 << 10;
    /// Sums of three values over 16 warps, in two places.
    const SUMS: usize = 2 * 3 * 16 * 4;

    #[test]
    fn every_width_and_dtype_fits_the_smallest_card() {
        let dtypes = [None, Some(DType::BF16), Some(DType::F16), Some(DType::F32)];
        for d in (8..=WIDEST).step_by(8) {
            for (x, dy, dres) in
                dtypes[1..].iter().flat_map(|x| dtypes[1..].iter().flat_map(move |dy| dtypes.map(|r| (*x, *dy, r))))
            {
                let Rows { threads, stages, shared } = Rows::new(d, [x, dy, dres]);
                assert!(16 * threads >= d && (1..=2).contains(&stages));
                assert!(shared + SUMS <= SMALLEST, "{d}: {x:?} {dy:?} {dres:?} take {shared} bytes");
            }
        }
    }

    #[test]
    fn rows_of_16_bit_come_two_at_a_time() {
        let (half, full) = (Some(DType::BF16), Some(DType::F32));
        let at_5120 = |read| Rows::new(5120, read);
        assert_eq!((at_5120([half, half, None]).threads, at_5120([half, half, None]).stages), (320, 2));
        assert_eq!((at_5120([full, half, None]).stages, at_5120([full, half, full]).stages), (2, 1));
        assert_eq!(at_5120([full, half, full]).shared, 5120 * 10);
    }
}
