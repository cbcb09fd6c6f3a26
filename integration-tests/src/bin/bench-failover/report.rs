//! The figures, for people and for programs.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::contender::{Fault, Tool};

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) rounds: usize,
    pub(crate) faults: Vec<Series>,
    pub(crate) idle: Vec<Idle>,
}

/// What it was measured on and with.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) memory_mib: u64,
    pub(crate) postgres: String,
    pub(crate) etcd: String,
    /// Nothing if it was not measured.
    pub(crate) patroni: Option<String>,
}

/// All rounds of one fault at one tool.
#[derive(Debug, Serialize)]
pub(crate) struct Series {
    pub(crate) fault: Fault,
    pub(crate) tool: Tool,
    /// Of the write gap, in milliseconds.
    pub(crate) min_ms: Option<u64>,
    pub(crate) median_ms: Option<u64>,
    pub(crate) max_ms: Option<u64>,
    pub(crate) rounds: Vec<Round>,
    pub(crate) failures: Vec<String>,
}

/// What one fault cost the client.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Round {
    /// The longest time without an acknowledged insert.
    pub(crate) gap_ms: u64,
    pub(crate) acknowledged: usize,
    /// Acknowledged rows that are not in the cluster any more.
    pub(crate) lost: usize,
    /// For how long two members acknowledged inserts at the same time.
    pub(crate) two_primaries_ms: u64,
    /// They still did when the watch ended.
    pub(crate) two_primaries_went_on: bool,
    pub(crate) note: String,
}

/// What one keeper costs while nothing happens: the average of a cluster's three.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Idle {
    pub(crate) tool: Tool,
    pub(crate) pss_mib: f64,
    pub(crate) cpu_seconds_per_minute: f64,
    pub(crate) etcd_requests_per_minute: f64,
}

/// The rounds and failures by fault and tool.
pub(crate) type Rounds = BTreeMap<(Fault, Tool), (Vec<Round>, Vec<String>)>;

impl Report {
    pub(crate) fn new(machine: Machine, rounds: usize, measured: Rounds, idle: Vec<Idle>) -> Self {
        let faults = measured.into_iter().map(|((fault, tool), (rounds, failures))| {
            let mut gaps: Vec<u64> = rounds.iter().map(|round| round.gap_ms).collect();
            gaps.sort_unstable();
            let (min_ms, median_ms, max_ms) = (gaps.first().copied(), median(&gaps), gaps.last().copied());
            Series { fault, tool, min_ms, median_ms, max_ms, rounds, failures }
        });
        Self { machine, rounds, faults: faults.collect(), idle }
    }

    /// Writes it as JSON.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        let json = serde_json::to_string_pretty(self).context("write the figures as JSON")?;
        fs::write(path, json + "\n").with_context(|| format!("write {}", path.display()))
    }

    /// How many rounds have failed.
    pub(crate) fn failures(&self) -> usize {
        self.faults.iter().map(|series| series.failures.len()).sum()
    }

    /// The tables. Ratios are of medians, to the first tool's.
    pub(crate) fn tables(&self) -> String {
        let Machine { cores, memory_mib, postgres, etcd, patroni } = &self.machine;
        let patroni = patroni.as_deref().unwrap_or("not measured");
        let mut text = format!(
            "\n{cores} cores, {:.0} GiB; {postgres}; {etcd}; Patroni {patroni}; {} rounds\n",
            *memory_mib as f64 / 1_024.0,
            self.rounds
        );
        let mut table = new_table(["FAULT", "KEPT BY", "MIN", "MEDIAN", "MAX", "RATIO", "LOST", "TWO PRIMARIES"]);
        for series in &self.faults {
            table.add_row(self.row(series));
        }
        text += &lines(&table);
        let mut table = new_table(["IDLE", "KEPT BY", "MEMORY (PSS)", "CPU S/MIN", "ETCD REQUESTS/MIN"]);
        for idle in &self.idle {
            table.add_row([
                String::from("each of 3"),
                idle.tool.to_string(),
                format!("{:.1} MiB", idle.pss_mib),
                format!("{:.2}", idle.cpu_seconds_per_minute),
                format!("{:.0}", idle.etcd_requests_per_minute),
            ]);
        }
        if !self.idle.is_empty() {
            text += &lines(&table);
        }
        text
    }

    fn row(&self, series: &Series) -> [String; 8] {
        let time = |ms: Option<u64>| ms.map_or_else(|| String::from("failed"), |ms| format!("{ms} ms"));
        let first = self.faults.iter().find(|other| other.fault == series.fault).and_then(|other| other.median_ms);
        let ratio = match (series.median_ms, first) {
            // Who goes on writing at two places has no gap, and nothing to be proud of.
            (Some(_), Some(_)) if series.rounds.iter().any(|round| round.two_primaries_ms > 0) => String::from("-"),
            (Some(own), Some(first)) if first > 0 => format!("{:.1}", own as f64 / first as f64),
            (Some(_) | None, Some(_) | None) => String::from("-"),
        };
        let (lost, acknowledged) =
            series.rounds.iter().fold((0, 0), |(lost, all), round| (lost + round.lost, all + round.acknowledged));
        let longest = series.rounds.iter().max_by_key(|round| round.two_primaries_ms);
        let two = match longest {
            Some(round) if round.two_primaries_went_on => format!("> {} ms, did not end", round.two_primaries_ms),
            Some(round) if round.two_primaries_ms > 0 => format!("{} ms", round.two_primaries_ms),
            Some(_) | None => String::from("never"),
        };
        [
            series.fault.to_string(),
            series.tool.to_string(),
            time(series.min_ms),
            time(series.median_ms),
            time(series.max_ms),
            ratio,
            format!("{lost} of {acknowledged}"),
            two,
        ]
    }
}

fn median(sorted: &[u64]) -> Option<u64> {
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get((sorted.len() - 1) / 2)?;
    Some(u64::midpoint(*lower, *upper))
}

fn new_table<const COLUMNS: usize>(header: [&str; COLUMNS]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(header);
    table
}

fn lines(table: &comfy_table::Table) -> String {
    let lines: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    format!("\n{lines}")
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7]), Some(7));
        assert_eq!(median(&[1, 2, 9]), Some(2));
        assert_eq!(median(&[1, 2, 4, 9]), Some(3));
    }
}
