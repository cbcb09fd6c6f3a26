//! The entries in Postgres. The server may fail over at any moment: connections are made anew within a bounded time, and
//! an entry is written exactly once or the writer is told that nobody knows.

use std::{
    fmt,
    fs::File,
    io::Read,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use serde::Serialize;
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_postgres::{Client, Config, NoTls, error::SqlState};

/// How long a visitor waits for the page while the database is away.
const READ_DEADLINE: Duration = Duration::from_secs(5);

/// How long a writer waits; a failover fits.
const WRITE_DEADLINE: Duration = Duration::from_secs(8);

/// How long one connection has to do its work before another is tried: a frozen server never says no.
const ATTEMPT_DEADLINE: Duration = Duration::from_secs(2);

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// Connections at once: a database has few to give, and visitors wait for one rather than making more. Web bots are told the same by
/// `database.connections_per_bot`.
const CONNECTIONS_MAX: usize = 5;

/// How many entries the page shows.
const SHOWN_MAX: i64 = 100;

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS entries (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    token text NOT NULL UNIQUE,
    name text NOT NULL,
    message text NOT NULL,
    written_at timestamptz NOT NULL DEFAULT now())";

const LATEST: &str = "SELECT name, message, to_char(written_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS \"UTC\"')
    FROM entries ORDER BY id DESC LIMIT $1";

// The token makes it safe to send the same entry again when an answer was lost.
const WRITE: &str = "INSERT INTO entries (token, name, message) VALUES ($1, $2, $3) ON CONFLICT (token) DO NOTHING";

/// One entry, as the page shows it.
#[derive(Debug, Serialize)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) message: String,
    pub(crate) written_at: String,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The database cannot be reached; nothing has changed.
    Away(String),
    /// The entry was sent and no answer came: it may be there or not.
    Unknown(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away(why) => write!(f, "the database is away, nothing was written: try again soon ({why})"),
            Self::Unknown(why) => {
                write!(f, "the entry may have been written or not: look at the page before trying again ({why})")
            }
        }
    }
}

/// The way to the table.
pub(crate) struct Entries {
    config: Config,
    places: Semaphore,
    kept: Mutex<Vec<Client>>,
}

impl Entries {
    /// Reads the URL; connects when there is something to do.
    pub(crate) fn new(url: &str) -> Result<Self> {
        // The error may quote the URL, which holds a password.
        let config = url.parse::<Config>().ok().context("DATABASE_URL is not a connection URL")?;
        Ok(Self { config, places: Semaphore::new(CONNECTIONS_MAX), kept: Mutex::default() })
    }

    /// The newest entries.
    pub(crate) async fn latest(&self) -> Result<Vec<Entry>, Trouble> {
        let deadline = Instant::now() + READ_DEADLINE;
        loop {
            let read = async {
                let _place = self.places.acquire().await.expect("the semaphore is never closed");
                let client = self.client().await?;
                let rows = client.query(LATEST, &[&SHOWN_MAX]).await?;
                self.keep(client);
                let entry = |row: tokio_postgres::Row| {
                    Ok(Entry { name: row.try_get(0)?, message: row.try_get(1)?, written_at: row.try_get(2)? })
                };
                rows.into_iter().map(entry).collect::<Result<Vec<_>, tokio_postgres::Error>>()
            };
            let why = match timeout_at(deadline, timeout(ATTEMPT_DEADLINE, read)).await {
                Ok(Ok(Ok(entries))) => return Ok(entries),
                Ok(Ok(Err(error))) => reason(&error),
                Ok(Err(_)) | Err(_) => String::from("no answer in time"),
            };
            if Instant::now() + PAUSE >= deadline {
                return Err(Trouble::Away(why));
            }
            sleep(PAUSE).await;
        }
    }

    /// Writes an entry, once.
    pub(crate) async fn write(&self, name: &str, message: &str) -> Result<(), Trouble> {
        let token = token().map_err(|e| Trouble::Away(format!("{e:#}")))?;
        let deadline = Instant::now() + WRITE_DEADLINE;
        // Whether an earlier attempt may have written it after all.
        let mut unknown = false;
        loop {
            let before = unknown;
            let write = async {
                let _place = self.places.acquire().await.expect("the semaphore is never closed");
                let client = self.client().await?;
                unknown = true;
                client.execute(WRITE, &[&token, &name, &message]).await?;
                self.keep(client);
                Ok::<(), tokio_postgres::Error>(())
            };
            let why = match timeout_at(deadline, timeout(ATTEMPT_DEADLINE, write)).await {
                Ok(Ok(Ok(()))) => return Ok(()),
                Ok(Ok(Err(error))) => {
                    // A server that has become a replica says so, and has done nothing.
                    if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) {
                        unknown = before;
                    }
                    reason(&error)
                }
                Ok(Err(_)) | Err(_) => String::from("no answer in time"),
            };
            if Instant::now() + PAUSE >= deadline {
                return Err(if unknown { Trouble::Unknown(why) } else { Trouble::Away(why) });
            }
            sleep(PAUSE).await;
        }
    }

    /// A connection to a server that takes writes.
    async fn client(&self) -> Result<Client, tokio_postgres::Error> {
        while let Some(client) = self.kept().pop() {
            if !client.is_closed() {
                return Ok(client);
            }
        }
        let (client, connection) = self.config.connect(NoTls).await?;
        tokio::spawn(async move {
            // Its user sees the same error at the next question.
            let _broken = connection.await;
        });
        client.batch_execute(SCHEMA).await?;
        Ok(client)
    }

    /// Keeps a connection that has just worked. One that has not is dropped, whatever state it is in.
    fn keep(&self, client: Client) {
        self.kept().push(client);
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Vec<Client>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One line, without the URL.
fn reason(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => db.message().to_owned(),
        None => std::error::Error::source(error).map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}")),
    }
}

/// 128 random bits, in hexadecimal.
fn token() -> Result<String> {
    let mut bytes = [0_u8; 16];
    File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes)).context("read /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
