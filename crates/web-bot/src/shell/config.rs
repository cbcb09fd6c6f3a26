//! The configuration of a web bot: the YAML document, and what of it the machine must know.

use std::{net::SocketAddr, path::PathBuf};

use bots_core::{
    machine::Span,
    shell::{Common, Networks, Secret, config::one_secret},
};
use serde::Deserialize;

use crate::machine::{ConnectionBudget, Mode, ScalingSettings, Settings};

/// The shortest lease: etcd counts in whole seconds and rounds up to its own election time.
const TTL_S_MIN: u64 = 2;

/// The longest time-out that makes sense; more is a slip of the finger, such as milliseconds.
const TIMEOUT_S_MAX: u64 = 3_600;

/// The whole document.
#[derive(Debug, Clone, Deserialize)]
pub struct WebConfig {
    /// What every bot has.
    #[serde(flatten)]
    pub common: Common,
    /// The web server.
    pub web: Web,
    /// Where content comes from.
    pub content: Content,
    /// The database of the app.
    #[serde(default)]
    pub database: Option<Database>,
    /// The CDN in front.
    #[serde(default)]
    pub cdn: Cdn,
    /// How many bots serve.
    #[serde(default)]
    pub scaling: ScalingSettings,
    /// Where revisions are kept; the bot's own.
    pub data_dir: PathBuf,
    /// The length of the lease.
    #[serde(default = "ttl_s")]
    pub ttl_s: u64,
}

/// The web server.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Web {
    /// Where to listen.
    #[serde(default = "web_listen")]
    pub listen: String,
    /// Where clients reach it, if that differs; it does where it listens on every address.
    #[serde(default)]
    pub connect_url: Option<String>,
    /// How to answer.
    pub mode: Mode,
    /// The app and its arguments.
    #[serde(default)]
    pub command: Vec<String>,
    /// Asked for as long as the app runs: below 500 it is healthy.
    #[serde(default = "health_path")]
    pub health_path: String,
    /// How often a healthy app is asked again. One that misses three in a row is replaced.
    #[serde(default = "health_interval_s")]
    pub health_interval_s: u64,
    /// How long the app may take to become healthy.
    #[serde(default = "app_start_timeout_s")]
    pub app_start_timeout_s: u64,
    /// How long requests in flight may take to end.
    #[serde(default = "drain_timeout_s")]
    pub drain_timeout_s: u64,
    /// How long the app may take to begin an answer.
    #[serde(default = "app_answer_timeout_s")]
    pub app_answer_timeout_s: u64,
    /// How long a request waits for an app that is about to be there.
    #[serde(default = "hold_timeout_s")]
    pub hold_timeout_s: u64,
    /// How many requests wait so at once.
    #[serde(default = "hold_max")]
    pub hold_max: u32,
    /// The largest body of a request that is passed to the app.
    #[serde(default = "body_max_bytes")]
    pub body_max_bytes: u64,
    /// Whose word about the client, its host and its protocol is believed (`X-Forwarded-For`, `-Host`, `-Proto`), in the access log, too.
    #[serde(default = "Networks::loopback")]
    pub trusted_proxies: Networks,
    /// How much of the site is held in memory, compressed forms included; the rest is read from disk as it is sent.
    #[serde(default = "memory_max_bytes")]
    pub memory_max_bytes: u64,
    /// TLS, on a port of its own.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// The file that gets a line for each answer.
    #[serde(default)]
    pub access_log: Option<PathBuf>,
}

/// TLS for clients.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Where to listen.
    pub listen: String,
    /// The certificate's chain, PEM; read again when it changes.
    pub certificate: PathBuf,
    /// Its private key, PEM; read again when it changes.
    pub key: PathBuf,
}

/// Where content comes from.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Content {
    /// The content bot's scope.
    pub scope: String,
    /// The folder of the repository that is the site; all of it by default.
    #[serde(default)]
    pub path_in_repo: String,
    /// The largest revision, unpacked.
    #[serde(default = "size_max_bytes")]
    pub size_max_bytes: u64,
}

/// The database of the app.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Database {
    /// The Postgres cluster's scope.
    pub scope: String,
    /// The database.
    pub dbname: String,
    /// The user.
    pub username: String,
    /// The password.
    #[serde(default)]
    pub password: Option<Secret>,
    /// The file that holds the password.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// How many connections one instance of the app holds at most. With it, no more bots serve than the database has
    /// connections for.
    #[serde(default)]
    pub connections_per_bot: Option<u32>,
    /// The fleet's part of the database's connections, in hundredths: less than all where several fleets share it.
    #[serde(default = "share_percent")]
    pub share_percent: u32,
}

/// The CDN in front.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cdn {
    /// What asset URLs begin with; the key `config` of the scope in etcd wins.
    pub base_url: Option<String>,
}

impl Database {
    fn budget(&self) -> Option<ConnectionBudget> {
        let share_percent = self.share_percent;
        self.connections_per_bot.map(|per_instance| ConnectionBudget { per_instance, share_percent })
    }
}

impl WebConfig {
    /// What the types cannot check.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn check(&self) -> Result<(), String> {
        let listen = self.listen()?;
        if listen.ip().is_unspecified() && self.web.connect_url.is_none() {
            return Err(format!(
                "web.connect_url is not set, and nobody can connect to {listen}: give the URL under which proxies reach \
                 this bot's site, such as http://10.0.0.31:{}",
                listen.port()
            ));
        }
        self.tls_listen()?;
        // Read again at each start of the app; what cannot be read now is said now.
        self.database_password()?;
        self.site_path()?;
        let scope =
            |field: &str, name: &str| self.common.other_scope(name).map(drop).map_err(|e| format!("{field}: {e}"));
        scope("content.scope", &self.content.scope)?;
        if let Some(database) = &self.database {
            scope("database.scope", &database.scope)?;
            if database.connections_per_bot == Some(0) {
                return Err(String::from(
                    "database.connections_per_bot is 0: use what the app's pool holds, or leave it out",
                ));
            }
            if !(1..=100).contains(&database.share_percent) {
                return Err(format!("database.share_percent is {}: use 1 to 100", database.share_percent));
            }
        }
        if self.web.mode == Mode::App && self.web.command.first().is_none_or(String::is_empty) {
            return Err(String::from("web.command is empty: name the app's program, or use web.mode: static"));
        }
        if !self.web.health_path.starts_with('/') {
            return Err(format!("web.health_path is `{}`: begin it with a slash", self.web.health_path));
        }
        if self.web.hold_max == 0 {
            return Err(String::from(
                "web.hold_max is 0: use 1 or more, or web.hold_timeout_s: 0 if no request shall wait",
            ));
        }
        if let Some(fault) = self.scaling.fault() {
            return Err(fault);
        }
        let bounded = [
            ("ttl_s", self.ttl_s, TTL_S_MIN),
            ("web.health_interval_s", self.web.health_interval_s, 1),
            ("web.app_start_timeout_s", self.web.app_start_timeout_s, 1),
            ("web.app_answer_timeout_s", self.web.app_answer_timeout_s, 1),
            ("web.drain_timeout_s", self.web.drain_timeout_s, 0),
            ("web.hold_timeout_s", self.web.hold_timeout_s, 0),
        ];
        for (field, value, min) in bounded {
            if !(min..=TIMEOUT_S_MAX).contains(&value) {
                return Err(format!("{field} is {value}: use {min} to {TIMEOUT_S_MAX} seconds"));
            }
        }
        Ok(())
    }

    /// Where to listen.
    ///
    /// # Errors
    /// If it is no address with a port.
    pub fn listen(&self) -> Result<SocketAddr, String> {
        address("web.listen", &self.web.listen)
    }

    /// Where to listen for TLS.
    ///
    /// # Errors
    /// If it is no address with a port.
    pub fn tls_listen(&self) -> Result<Option<SocketAddr>, String> {
        self.web.tls.as_ref().map(|tls| address("web.tls.listen", &tls.listen)).transpose()
    }

    /// The folder of the repository that is the site, as plain names.
    ///
    /// # Errors
    /// If it leaves the repository.
    pub fn site_path(&self) -> Result<Vec<String>, String> {
        let parts = self.content.path_in_repo.split('/').filter(|part| !part.is_empty() && *part != ".");
        let parts: Vec<String> = parts.map(str::to_owned).collect();
        if parts.iter().any(|part| part == ".." || part == ".git") {
            return Err(String::from("content.path_in_repo leaves the repository: name a folder in it"));
        }
        Ok(parts)
    }

    /// The password of the app's database user, if it needs one.
    ///
    /// # Errors
    /// If two are given, or the file cannot be read.
    pub fn database_password(&self) -> Result<Option<Secret>, String> {
        match &self.database {
            Some(Database { password: None, password_file: None, .. }) | None => Ok(None),
            Some(database) => {
                one_secret("database.password", database.password.as_ref(), database.password_file.as_ref()).map(Some)
            }
        }
    }

    /// The machine's part. `bound` is where the web server listens.
    ///
    /// # Errors
    /// If a scope has a name that a key cannot hold.
    pub fn settings(&self, bound: SocketAddr, version: &str) -> Result<Settings, String> {
        let scope = |name: &str| self.common.other_scope(name).map_err(|e| e.to_string());
        let url = self.web.connect_url.clone();
        Ok(Settings {
            scope: self.common.scope(),
            content: scope(&self.content.scope)?,
            database: self.database.as_ref().map(|database| scope(&database.scope)).transpose()?,
            name: self.common.name.clone(),
            version: version.to_owned(),
            api_url: self.common.api_url(),
            url: url.unwrap_or_else(|| format!("http://{bound}")),
            mode: self.web.mode,
            ttl: Span::from_secs(self.ttl_s),
            app_start_timeout: Span::from_secs(self.web.app_start_timeout_s),
            drain_timeout: Span::from_secs(self.web.drain_timeout_s),
            cdn_url: self.cdn.base_url.clone(),
            scaling: self.scaling,
            connections: self.database.as_ref().and_then(Database::budget),
        })
    }
}

fn address(field: &str, written: &str) -> Result<SocketAddr, String> {
    let text = written.replace("localhost", "127.0.0.1");
    let text = text.strip_prefix('*').map_or_else(|| text.clone(), |port| format!("0.0.0.0{port}"));
    text.parse().map_err(|_unparsed| {
        format!("{field}: `{written}` is not an IP address with a port: write it like 127.0.0.1:8080")
    })
}

const fn ttl_s() -> u64 {
    5
}

fn web_listen() -> String {
    String::from("127.0.0.1:8080")
}

fn health_path() -> String {
    String::from("/healthz")
}

const fn health_interval_s() -> u64 {
    5
}

const fn share_percent() -> u32 {
    100
}

const fn app_start_timeout_s() -> u64 {
    30
}

const fn drain_timeout_s() -> u64 {
    10
}

const fn app_answer_timeout_s() -> u64 {
    60
}

/// As long as a restart of a quick app takes; clients and proxies give up after more.
const fn hold_timeout_s() -> u64 {
    10
}

/// Each that waits costs a connection and some kilobytes.
const fn hold_max() -> u32 {
    1_024
}

const fn body_max_bytes() -> u64 {
    64 * 1024 * 1024
}

const fn memory_max_bytes() -> u64 {
    256 * 1024 * 1024
}

const fn size_max_bytes() -> u64 {
    256 * 1024 * 1024
}

#[cfg(test)]
mod tests {
    use bots_core::shell::config;

    use super::{Mode, WebConfig};

    const GOOD: &str = "scope: web\nname: web-1\netcd3: {hosts: '127.0.0.1:2379'}\ndata_dir: /tmp/x\n\
                        content: {scope: site}\nweb: {mode: static, listen: 'localhost:0'}\n";

    fn read(text: &str) -> Result<WebConfig, String> {
        let env = [(String::from("BOT_CONFIGURATION"), text.to_owned())];
        let config: WebConfig = config::load(None, &env).map_err(|e| e.to_string())?;
        config.check().map(|()| config)
    }

    #[test]
    fn a_short_file_is_enough() {
        let config = read(GOOD).expect("good");
        assert_eq!(config.web.mode, Mode::Static);
        let settings = config.settings(([127, 0, 0, 1], 8080).into(), "1").expect("settings");
        assert_eq!(settings.url, "http://127.0.0.1:8080");
        assert_eq!(settings.scaling.max, 4);
        assert!(config.common.unknown.is_empty(), "{:?}", config.common.unknown);
    }

    #[test]
    fn bad_fields_are_named_with_the_way_out() {
        let check = |from: &str, to: &str, expected: &str| {
            let error = read(&GOOD.replace(from, to)).expect_err(to);
            assert!(error.contains(expected) && !error.contains('\n'), "{to}: {error}");
        };
        check("mode: static", "mode: app", "web.command");
        check("mode: static", "mode: fast", "web.mode");
        check("mode: static", "mode: static, hold_max: 0", "web.hold_max");
        check("mode: static", "mode: static, hold_timeout_s: 10000", "web.hold_timeout_s");
        check("localhost:0", "nowhere", "web.listen");
        check("localhost:0", "0.0.0.0:8080", "web.connect_url");
        check("localhost:0", "*:8080", "web.connect_url");
        check("localhost:0", "[::]:8080", "web.connect_url");
        let told = GOOD.replace("'localhost:0'", "'0.0.0.0:8080', connect_url: 'http://10.0.0.31:8080'");
        assert_eq!(read(&told).map(|config| config.web.connect_url), Ok(Some(String::from("http://10.0.0.31:8080"))));
        check("mode: static", "mode: static, trusted_proxies: [10.0.0.0/99]", "web.trusted_proxies");
        check("scope: site", "scope: a/b", "content.scope");
        check("scope: site", "scope: site, path_in_repo: a/../..", "content.path_in_repo");
        check("data_dir: /tmp/x", "data_dir: /tmp/x\nscaling: {max: 0}", "scaling.max");
        check("data_dir: /tmp/x", "data_dir: /tmp/x\nttl_s: 1", "ttl_s");
        check("data_dir: /tmp/x\n", "", "data_dir");
        let both = "data_dir: /tmp/x\ndatabase: {scope: main, dbname: d, username: u, password: a, password_file: b}";
        check("data_dir: /tmp/x", both, "database.password");
        let share = "data_dir: /tmp/x\ndatabase: {scope: main, dbname: d, username: u, share_percent: 101}";
        check("data_dir: /tmp/x", share, "database.share_percent");
    }
}
