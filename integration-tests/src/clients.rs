//! SQL clients that retry nothing: whatever a transaction of theirs meets, an application would have shown to its user.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls};

use crate::{
    sql::Login,
    wait::{millis, until},
};

/// The most patient application has given up by then; what is held for so long is stuck.
const TRANSACTION_DEADLINE: Duration = Duration::from_secs(30);

/// What a transaction does between its statements, as an application does: it is open for about as long.
const THINKING: Duration = Duration::from_millis(3);

/// Between two transactions of a client.
const PAUSE: Duration = Duration::from_millis(5);

/// How a client comes by a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connects {
    /// A new one for every transaction.
    EachTime,
    /// One that is kept between transactions, as pools do: one that is seen to be closed is replaced before it is used.
    Pooled,
}

/// Clients that run transactions, one after the other, each in a session of its own.
#[derive(Debug)]
pub struct Clients {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    done: Mutex<Vec<Done>>,
}

/// How a transaction ended.
#[derive(Debug, Clone)]
struct Done {
    began: Instant,
    ended: Instant,
    /// Why it failed; nothing if it was committed.
    failure: Option<String>,
}

/// What became of the transactions.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Those that were committed.
    pub committed: usize,
    /// Those that were not.
    pub failed: usize,
    /// Why the first of them was not.
    pub first_failure: Option<String>,
    /// The longest that a transaction took that was committed, in milliseconds: what a user waits at worst.
    pub longest_ms: u64,
}

impl Clients {
    /// Makes their table and starts `count` of them.
    ///
    /// # Errors
    /// If the table cannot be made, or a first transaction is not committed.
    pub async fn start(login: &Login, count: usize, connects: Connects) -> Result<Self> {
        login.execute("CREATE TABLE IF NOT EXISTS client_transactions (word text)").await?;
        let shared = Arc::new(Shared::default());
        let tasks = (0..count).map(|_| tokio::spawn(run(login.clone(), Arc::clone(&shared), connects))).collect();
        let clients = Self { shared, tasks };
        clients.commit_after(Instant::now(), TRANSACTION_DEADLINE).await?;
        Ok(clients)
    }

    /// Waits until every client could have begun and committed a transaction after `moment`.
    ///
    /// # Errors
    /// If fewer are committed in time.
    pub async fn commit_after(&self, moment: Instant, deadline: Duration) -> Result<()> {
        let wanted = self.tasks.len();
        until(&format!("{wanted} transactions are committed"), deadline, || async {
            let done = self.shared.done.lock().unwrap_or_else(PoisonError::into_inner);
            let new = done.iter().filter(|d| d.failure.is_none() && d.began > moment).count();
            let failure = done.iter().rev().find_map(|d| d.failure.clone());
            if new >= wanted { Ok(()) } else { Err(format!("{new} are; the last failure: {failure:?}")) }
        })
        .await
    }

    /// The longest time without a commit since `moment`, in milliseconds.
    #[must_use]
    pub fn longest_gap_since(&self, moment: Instant) -> u64 {
        let done = self.shared.done.lock().unwrap_or_else(PoisonError::into_inner);
        let mut commits: Vec<Instant> = done.iter().filter(|d| d.failure.is_none()).map(|d| d.ended).collect();
        commits.sort();
        let gaps = commits.windows(2).filter(|w| w[1] > moment).map(|w| w[1] - w[0]);
        millis(gaps.max().unwrap_or_default())
    }

    /// Lets every client end its transaction, and counts.
    ///
    /// # Errors
    /// If one does not end.
    pub async fn finish(self) -> Result<Tally> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            tokio::time::timeout(TRANSACTION_DEADLINE * 2, task)
                .await
                .context("the clients stop")?
                .context("the clients do not panic")?;
        }
        let done = self.shared.done.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tally = Tally::default();
        for one in done.iter() {
            match &one.failure {
                None => {
                    tally.committed += 1;
                    tally.longest_ms = tally.longest_ms.max(millis(one.ended - one.began));
                }
                Some(why) => {
                    tally.failed += 1;
                    tally.first_failure.get_or_insert_with(|| why.clone());
                }
            }
        }
        Ok(tally)
    }
}

async fn run(login: Login, shared: Arc<Shared>, connects: Connects) {
    let mut kept = None;
    while !shared.stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let ended = tokio::time::timeout(TRANSACTION_DEADLINE, transact(&login, &mut kept)).await;
        let failure = match ended {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(_elapsed) => Some(format!("not within {TRANSACTION_DEADLINE:?}")),
        };
        if failure.is_some() || connects == Connects::EachTime {
            kept = None;
        }
        let done = Done { began, ended: Instant::now(), failure };
        shared.done.lock().unwrap_or_else(PoisonError::into_inner).push(done);
        tokio::time::sleep(PAUSE).await;
    }
}

/// One transaction of two statements, with a moment between them.
async fn transact(login: &Login, kept: &mut Option<Client>) -> Result<()> {
    let client = match kept.take_if(|client| !client.is_closed()) {
        Some(client) => kept.insert(client),
        None => kept.insert(connect(login).await?),
    };
    let transaction = client.transaction().await.context("begin")?;
    let insert = "INSERT INTO client_transactions VALUES ($1)";
    transaction.execute(insert, &[&"one"]).await.context("insert")?;
    tokio::time::sleep(THINKING).await;
    transaction.execute(insert, &[&"two"]).await.context("insert again")?;
    transaction.commit().await.context("commit")
}

/// Connects to the first of the login's ports, as who knows of one address alone.
async fn connect(login: &Login) -> Result<Client> {
    let mut config = Config::new();
    config.user(&login.user).password(&login.password).dbname(&login.database).application_name("client");
    config.host("127.0.0.1").port(*login.ports.first().context("an address")?);
    let (client, connection) = config.connect(NoTls).await.context("connect")?;
    tokio::spawn(connection);
    Ok(client)
}
