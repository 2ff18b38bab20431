//! Which drivers run what was built here.

/// A driver runs what was built with any CUDA of its own major version or an earlier one; kernels of a later one it refuses
/// with words that help nobody. `driver` is the newest CUDA that it knows, (12, 8); `built_with` that of the compiler,
/// "13.0". What is not known is not held against anybody.
#[cfg(any(test, feature = "cuda"))]
pub(crate) fn check(driver: Option<(i32, i32)>, built_with: &str) -> Result<(), String> {
    let built = built_with.split('.').next().and_then(|major| major.parse::<i32>().ok());
    match (driver, built) {
        (Some((major, minor)), Some(built)) if major < built => {
            Err(format!("its driver is for CUDA {major}.{minor}, this program was built with CUDA {built_with}"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn a_driver_runs_its_own_cuda_and_earlier_ones() {
        for (driver, built) in
            [((13, 0), "13.0"), ((13, 0), "13.2"), ((12, 4), "12.8"), ((13, 1), "12.2"), ((12, 8), "")]
        {
            check(Some(driver), built).unwrap();
        }
        check(None, "13.0").unwrap();
        let said = check(Some((12, 8)), "13.0").unwrap_err();
        assert!(said.contains("for CUDA 12.8") && said.contains("with CUDA 13.0"), "{said}");
    }
}
