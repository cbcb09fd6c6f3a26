//! How one member connects to another: libpq's connection string, made of a member's URL. Never with a password in it.

use std::{fmt, path::Path};

use anyhow::{Context, bail};
use tokio_postgres::config::Host;

use super::{node::Login, quote};
use crate::machine::Upstream;

/// A silent peer is given up after about this long; a lease of five seconds must not wait for a kernel's minutes.
const SILENCE_SECS_MAX: u32 = 5;

/// A connection string in the making.
#[derive(Debug, Clone)]
pub(super) struct Conninfo(Vec<(&'static str, String)>);

impl Conninfo {
    /// To the member `upstream`, as the user `login`, whose password stands elsewhere.
    ///
    /// # Errors
    /// If the member's `conn_url` does not say where it is.
    pub(super) fn new(upstream: &Upstream, login: &Login) -> anyhow::Result<Self> {
        let (host, port) = address(&upstream.conn_url)
            .with_context(|| format!("the conn_url of {} in etcd: {}", upstream.name, upstream.conn_url))?;
        let silence = SILENCE_SECS_MAX.to_string();
        let mut fields = vec![
            ("host", host),
            ("port", port.to_string()),
            ("user", login.username.clone()),
            ("connect_timeout", silence),
            ("keepalives_idle", String::from("2")),
            ("keepalives_interval", String::from("1")),
            ("keepalives_count", String::from("3")),
            ("tcp_user_timeout", (SILENCE_SECS_MAX * 1_000).to_string()),
        ];
        fields.extend(login.options.iter().cloned());
        Ok(Self(fields))
    }

    /// With the passwords in this file.
    #[must_use]
    pub(super) fn passfile(self, path: &Path) -> Self {
        self.with("passfile", path.display().to_string())
    }

    /// Under this name in the other's `pg_stat_replication`.
    #[must_use]
    pub(super) fn application_name(self, name: &str) -> Self {
        self.with("application_name", name.to_owned())
    }

    /// To this database.
    #[must_use]
    pub(super) fn database(self, name: &str) -> Self {
        self.with("dbname", name.to_owned())
    }

    /// For the log, and no database.
    #[must_use]
    pub(super) fn for_replication(self) -> Self {
        self.with("replication", String::from("true"))
    }

    fn with(mut self, field: &'static str, value: String) -> Self {
        self.0.push((field, value));
        self
    }
}

impl fmt::Display for Conninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (field, value)) in self.0.iter().enumerate() {
            let space = if n == 0 { "" } else { " " };
            write!(f, "{space}{field}={}", quote::conninfo(value))?;
        }
        Ok(())
    }
}

/// Host and port of a URL such as `postgres://127.0.0.1:5432/postgres`.
///
/// # Errors
/// If there is no host in it.
pub(super) fn address(conn_url: &str) -> anyhow::Result<(String, u16)> {
    let config: tokio_postgres::Config = conn_url.parse().context("not a connection URL")?;
    let port = config.get_ports().first().copied().unwrap_or(5_432);
    match config.get_hosts().first() {
        Some(Host::Tcp(host)) if !host.is_empty() => Ok((host.clone(), port)),
        Some(Host::Tcp(_) | Host::Unix(_)) | None => bail!("there is no host in it"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Conninfo, Login, address};
    use crate::machine::Upstream;

    #[test]
    fn urls_of_members_are_read() {
        let read = |url: &str| address(url).ok();
        assert_eq!(read("postgres://10.0.0.1:5433/postgres"), Some((String::from("10.0.0.1"), 5433)));
        assert_eq!(read("postgres://[::1]:5433/postgres"), Some((String::from("::1"), 5433)));
        assert_eq!(read("postgresql://db.example/postgres"), Some((String::from("db.example"), 5432)));
        assert_eq!(read("nonsense"), None);
    }

    #[test]
    fn values_are_quoted() {
        let upstream = Upstream { name: String::from("a"), conn_url: String::from("postgres://h:1/postgres") };
        let login = Login { username: String::from("it's"), password: None, options: vec![] };
        let text = Conninfo::new(&upstream, &login).expect("valid").application_name("x y").to_string();
        assert!(
            text.starts_with(r"host='h' port='1' user='it\'s'") && text.ends_with("application_name='x y'"),
            "{text}"
        );
    }
}
