//! The figures, for people and for programs. A run can be one of several parts: what it did not measure stays as it was.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};
use fleet::usage::round;
use serde::{Deserialize, Serialize};

use crate::{
    contender::Tool,
    rows::{Fault, Measure},
};

/// What no run of this kind can show; it stands below every table.
const NOT_SHOWN: &str = "\
All members, etcd and the clients share one machine: what a network adds is not in the figures, and a busy neighbour is.
A killed node refuses connections at once; one without power would be silent. No watchdog device is used by anybody.
\"Both\" is from the first to the last write that the old primary acknowledged though it was asked for it after the new one had
acknowledged one, on one clock; it is watched for 10 s, and `>` says that it had not ended.
Parts of a table that were measured at different times (see the JSON) are comparable as far as the machine was alike.
";

/// Everything that was measured.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) faults: Vec<Series>,
    pub(crate) idle: Vec<Idle>,
}

/// What it was measured on and with.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) memory_mib: u64,
    pub(crate) postgres: String,
    pub(crate) etcd: String,
    pub(crate) patroni: String,
}

/// All rounds of one fault at one tool.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) fault: Fault,
    pub(crate) tool: Tool,
    /// Which of the figures of a round the following are of.
    pub(crate) measure: Measure,
    pub(crate) min_ms: Option<u64>,
    pub(crate) median_ms: Option<u64>,
    pub(crate) max_ms: Option<u64>,
    /// The median, in medians of the first tool; nothing where either is zero or none.
    pub(crate) ratio: Option<f64>,
    /// When it was measured, in seconds of Unix time.
    pub(crate) measured_unix_s: u64,
    pub(crate) rounds: Vec<Round>,
    pub(crate) failures: Vec<String>,
}

/// What one fault cost the client.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Round {
    /// The longest time without an acknowledged insert.
    pub(crate) gap_ms: u64,
    pub(crate) acknowledged: usize,
    /// Acknowledged rows that are not in the cluster any more.
    pub(crate) lost: usize,
    /// For how long two members acknowledged inserts.
    pub(crate) two_primaries_ms: u64,
    /// They still did when the watch ended.
    pub(crate) two_primaries_went_on: bool,
    pub(crate) note: String,
}

/// What keepers cost while nothing happens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Idle {
    pub(crate) tool: Tool,
    /// Of one member's keeper, on average.
    pub(crate) pss_mib: f64,
    /// Of one member's keeper, on average.
    pub(crate) cpu_seconds_per_minute: f64,
    /// Of the cluster of three.
    pub(crate) etcd_requests_per_minute: f64,
}

/// The rounds and failures by fault and tool.
pub(crate) type Rounds = BTreeMap<(Fault, Tool), (Vec<Round>, Vec<String>)>;

impl Report {
    pub(crate) fn new(machine: Machine, measured: Rounds, idle: Vec<Idle>, now_unix_s: u64) -> Self {
        let series = measured.into_iter().map(|((fault, tool), (rounds, failures))| {
            let measure = fault.measure();
            let mut figures: Vec<u64> = rounds.iter().map(|round| round.figure(measure)).collect();
            figures.sort_unstable();
            let (min_ms, median_ms, max_ms) = (figures.first().copied(), median(&figures), figures.last().copied());
            let (ratio, measured_unix_s) = (None, now_unix_s);
            Series { fault, tool, measure, min_ms, median_ms, max_ms, ratio, measured_unix_s, rounds, failures }
        });
        let mut report = Self { machine, faults: series.collect(), idle };
        report.compare();
        report
    }

    /// Adds what an earlier run on the same machine has left in `path` and this one has not measured.
    pub(crate) fn add_earlier(&mut self, path: &Path) {
        let earlier = fs::read_to_string(path).ok().and_then(|text| serde_json::from_str::<Self>(&text).ok());
        let Some(earlier) = earlier.filter(|earlier| earlier.machine == self.machine) else { return };
        let of = |series: &Series| (series.fault, series.tool);
        let known: Vec<_> = self.faults.iter().map(of).collect();
        self.faults.extend(earlier.faults.into_iter().filter(|series| !known.contains(&of(series))));
        self.faults.sort_by_key(of);
        let known: Vec<_> = self.idle.iter().map(|idle| idle.tool).collect();
        self.idle.extend(earlier.idle.into_iter().filter(|idle| !known.contains(&idle.tool)));
        self.idle.sort_by_key(|idle| idle.tool);
        self.compare();
    }

    fn compare(&mut self) {
        // Where the first tool has failed, nothing is compared with the second instead.
        let first = self.faults.iter().map(|series| series.tool).min();
        let of_first = self.faults.iter().filter(|series| Some(series.tool) == first);
        let firsts: BTreeMap<Fault, u64> =
            of_first.filter_map(|series| Some((series.fault, series.median_ms?))).collect();
        for series in &mut self.faults {
            let ratio = series.median_ms.zip(firsts.get(&series.fault)).filter(|(own, first)| *own > 0 && **first > 0);
            series.ratio = ratio.map(|(own, first)| round(own as f64 / *first as f64));
        }
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

    /// The tables: a row a fault, a column a tool.
    pub(crate) fn tables(&self) -> String {
        let Machine { cores, memory_mib, postgres, etcd, patroni } = &self.machine;
        let gib = *memory_mib as f64 / 1_024.0;
        let mut text = format!("\n{cores} cores, {gib:.0} GiB; {postgres}; {etcd}; Patroni {patroni}\n");
        let mut tools: Vec<Tool> = self.faults.iter().map(|series| series.tool).collect();
        tools.extend(self.idle.iter().map(|idle| idle.tool));
        tools.sort_unstable();
        tools.dedup();
        let mut faults: Vec<Fault> = self.faults.iter().map(|series| series.fault).collect();
        faults.dedup();
        if !faults.is_empty() {
            text += "\nseconds, min / median / max; ×: median, in medians of the first column\n";
            text += &self.table(&faults, &tools, |series| series.times());
            text += "\nacknowledged writes that were lost, of all\n";
            text += &self.table(&faults, &tools, |series| series.losses());
        }
        if !self.idle.is_empty() {
            text += "\nidle: memory of a keeper (PSS) / its CPU s per minute / etcd requests per minute and cluster\n";
            let cells = self.idle.iter().map(|idle| {
                let Idle { pss_mib, cpu_seconds_per_minute, etcd_requests_per_minute, .. } = idle;
                format!("{pss_mib:.1} MiB / {cpu_seconds_per_minute:.2} / {etcd_requests_per_minute:.0}")
            });
            let mut table =
                new_table(["IDLE".to_owned()].into_iter().chain(self.idle.iter().map(|i| i.tool.to_string())));
            table.add_row(["idle agent".to_owned()].into_iter().chain(cells));
            text += &lines(&table);
        }
        text + "\n" + NOT_SHOWN
    }

    fn table(&self, faults: &[Fault], tools: &[Tool], cell: impl Fn(&Series) -> String) -> String {
        let head = ["FAULT", "MEASURED"].map(str::to_owned).into_iter();
        let mut table = new_table(head.chain(tools.iter().map(|tool| tool.to_string())));
        for fault in faults {
            let measured = match fault.measure() {
                Measure::Gap => "gap",
                Measure::Both => "both",
            };
            let cells = tools.iter().map(|tool| {
                let series = self.faults.iter().find(|series| series.fault == *fault && series.tool == *tool);
                series.map_or_else(|| String::from("-"), &cell)
            });
            table.add_row([fault.to_string(), measured.to_owned()].into_iter().chain(cells));
        }
        lines(&table)
    }
}

impl Round {
    fn figure(&self, measure: Measure) -> u64 {
        match measure {
            Measure::Gap => self.gap_ms,
            Measure::Both => self.two_primaries_ms,
        }
    }
}

impl Series {
    fn times(&self) -> String {
        let (Some(min), Some(median), Some(max)) = (self.min_ms, self.median_ms, self.max_ms) else {
            return String::from("failed");
        };
        let [min, median, max] = [min, median, max].map(|ms| format!("{:.2}", ms as f64 / 1_000.0));
        let ratio = self.ratio.map(|ratio| format!(" ×{ratio:.1}")).unwrap_or_default();
        let more = if self.rounds.iter().any(|round| round.two_primaries_went_on) { "> " } else { "" };
        // A figure of writes that went on means little where they went on at two places.
        let two = self.rounds.iter().map(|round| round.two_primaries_ms).max().filter(|_| self.measure == Measure::Gap);
        let two = two.filter(|ms| *ms > 0).map(|ms| format!(" (two primaries for {ms} ms)")).unwrap_or_default();
        let failed = match self.failures.len() {
            0 => String::new(),
            failed => format!(" ({failed} failed)"),
        };
        format!("{more}{min} / {median} / {max}{ratio}{two}{failed}")
    }

    fn losses(&self) -> String {
        let (lost, all) =
            self.rounds.iter().fold((0, 0), |(lost, all), round| (lost + round.lost, all + round.acknowledged));
        format!("{lost} of {all}")
    }
}

fn median(sorted: &[u64]) -> Option<u64> {
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get((sorted.len().checked_sub(1)?) / 2)?;
    Some(u64::midpoint(*lower, *upper))
}

fn new_table(header: impl Iterator<Item = String>) -> comfy_table::Table {
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
    use super::{Machine, Report, Round, Rounds, median};
    use crate::{contender::Tool, rows::Fault};

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7]), Some(7));
        assert_eq!(median(&[1, 2, 9]), Some(2));
        assert_eq!(median(&[1, 2, 4, 9]), Some(3));
    }

    #[test]
    fn a_part_replaces_what_it_measured_and_keeps_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("failover.json");
        let earlier = [(Fault::NodeLost, Tool::Bot, 4_000), (Fault::NodeLost, Tool::Patroni, 24_000)];
        report(&[earlier[0], earlier[1], (Fault::Switchover, Tool::Bot, 100)]).write(&path).unwrap();
        let mut now = report(&[(Fault::NodeLost, Tool::Bot, 3_000)]);
        now.add_earlier(&path);
        let seen: Vec<_> = now.faults.iter().map(|s| (s.fault, s.tool, s.median_ms.unwrap(), s.ratio)).collect();
        let (bot, patroni) = (Tool::Bot, Tool::Patroni);
        let switchover = (Fault::Switchover, bot, 100, Some(1.0));
        let node_lost = [(Fault::NodeLost, bot, 3_000, Some(1.0)), (Fault::NodeLost, patroni, 24_000, Some(8.0))];
        assert_eq!(seen, [switchover, node_lost[0], node_lost[1]]);
    }

    fn report(figures: &[(Fault, Tool, u64)]) -> Report {
        let text = String::new;
        let machine = Machine { cores: 2, memory_mib: 1, postgres: text(), etcd: text(), patroni: text() };
        let round = |gap_ms| Round {
            gap_ms,
            acknowledged: 1,
            lost: 0,
            two_primaries_ms: 0,
            two_primaries_went_on: false,
            note: String::new(),
        };
        let rounds: Rounds =
            figures.iter().map(|(fault, tool, ms)| ((*fault, *tool), (vec![round(*ms)], Vec::new()))).collect();
        Report::new(machine, rounds, Vec::new(), 0)
    }
}
