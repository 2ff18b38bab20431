//! How much memory there is.

/// What a run may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes on the computing device; on the CPU this is host memory and `host` is not looked at.
    pub device: u64,
    /// Bytes of host memory.
    pub host: u64,
}

/// Bytes of host memory that can be taken without swapping, where the system tells.
pub fn available_ram() -> Option<u64> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// Bytes of host memory, where the system tells.
pub fn total_ram() -> Option<u64> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// Bytes of host memory that this process has held at most, where the system tells.
pub fn host_peak() -> Option<u64> {
    parse_meminfo(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

fn parse_meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_available_line_is_read() {
        let text = "MemTotal:       24600000 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n";
        assert_eq!(parse_meminfo(text, "MemAvailable:"), Some(20_000_000 * 1024));
        assert_eq!(parse_meminfo("MemTotal: 5 kB", "MemAvailable:"), None);
        assert_eq!(parse_meminfo("VmPeak:\t 9 kB\nVmHWM:\t    128 kB\n", "VmHWM:"), Some(128 * 1024));
    }
}
