//! SQL from outside: a client that finds the writable server among all, and a writer that measures how long there is none.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls, config::TargetSessionAttrs};

use crate::wait::{millis, until};

/// A statement that has not ended by then counts as lost.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(2);

/// Between two writes of the writer.
const WRITE_INTERVAL: Duration = Duration::from_millis(5);

/// How to log in.
#[derive(Debug, Clone)]
pub struct Login {
    /// The servers' ports.
    pub ports: Vec<u16>,
    /// The addresses of the servers that are not on loopback, by their ports, which differ.
    pub hosts: BTreeMap<u16, String>,
    /// The user.
    pub user: String,
    /// The password.
    pub password: String,
    /// The database.
    pub database: String,
}

impl Login {
    /// The same login at one server alone.
    #[must_use]
    pub fn at(&self, port: u16) -> Self {
        Self { ports: vec![port], ..self.clone() }
    }

    /// Where the server of a port is.
    #[must_use]
    pub fn host(&self, port: u16) -> &str {
        self.hosts.get(&port).map_or("127.0.0.1", String::as_str)
    }

    /// The address for `psql` and for apps that write.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}?target_session_attrs=read-write", self.plain_url())
    }

    /// The address for `psql` and for apps.
    #[must_use]
    pub fn plain_url(&self) -> String {
        let hosts = self.ports.iter().map(|p| format!("{}:{p}", self.host(*p))).collect::<Vec<_>>().join(",");
        format!("postgresql://{}:{}@{hosts}/{}", self.user, self.password, self.database)
    }

    /// Connects to whichever server takes writes.
    ///
    /// # Errors
    /// If none does.
    pub async fn writable(&self) -> Result<Client> {
        self.connect(TargetSessionAttrs::ReadWrite).await
    }

    /// Connects to any of the servers.
    ///
    /// # Errors
    /// If none takes connections.
    pub async fn any(&self) -> Result<Client> {
        self.connect(TargetSessionAttrs::Any).await
    }

    async fn connect(&self, target: TargetSessionAttrs) -> Result<Client> {
        let mut config = Config::new();
        config.user(&self.user).password(&self.password).dbname(&self.database).target_session_attrs(target);
        config.connect_timeout(Duration::from_secs(1)).application_name("fleet");
        for port in &self.ports {
            config.host(self.host(*port)).port(*port);
        }
        let connecting = tokio::time::timeout(STATEMENT_DEADLINE, config.connect(NoTls));
        let (client, connection) = connecting.await.context("connect in time")?.context("connect")?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Runs statements at the writable server, within the deadline of one.
    ///
    /// # Errors
    /// If there is none or a statement fails.
    pub async fn execute(&self, statements: &str) -> Result<()> {
        let client = self.writable().await?;
        let running = tokio::time::timeout(STATEMENT_DEADLINE * 5, client.batch_execute(statements));
        running.await.context("end in time")?.with_context(|| format!("execute {statements}"))
    }

    /// Asks one server for one value, as text.
    ///
    /// # Errors
    /// If it does not answer with a value.
    pub async fn ask(&self, query: &str) -> Result<String> {
        let client = self.any().await?;
        let rows =
            tokio::time::timeout(STATEMENT_DEADLINE, client.simple_query(query)).await.context("answer in time")?;
        let rows = rows.with_context(|| format!("ask {query}"))?;
        let value = rows.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        });
        value.ok_or_else(|| anyhow!("{query} yields nothing"))
    }

    /// Waits until `query` at one server yields `wanted`.
    ///
    /// # Errors
    /// If it does not in time.
    pub async fn wait_for(&self, query: &str, wanted: &str, deadline: Duration) -> Result<()> {
        until(&format!("`{query}` yields {wanted} at {:?}", self.ports), deadline, || async {
            match self.ask(query).await {
                Ok(found) if found == wanted => Ok(()),
                Ok(found) => Err(found),
                Err(error) => Err(format!("{error:#}")),
            }
        })
        .await
    }
}

/// Inserts unique numbers, one after the other, at whichever server takes them, and notes when each was acknowledged.
#[derive(Debug)]
pub struct Writer {
    login: Login,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    acknowledged: Mutex<Vec<Write>>,
    refused: AtomicU64,
    last_error: Mutex<String>,
}

/// An acknowledged write.
#[derive(Debug, Clone, Copy)]
struct Write {
    id: i64,
    sent: Instant,
    acknowledged: Instant,
}

/// What became of the writer's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Rows that were acknowledged.
    pub acknowledged: usize,
    /// Acknowledged rows that are gone: an asynchronous cluster may lose the last ones with its primary.
    pub lost: usize,
    /// Attempts that were not acknowledged.
    pub refused: u64,
}

impl Writer {
    /// Makes its table and starts writing.
    ///
    /// # Errors
    /// If the table cannot be made.
    pub async fn start(login: &Login) -> Result<Self> {
        login.execute("CREATE TABLE IF NOT EXISTS fleet_writes (id bigint PRIMARY KEY)").await?;
        let client = login.writable().await?;
        let next = client.query_one("SELECT coalesce(max(id), 0) + 1 FROM fleet_writes", &[]);
        let next: i64 = next.await.context("ask for the next number")?.get(0);
        let shared = Arc::new(Shared::default());
        let task = tokio::spawn(write(login.clone(), Arc::clone(&shared), next));
        let writer = Self { login: login.clone(), shared, task };
        writer.writes_after(Instant::now(), Duration::from_secs(10)).await?;
        Ok(writer)
    }

    /// Waits for a write that was sent and acknowledged after `moment`; says how long after `moment` it was.
    ///
    /// # Errors
    /// If there is none in time.
    pub async fn writes_after(&self, moment: Instant, deadline: Duration) -> Result<u64> {
        until("a write is acknowledged", deadline, || async {
            let writes = self.shared.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
            // The last ones alone: those that were sent after the moment stand at the end.
            match writes.iter().rev().take_while(|w| w.sent > moment).last() {
                Some(first) => Ok(millis(first.acknowledged - moment)),
                None => Err(self.shared.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()),
            }
        })
        .await
    }

    /// The longest time without an acknowledged write since `moment`, in milliseconds.
    #[must_use]
    pub fn longest_gap_since(&self, moment: Instant) -> u64 {
        let acknowledged = self.shared.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        let pairs = acknowledged.windows(2).filter(|w| w[1].acknowledged > moment);
        let gaps = pairs.map(|w| w[1].acknowledged - w[0].acknowledged);
        millis(gaps.max().unwrap_or_default())
    }

    /// How many attempts were not acknowledged so far.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Why the last attempt that was not acknowledged was not.
    #[must_use]
    pub fn last_error(&self) -> String {
        self.shared.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stops writing and counts what is still there.
    ///
    /// # Errors
    /// If the rows cannot be read.
    pub async fn finish(self) -> Result<Tally> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let stopping = tokio::time::timeout(STATEMENT_DEADLINE * 4, self.task);
        stopping.await.context("the writer stops")?.context("the writer does not panic")?;
        let client = self.login.writable().await?;
        let rows = client.query("SELECT id FROM fleet_writes", &[]).await.context("read the rows")?;
        let present: BTreeSet<i64> = rows.iter().map(|row| row.get(0)).collect();
        let acknowledged = self.shared.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Tally {
            acknowledged: acknowledged.len(),
            lost: acknowledged.iter().filter(|w| !present.contains(&w.id)).count(),
            refused: self.shared.refused.load(Ordering::Relaxed),
        })
    }
}

async fn write(login: Login, shared: Arc<Shared>, first: i64) {
    let (mut client, mut id) = (None, first);
    while !shared.stop.load(Ordering::Relaxed) {
        let sent = Instant::now();
        match insert(&login, &mut client, id).await {
            Ok(()) => {
                let write = Write { id, sent, acknowledged: Instant::now() };
                shared.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).push(write);
            }
            Err(error) => {
                client = None;
                shared.refused.fetch_add(1, Ordering::Relaxed);
                *shared.last_error.lock().unwrap_or_else(PoisonError::into_inner) = format!("{error:#}");
            }
        }
        // A lost answer says nothing about the row: its number is never used again.
        id += 1;
        tokio::time::sleep(WRITE_INTERVAL).await;
    }
}

async fn insert(login: &Login, client: &mut Option<Client>, id: i64) -> Result<()> {
    let connected = match client {
        Some(connected) => connected,
        None => client.insert(login.writable().await?),
    };
    let row: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&id];
    let inserting = connected.execute("INSERT INTO fleet_writes VALUES ($1)", &row);
    tokio::time::timeout(STATEMENT_DEADLINE, inserting).await.context("insert in time")?.context("insert")?;
    Ok(())
}
