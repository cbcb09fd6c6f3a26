//! The load: wrk, and what it says.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fleet::process::{Program, system_binary};

use crate::servers::TO_INSTALL;

/// Beyond the length of a run: start, warm-up, end.
const MARGIN: Duration = Duration::from_secs(20);

/// The program.
pub(crate) struct Wrk {
    path: PathBuf,
    logs: PathBuf,
}

/// What it measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    /// Answers a second.
    pub(crate) rps: f64,
    /// Half of them took no longer.
    pub(crate) p50_us: f64,
    /// All but one of a hundred took no longer.
    pub(crate) p99_us: f64,
}

impl Wrk {
    /// Looks for it.
    pub(crate) fn find() -> Result<Self> {
        Ok(Self { path: system_binary("wrk", &[]).context(TO_INSTALL)?, logs: PathBuf::new() })
    }

    /// The same, which leaves what it prints in a folder.
    pub(crate) fn logging_to(self, logs: &Path) -> Self {
        Self { logs: logs.to_owned(), ..self }
    }

    /// One run; every answer must be a good one.
    pub(crate) async fn run(&self, url: &str, header: Option<&str>, connections: u32, length: Duration) -> Result<Run> {
        let args =
            ["-t1".to_owned(), format!("-c{connections}"), format!("-d{}s", length.as_secs()), "--latency".to_owned()];
        let header = header.map(|h| ["-H".to_owned(), h.to_owned()]).into_iter().flatten();
        let program = Program::new("wrk", &self.path).args(args.into_iter().chain(header)).args([url]);
        let ended = program.run(&self.logs, length + MARGIN).await?;
        ensure!(ended.code == Some(0), "wrk {url}: {}{}", ended.stdout, ended.stderr);
        let said = &ended.stdout;
        ensure!(!said.contains("Non-2xx") && !said.contains("Socket errors"), "wrk {url}: {said}");
        // A line is told by its first word: the same percentage may be a figure of another line.
        let after = |label: &str| said.lines().find_map(|line| line.trim_start().strip_prefix(label)).map(str::trim);
        let time = |label: &str| after(label).and_then(microseconds);
        let rps = after("Requests/sec:").and_then(|text| text.parse().ok());
        let run = rps.zip(time("50%")).zip(time("99%")).map(|((rps, p50_us), p99_us)| Run { rps, p50_us, p99_us });
        run.with_context(|| format!("wrk printed what is not understood: {said}"))
    }
}

/// `1.25ms` in microseconds.
fn microseconds(text: &str) -> Option<f64> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit);
    let each = match unit {
        "us" => 1.0,
        "ms" => 1_000.0,
        "s" => 1_000_000.0,
        _ => return None,
    };
    number.parse::<f64>().ok().map(|n| n * each)
}
