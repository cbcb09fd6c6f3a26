//! The parameters that a standby may not have lower than its primary had: it would refuse to start, or to replay. The control
//! file says what they were.

use std::{collections::BTreeMap, process::Command};

use super::node::Node;

/// The parameters, with their names in the control file and what they are if nobody sets them.
const FLOORS: &[(&str, &str, u64)] = &[
    ("max_connections", "max_connections setting:", 100),
    ("max_worker_processes", "max_worker_processes setting:", 8),
    ("max_wal_senders", "max_wal_senders setting:", 10),
    ("max_prepared_transactions", "max_prepared_xacts setting:", 0),
    ("max_locks_per_transaction", "max_locks_per_xact setting:", 64),
];

/// Raises what is too low for a standby on this data; says what was raised. The operator's lower values come into force with
/// the first restart after the primary has taken them.
pub(super) fn raise(node: &Node, parameters: &mut BTreeMap<String, String>) -> Vec<&'static str> {
    let mut command = Command::new(node.binaries.program("pg_controldata"));
    let told = command.arg("-D").arg(&node.data_dir).env("LC_ALL", "C").output();
    let told = told.map(|told| String::from_utf8_lossy(&told.stdout).into_owned()).unwrap_or_default();
    raise_to(&told, parameters)
}

fn raise_to(told: &str, parameters: &mut BTreeMap<String, String>) -> Vec<&'static str> {
    let mut raised = Vec::new();
    for (name, label, default) in FLOORS {
        let floor = told.lines().find_map(|line| line.strip_prefix(label)?.trim().parse::<u64>().ok());
        let wanted = parameters.get(*name).map_or(Some(*default), |value| value.trim().parse().ok());
        if let (Some(floor), Some(wanted)) = (floor, wanted)
            && wanted < floor
        {
            parameters.insert((*name).to_owned(), floor.to_string());
            raised.push(*name);
        }
    }
    raised
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::raise_to;

    #[test]
    fn a_standby_gets_no_less_than_its_primary_had() {
        let told = "wal_level setting:                    replica\n\
                    max_connections setting:              60\n\
                    max_worker_processes setting:         16\n\
                    max_wal_senders setting:              10\n";
        let mut parameters = BTreeMap::from([(String::from("max_connections"), String::from("40"))]);
        assert_eq!(raise_to(told, &mut parameters), ["max_connections", "max_worker_processes"]);
        assert_eq!((parameters["max_connections"].as_str(), parameters["max_worker_processes"].as_str()), ("60", "16"));
        assert!(raise_to(told, &mut parameters).is_empty());
        assert!(raise_to("nonsense", &mut BTreeMap::new()).is_empty());
    }
}
