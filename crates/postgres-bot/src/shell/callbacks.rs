//! Callbacks: programs of the operator's that are told what has become of the server, in Patroni's words. They are told after the
//! fact, one after the other; the bot never waits for them. One that still runs when there is more to tell has a moment to finish:
//! ended at once, a slow machine's callbacks would hear only the last news.

use std::{
    collections::{BTreeMap, VecDeque},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bots_core::{
    machine::{Span, Time},
    shell::Clock,
};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;
use tokio::{process::Child, sync::Notify};

use super::tool::clean_command;
use crate::machine::{Postgres, State};

/// What a callback is told of; its name in the configuration, too.
const NAMES: [&str; 5] = ["on_start", "on_stop", "on_restart", "on_reload", "on_role_change"];

/// So long may a program keep others waiting. One that moves an address takes less; one that hangs must not hold up the next role.
const PATIENCE: Span = Span::from_secs(3);

/// So much is told late at most; of more, the oldest is dropped, for the last of it is what holds.
const WAITING_MAX: usize = 16;

/// How often the one that runs is looked at while others wait for it.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The same while none does: it may run for as long as it likes.
const LOOK_EVERY_QUIET: Duration = Duration::from_millis(500);

/// The programs, each with its own arguments, by what they are told of.
pub(super) type Programs = BTreeMap<&'static str, Vec<String>>;

/// Finds out what there is to tell, and has it told.
#[derive(Debug)]
pub(super) struct Callbacks {
    told: Told,
    teller: Arc<Mutex<Teller>>,
    /// There is more to tell.
    told_more: Arc<Notify>,
}

#[derive(Debug)]
struct Teller {
    programs: Programs,
    scope: String,
    running: Option<Child>,
    waiting: VecDeque<(&'static str, bool)>,
    /// Somebody sees to it that the one that runs is reaped, and the next one started.
    looked_after: bool,
    /// Since when something waits for the one that runs.
    waited_since: Option<Time>,
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
        let teller = Teller {
            programs,
            scope: scope.to_owned(),
            running: None,
            waiting: VecDeque::new(),
            looked_after: false,
            waited_since: None,
        };
        Self { told: Told::default(), teller: Arc::new(Mutex::new(teller)), told_more: Arc::default() }
    }

    /// Takes note of a step; `reloads` counts how often the server was told to read its files again.
    pub(super) fn note(&mut self, state: &State, reloads: u64) {
        if let Some((name, primary)) = self.told.news(state, reloads) {
            self.tell(name, primary);
        }
    }

    fn tell(&self, name: &'static str, primary: bool) {
        let mut teller = lock(&self.teller);
        teller.add(name, primary);
        teller.go_on();
        if teller.is_busy() && !teller.looked_after {
            teller.looked_after = true;
            tokio::spawn(look_after(Arc::clone(&self.teller), Arc::clone(&self.told_more)));
        }
        self.told_more.notify_one();
    }

    /// The bot ends: what waits is told without waiting.
    pub(super) fn finish(&self) {
        let mut teller = lock(&self.teller);
        while !teller.waiting.is_empty() {
            teller.tell_next();
        }
    }
}

/// Until nothing runs and nothing waits.
async fn look_after(teller: Arc<Mutex<Teller>>, told_more: Arc<Notify>) {
    loop {
        let pause = {
            let mut teller = lock(&teller);
            teller.go_on();
            if !teller.is_busy() {
                teller.looked_after = false;
                return;
            }
            if teller.waiting.is_empty() { LOOK_EVERY_QUIET } else { LOOK_EVERY }
        };
        // What waits is not to wait for the end of a long pause.
        let _sooner = tokio::time::timeout(pause, told_more.notified()).await;
    }
}

fn lock(teller: &Mutex<Teller>) -> MutexGuard<'_, Teller> {
    teller.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Teller {
    fn add(&mut self, name: &'static str, primary: bool) {
        if self.programs.contains_key(name) {
            self.waiting.push_back((name, primary));
        }
        if self.waiting.len() > WAITING_MAX {
            tracing::warn!("more callbacks wait than are told: the oldest is dropped");
            self.waiting.pop_front();
        }
    }

    /// Takes note of the one that has ended, and starts the next if it may start.
    fn go_on(&mut self) {
        self.note_end();
        while !self.waiting.is_empty() && self.is_free() {
            self.tell_next();
        }
    }

    fn is_busy(&self) -> bool {
        self.running.is_some() || !self.waiting.is_empty()
    }

    fn note_end(&mut self) {
        let Some(running) = &mut self.running else { return };
        match running.try_wait() {
            Ok(None) => return,
            Ok(Some(status)) if !status.success() => tracing::warn!(%status, "a callback failed"),
            Ok(Some(_)) | Err(_) => {}
        }
        self.running = None;
    }

    /// Whether the next may start: the last is done, or has had its time.
    fn is_free(&mut self) -> bool {
        self.note_end();
        let Some(running) = &self.running else { return true };
        let now = Clock::now();
        if now.since(*self.waited_since.get_or_insert(now)) < PATIENCE {
            return false;
        }
        let patience_ms = PATIENCE.as_millis();
        tracing::warn!(patience_ms, "a callback still runs: it is ended for the next one");
        end(running);
        true
    }

    fn tell_next(&mut self) {
        (self.running, self.waited_since) = (None, None);
        let Some((name, primary)) = self.waiting.pop_front() else { return };
        let Some((program, arguments)) = self.programs.get(name).and_then(|words| words.split_first()) else { return };
        let role = if primary { "primary" } else { "replica" };
        let mut command = clean_command(program);
        // A group of its own, so that it can be ended with what it has started.
        command
            .args(arguments)
            .args([name, role, &self.scope])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0);
        match command.spawn() {
            Ok(child) => {
                tracing::info!(name, role, "callback");
                self.running = Some(child);
            }
            Err(error) => tracing::error!(name, program, %error, "a callback cannot be started"),
        }
    }
}

/// Kills a program and what it has started; the runtime reaps it.
fn end(program: &Child) {
    if let Some(group) = program.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        let _gone_by_itself = kill_process_group(group, Signal::KILL);
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
    use std::{fs, iter, time::Duration};

    use rustix::process::Pid;
    use serde_json::json;

    use super::{Callbacks, LOOK_EVERY, Programs, WAITING_MAX, lock, programs, split};
    use crate::shell::processes;

    /// A busy machine needs a moment for anything.
    const PATIENCE_WITH_A_TEST: Duration = Duration::from_secs(20);

    /// Callbacks that append what they hear to a file, after what is to be done before.
    fn callbacks(folder: &tempfile::TempDir, before: &str) -> (Callbacks, impl Fn() -> String) {
        let heard = folder.path().join("heard");
        let script = format!("{before}; echo $0 $1 $2 >> {}", heard.display());
        let words: Vec<String> = ["/bin/sh", "-c", &script].map(str::to_owned).into();
        let programs: Programs = ["on_start", "on_stop"].map(|name| (name, words.clone())).into();
        (Callbacks::new(programs, "main"), move || fs::read_to_string(&heard).unwrap_or_default())
    }

    async fn until_all_are_told(callbacks: &Callbacks) {
        while !lock(&callbacks.teller).waiting.is_empty() || !lock(&callbacks.teller).is_free() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    #[tokio::test]
    async fn all_news_are_told_in_their_order_to_who_takes_its_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let (callbacks, heard) = callbacks(&folder, "sleep 0.1");
        for (name, primary) in [("on_start", true), ("on_reload", true), ("on_stop", true)] {
            callbacks.tell(name, primary);
        }
        until_all_are_told(&callbacks).await;
        assert_eq!(heard(), "on_start primary main\non_stop primary main\n");
    }

    #[tokio::test]
    async fn who_hangs_is_ended_with_what_it_started() {
        let folder = tempfile::tempdir().expect("a folder");
        let child = folder.path().join("child");
        let hang = format!("test $0 = on_stop || {{ sleep 1000 & echo $! > {}; wait; }}", child.display());
        let (callbacks, heard) = callbacks(&folder, &hang);
        callbacks.tell("on_start", false);
        callbacks.tell("on_stop", false);
        until_all_are_told(&callbacks).await;
        assert_eq!(heard(), "on_stop replica main\n");
        let child: i32 = fs::read_to_string(&child).expect("it was started").trim().parse().expect("a number");
        assert!(!Pid::from_raw(child).is_some_and(processes::lives), "what it started is gone");
    }

    #[tokio::test]
    async fn the_last_news_are_not_lost_when_there_are_too_many_or_the_bot_ends() {
        let folder = tempfile::tempdir().expect("a folder");
        let (callbacks, heard) = callbacks(&folder, "sleep 0.1");
        for (name, primary) in iter::repeat_n(("on_start", false), 2 * WAITING_MAX).chain([("on_stop", true)]) {
            callbacks.tell(name, primary);
        }
        assert_eq!(lock(&callbacks.teller).waiting.len(), WAITING_MAX);
        callbacks.finish();
        until_all_are_told(&callbacks).await;
        assert!(heard().contains("on_stop primary main\n"), "{}", heard());
    }

    #[tokio::test]
    async fn the_end_of_the_last_callback_is_seen_though_nothing_more_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let (callbacks, _heard) = callbacks(&folder, "sleep 0.1; exit 3");
        callbacks.tell("on_start", true);
        let seen = async {
            while lock(&callbacks.teller).is_busy() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::time::timeout(PATIENCE_WITH_A_TEST, seen).await.expect("its end is seen at once");
        assert!(!lock(&callbacks.teller).looked_after, "nothing is left to look after");
    }

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
