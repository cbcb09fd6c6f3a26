//! Step logs, read while they are written: how much time was left on a lease each time that it was renewed.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

/// A step log that is followed to its end again and again, also when it begins anew.
#[derive(Debug)]
pub struct StepLog {
    path: PathBuf,
    file: Option<BufReader<File>>,
    /// What was read of a line that is not complete yet.
    partial: String,
    /// Until when each lease was sure to live, by its number, in milliseconds of the bot's clock.
    leases: BTreeMap<i64, u64>,
}

/// An answered renewal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewal {
    /// What the bot was.
    pub role: String,
    /// How long the lease would have lived without it, when the machine learned of the answer.
    pub left: Duration,
    /// For how much longer it lives with it.
    pub gained: Duration,
}

/// What is read of a line.
#[derive(Deserialize)]
struct Line {
    at: u64,
    event: Value,
    role: String,
}

impl StepLog {
    /// The log at `path`, which need not exist yet.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: None, partial: String::new(), leases: BTreeMap::new() }
    }

    /// The renewals since the last call.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn renewals(&mut self) -> Result<Vec<Renewal>> {
        let mut renewals = Vec::new();
        // The second time around, the log has begun anew.
        for _ in 0..2 {
            if self.file.is_none() {
                let Ok(file) = File::open(&self.path) else { break };
                self.file = Some(BufReader::new(file));
            }
            self.read_on(&mut renewals)?;
            if self.is_current() {
                break;
            }
            (self.file, self.partial) = (None, String::new());
        }
        Ok(renewals)
    }

    fn read_on(&mut self, renewals: &mut Vec<Renewal>) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        loop {
            file.read_line(&mut self.partial).with_context(|| format!("read {}", self.path.display()))?;
            if !self.partial.ends_with('\n') {
                return Ok(());
            }
            let line = std::mem::take(&mut self.partial);
            // Few steps are about leases, and each line holds the whole state.
            if line.contains("LeaseRenewed") || line.contains("LeaseGranted") {
                renewals.extend(lease_of(&line).and_then(|lease| renew(&mut self.leases, lease)));
            }
        }
    }

    /// Whether the file that is read is still the one that is written.
    fn is_current(&self) -> bool {
        let inode = |file: &BufReader<File>| file.get_ref().metadata().map(|data| data.ino()).ok();
        self.file.as_ref().and_then(inode) == std::fs::metadata(&self.path).map(|data| data.ino()).ok()
    }
}

/// A step about a lease: when, in which role, whose lease, until when it lives.
fn lease_of(line: &str) -> Option<(Line, i64, u64)> {
    let line: Line = serde_json::from_str(line).ok()?;
    let lease = find(&line.event, "LeaseRenewed").or_else(|| find(&line.event, "LeaseGranted"))?;
    let (number, until) = (lease["lease"].as_i64()?, lease["valid_until"].as_u64()?);
    Some((line, number, until))
}

fn renew(leases: &mut BTreeMap<i64, u64>, (line, number, until): (Line, i64, u64)) -> Option<Renewal> {
    let before = leases.insert(number, until)?;
    let ms = |from: u64, to: u64| Duration::from_millis(to.saturating_sub(from));
    Some(Renewal { role: line.role, left: ms(line.at, before), gained: ms(line.at, until) })
}

/// The value of a field, however deep.
fn find<'v>(value: &'v Value, field: &str) -> Option<&'v Value> {
    let fields = value.as_object()?;
    fields.get(field).or_else(|| fields.values().find_map(|value| find(value, field)))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, time::Duration};

    use super::{Renewal, StepLog};

    #[test]
    fn what_was_left_is_counted_to_the_end_that_the_lease_had_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("steps.jsonl");
        let mut log = StepLog::new(path.clone());
        assert!(log.renewals().unwrap().is_empty());
        fs::write(&path, line("LeaseGranted", 1_000, 5_990) + &line("LeaseRenewed", 2_600, 7_550) + "{\"at\": 3")
            .unwrap();
        let renewal = |left, gained| {
            let (left, gained) = (Duration::from_millis(left), Duration::from_millis(gained));
            Renewal { role: String::from("primary"), left, gained }
        };
        assert_eq!(log.renewals().unwrap(), [renewal(3_390, 4_950)]);
        fs::rename(&path, folder.path().join("steps.jsonl.1")).unwrap();
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(line("LeaseRenewed", 7_600, 12_500).as_bytes()).unwrap();
        assert_eq!(log.renewals().unwrap(), [renewal(0, 4_900)], "it came too late");
    }

    fn line(event: &str, at: u64, until: u64) -> String {
        format!(
            "{{\"at\": {at}, \"event\": {{\"Dcs\": {{\"{event}\": {{\"lease\": 7, \"valid_until\": {until}}}}}}}, \
             \"role\": \"primary\", \"actions\": [], \"state\": {{}}}}\n"
        )
    }
}
