//! The memory of a training run: what it has had.

/// The most memory that this process has had, in bytes (`VmHWM` of /proc/self/status); none where the system does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())?;
    Some(kib << 10)
}
