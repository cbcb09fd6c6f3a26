//! Parameters that the server's own program does not take. One of them in a file keeps a running server from taking in all the
//! others, and a stopped one from starting: so they are found before anything is written, and left out.

use std::{
    collections::BTreeMap,
    fs,
    process::{Command, Output},
};

use super::{files, node::Node, quote};
use crate::machine::STANDBY_NAMES;

/// What is passed over at the first look (a name that is not known ends it before values are looked at), and then a few more.
const LOOKS_MAX: usize = 8;

/// Parameters that we set ourselves, over and over: they are sound.
const OUR_OWN: [&str; 3] = [STANDBY_NAMES, "primary_slot_name", "hot_standby_feedback"];

/// What decides where complaints go and in what language: applied last, so that the complaints about the others can be read.
const OF_THE_LOG: [&str; 4] = ["log", "lc_", "syslog", "event_source"];

/// What was found out about one set of parameters.
#[derive(Debug, Default)]
pub(super) struct Sound {
    checked: Option<BTreeMap<String, String>>,
    /// By name, in the server's words.
    refused: BTreeMap<String, String>,
}

impl Sound {
    /// Takes out what the server would refuse; says what that is if it is news.
    pub(super) fn sift(
        &mut self,
        node: &Node,
        parameters: &mut BTreeMap<String, String>,
    ) -> Option<BTreeMap<String, String>> {
        let ours = |name: &String| OUR_OWN.contains(&name.as_str()) || !files::may_be_set(name);
        let asked: BTreeMap<String, String> = parameters
            .iter()
            .filter(|(name, _)| !ours(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        let mut news = None;
        if self.checked.as_ref() != Some(&asked) {
            let refused = look(node, asked.clone());
            self.checked = Some(asked);
            if refused != self.refused {
                self.refused = refused;
                news = Some(self.refused.clone());
            }
        }
        parameters.retain(|name, _| !self.refused.contains_key(name));
        news
    }
}

/// What the server's program says of these parameters, by name; nothing of what it cannot be asked about.
fn look(node: &Node, mut parameters: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut refused = BTreeMap::new();
    for _ in 0..LOOKS_MAX {
        let said = match ask(node, &parameters) {
            Ok(output) if output.status.success() => break,
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => {
                tracing::warn!(%error, "the parameters of Postgres cannot be checked");
                break;
            }
        };
        let found: Vec<(String, String)> = said.lines().filter_map(complaint).collect();
        let before = parameters.len();
        for (name, why) in found {
            let named = parameters.keys().find(|known| known.eq_ignore_ascii_case(&name)).cloned();
            if let Some(named) = named {
                parameters.remove(&named);
                tracing::error!(name = named, why, "a parameter of Postgres is left out");
                refused.insert(named, why);
            }
        }
        if parameters.len() == before {
            tracing::warn!(said, "Postgres does not take its parameters, and does not say which");
            break;
        }
    }
    refused
}

/// Has the server's program read a file of these parameters, and nothing else: it ends before it looks at any data.
fn ask(node: &Node, parameters: &BTreeMap<String, String>) -> anyhow::Result<Output> {
    let of_the_log = |name: &str| OF_THE_LOG.iter().any(|prefix| name.to_ascii_lowercase().starts_with(prefix));
    let (last, first): (Vec<_>, Vec<_>) = parameters.iter().partition(|(name, _)| of_the_log(name));
    let mut text = String::new();
    for (name, value) in first.into_iter().chain(last) {
        text += &format!("{name} = {}\n", quote::conf(value));
    }
    let file = node.run_dir.join("parameters.conf");
    files::private_dir(&node.run_dir)?;
    files::replace(&file, &text, 0o600)?;
    let mut command = Command::new(node.binaries.program("postgres"));
    command.env_clear().env("LC_ALL", "C").args(["-C", "port", "-D"]).arg(&node.run_dir);
    let output = command.arg("-c").arg(format!("config_file={}", file.display())).output();
    let _best_effort = fs::remove_file(&file);
    Ok(output?)
}

/// The parameter that a line of Postgres complains about, and how.
fn complaint(line: &str) -> Option<(String, String)> {
    let (_, why) = line.split_once("LOG:  ").or_else(|| line.split_once("FATAL:  "))?;
    let (_, rest) = why.split_once("parameter \"")?;
    let (name, _) = rest.split_once('"')?;
    // Where the file stands is ours to know.
    let why = why.split(" in file \"").next().unwrap_or(why);
    Some((name.to_owned(), why.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::complaint;

    #[test]
    fn the_server_names_what_it_does_not_take() {
        let named = |line: &str| complaint(line).expect("a complaint");
        let unknown = "2026-01-01 00:00:00 GMT [7] LOG:  unrecognized configuration parameter \"max_conections\" in file \"/x\" line 2";
        assert_eq!(named(unknown).0, "max_conections");
        assert_eq!(named(unknown).1, "unrecognized configuration parameter \"max_conections\"");
        let range = "t LOG:  5000000 is outside the valid range for parameter \"max_connections\" (1 .. 262143)";
        assert_eq!(named(range).0, "max_connections");
        assert_eq!(named("t LOG:  parameter \"fsync\" requires a Boolean value").0, "fsync");
        assert!(complaint("t LOG:  skipping missing configuration file \"/x/postgresql.auto.conf\"").is_none());
    }
}
