//! Changing the replication slots of the running server. Every change is made only if it still can be, so that an old wish does
//! no harm; what failed is told in the log, and shows in the next look.

use anyhow::Context;
use tokio_postgres::Client;

use super::{
    hands::Hands,
    server::{connect, connect_to},
};
use crate::machine::{SlotChange, SlotKind};

/// A logical slot begins once the transactions that run have ended: long ones are not waited for, but asked again.
const OPTIONS: &str = "-c statement_timeout=10s";

/// A copy that is moved on reads the log from where it is kept on, which may be much; what was read is lost with the statement.
const FOLLOW_OPTIONS: &str = "-c statement_timeout=300s";

/// Makes the changes, in order.
pub(super) async fn change(hands: &Hands, changes: Vec<SlotChange>) {
    let client = match connect(&hands.node, OPTIONS).await {
        Ok(client) => client,
        Err(error) => return tracing::debug!(error = format!("{error:#}"), "replication slots cannot be changed now"),
    };
    for change in changes {
        match make(hands, &client, &change).await {
            Ok(true) => tracing::info!(?change, "a replication slot was changed"),
            Ok(false) => tracing::debug!(?change, "a replication slot was left alone"),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(?change, error, "a replication slot could not be changed");
            }
        }
    }
}

/// Makes one change; says whether there was anything to do.
async fn make(hands: &Hands, client: &Client, change: &SlotChange) -> anyhow::Result<bool> {
    let changed = match change {
        SlotChange::Create { name, kind: SlotKind::Physical } => {
            let sql = "SELECT pg_create_physical_replication_slot($1::text::name, true) \
                       WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1::text::name)";
            client.query(sql, &[name]).await
        }
        SlotChange::Create { name, kind: SlotKind::Logical { database, plugin } } => {
            let client = connect_to(&hands.node, database, OPTIONS).await?;
            let sql = "SELECT pg_create_logical_replication_slot($1::text::name, $2::text::name) \
                       WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1::text::name)";
            client.query(sql, &[name, plugin]).await
        }
        SlotChange::Advance { name, to } => {
            let sql = "SELECT pg_replication_slot_advance(slot_name, $2::text::pg_lsn) \
                         FROM pg_replication_slots \
                        WHERE slot_name = $1::text::name AND NOT active \
                          AND restart_lsn < $2::text::pg_lsn";
            client.query(sql, &[name, &to.to_string()]).await
        }
        SlotChange::Follow { name, database, to } => {
            let client = connect_to(&hands.node, database, FOLLOW_OPTIONS).await?;
            // A wish that comes late must not move what a consumer uses.
            let sql = "SELECT pg_replication_slot_advance(slot_name, $2::text::pg_lsn) \
                         FROM pg_replication_slots \
                        WHERE slot_name = $1::text::name AND NOT active AND pg_is_in_recovery() \
                          AND confirmed_flush_lsn <= $2::text::pg_lsn";
            client.query(sql, &[name, &to.to_string()]).await
        }
        SlotChange::Drop { name } => {
            let sql = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
                        WHERE slot_name = $1::text::name AND NOT active";
            client.query(sql, &[name]).await
        }
    };
    Ok(!changed.context("ask the server")?.is_empty())
}
