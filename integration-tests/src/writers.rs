//! A client that inserts all the time, at every member at once: what it can write, where, and for how long it cannot.
//!
//! One connection a member. Nobody tells the client who is primary: it tries, so that two members that both take writes
//! are seen, and so that no proxy's or pool's delay is in the figures.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, Statement, error::SqlState};

use crate::{sql::Login, wait::until};

/// Between two attempts at one member: the resolution of what is measured. Shorter, and the attempts at a server that
/// starts (each costs it a process) take the processor that it starts with.
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(10);

/// A statement that has not ended by then is given up, with its connection.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(2);

/// A member that has acknowledged nothing for longer than this has stopped taking writes.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// The table that is written to.
const TABLE: &str = "bench_writes";

/// The timeline that a primary writes on: the first part of the name of its present log file.
const TIMELINE: &str = "('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int";

/// How much log it has written.
const POSITION: &str = "(pg_current_wal_insert_lsn() - '0/0')::bigint";

/// The running client.
#[derive(Debug)]
pub struct Writers {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    began: Instant,
    stop: AtomicBool,
    next: AtomicI64,
    acknowledged: Mutex<Vec<Acknowledged>>,
}

/// A write that a server has acknowledged. Times count from the client's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acknowledged {
    /// Its unique number.
    pub id: i64,
    /// The port of the server.
    pub port: u16,
    /// The timeline that the server wrote it on. Each promotion begins a new one, with a greater number.
    pub timeline: i32,
    /// How much log the server had written with it, in bytes.
    pub position: i64,
    /// When it was sent.
    pub sent: Duration,
    /// When the answer came.
    pub at: Duration,
}

/// One member's connection.
struct Session {
    client: Client,
    /// Set by every notice that the server sends.
    noticed: Arc<AtomicBool>,
    /// How to insert; nothing until the server has said that it is no replica.
    insert: Option<Statement>,
}

impl Writers {
    /// Makes the table and starts to write; returns when a write is acknowledged.
    ///
    /// # Errors
    /// If no server takes writes in time.
    pub async fn start(login: &Login, deadline: Duration) -> Result<Self> {
        login.execute(&format!("CREATE TABLE IF NOT EXISTS {TABLE} (id bigint PRIMARY KEY)")).await?;
        let client = login.writable().await?;
        let first = client.query_one(&format!("SELECT coalesce(max(id), 0) + 1 FROM {TABLE}"), &[]).await;
        let first: i64 = first.context("ask for the next number")?.get(0);
        let shared = Arc::new(Shared {
            began: Instant::now(),
            stop: AtomicBool::new(false),
            next: AtomicI64::new(first),
            acknowledged: Mutex::new(Vec::new()),
        });
        let mut tasks = JoinSet::new();
        for port in &login.ports {
            tasks.spawn(write(login.at(*port), *port, Arc::clone(&shared)));
        }
        let writers = Self { shared, tasks };
        writers.acknowledged_by(None, Duration::ZERO, deadline).await?;
        Ok(writers)
    }

    /// Now, on the clock of the acknowledged writes.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.shared.began.elapsed()
    }

    /// Waits for a write that was sent after `moment` and acknowledged by the server at `port`, or by any.
    ///
    /// # Errors
    /// If there is none in time.
    pub async fn acknowledged_by(&self, port: Option<u16>, moment: Duration, deadline: Duration) -> Result<()> {
        until(&format!("a write is acknowledged by {port:?}"), deadline, || async {
            let all = self.shared.acknowledged();
            let new = all.iter().rev().take_while(|w| w.at > moment);
            let found = new.filter(|w| w.sent > moment).any(|w| port.is_none_or(|port| port == w.port));
            if found { Ok(()) } else { Err(format!("{} writes, none of them", all.len())) }
        })
        .await
    }

    /// Stops, and yields all that was acknowledged, in the order of the answers.
    ///
    /// # Errors
    /// If a task has panicked.
    pub async fn finish(mut self) -> Result<Vec<Acknowledged>> {
        self.shared.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.context("the writing task ends well")?;
        }
        let mut all = self.shared.acknowledged().clone();
        all.sort_by_key(|w| w.at);
        Ok(all)
    }
}

/// How many of `acknowledged` are not in the cluster any more.
///
/// # Errors
/// If the rows cannot be read.
pub async fn lost(login: &Login, acknowledged: &[Acknowledged]) -> Result<usize> {
    Ok(missing(login, acknowledged).await?.len())
}

/// Those of `acknowledged` that are not in the cluster any more.
///
/// # Errors
/// If the rows cannot be read.
pub async fn missing(login: &Login, acknowledged: &[Acknowledged]) -> Result<Vec<Acknowledged>> {
    let client = login.writable().await?;
    let first = acknowledged.iter().map(|w| w.id).min().unwrap_or(0);
    let rows = client.query(&format!("SELECT id FROM {TABLE} WHERE id >= $1"), &[&first]).await;
    let present: BTreeSet<i64> = rows.context("read the rows")?.iter().map(|row| row.get(0)).collect();
    Ok(acknowledged.iter().filter(|w| !present.contains(&w.id)).copied().collect())
}

/// The most that was lost of one timeline, in bytes of its log: from the first to the last write that is `missing`.
#[must_use]
pub fn missing_bytes(missing: &[Acknowledged]) -> i64 {
    let mut spans: BTreeMap<i32, (i64, i64)> = BTreeMap::new();
    for write in missing {
        let span = spans.entry(write.timeline).or_insert((write.position, write.position));
        *span = (span.0.min(write.position), span.1.max(write.position));
    }
    spans.values().map(|(first, last)| last - first).max().unwrap_or_default()
}

/// The longest time without an acknowledged write that ended after `since`. The writes are in the order of the answers.
#[must_use]
pub fn longest_gap(acknowledged: &[Acknowledged], since: Duration) -> Duration {
    let pairs = acknowledged.windows(2).filter(|w| w[1].at > since);
    pairs.map(|w| w[1].at - w[0].at).max().unwrap_or_default()
}

/// For how long two servers acknowledged writes: from the first to the last write that went to an older timeline, was sent after
/// the first answer on a newer one, and was acknowledged all the same. A timeline that two servers write on counts likewise.
///
/// This is exact, whatever the pauses between writes: a server that was asked after its successor had answered, and said yes,
/// was writable when it must not have been. An answer that was only held up on its way is none of these.
#[must_use]
pub fn two_writable(acknowledged: &[Acknowledged]) -> Duration {
    let mut firsts: BTreeMap<(i32, u16), Duration> = BTreeMap::new();
    for write in acknowledged {
        let first = firsts.entry((write.timeline, write.port)).or_insert(write.at);
        *first = write.at.min(*first);
    }
    let too_late = |write: &&Acknowledged| {
        let mut successors = firsts.iter().filter(|((timeline, port), _)| {
            *timeline > write.timeline || *timeline == write.timeline && *port != write.port
        });
        successors.any(|(_, first)| write.sent > *first)
    };
    let late: Vec<&Acknowledged> = acknowledged.iter().filter(too_late).collect();
    let (from, to) = (late.iter().map(|write| write.sent).min(), late.iter().map(|write| write.at).max());
    // One alone is one too many, however quick it was.
    from.zip(to).map(|(from, to)| (to - from).max(Duration::from_millis(1))).unwrap_or_default()
}

/// Whether two servers still took writes at the end.
#[must_use]
pub fn two_writable_to_the_end(acknowledged: &[Acknowledged], end: Duration) -> bool {
    let last = acknowledged.iter().rev().take_while(|w| w.at + PAUSE_MAX > end);
    last.map(|w| w.port).collect::<BTreeSet<_>>().len() > 1
}

impl Shared {
    fn acknowledged(&self) -> MutexGuard<'_, Vec<Acknowledged>> {
        self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn write(login: Login, port: u16, shared: Arc<Shared>) {
    let mut session = None;
    while !shared.stop.load(Ordering::Relaxed) {
        let attempt = tokio::time::timeout(STATEMENT_DEADLINE, attempt(&login, port, &mut session, &shared));
        if !matches!(attempt.await, Ok(Ok(()))) {
            session = None;
        }
        tokio::time::sleep(ATTEMPT_INTERVAL).await;
    }
}

async fn attempt(login: &Login, port: u16, session: &mut Option<Session>, shared: &Shared) -> Result<()> {
    let session = match session {
        Some(session) => session,
        None => session.insert(connect(login, port).await?),
    };
    let Some(insert) = session.insert.clone() else {
        let replica = session.client.query_one("SELECT pg_is_in_recovery()", &[]).await.context("ask for the role")?;
        if !replica.get::<_, bool>(0) {
            let insert = format!("INSERT INTO {TABLE} VALUES ($1) RETURNING {TIMELINE}, {POSITION}");
            session.insert = Some(session.client.prepare(&insert).await.context("prepare the insert")?);
        }
        return Ok(());
    };
    // A lost answer says nothing about the row: its number is never used again.
    let id = shared.next.fetch_add(1, Ordering::Relaxed);
    session.noticed.store(false, Ordering::Relaxed);
    let sent = shared.began.elapsed();
    match session.client.query_one(&insert, &[&id]).await {
        Ok(row) => {
            // A commit that was cancelled while it waited for its replicas succeeds too, with a warning alone.
            ensure!(!session.noticed.load(Ordering::Relaxed), "the server has answered with a warning");
            let (timeline, position) = (row.get(0), row.get(1));
            shared.acknowledged().push(Acknowledged { id, port, timeline, position, sent, at: shared.began.elapsed() });
            Ok(())
        }
        Err(error) if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => {
            session.insert = None;
            Ok(())
        }
        Err(error) => Err(error).context("insert"),
    }
}

async fn connect(login: &Login, port: u16) -> Result<Session> {
    let mut config = Config::new();
    config.user(&login.user).password(&login.password).dbname(&login.database).application_name("bench");
    config.host(login.host(port)).port(port).connect_timeout(STATEMENT_DEADLINE);
    let (client, mut connection) = config.connect(NoTls).await.context("connect")?;
    let noticed = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&noticed);
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            if matches!(message, AsyncMessage::Notice(_)) {
                seen.store(true, Ordering::Relaxed);
            }
        }
    });
    Ok(Session { client, noticed, insert: None })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Acknowledged, longest_gap, two_writable, two_writable_to_the_end};

    #[test]
    fn the_gap_is_the_longest_that_ended_after_the_fault() {
        let writes = [at(1, 0), at(1, 3_000), at(1, 3_010), at(2, 4_010), at(2, 4_020)];
        assert_eq!(longest_gap(&writes, ms(3_005)), ms(1_000));
        assert_eq!(longest_gap(&writes, ms(2_000)), ms(3_000));
        assert_eq!(longest_gap(&writes, ms(9_000)), ms(0));
    }

    #[test]
    fn servers_that_take_over_from_each_other_are_never_two() {
        assert_eq!(two_writable(&[at(1, 0), at(1, 10), at(2, 10), at(2, 20)]), ms(0));
        let there_and_back = [on(1, 1, 0), on(1, 1, 10), on(2, 2, 150), on(2, 2, 200), on(1, 3, 350), on(1, 3, 400)];
        assert_eq!(two_writable(&there_and_back), ms(0));
    }

    #[test]
    fn servers_that_write_side_by_side_are_two_as_long_as_both_do() {
        let both = [at(1, 0), at(2, 100), at(1, 200), at(2, 300), at(1, 400), at(2, 500)];
        assert_eq!(two_writable(&both), ms(200));
        assert!(two_writable_to_the_end(&both, ms(600)));
        assert!(!two_writable_to_the_end(&both, ms(900)), "only the second server still did");
    }

    #[test]
    fn an_answer_that_was_held_up_is_no_second_primary_and_one_to_a_later_question_is() {
        let held_up = Acknowledged { sent: ms(90), ..at(1, 5_000) };
        assert_eq!(two_writable(&[at(1, 0), at(2, 100), at(2, 4_900), held_up]), ms(0));
        let late = Acknowledged { sent: ms(4_990), ..at(1, 5_000) };
        assert_eq!(two_writable(&[at(1, 0), at(2, 100), at(2, 4_900), late]), ms(10));
    }

    #[test]
    fn two_servers_on_one_timeline_are_two() {
        assert_eq!(two_writable(&[on(1, 1, 0), on(2, 1, 100), on(2, 1, 200)]), ms(100));
    }

    /// An answer of a server that writes on the timeline of its own number.
    fn at(port: u16, at: u64) -> Acknowledged {
        on(port, port.into(), at)
    }

    fn on(port: u16, timeline: i32, at: u64) -> Acknowledged {
        Acknowledged { id: 0, port, timeline, position: 0, sent: ms(at), at: ms(at) }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }
}
