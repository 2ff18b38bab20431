//! Descriptions of tensors for Hopper's copy engine, see `hopper.cuh`.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::driver::sys::{
    self, CUresult, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};
use candle_core::DType;

use super::gpu::{error, Arg, View};
use crate::Result;

/// Bytes of a row of a box: what the swizzle spans.
const ROW_BYTES: usize = 128;
/// 16-bit values in it.
const COLUMNS: usize = ROW_BYTES / 2;

/// A map of a contiguous 16-bit tensor [b, l, n, h], its boxes `rows` of `l` by 64 of `h`, in shared memory swizzled over
/// 128 bytes. It holds an address only: `t` must live until the launch is issued.
pub(crate) fn tensor_map(op: &'static str, t: &View, [b, l, n, h]: [usize; 4], rows: usize) -> Result<Arg> {
    let sizes = [h, n, l, b].map(|d| d as u64);
    let strides = [h * 2, n * h * 2, l * n * h * 2].map(|d| d as u64);
    encode(op, t.address, t.dtype, sizes, strides, [COLUMNS, 1, rows, 1].map(|d| d as u32))
}

/// A map of a matrix of bytes or of 16-bit values, its rows `stride` values apart, in boxes of `box_rows` by 128 bytes. As
/// above.
pub(crate) fn matrix_map(
    op: &'static str,
    address: u64,
    dtype: DType,
    [rows, columns, stride]: [usize; 3],
    box_rows: usize,
) -> Result<Arg> {
    let bytes = dtype.size_in_bytes();
    let sizes = [columns as u64, rows as u64];
    encode(op, address, dtype, sizes, [(stride * bytes) as u64], [(ROW_BYTES / bytes) as u32, box_rows as u32])
}

/// `strides` in bytes, of all axes but the first, which is dense.
fn encode<const RANK: usize, const STRIDES: usize>(
    op: &'static str,
    address: u64,
    dtype: DType,
    sizes: [u64; RANK],
    strides: [u64; STRIDES],
    of_box: [u32; RANK],
) -> Result<Arg> {
    const { assert!(STRIDES + 1 == RANK, "a stride for every axis but the first") };
    let kind = match dtype {
        DType::U8 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        DType::BF16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    let mut map = CUtensorMap { opaque: [0; 16] };
    // SAFETY: every pointer is to a local of the length that the rank asks for (`CUtensorMap` is aligned as the driver wants
    // it); the tensor's address is only written down.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            kind,
            RANK as u32,
            address as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            of_box.as_ptr(),
            [1u32; RANK].as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    if result != CUresult::CUDA_SUCCESS {
        return Err(error(op, format!("no map of {sizes:?} in boxes of {of_box:?}: {result:?}")));
    }
    Ok(Arg::longs(&map.opaque))
}
