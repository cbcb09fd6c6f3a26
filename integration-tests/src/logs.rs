//! What the bots write about themselves: a line begins with the time and the level.

/// The lines of a bot's log that it wrote as errors: a human would have to look. What a line quotes, and what the server beside the
/// bot writes into the same file, may say ERROR too.
pub fn errors(log: &str) -> impl Iterator<Item = &str> {
    log.lines().filter(|line| line.split_whitespace().nth(1) == Some("ERROR"))
}

#[cfg(test)]
mod tests {
    use super::errors;

    #[test]
    fn an_error_is_told_by_its_level_and_not_by_what_it_quotes() {
        let log = "2026-01-01T00:00:00Z ERROR the lock is gone\n\
                   2026-01-01T00:00:01Z  WARN the server said ERROR: no such table\n\
                   2026-01-01 00:00:02.123 UTC [71] ERROR:  canceling statement\n";
        assert_eq!(errors(log).collect::<Vec<_>>(), ["2026-01-01T00:00:00Z ERROR the lock is gone"]);
    }
}
