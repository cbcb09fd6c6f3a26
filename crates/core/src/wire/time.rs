//! Wall-clock times as they stand in keys, for people to read. Nothing is decided by them but what an operator scheduled.

/// Milliseconds since 1970 as RFC 3339 in UTC; the end of time for what lies beyond it.
#[must_use]
pub fn rfc3339_from_unix_ms(ms: u64) -> String {
    let ms = i64::try_from(ms).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(ms).unwrap_or(jiff::Timestamp::MAX).to_string()
}

/// Milliseconds since 1970 of an RFC 3339 time with an offset; nothing for any other text or a time before 1970.
#[must_use]
pub fn unix_ms_from_rfc3339(text: &str) -> Option<u64> {
    let at: jiff::Timestamp = text.trim().parse().ok()?;
    u64::try_from(at.as_millisecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::{rfc3339_from_unix_ms, unix_ms_from_rfc3339};

    #[test]
    fn times_survive_the_journey() {
        let text = rfc3339_from_unix_ms(1_785_000_000_123);
        assert_eq!(text, "2026-07-25T17:20:00.123Z");
        assert_eq!(unix_ms_from_rfc3339(&text), Some(1_785_000_000_123));
        assert_eq!(unix_ms_from_rfc3339("2026-07-24T12:00:00+00:00"), Some(1_784_894_400_000));
        assert_eq!(unix_ms_from_rfc3339("tomorrow"), None);
    }
}
