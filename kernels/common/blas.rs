//! Matrix products by cublasLt: row-major, 16-bit or fp32 operands, fp32 sums, with what may follow (bias, addition of a
//! matrix) in the product's own epilogue. The algorithm of a shape is chosen once and kept.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::DType;

use super::gpu::error;
use crate::Result;

mod batch;
pub(crate) use batch::{Batch, Strided};

const NAME: &str = "cublasLt";
/// What cublasLt asks for on Hopper; smaller cards use less of it.
const WORKSPACE: usize = 32 << 20;

pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
    chosen: Mutex<HashMap<Key, sys::cublasLtMatmulAlgo_t>>,
    /// Ones, for operands without scales; made when first needed.
    ones: Mutex<Option<CudaSlice<f32>>>,
    /// The library or the card refused scales by row, without and with an addition: they are applied afterwards.
    scales_later: [AtomicBool; 2],
}

// SAFETY: a cublasLt handle may be used from any thread; the map is behind a lock and calls go to one stream.
unsafe impl Send for Blas {}
unsafe impl Sync for Blas {}

/// A matrix in memory, row-major.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix {
    pub address: u64,
    /// Read as its transpose.
    pub transposed: bool,
    /// Elements from a row in memory to the next; `None`: as many as a row has.
    pub stride: Option<usize>,
}

/// `out [rows, columns] = left [rows, inner] · right [inner, columns] (+ bias over columns) (+ add)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    pub rows: usize,
    pub columns: usize,
    pub inner: usize,
    pub left: Matrix,
    pub right: Matrix,
    /// Dtype of both operands.
    pub operands: DType,
    pub out: u64,
    /// As [`Matrix::stride`], of `out` and `add`.
    pub out_stride: Option<usize>,
    /// Dtype of `out`, `bias` and `add`.
    pub result: DType,
    pub bias: Option<u64>,
    /// A matrix like `out`; may be `out` itself.
    pub add: Option<u64>,
}

/// `out [rows, columns] = left_scales · codes of left [rows, inner] · (codes of right [columns, inner])ᵀ · right_scales
/// (+ bias over columns) (+ add)`, codes e4m3, scales fp32 by row of each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Eight {
    pub rows: usize,
    pub columns: usize,
    pub inner: usize,
    pub left: u64,
    pub right: u64,
    pub left_scales: u64,
    /// `None`: all are 1.
    pub right_scales: Option<u64>,
    pub out: u64,
    /// Dtype of `out`, `bias` and `add`.
    pub result: DType,
    pub bias: Option<u64>,
    /// A matrix like `out`; may be `out` itself.
    pub add: Option<u64>,
}

/// `out [rows, columns] = left [rows, inner] · (right [columns, inner])ᵀ`, operands int8, sums int32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Int8 {
    pub rows: usize,
    pub columns: usize,
    pub inner: usize,
    pub left: u64,
    pub right: u64,
    pub out: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    shape: [usize; 3],
    transposed: [bool; 2],
    dtypes: [DType; 2],
    bias: bool,
    add: bool,
    /// Count, then distances of rows and of matrices (left, right, out); a single product has zeros but for rows with gaps.
    batch: [usize; 7],
    /// Largest power of two (at most 16) that divides all addresses.
    alignment: u32,
    /// Operands are e4m3: with scales by row in the product, or without any.
    eight: Option<bool>,
}

// Attributes that bindings made for a CUDA before 12.8 do not name. A library that does not know them says so.
const A_SCALE_MODE: u32 = 31;
const B_SCALE_MODE: u32 = 32;
/// One fp32 factor for each row of an operand (CUDA 12.9, Hopper).
const OUTER_VECTOR: i32 = 3;
/// Sums of codes reach 448² · inner: with this factor they fit fp16 for every width of a model (2^15.7 at 13824).
const UNIT: f32 = 1.0 / 65536.0;

extern "C" {
    /// The same function as in the bindings, which take the attribute as an enum of what they know.
    #[link_name = "cublasLtMatmulDescSetAttribute"]
    fn set_attribute_by_number(desc: *mut c_void, attribute: u32, value: *const c_void, bytes: usize) -> u32;
}

impl Blas {
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let handle = result::create_handle().map_err(|e| error(NAME, e.to_string()))?;
        // SAFETY: a workspace has no meaning before a product writes it.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE) }.map_err(|e| error(NAME, e.to_string()))?;
        Ok(Blas {
            handle,
            workspace,
            stream: stream.clone(),
            chosen: Mutex::default(),
            ones: Mutex::default(),
            scales_later: Default::default(),
        })
    }

    pub fn run(&self, p: &Product) -> Result<()> {
        self.issue(p).map_err(|e| {
            let Product { rows, columns, inner, operands, result, .. } = p;
            error(NAME, format!("[{rows}, {inner}] x [{inner}, {columns}], {operands:?} to {result:?}: {e}"))
        })
    }

    /// cublasLt counts columns first: the row-major product is that of the transposes, in reverse order.
    fn issue(&self, p: &Product) -> std::result::Result<(), result::CublasError> {
        let (a, b) = (p.right, p.left);
        let (m, n, k) = (p.columns, p.rows, p.inner);
        let types = (data_type(p.operands), data_type(p.result));
        let desc = Desc::new()?;
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &op(a.transposed))?;
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, &op(b.transposed))?;
        if let Some(bias) = p.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
            desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &types.1)?;
        }
        let a_layout = Layout::rows(types.0, if a.transposed { (k, m) } else { (m, k) }, a.stride)?;
        let b_layout = Layout::rows(types.0, if b.transposed { (n, k) } else { (k, n) }, b.stride)?;
        let d_layout = Layout::rows(types.1, (m, n), p.out_stride)?;
        let add = p.add.unwrap_or(p.out);
        let strides = [a.stride, b.stride].iter().flatten().fold(0, |all, s| all | (s * p.operands.size_in_bytes()));
        let strides = strides | (p.out_stride.unwrap_or(0) * p.result.size_in_bytes());
        let all = a.address | b.address | p.out | add | p.bias.unwrap_or(0) | strides as u64;
        let [a_row, b_row, d_row] = [a.stride, b.stride, p.out_stride].map(|stride| stride.unwrap_or(0));
        let key = Key {
            shape: [m, n, k],
            transposed: [a.transposed, b.transposed],
            dtypes: [p.operands, p.result],
            bias: p.bias.is_some(),
            add: p.add.is_some(),
            batch: [0, b_row, 0, a_row, 0, d_row, 0],
            alignment: 1 << all.trailing_zeros().min(4),
            eight: None,
        };
        let algo = self.algorithm(key, &desc, [&a_layout, &b_layout, &d_layout])?;
        let factors = [1f32, if p.add.is_some() { 1.0 } else { 0.0 }].map(f32::to_bits);
        let at = [(a.address, &a_layout), (b.address, &b_layout), (add, &d_layout), (p.out, &d_layout)];
        // SAFETY: addresses are of live tensors of the shapes said (the op's gate), freed later on this stream.
        unsafe { self.call(&desc, factors, at, &algo) }
    }

    /// Issues `d = factors[0] · a · b + factors[1] · c`; `factors` are the bits of numbers of the description's scale type,
    /// `at` are a, b, c and d.
    ///
    /// # Safety
    /// Addresses are of device memory that holds what the layouts say and is freed, if at all, later on this stream.
    unsafe fn call(
        &self,
        desc: &Desc,
        [alpha, beta]: [u32; 2],
        [a, b, c, d]: [(u64, &Layout); 4],
        algo: &sys::cublasLtMatmulAlgo_t,
    ) -> std::result::Result<(), result::CublasError> {
        let (workspace, _guard) = self.workspace.device_ptr(&self.stream);
        result::matmul(
            self.handle,
            desc.0,
            (&alpha as *const u32).cast(),
            (&beta as *const u32).cast(),
            a.0 as *const c_void,
            a.1 .0,
            b.0 as *const c_void,
            b.1 .0,
            c.0 as *const c_void,
            c.1 .0,
            d.0 as *mut c_void,
            d.1 .0,
            algo,
            workspace as *mut c_void,
            WORKSPACE,
            self.stream.cu_stream().cast(),
        )
    }

    /// A product of e4m3 codes; false: the library or the card cannot scale by rows as it writes, nothing was done.
    pub fn run_eight(&self, p: &Eight) -> Result<bool> {
        let later = &self.scales_later[usize::from(p.add.is_some())];
        if later.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let done = self.issue_eight(p, true).is_ok();
        later.store(!done, Ordering::Relaxed);
        Ok(done)
    }

    /// Its sums alone, without scales, bias and addition, in units of what is returned.
    pub fn run_eight_sums(&self, p: &Eight) -> Result<f32> {
        self.issue_eight(&Eight { bias: None, add: None, ..*p }, false).map_err(|e| {
            let Eight { rows, columns, inner, result, .. } = p;
            error(NAME, format!("[{rows}, {inner}] x [{inner}, {columns}], e4m3 to {result:?}: {e}"))
        })?;
        Ok(1.0 / UNIT)
    }

    fn issue_eight(&self, p: &Eight, scaled: bool) -> std::result::Result<(), result::CublasError> {
        let (m, n, k) = (p.columns, p.rows, p.inner);
        let (codes, result_type) = (sys::cudaDataType::CUDA_R_8F_E4M3, data_type(p.result));
        let desc = Desc::new()?;
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &op(true))?;
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, &op(false))?;
        if scaled {
            let right = match p.right_scales {
                Some(scales) => scales,
                None => self.ones(m)?,
            };
            desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &right)?;
            desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &p.left_scales)?;
            desc.set_by_number(A_SCALE_MODE, &OUTER_VECTOR)?;
            desc.set_by_number(B_SCALE_MODE, &OUTER_VECTOR)?;
            // Sums stay in the tensor cores' own accumulators, which keep 14 bits below the largest product, instead of
            // being moved to fp32 ones on the way: on an H200 7 to 9 % off these products. Rounding to e4m3 costs a
            // hundred times the error: the gradients of a 14B model keep their cosine to four digits.
            desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &1i8)?;
            if let Some(bias) = p.bias {
                let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
                desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
                desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
                desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &result_type)?;
            }
        }
        let a_layout = Layout::new(codes, (k, m))?;
        let b_layout = Layout::new(codes, (k, n))?;
        let d_layout = Layout::new(result_type, (m, n))?;
        let add = p.add.unwrap_or(p.out);
        let all = p.right | p.left | p.out | add | p.bias.unwrap_or(0);
        let key = Key {
            shape: [m, n, k],
            transposed: [true, false],
            dtypes: [DType::U8, p.result],
            bias: p.bias.is_some(),
            add: p.add.is_some(),
            batch: [0; 7],
            alignment: 1 << all.trailing_zeros().min(4),
            eight: Some(scaled),
        };
        let algo = self.algorithm(key, &desc, [&a_layout, &b_layout, &d_layout])?;
        let factors = [if scaled { 1.0 } else { UNIT }, if p.add.is_some() { 1.0 } else { 0.0 }].map(f32::to_bits);
        let at = [(p.right, &a_layout), (p.left, &b_layout), (add, &d_layout), (p.out, &d_layout)];
        // SAFETY: as in `issue`.
        unsafe { self.call(&desc, factors, at, &algo) }
    }

    pub fn run_int8(&self, p: &Int8) -> Result<()> {
        self.issue_int8(p).map_err(|e| {
            let Int8 { rows, columns, inner, .. } = p;
            error(NAME, format!("[{rows}, {inner}] x [{inner}, {columns}], int8 to int32: {e}"))
        })
    }

    fn issue_int8(&self, p: &Int8) -> std::result::Result<(), result::CublasError> {
        let (m, n, k) = (p.columns, p.rows, p.inner);
        let (codes, sums) = (sys::cudaDataType::CUDA_R_8I, sys::cudaDataType::CUDA_R_32I);
        let desc = Desc::of(sys::cublasComputeType_t::CUBLAS_COMPUTE_32I, sums)?;
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &op(true))?;
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, &op(false))?;
        let a_layout = Layout::new(codes, (k, m))?;
        let b_layout = Layout::new(codes, (k, n))?;
        let d_layout = Layout::new(sums, (m, n))?;
        let key = Key {
            shape: [m, n, k],
            transposed: [true, false],
            // No other product is of such results.
            dtypes: [DType::U8, DType::U32],
            bias: false,
            add: false,
            batch: [0; 7],
            alignment: 1 << (p.right | p.left | p.out).trailing_zeros().min(4),
            eight: None,
        };
        let algo = self.algorithm(key, &desc, [&a_layout, &b_layout, &d_layout])?;
        let at = [(p.right, &a_layout), (p.left, &b_layout), (p.out, &d_layout), (p.out, &d_layout)];
        // SAFETY: as in `issue`; the factors are int32, as the description says.
        unsafe { self.call(&desc, [1, 0], at, &algo) }
    }

    /// The address of at least `count` ones.
    fn ones(&self, count: usize) -> std::result::Result<u64, result::CublasError> {
        let mut ones = self.ones.lock().unwrap_or_else(PoisonError::into_inner);
        if ones.as_ref().is_none_or(|have| have.len() < count) {
            let fresh = self.stream.clone_htod(&vec![1f32; count.next_power_of_two()]);
            *ones = Some(fresh.map_err(|_| result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED))?);
        }
        let address = ones.as_ref().map(|have| have.device_ptr(&self.stream).0);
        address.ok_or(result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED))
    }

    fn algorithm(
        &self,
        key: Key,
        desc: &Desc,
        [a, b, d]: [&Layout; 3],
    ) -> std::result::Result<sys::cublasLtMatmulAlgo_t, result::CublasError> {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(algo) = chosen.get(&key) {
            return Ok(*algo);
        }
        let preference = Preference::new()?;
        let set = |attribute, value: &u64, bytes| {
            let value: *const u64 = value;
            // SAFETY: the preference is alive and the value has the attribute's size.
            unsafe { result::set_matmul_pref_attribute(preference.0, attribute, value.cast(), bytes) }
        };
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE as u64), 8)?;
        for attribute in [
            P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            set(attribute, &u64::from(key.alignment), 4)?;
        }
        // SAFETY: all descriptors are alive.
        let found =
            unsafe { result::get_matmul_algo_heuristic(self.handle, desc.0, a.0, b.0, d.0, d.0, preference.0) }?;
        chosen.insert(key, found.algo);
        Ok(found.algo)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handle. A failure here has no one to hear it.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn op(transposed: bool) -> i32 {
    i32::from(transposed)
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

struct Desc(sys::cublasLtMatmulDesc_t);

impl Desc {
    /// fp32 sums of exact products: no TF32.
    fn new() -> std::result::Result<Self, result::CublasError> {
        Self::of(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)
    }

    fn of(
        compute: sys::cublasComputeType_t,
        scale: sys::cudaDataType,
    ) -> std::result::Result<Self, result::CublasError> {
        Ok(Desc(result::create_matmul_desc(compute, scale)?))
    }

    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> std::result::Result<(), result::CublasError> {
        let value: *const T = value;
        // SAFETY: the descriptor is alive; the value has the attribute's type.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, value.cast(), size_of::<T>()) }
    }
}

impl Desc {
    fn set_by_number<T>(&self, attribute: u32, value: &T) -> std::result::Result<(), result::CublasError> {
        let value: *const T = value;
        // SAFETY: the descriptor is alive; the value has the attribute's type (the library checks its size).
        let status = unsafe { set_attribute_by_number(self.0.cast(), attribute, value.cast(), size_of::<T>()) };
        match status {
            0 => Ok(()),
            _ => Err(result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
        }
    }
}

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// Column-major (rows, columns), `stride` elements from a column to the next.
    fn rows(
        dtype: sys::cudaDataType,
        (rows, columns): (usize, usize),
        stride: Option<usize>,
    ) -> std::result::Result<Self, result::CublasError> {
        let stride = stride.unwrap_or(rows) as i64;
        Ok(Layout(result::create_matrix_layout(dtype, rows as u64, columns as u64, stride)?))
    }

    /// The same without gaps.
    fn new(dtype: sys::cudaDataType, shape: (usize, usize)) -> std::result::Result<Self, result::CublasError> {
        Self::rows(dtype, shape, None)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> std::result::Result<Self, result::CublasError> {
        Ok(Preference(result::create_matmul_pref()?))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
