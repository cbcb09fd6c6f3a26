//! What the bots write about themselves: a line begins with the time and the level. And what no fault may make a Postgres server write.

/// What a server says that finds its data damaged.
const DAMAGE: [&str; 6] = [
    "PANIC:",
    "invalid page in block",
    "could not read block",
    "unexpected data beyond EOF",
    "missing chunk number",
    "could not access status of transaction",
];

/// What a server gives up for that is out of space, or whose disk fails: no damage is done.
const DISK_FAILS: [&str; 2] = ["No space left on device", "Input/output error"];

/// The lines of a bot's log that it wrote as errors: a human would have to look. What a line quotes, and what the server beside the
/// bot writes into the same file, may say ERROR too.
pub fn errors(log: &str) -> impl Iterator<Item = &str> {
    log.lines().filter(|line| line.split_whitespace().nth(1) == Some("ERROR"))
}

/// The lines of a server's log that tell of damaged data.
pub fn damage(log: &str) -> impl Iterator<Item = &str> {
    let tells = |line: &&str| DAMAGE.iter().any(|text| line.contains(text));
    log.lines().filter(tells).filter(|line| !DISK_FAILS.iter().any(|text| line.contains(text)))
}

#[cfg(test)]
mod tests {
    use super::{damage, errors};

    #[test]
    fn damage_is_told_from_a_disk_that_is_full() {
        let log = "2026-01-01 00:00:00 UTC [7] PANIC:  could not write to file \"pg_wal/xlogtemp.7\": No space left on device\n\
                   2026-01-01 00:00:01 UTC [7] HINT:  some data might be corrupted\n\
                   2026-01-01 00:00:02 UTC [8] ERROR:  invalid page in block 7 of relation base/5/16384\n\
                   2026-01-01 00:00:03 UTC [9] PANIC:  could not locate a valid checkpoint record\n";
        let found: Vec<&str> = damage(log).collect();
        assert!(found.len() == 2 && found[0].contains("invalid page") && found[1].contains("checkpoint"), "{found:?}");
    }

    #[test]
    fn an_error_is_told_by_its_level_and_not_by_what_it_quotes() {
        let log = "2026-01-01T00:00:00Z ERROR the lock is gone\n\
                   2026-01-01T00:00:01Z  WARN the server said ERROR: no such table\n\
                   2026-01-01 00:00:02.123 UTC [71] ERROR:  canceling statement\n";
        assert_eq!(errors(log).collect::<Vec<_>>(), ["2026-01-01T00:00:00Z ERROR the lock is gone"]);
    }
}
