//! How the C library keeps freed memory.

/// Makes every buffer of 4 MiB or more a mapping of its own, so that freeing it gives the memory back.
///
/// glibc moves that limit up to 32 MiB by itself as buffers are freed; the activations of a picture then share one heap
/// with everything else, and the holes between them double the resident memory (a 720p clip through a VAE of base
/// width 8 peaked at 1.0 GB instead of 0.6). Call it once, first thing in `main`. Does nothing where there is no glibc.
pub fn map_large_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // From malloc.h of glibc; stable since it exists.
        const M_TRIM_THRESHOLD: i32 = -1;
        const M_MMAP_THRESHOLD: i32 = -3;
        extern "C" {
            fn mallopt(param: i32, value: i32) -> i32;
        }
        // SAFETY: `mallopt` takes two integers and may be called at any time; a refusal (0) leaves the default, which
        // costs memory only.
        unsafe {
            mallopt(M_MMAP_THRESHOLD, 4 << 20);
            // Setting one limit freezes the other at 128 KiB, which would give the heap's end back over and over.
            mallopt(M_TRIM_THRESHOLD, 64 << 20);
        }
    }
}
