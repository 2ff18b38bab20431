//! Descriptions of tensors for Hopper's copy engine, see `hopper.cuh`.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::driver::sys::{
    self, CUresult, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};
use candle_core::DType;

use super::gpu::{error, Arg, View};
use crate::Result;

/// Values in a row of a box: 128 bytes, what the swizzle spans.
const COLUMNS: usize = 64;

/// A map of a contiguous 16-bit tensor [b, l, n, h], its boxes `rows` of `l` by 64 of `h`, in shared memory swizzled over
/// 128 bytes. It holds an address only: `t` must live until the launch is issued.
pub(crate) fn tensor_map(op: &'static str, t: &View, [b, l, n, h]: [usize; 4], rows: usize) -> Result<Arg> {
    let dtype = match t.dtype {
        DType::BF16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    let sizes = [h, n, l, b].map(|d| d as u64);
    let strides = [h * 2, n * h * 2, l * n * h * 2].map(|d| d as u64);
    let of_box = [COLUMNS, 1, rows, 1].map(|d| d as u32);
    let mut map = CUtensorMap { opaque: [0; 16] };
    // SAFETY: every pointer is to a local of the length that rank 4 asks for (`CUtensorMap` is aligned as the driver wants
    // it); the tensor's address is only written down.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            dtype,
            4,
            t.address as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            of_box.as_ptr(),
            [1u32; 4].as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    if result != CUresult::CUDA_SUCCESS {
        return Err(error(op, format!("no tensor map of [{b}, {l}, {n}, {h}] in boxes of {rows} rows: {result:?}")));
    }
    Ok(Arg::longs(&map.opaque))
}
