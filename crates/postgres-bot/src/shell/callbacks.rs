//! Callbacks: programs of the operator's that are told what has become of the server, in Patroni's words. They are told after the
//! fact, and never waited for; one that still runs when there is more to tell is ended.

use std::{collections::BTreeMap, process::Stdio};

use serde_json::Value;
use tokio::process::Child;

use super::tool::clean_command;
use crate::machine::{Postgres, State};

/// What a callback is told of; its name in the configuration, too.
const NAMES: [&str; 5] = ["on_start", "on_stop", "on_restart", "on_reload", "on_role_change"];

/// The programs, each with its own arguments, by what they are told of.
pub(super) type Programs = BTreeMap<&'static str, Vec<String>>;

/// Tells them.
#[derive(Debug)]
pub(super) struct Callbacks {
    programs: Programs,
    scope: String,
    told: Told,
    running: Option<Child>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Told {
    up: bool,
    /// The last role that it was up in.
    primary: Option<bool>,
    restarting: bool,
    reloads: u64,
}

impl Callbacks {
    /// Nothing has been told yet.
    pub(super) fn new(programs: Programs, scope: &str) -> Self {
        Self { programs, scope: scope.to_owned(), told: Told::default(), running: None }
    }

    /// Takes note of a step; `reloads` counts how often the server was told to read its files again.
    pub(super) fn note(&mut self, state: &State, reloads: u64) {
        if let Some((name, primary)) = self.told.news(state, reloads) {
            self.tell(name, if primary { "primary" } else { "replica" });
        }
    }

    fn tell(&mut self, name: &'static str, role: &str) {
        let Some((program, arguments)) = self.programs.get(name).and_then(|words| words.split_first()) else { return };
        if let Some(running) = &mut self.running
            && matches!(running.try_wait(), Ok(None))
        {
            tracing::warn!("a callback still runs: it is ended for the next one");
            let _gone_by_itself = running.start_kill();
        }
        let mut command = clean_command(program);
        command.args(arguments).args([name, role, &self.scope]).stdin(Stdio::null()).stdout(Stdio::null());
        match command.spawn() {
            Ok(child) => {
                tracing::info!(name, role, "callback");
                self.running = Some(child);
            }
            Err(error) => tracing::error!(name, program, %error, "a callback cannot be started"),
        }
    }
}

impl Told {
    /// What there is to tell, with whether the server is or was a primary.
    fn news(&mut self, state: &State, reloads: u64) -> Option<(&'static str, bool)> {
        let before = *self;
        let primary = match state.postgres() {
            Postgres::Up(server) => Some(!server.in_recovery),
            // On its way, or silent for a moment: nothing is known to have changed.
            Postgres::Starting | Postgres::Silent => return None,
            Postgres::Down => None,
        };
        *self = Self {
            up: primary.is_some(),
            primary: primary.or(before.primary),
            restarting: state.is_restarting(),
            reloads,
        };
        match (before.up, primary) {
            (_, Some(now)) if before.primary.is_some_and(|was| was != now) => Some(("on_role_change", now)),
            (false, Some(now)) if before.restarting => Some(("on_restart", now)),
            (false, Some(now)) => Some(("on_start", now)),
            (true, Some(now)) if before.reloads != reloads => Some(("on_reload", now)),
            (true, None) if !self.restarting => Some(("on_stop", before.primary == Some(true))),
            (true | false, _) => None,
        }
    }
}

/// Reads `postgresql.callbacks`.
///
/// # Errors
/// One line that names the field and the fix.
pub(super) fn programs(section: Option<&Value>) -> Result<Programs, String> {
    let mut out = Programs::new();
    let map = match section {
        Some(Value::Object(map)) => map,
        None | Some(Value::Null) => return Ok(out),
        Some(other) => return Err(format!("postgresql.callbacks is {other}: it must be a mapping")),
    };
    for (field, value) in map {
        let Some(name) = NAMES.into_iter().find(|name| name == field) else {
            return Err(format!("postgresql.callbacks.{field}: nobody knows it: use one of {}", NAMES.join(", ")));
        };
        let words = value.as_str().and_then(split).filter(|words| !words.is_empty());
        let bad = || format!("postgresql.callbacks.{field} is {value}: use the path of a program, with arguments");
        out.insert(name, words.ok_or_else(bad)?);
    }
    Ok(out)
}

/// Splits a command into words as a shell does: at blanks that are not within quotes.
fn split(command: &str) -> Option<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in command.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{programs, split};

    #[test]
    fn a_command_is_split_as_a_shell_splits_it() {
        let words = |text: &str| split(text).unwrap_or_default().join("|");
        assert_eq!(words("/bin/a  b 'c d' \"e'f\" ''"), "/bin/a|b|c d|e'f|");
        assert_eq!(split("a 'b"), None);
    }

    #[test]
    fn callbacks_are_read_and_what_cannot_be_one_is_named() {
        let read = programs(Some(&json!({"on_start": "/bin/tell me", "on_role_change": "/bin/vip"}))).expect("good");
        assert_eq!(read["on_start"], ["/bin/tell", "me"]);
        let wrong = programs(Some(&json!({"on_strat": "/bin/x"}))).expect_err("no such callback");
        assert!(wrong.contains("on_strat") && wrong.contains("on_start"), "{wrong}");
        assert!(programs(Some(&json!({"on_stop": 1}))).expect_err("no path").contains("on_stop"));
    }
}
