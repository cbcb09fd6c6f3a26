//! What the version of an etcd member says about how it renews leases.

/// The first versions whose leader makes sure, before it answers a renewal, that it has not been replaced. Before them the leader
/// answers from its own memory: one whose disk has stalled does so after another was elected, which lets the lease run out.
const SINCE_3_4: u64 = 31;
const SINCE_3_5: u64 = 13;

/// Whether a member of this version renews a lease only while its leader is sure to lead.
pub(super) fn renews_only_as_leader(version: &str) -> bool {
    let figure = |part: &str| part.split(['-', '+']).next().and_then(|digits| digits.parse::<u64>().ok());
    let parts: Option<Vec<u64>> = version.trim().trim_start_matches('v').splitn(3, '.').map(figure).collect();
    match parts.as_deref() {
        Some([3, 4, patch]) => *patch >= SINCE_3_4,
        Some([3, 5, patch]) => *patch >= SINCE_3_5,
        Some([major, minor, _]) => (*major, *minor) >= (3, 6),
        Some(_) | None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::renews_only_as_leader;

    #[test]
    fn the_versions_that_make_sure_are_known() {
        let sure = ["3.4.31", "3.4.40", "3.5.13", "3.5.21", "3.6.0", "3.6.0-rc.1", "v3.6.4", "4.0.0"];
        assert_eq!(sure.map(renews_only_as_leader), [true; 8]);
        let old = ["3.4.23", "3.4.30", "3.5.0", "3.5.12", "3.3.27", "2.3.8", "", "3.6", "main", "3.5.x"];
        assert_eq!(old.map(renews_only_as_leader), [false; 10]);
    }
}
