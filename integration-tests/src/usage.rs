//! What a process costs, as the kernel counts it: memory and processor time.

use std::fs;

use anyhow::{Context, Result};

/// The kernel counts processor time in hundredths of a second, on every Linux.
pub const TICKS_PER_SECOND: f64 = 100.0;

/// The processor time that a process has used so far, in ticks.
///
/// # Errors
/// If there is no such process.
pub fn cpu_ticks(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("read the processor time")?;
    // Behind the name, which may hold anything: user and system time are the 12th and 13th of what follows.
    let (_, fields) = stat.rsplit_once(") ").context("read /proc/<pid>/stat")?;
    fields.split(' ').skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>().context("read ticks")
}

/// The proportional set size of a process: shared pages count by their share.
///
/// # Errors
/// If there is no such process, or it is not ours to look at.
pub fn pss_kib(pid: u32) -> Result<u64> {
    let memory = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("read the memory")?;
    let pss = memory.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    pss.context("find the PSS")
}

/// To hundredths.
#[must_use]
pub fn round(figure: f64) -> f64 {
    (figure * 100.0).round() / 100.0
}
