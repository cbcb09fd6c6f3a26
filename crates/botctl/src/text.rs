//! Figures and columns for people: durations, bytes, short commits, plain tables, one-line diffs.

use bots_core::machine::Span;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::Value;

/// How many hex digits of a commit people read.
const SHORT_SHA: usize = 7;

/// The longest diff that is computed by the exact, quadratic method.
const DIFF_LINES_MAX: usize = 2_000;

/// A length of time.
pub(crate) fn duration(ms: u64) -> String {
    const DAY_MS: u64 = 86_400_000;
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{} s", ms / 1_000),
        60_000..DAY_MS => Span::from_millis(ms).to_string(),
        _ => format!("{} d {} h", ms / DAY_MS, ms % DAY_MS / 3_600_000),
    }
}

/// A number of bytes.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n < 1_024 {
        return format!("{n} B");
    }
    let (mut whole, mut tenths, mut unit) = (n, 0, 0);
    for (i, _) in UNITS.iter().enumerate() {
        if whole < 1_024 {
            break;
        }
        (tenths, whole, unit) = (whole % 1_024 * 10 / 1_024, whole / 1_024, i);
    }
    format!("{whole}.{tenths} {}", UNITS[unit])
}

/// The first digits of a commit.
pub(crate) fn short(sha: &str) -> &str {
    sha.get(..SHORT_SHA).unwrap_or(sha)
}

/// A table without borders: a line of headings and a line a row, columns two spaces apart, no space at line ends.
pub(crate) fn table(headings: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(headings.to_vec()).add_rows(rows);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    text.truncate(text.trim_end().len());
    text
}

/// The lines that differ, with `-` and `+`, and one line of context around them.
pub(crate) fn diff(old: &str, new: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    if old.len() > DIFF_LINES_MAX || new.len() > DIFF_LINES_MAX {
        return format!("({} lines become {} lines)", old.len(), new.len());
    }
    // Lengths of the longest common subsequences of all tails.
    let mut common = vec![vec![0_usize; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] =
                if old[i] == new[j] { common[i + 1][j + 1] + 1 } else { common[i + 1][j].max(common[i][j + 1]) };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            lines.push((' ', old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || i < old.len() && common[i + 1][j] >= common[i][j + 1] {
            lines.push(('-', old[i]));
            i += 1;
        } else {
            lines.push(('+', new[j]));
            j += 1;
        }
    }
    let near = |at: usize| lines[at.saturating_sub(1)..(at + 2).min(lines.len())].iter().any(|(sign, _)| *sign != ' ');
    let shown = lines.iter().enumerate().filter(|(at, _)| near(*at));
    shown.map(|(_, (sign, line))| format!("{sign} {line}\n")).collect()
}

/// A value as YAML text, with a line end.
pub(crate) fn yaml(value: &impl serde::Serialize) -> String {
    match serde_saphyr::to_string(value) {
        Ok(text) if text.ends_with('\n') => text,
        Ok(text) => format!("{text}\n"),
        Err(error) => format!("# not to be written as YAML: {error}\n"),
    }
}

/// A value as indented JSON text, with a line end.
pub(crate) fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).unwrap_or_else(|e| Value::from(e.to_string()).to_string()) + "\n"
}

#[cfg(test)]
mod tests {
    use super::{bytes, diff, duration, short, table};

    #[test]
    fn figures_read_well() {
        let read = [0, 999, 59_999, 61_000, 7_260_000, 90_000_000].map(duration);
        assert_eq!(read, ["0 ms", "999 ms", "59 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"]);
        let read = [0, 1_023, 1_024, 1_536, 16_777_216, u64::MAX].map(bytes);
        assert_eq!(read, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "16.0 MiB", "16383.9 PiB"]);
        assert_eq!((short("0123456789"), short("ab")), ("0123456", "ab"));
    }

    #[test]
    fn tables_have_no_space_at_line_ends() {
        let text = table(&["A", "LONG"], &[1], vec![vec![String::from("x"), String::from("1")]]);
        assert_eq!(text, "A  LONG\nx     1");
    }

    #[test]
    fn a_diff_shows_what_changes_and_a_line_around() {
        let old = "ttl: 5\nloop_wait: 10\npostgresql:\n  use_pg_rewind: true\n";
        let new = "ttl: 4\nloop_wait: 10\npostgresql:\n  use_pg_rewind: true\n  use_slots: true\n";
        assert_eq!(
            diff(old, new),
            "- ttl: 5\n+ ttl: 4\n  loop_wait: 10\n    use_pg_rewind: true\n+   use_slots: true\n"
        );
        assert_eq!(diff(old, old), "");
    }
}
