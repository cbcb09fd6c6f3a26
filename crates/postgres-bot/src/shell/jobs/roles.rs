//! The users of the database that replication and rewinding need. Idempotent.

use std::time::Duration;

use anyhow::Context;
use tokio_postgres::Client;

use super::super::{
    hands::Hands,
    node::Login,
    quote::{identifier, literal},
    server::connect,
};
use crate::machine::JobResult;

/// What `pg_rewind` reads through the server, which else only a superuser may.
const REWIND_FUNCTIONS: &[&str] = &[
    "pg_ls_dir(text, boolean, boolean)",
    "pg_stat_file(text, boolean)",
    "pg_read_binary_file(text)",
    "pg_read_binary_file(text, bigint, bigint, boolean)",
];

/// These statements are short; a lock that blocks them is an error to show.
const DEADLINE: Duration = Duration::from_secs(10);

/// Creates what is missing and sets the passwords.
pub(super) async fn run(hands: &Hands) -> anyhow::Result<JobResult> {
    let node = &hands.node;
    let client = connect(node, &format!("-c statement_timeout={}", DEADLINE.as_millis())).await?;
    // Passwords must not reach the server's log.
    let quiet = "SET log_statement = 'none'; SET log_min_duration_statement = -1; SET log_min_error_statement = 'panic'; \
                 SET password_encryption = 'scram-sha-256'; SET synchronous_commit = 'local'";
    client.batch_execute(quiet).await.context("prepare to create users")?;
    upsert(&client, &node.superuser, "SUPERUSER").await?;
    upsert(&client, &node.replication, "REPLICATION").await?;
    if let Some(rewind) = &node.rewind {
        if rewind.username != node.superuser.username && rewind.username != node.replication.username {
            upsert(&client, rewind, "").await?;
        }
        for function in REWIND_FUNCTIONS {
            let grant = format!("GRANT EXECUTE ON FUNCTION pg_catalog.{function} TO {}", identifier(&rewind.username));
            client.batch_execute(&grant).await.context("allow pg_rewind to read")?;
        }
    }
    Ok(JobResult::Done)
}

async fn upsert(client: &Client, login: &Login, attributes: &str) -> anyhow::Result<()> {
    let name = &login.username;
    let failed = || format!("create the user {name}");
    let found = client.query_opt("SELECT FROM pg_roles WHERE rolname = $1", &[name]).await.with_context(failed)?;
    let verb = if found.is_some() { "ALTER" } else { "CREATE" };
    let password = login.password.as_ref().map_or_else(String::new, |p| format!("PASSWORD {}", literal(p.expose())));
    let statement = format!("{verb} ROLE {} LOGIN {attributes} {password}", identifier(name));
    client.batch_execute(&statement).await.with_context(failed)
}
