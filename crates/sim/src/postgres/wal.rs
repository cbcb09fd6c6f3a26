//! A write-ahead log with its timelines: what two servers have in common, and where they parted.

use bots_core::wire::{Lsn, Timeline};

/// Where a new cluster's log begins.
const BEGINNING: Lsn = Lsn(0x0100_0000);

/// A record. Its number is unique in the world: two logs that have it have everything before it in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// Which one.
    pub serial: u64,
    /// Where it ends.
    pub end: Lsn,
    /// The timeline that it was written on.
    pub timeline: Timeline,
}

/// A log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wal {
    records: Vec<Record>,
    /// Where each earlier timeline ended.
    switches: Vec<(Timeline, Lsn)>,
    timeline: Timeline,
}

impl Wal {
    /// The log of a new cluster.
    #[must_use]
    pub fn new(serial: u64) -> Self {
        let timeline = Timeline(1);
        Self { records: vec![Record { serial, end: BEGINNING, timeline }], switches: Vec::new(), timeline }
    }

    /// Its end.
    #[must_use]
    pub fn end(&self) -> Lsn {
        self.records.last().map_or(Lsn(0), |record| record.end)
    }

    /// Where its last record but so many ends.
    #[must_use]
    pub fn end_before(&self, last: usize) -> Lsn {
        let records = self.records.len().saturating_sub(last);
        self.records.get(..records.max(1)).and_then(<[Record]>::last).map_or(Lsn(0), |record| record.end)
    }

    /// Its newest timeline.
    #[must_use]
    pub const fn timeline(&self) -> Timeline {
        self.timeline
    }

    /// Each earlier timeline with where it was left, the oldest first.
    #[must_use]
    pub fn ancestry(&self) -> &[(Timeline, Lsn)] {
        &self.switches
    }

    /// How many records it has.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Whether it has this very record.
    #[must_use]
    pub fn has(&self, index: usize, serial: u64) -> bool {
        self.records.get(index).is_some_and(|record| record.serial == serial)
    }

    /// Writes a record of `size` bytes.
    pub fn append(&mut self, serial: u64, size: u64) {
        let end = Lsn(self.end().0 + size);
        self.records.push(Record { serial, end, timeline: self.timeline });
    }

    /// Whether `other` has everything that this log has.
    #[must_use]
    pub fn is_part_of(&self, other: &Self) -> bool {
        let Some(last) = self.records.last() else { return true };
        other.has(self.records.len() - 1, last.serial)
    }

    /// Takes over what `other` has beyond; says whether there was anything.
    pub fn catch_up(&mut self, other: &Self) -> bool {
        let before = self.records.len();
        self.records.extend(other.records.iter().skip(before));
        self.timeline = other.timeline;
        self.switches.clone_from(&other.switches);
        self.records.len() > before
    }

    /// Begins a new timeline here; says where.
    pub fn branch(&mut self, to: Timeline) -> Lsn {
        let at = self.end();
        self.switches.push((self.timeline, at));
        self.timeline = to;
        at
    }

    /// Up to where this log and `other` are the same, as their timelines tell.
    #[must_use]
    pub fn parted_from(&self, other: &Self) -> Lsn {
        let (mine, theirs) = (self.spans(), other.spans());
        let common = mine.iter().zip(&theirs).take_while(|(a, b)| a.0 == b.0 && a.1 == b.1).last();
        common.map_or(Lsn(0), |(a, b)| a.2.min(b.2))
    }

    /// Forgets everything after `at`.
    pub fn cut(&mut self, at: Lsn) {
        self.records.retain(|record| record.end <= at);
    }

    /// Each timeline with its beginning and its end.
    fn spans(&self) -> Vec<(Timeline, Lsn, Lsn)> {
        let mut begin = Lsn(0);
        let mut spans = Vec::new();
        for (timeline, end) in &self.switches {
            spans.push((*timeline, begin, *end));
            begin = *end;
        }
        spans.push((self.timeline, begin, Lsn(u64::MAX)));
        spans
    }
}

#[cfg(test)]
mod tests {
    use bots_core::wire::{Lsn, Timeline};

    use super::Wal;

    #[test]
    fn logs_part_where_the_first_of_them_branched() {
        let mut old = Wal::new(1);
        old.append(2, 100);
        let mut new = old.clone();
        let at = new.branch(Timeline(2));
        new.append(3, 50);
        old.append(4, 70);
        assert!(!old.is_part_of(&new));
        assert_eq!(old.parted_from(&new), at);
        old.cut(at);
        assert!(old.is_part_of(&new));
        assert!(old.catch_up(&new));
        assert_eq!((old.timeline(), old.end()), (Timeline(2), Lsn(at.0 + 50)));
    }
}
