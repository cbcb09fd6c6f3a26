//! The configuration of a web bot: the YAML document, and what of it the machine must know.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use bots_core::{
    machine::Span,
    shell::{Common, Networks, Secret, config::one_secret},
};
use serde::{Deserialize, Deserializer};

use crate::machine::{ConnectionBudget, Live, Mode, ScalingSettings, Settings};

/// The shortest lease: etcd counts in whole seconds and rounds up to its own election time.
const TTL_S_MIN: u64 = 2;

/// The longest time-out that makes sense; more is a slip of the finger, such as milliseconds.
const TIMEOUT_S_MAX: u64 = 3_600;

/// What the bot itself says in the environment of an app.
const OWN_VARIABLES: [&str; 5] = ["PORT", "CONTENT_DIR", "REVISION", "CDN_URL", "DATABASE_URL"];

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
    /// What else stands in its environment.
    #[serde(default)]
    pub env: BTreeMap<String, EnvValue>,
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

/// The value of a variable for the app; it may be a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvValue(pub(super) Secret);

impl<'de> Deserialize<'de> for EnvValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a string, a whole number, true or false")]
        enum Written {
            Text(String),
            Number(i64),
            Truth(bool),
        }
        Ok(Self(Secret::new(match Written::deserialize(deserializer)? {
            Written::Text(text) => text,
            Written::Number(number) => number.to_string(),
            Written::Truth(truth) => truth.to_string(),
        })))
    }
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
        self.check_env()?;
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

    fn check_env(&self) -> Result<(), String> {
        for (name, value) in &self.web.env {
            let shown: String = name.escape_default().collect();
            if OWN_VARIABLES.contains(&name.as_str()) {
                return Err(format!("web.env.{name}: the bot itself says that to the app: leave it out"));
            }
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(format!("web.env: `{shown}` cannot be the name of a variable: use letters, digits and _"));
            }
            if value.0.expose().contains('\0') {
                return Err(format!("web.env.{shown} has a zero byte in it, which no variable can hold: take it out"));
            }
        }
        Ok(())
    }

    /// Whether an app of `new` could take the place of one of ours while the bot runs: with another mode it may have no command, and with
    /// another cluster an account that ours does not know.
    #[must_use]
    pub fn has_the_app_of(&self, new: &Self) -> bool {
        self.web.mode == new.web.mode && self.database_scope() == new.database_scope()
    }

    fn database_scope(&self) -> Option<&str> {
        self.database.as_ref().map(|database| database.scope.as_str())
    }

    /// The fields that differ in `new` and that a bot that runs cannot take over.
    #[must_use]
    pub fn fixed_differences(&self, new: &Self) -> Vec<&'static str> {
        let debug = |what: &dyn std::fmt::Debug| format!("{what:?}");
        let (old_web, new_web) = (&self.web, &new.web);
        let fields = [
            ("scope, name, etcd3, restapi or log", self.common != new.common),
            ("web.listen", old_web.listen != new_web.listen),
            ("web.connect_url", old_web.connect_url != new_web.connect_url),
            ("web.mode", old_web.mode != new_web.mode),
            ("web.app_answer_timeout_s", old_web.app_answer_timeout_s != new_web.app_answer_timeout_s),
            ("web.hold_timeout_s", old_web.hold_timeout_s != new_web.hold_timeout_s),
            ("web.hold_max", old_web.hold_max != new_web.hold_max),
            ("web.body_max_bytes", old_web.body_max_bytes != new_web.body_max_bytes),
            ("web.trusted_proxies", old_web.trusted_proxies != new_web.trusted_proxies),
            ("web.memory_max_bytes", old_web.memory_max_bytes != new_web.memory_max_bytes),
            ("web.tls", debug(&old_web.tls) != debug(&new_web.tls)),
            ("web.access_log", old_web.access_log != new_web.access_log),
            ("content", debug(&self.content) != debug(&new.content)),
            ("database.scope", self.database_scope() != new.database_scope()),
            ("data_dir", self.data_dir != new.data_dir),
            ("ttl_s", self.ttl_s != new.ttl_s),
        ];
        fields.into_iter().filter(|(_, differs)| *differs).map(|(field, _)| field).collect()
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
            live: self.live(0),
        })
    }

    /// The part of it that may change while the bot runs; the app is run in the way that has that number.
    #[must_use]
    pub fn live(&self, configuration: u64) -> Live {
        Live {
            configuration,
            app_start_timeout: Span::from_secs(self.web.app_start_timeout_s),
            drain_timeout: Span::from_secs(self.web.drain_timeout_s),
            cdn_url: self.cdn.base_url.clone(),
            scaling: self.scaling,
            connections: self.database.as_ref().and_then(Database::budget),
        }
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
        assert_eq!(settings.live.scaling.max, 4);
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
        check("mode: static", "mode: static, env: {PORT: 80}", "web.env.PORT");
        check("mode: static", "mode: static, env: {A=B: c}", "web.env");
        check("mode: static", "mode: static, env: {RATIO: 1.10}", "web.env.RATIO");
        check("mode: static", "mode: static, env: {CODE: 007}", "put the value in quotes");
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

    #[test]
    fn what_takes_effect_at_once_and_what_when_the_bot_is_started_anew() {
        let old = read(GOOD).expect("good");
        let fixed = |from: &str, to: &str| {
            let new = read(&GOOD.replace(from, to)).expect(to);
            (old.fixed_differences(&new), old.live(0) != new.live(0))
        };
        let nothing: [&str; 0] = [];
        assert_eq!(fixed("mode: static", "mode: static"), (nothing.to_vec(), false));
        assert_eq!(fixed("mode: static", "mode: static, command: [x], env: {A: 1}"), (nothing.to_vec(), false));
        assert_eq!(fixed("mode: static", "mode: static, drain_timeout_s: 7"), (nothing.to_vec(), true));
        assert_eq!(fixed("localhost:0", "localhost:1"), (vec!["web.listen"], false));
        assert_eq!(fixed("mode: static", "mode: app, command: [x]"), (vec!["web.mode"], false));
        let database = "data_dir: /tmp/x\ndatabase: {scope: main, dbname: d, username: u}";
        assert_eq!(fixed("data_dir: /tmp/x", database), (vec!["database.scope"], false));
        assert_eq!(fixed("scope: site", "scope: other"), (vec!["content"], false));
        let both = fixed("data_dir: /tmp/x", "data_dir: /tmp/y\nttl_s: 9\nscaling: {max: 2}");
        assert_eq!(both, (vec!["data_dir", "ttl_s"], true));

        let replaced = |from: &str, to: &str| old.has_the_app_of(&read(&GOOD.replace(from, to)).expect(to));
        assert!(replaced("mode: static", "mode: static, command: [x]"));
        assert!(!replaced("mode: static", "mode: app, command: [x]"));
        assert!(!replaced("data_dir: /tmp/x", database));
    }

    #[test]
    fn variables_of_the_app_are_text_and_do_not_show_themselves() {
        let text = GOOD.replace("mode: static", "mode: static, env: {A: 4, B: true, C: 'hidden 007'}");
        let env = read(&text).expect("good").web.env;
        let values: Vec<&str> = env.values().map(|value| value.0.expose()).collect();
        assert_eq!(values, ["4", "true", "hidden 007"]);
        assert!(!format!("{env:?}").contains("hidden"));
    }
}
