//! Asking the server: one connection over its private socket, and the facts that the machine goes by.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context;
use bots_core::wire::{Connections, Lsn, ParameterChange, Timeline};
use serde_json::Value;
use tokio_postgres::{Client, NoTls, Statement, error::SqlState};

use super::node::Node;
use crate::machine::{ReplicationSlot, Server, SlotKind, Standby, WaitsFor, Xid};

/// A server that does not take a connection on its own machine within this time is busy beyond use.
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(1);

/// What a live server says of itself. Works on a primary and on a replica, as any superuser, since version 13.
const FACTS: &str = "
SELECT in_recovery,
       CASE WHEN in_recovery THEN NULL ELSE pg_walfile_name(pg_current_wal_lsn()) END,
       CASE WHEN in_recovery THEN NULL ELSE pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::int8 END,
       pg_wal_lsn_diff(pg_last_wal_receive_lsn(), '0/0')::int8,
       pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')::int8,
       (SELECT timeline_id FROM pg_control_checkpoint()),
       (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
       (SELECT received_tli FROM pg_stat_wal_receiver),
       COALESCE((SELECT status = 'streaming' FROM pg_stat_wal_receiver), false),
       current_setting('server_version_num')::int4,
       current_setting('max_connections')::int4,
       current_setting('superuser_reserved_connections')::int4,
       in_recovery AND (pg_last_wal_receive_lsn() IS NOT NULL OR EXISTS (
         SELECT FROM pg_stat_activity WHERE backend_type = 'startup'
            AND wait_event IN ('RecoveryWalStream', 'RecoveryRetrieveRetryInterval'))),
       current_setting('synchronous_standby_names'),
       CASE WHEN in_recovery THEN NULL ELSE (
         SELECT json_object_agg(name, json_build_array(streams, flushed))::text FROM (
           SELECT application_name AS name, bool_or(state = 'streaming') AS streams,
                  COALESCE(max(pg_wal_lsn_diff(flush_lsn, '0/0')), 0)::int8 AS flushed
             FROM pg_stat_replication WHERE state IN ('streaming', 'catchup') GROUP BY 1) AS standby) END,
       current_setting('restore_command') <> ''
  FROM (SELECT pg_is_in_recovery() AS in_recovery) AS now";

/// What waits for a restart, with the value that the last file that names it holds.
const PENDING_RESTART: &str = "
SELECT now.name, current_setting(now.name),
       COALESCE((SELECT setting FROM pg_file_settings AS file
                  WHERE lower(file.name) = lower(now.name) ORDER BY seqno DESC LIMIT 1), now.reset_val, '')
  FROM pg_settings AS now WHERE pending_restart";

/// The replication slots. Those that Postgres 17 itself keeps in step on standbys (`failover`) are none of our business.
const SLOTS: &str = "
SELECT slot_name::text, database::text, plugin::text, active,
       pg_wal_lsn_diff(restart_lsn, '0/0')::int8, pg_wal_lsn_diff(confirmed_flush_lsn, '0/0')::int8,
       COALESCE(wal_status = 'lost', false), catalog_xmin::text::int8
  FROM pg_replication_slots AS slot
 WHERE NOT temporary AND NOT COALESCE((to_jsonb(slot) ->> 'failover')::bool, false)";

/// What the API tells beyond the facts, as the JSON that Patroni's members answer with.
const DETAILS: &str = "
SELECT json_build_object(
         'postmaster_start_time', to_char(pg_postmaster_start_time() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00:00'),
         'postmaster_start_epoch', extract(epoch FROM pg_postmaster_start_time())::float8,
         'replayed_timestamp', to_char(pg_last_xact_replay_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00:00'),
         'replayed_epoch', extract(epoch FROM pg_last_xact_replay_timestamp())::float8,
         'paused', CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() ELSE false END,
         'latest_end_lsn', (SELECT pg_wal_lsn_diff(latest_end_lsn, '0/0')::int8 FROM pg_stat_wal_receiver),
         'replication', (SELECT json_agg(peer) FROM (
             SELECT usename, application_name, client_addr, state, sync_state, sync_priority
               FROM pg_stat_replication ORDER BY application_name) AS peer))::text";

/// Between two waits in a checkpoint, too, the checkpointer reads its files.
const CHECKPOINTER_WAITS: &str = "
SELECT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'checkpointer'
                  AND wait_event IN ('CheckpointerMain', 'CheckpointWriteDelay'))";

/// The same, with whom a commit would wait for if it waits.
const HEEDS: &str = "
SELECT current_setting('synchronous_standby_names'),
       EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'checkpointer'
                  AND wait_event IN ('CheckpointerMain', 'CheckpointWriteDelay'))";

/// It has no receiver, and its files name nobody that it could receive from.
const RECEIVES_NOTHING: &str = "
SELECT current_setting('primary_conninfo') = '' AND NOT EXISTS (SELECT FROM pg_stat_wal_receiver)
   AND NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'walreceiver')";

/// A connection to the server, with the question prepared.
#[derive(Debug)]
pub(super) struct Connection {
    client: Client,
    facts: Statement,
    slots: Statement,
}

impl Connection {
    /// Connects and prepares. The questions of this connection are short: a `deadline` of the server's own ends those
    /// that are not.
    ///
    /// # Errors
    /// If the server does not take the connection in time.
    pub(super) async fn open(node: &Node, deadline: Duration) -> anyhow::Result<Self> {
        let options = format!("-c statement_timeout={}", deadline.as_millis());
        let client = connect(node, &options).await?;
        let facts = client.prepare(FACTS).await.context("prepare the question for facts")?;
        let slots = client.prepare(SLOTS).await.context("prepare the question for replication slots")?;
        Ok(Self { client, facts, slots })
    }

    /// The connection for other questions.
    pub(super) const fn client(&self) -> &Client {
        &self.client
    }

    /// The facts, without `pending_restart`. On a replica the timeline is at least `known`: a server in recovery never
    /// goes back, but forgets where it was when its stream ends.
    ///
    /// # Errors
    /// If the server does not answer.
    pub(super) async fn facts(&self, known: Timeline) -> anyhow::Result<Server> {
        let row = self.client.query_one(&self.facts, &[]).await.context("ask the server for facts")?;
        let in_recovery: bool = row.get(0);
        let lsn = |column: usize| Lsn(row.get::<_, Option<i64>>(column).map_or(0, i64::cast_unsigned));
        let timeline = |column: usize| Timeline(row.get::<_, Option<i32>>(column).map_or(0, i32::cast_unsigned));
        let number = |column: usize| u32::try_from(row.get::<_, i32>(column)).unwrap_or_default();
        let (version, connections) = (number(9), Some(Connections { max: number(10), reserved: number(11) }));
        let waits_for = WaitsFor { names: row.get(13), in_force: false };
        if !in_recovery {
            let file: Option<String> = row.get(1);
            let current = file.and_then(|name| u32::from_str_radix(name.get(..8)?, 16).ok()).map(Timeline);
            let timeline = current.context("the server does not name its WAL file")?;
            let standbys = standbys(row.get(14))?;
            let position = lsn(2);
            return Ok(Server { timeline, position, version, connections, waits_for, standbys, ..Server::default() });
        }
        let (received, replayed) = (lsn(3), lsn(4));
        let timeline = known.max(timeline(5)).max(timeline(6)).max(timeline(7));
        let streaming = row.get(8);
        let position = received.max(replayed);
        let (settled, restores) = (row.get(12), row.get(15));
        Ok(Server {
            in_recovery,
            timeline,
            position,
            received,
            replayed,
            streaming,
            restores,
            settled,
            version,
            connections,
            ..Server::default()
        })
    }

    /// Whether the checkpointer waits for something to do: then it has read the files that it was told to read again. It is the
    /// one who makes commits wait at all, where they have not waited before.
    ///
    /// # Errors
    /// If the server does not answer.
    pub(super) async fn checkpointer_waits(&self) -> anyhow::Result<bool> {
        let row = self.client.query_one(CHECKPOINTER_WAITS, &[]).await.context("ask for the checkpointer")?;
        Ok(row.get(0))
    }

    /// Whom commits would wait for, and whether the checkpointer waits for something to do.
    ///
    /// # Errors
    /// If the server does not answer.
    pub(super) async fn heeds(&self) -> anyhow::Result<(String, bool)> {
        let row = self.client.query_one(HEEDS, &[]).await?;
        Ok((row.get(0), row.get(1)))
    }

    /// The process that receives the log, if one does.
    ///
    /// # Errors
    /// If the server does not answer.
    pub(super) async fn receiver(&self) -> anyhow::Result<Option<u32>> {
        let row =
            self.client.query_opt("SELECT pid FROM pg_stat_wal_receiver", &[]).await.context("ask who receives")?;
        Ok(row.and_then(|row| u32::try_from(row.get::<_, i32>(0)).ok()))
    }

    /// Whether this standby receives nothing, and its configuration names nobody to receive from.
    ///
    /// # Errors
    /// If the server does not answer.
    pub(super) async fn receives_nothing(&self) -> anyhow::Result<bool> {
        let row = self.client.query_one(RECEIVES_NOTHING, &[]).await.context("ask whether the server receives")?;
        Ok(row.get(0))
    }

    /// The parameters that wait for a restart; a costlier question than the facts.
    ///
    /// # Errors
    /// If the server does not answer.
    pub(super) async fn pending_restart(&self) -> anyhow::Result<BTreeMap<String, ParameterChange>> {
        let rows = self.client.query(PENDING_RESTART, &[]).await.context("ask for pending restarts")?;
        let change = |row: &tokio_postgres::Row| ParameterChange { old_value: row.get(1), new_value: row.get(2) };
        Ok(rows.iter().map(|row| (row.get(0), change(row))).collect())
    }

    /// The replication slots by name, without temporary ones.
    ///
    /// # Errors
    /// If the server does not answer.
    pub(super) async fn slots(&self) -> anyhow::Result<BTreeMap<String, ReplicationSlot>> {
        let rows = self.client.query(&self.slots, &[]).await.context("ask for replication slots")?;
        let slot = |row: &tokio_postgres::Row| {
            let lsn = |column: usize| row.get::<_, Option<i64>>(column).map(|lsn| Lsn(lsn.cast_unsigned()));
            let kind = match (row.get::<_, Option<String>>(1), row.get::<_, Option<String>>(2)) {
                (Some(database), Some(plugin)) => SlotKind::Logical { database, plugin },
                (_, _) => SlotKind::Physical,
            };
            let xmin: Option<i64> = row.get(7);
            let catalog_xmin = xmin.and_then(|xmin| u32::try_from(xmin).ok()).map(Xid);
            let (restart, confirmed) = (lsn(4), lsn(5));
            ReplicationSlot { kind, active: row.get(3), restart, confirmed, lost: row.get(6), catalog_xmin }
        };
        Ok(rows.iter().map(|row| (row.get(0), slot(row))).collect())
    }

    /// What the API tells beyond the facts.
    ///
    /// # Errors
    /// If the server does not answer.
    pub(super) async fn details(&self) -> anyhow::Result<Value> {
        let row = self.client.query_one(DETAILS, &[]).await.context("ask the server for details")?;
        serde_json::from_str(row.get(0)).context("read the server's details")
    }
}

/// Who streams, from the JSON of [`FACTS`].
fn standbys(json: Option<String>) -> anyhow::Result<BTreeMap<String, Standby>> {
    let Some(json) = json else { return Ok(BTreeMap::new()) };
    let rows: BTreeMap<String, (bool, u64)> = serde_json::from_str(&json).context("read who streams")?;
    let standby = |(name, (streams, flushed))| (name, Standby { streams, flushed: Lsn(flushed) });
    Ok(rows.into_iter().map(standby).collect())
}

/// Connects as the superuser over the private socket. The connection ends with the client.
///
/// # Errors
/// If the server does not take the connection in time.
pub(super) async fn connect(node: &Node, options: &str) -> anyhow::Result<Client> {
    connect_to(node, "postgres", options).await
}

/// The same, to another database.
///
/// # Errors
/// If the server does not take the connection in time.
pub(super) async fn connect_to(node: &Node, database: &str, options: &str) -> anyhow::Result<Client> {
    let mut config = tokio_postgres::Config::new();
    config.host_path(&node.run_dir).port(node.listen.port).dbname(database).application_name("bots");
    config.user(&node.superuser.username).options(options);
    if let Some(password) = &node.superuser.password {
        config.password(password.expose());
    }
    let connected = tokio::time::timeout(CONNECT_DEADLINE, config.connect(NoTls)).await;
    let (client, connection) =
        connected.context("the server does not take connections")?.context("connect to the server")?;
    tokio::spawn(async move {
        // Its end shows at the client.
        let _ended = connection.await;
    });
    Ok(client)
}

/// Whether the error is the server's own word: it lives and answers, if not as we wish.
pub(super) fn is_answer(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.downcast_ref::<tokio_postgres::Error>().is_some_and(|error| error.code().is_some()))
}

/// Whether the error says that the server is starting up: it lives and will answer.
pub(super) fn is_starting(error: &anyhow::Error) -> bool {
    let code = error.chain().find_map(|cause| cause.downcast_ref::<tokio_postgres::Error>()?.code().cloned());
    code == Some(SqlState::CANNOT_CONNECT_NOW)
}
