//! How a connection to one member comes about: TLS with the files of the moment, and a login where etcd has users.
//!
//! A client of the library is never kept beyond its first failure, so every new connection reads the files again and logs in
//! again: a restarted etcd has forgotten all logins.

use std::{sync::Arc, time::Duration};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};

use super::etcd::{Failure, classify};
use crate::shell::{
    config::{self, Secret},
    tls,
};

/// How long a connection may take to come about, and again how long its TLS may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
/// A silent connection is asked whether it lives after this. etcd closes connections that ask more often than every 5 s.
const PING_INTERVAL: Duration = Duration::from_millis(5_500);
/// How long the answer to that may take.
const PING_DEADLINE: Duration = Duration::from_millis(1_500);
/// What etcd says to a login while it has no users yet.
const NO_USERS: &str = "etcdserver: authentication is not enabled";

/// A connection to one member.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Arc<Client>,
    /// There is a login, and etcd did not want it when we connected.
    pub(super) is_anonymous: bool,
}

/// What connections are made with.
pub(super) struct Connector {
    tls: Option<tls::Client>,
    user: Option<(String, Secret)>,
}

impl Connector {
    /// Checks what is configured.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub(super) fn new(config: &config::Etcd) -> Result<Self, String> {
        let tls = config.tls()?.map(tls::Client::new).transpose()?;
        Ok(Self { tls, user: config.user()? })
    }

    /// Whether there is somebody to log in as.
    pub(super) const fn has_user(&self) -> bool {
        self.user.is_some()
    }

    /// Connects to the member at `address`, as [`config::Etcd::endpoints`] has it.
    pub(super) async fn connect(&self, address: &str) -> Result<Connection, Failure> {
        let anonymous = self.options(address).await;
        let Some((name, password)) = &self.user else { return connection(address, anonymous, false).await };
        let login = anonymous.clone().with_user(name, password.expose()).with_auto_token_refresh(true);
        match connection(address, login, false).await {
            Err(Failure::Refused { message, .. }) if message == NO_USERS => {
                tracing::info!(member = address, "etcd has no users: no login is needed yet");
                connection(address, anonymous, true).await
            }
            Err(Failure::Refused { message, .. }) => {
                let why = message.trim_start_matches("etcdserver: ");
                Err(Failure::Stranger(format!(
                    "the login as `{name}` fails: {why}: correct etcd3.username or etcd3.password"
                )))
            }
            done => done,
        }
    }

    async fn options(&self, address: &str) -> ConnectOptions {
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_DEADLINE)
            .with_keep_alive(PING_INTERVAL, PING_DEADLINE)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true);
        match &self.tls {
            // The library takes TLS for https alone.
            Some(files) if address.starts_with("https://") => {
                let pems = files.current().await;
                options.with_tls(tls_options(&pems))
            }
            Some(_) | None => options,
        }
    }
}

async fn connection(address: &str, options: ConnectOptions, is_anonymous: bool) -> Result<Connection, Failure> {
    match Box::pin(Client::connect([address], Some(options))).await {
        Ok(client) => Ok(Connection { client: Arc::new(client), is_anonymous }),
        // Whatever a login has done, what it was for has not been sent.
        Err(error) => Err(match classify(&error) {
            Failure::Lost(why) => Failure::NotSent(why),
            other => other,
        }),
    }
}

fn tls_options(pems: &tls::ClientPems) -> TlsOptions {
    let options = TlsOptions::new().ca_certificate(Certificate::from_pem(&pems.authorities)).timeout(CONNECT_DEADLINE);
    match &pems.pair {
        Some((certificate, key)) => options.identity(Identity::from_pem(certificate, key)),
        None => options,
    }
}
