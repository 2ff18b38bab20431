//! Many products of one shape in one call: the heads of an attention.

use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use candle_core::DType;

use super::{data_type, error, op, Blas, Desc, Key, Layout, NAME};
use crate::Result;

/// Row-major matrices in memory; distances in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strided {
    /// Of the first matrix.
    pub address: u64,
    /// From a row to the next.
    pub row: usize,
    /// From a matrix to the next.
    pub batch: usize,
    /// Read as its transpose.
    pub transposed: bool,
}

/// `out [rows, columns] = left [rows, inner] · right [inner, columns]`, `count` times.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch {
    pub count: usize,
    pub rows: usize,
    pub columns: usize,
    pub inner: usize,
    pub left: Strided,
    pub right: Strided,
    pub out: Strided,
    /// Dtype of both operands.
    pub operands: DType,
    pub result: DType,
}

impl Blas {
    pub fn run_batch(&self, p: &Batch) -> Result<()> {
        self.issue_batch(p).map_err(|e| {
            let Batch { count, rows, columns, inner, operands, result, .. } = p;
            error(NAME, format!("{count} x [{rows}, {inner}] x [{inner}, {columns}], {operands:?} to {result:?}: {e}"))
        })
    }

    /// As [`Blas::run`]: the transposes in reverse order, since cublasLt counts columns first.
    fn issue_batch(&self, p: &Batch) -> std::result::Result<(), result::CublasError> {
        let (a, b, d) = (p.right, p.left, p.out);
        let (m, n, k) = (p.columns, p.rows, p.inner);
        let types = (data_type(p.operands), data_type(p.result));
        let desc = Desc::new()?;
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &op(a.transposed))?;
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, &op(b.transposed))?;
        let a_layout = Layout::batched(types.0, if a.transposed { (k, m) } else { (m, k) }, a, p.count)?;
        let b_layout = Layout::batched(types.0, if b.transposed { (n, k) } else { (k, n) }, b, p.count)?;
        let d_layout = Layout::batched(types.1, (m, n), d, p.count)?;
        // What every matrix' and every row's beginning is a multiple of, in bytes.
        let size = p.operands.size_in_bytes();
        let distances = [a, b].iter().fold(0, |all, s| all | (s.row * size) | (s.batch * size));
        let distances = distances | ((d.row | d.batch) * p.result.size_in_bytes());
        let all = a.address | b.address | d.address | distances as u64;
        let key = Key {
            shape: [m, n, k],
            transposed: [a.transposed, b.transposed],
            dtypes: [p.operands, p.result],
            bias: false,
            add: false,
            eight: None,
            batch: [p.count, b.row, b.batch, a.row, a.batch, d.row, d.batch],
            alignment: 1 << all.trailing_zeros().min(4),
        };
        let algo = self.algorithm(key, &desc, [&a_layout, &b_layout, &d_layout])?;
        let at = [(a.address, &a_layout), (b.address, &b_layout), (d.address, &d_layout), (d.address, &d_layout)];
        // SAFETY: addresses are of live memory that holds matrices of these shapes and distances (the caller's gate),
        // freed later on this stream.
        unsafe { self.call(&desc, [1f32, 0.0].map(f32::to_bits), at, &algo) }
    }
}

impl Layout {
    /// Column-major (rows, columns), `count` of them at the distances of `s`.
    fn batched(
        dtype: sys::cudaDataType,
        (rows, columns): (usize, usize),
        s: Strided,
        count: usize,
    ) -> std::result::Result<Self, result::CublasError> {
        let layout = Layout(result::create_matrix_layout(dtype, rows as u64, columns as u64, s.row as i64)?);
        use sys::cublasLtMatrixLayoutAttribute_t as A;
        let (count, distance) = (count as i32, s.batch as i64);
        // SAFETY: the layout is alive; the count is a 32-bit and the distance a 64-bit value.
        unsafe {
            result::set_matrix_layout_attribute(
                layout.0,
                A::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                (&count as *const i32).cast(),
                size_of::<i32>(),
            )?;
            result::set_matrix_layout_attribute(
                layout.0,
                A::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                (&distance as *const i64).cast(),
                size_of::<i64>(),
            )?;
        }
        Ok(layout)
    }
}
