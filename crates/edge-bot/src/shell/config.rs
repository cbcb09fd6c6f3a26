//! The configuration: read into types, checked, and made into the machine's settings and the way to start the proxy.

use std::{
    env,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use bots_core::{
    dcs::Scope,
    machine::Span,
    shell::{Common, Networks},
};
use serde::Deserialize;

use super::launch::Launch;
use crate::machine::Settings;

/// etcd's floor: its elections take about a second, and a lease must outlive one.
const TTL_S_MIN: u64 = 2;
/// A fleet that learns of a death after more than this is not looked after.
const TTL_S_MAX: u64 = 300;
/// HAProxy takes thousands; a backend of more is not one fleet's.
const PLACES_MAX: u64 = 1_024;
/// Who waits for longer than this has given up; a held connection takes memory for as long.
const HOLD_S_MAX: u64 = 600;
/// A day: sessions that need longer to end do not end.
const DRAIN_S_MAX: u64 = 86_400;
/// Who has nothing to say on a WebSocket says at least so within this, or is gone.
const STREAM_S_DEFAULT: u64 = 3_600;
/// A day: what is silent for longer is left over.
const STREAM_S_MAX: u64 = 86_400;
/// The kernel allows 107 bytes, and HAProxy binds a socket under a longer name before it renames it.
const SOCKET_PATH_BYTES_MAX: usize = 90;

/// The whole document.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    /// What every bot has.
    #[serde(flatten)]
    pub common: Common,
    /// The Postgres cluster to route to.
    #[serde(default)]
    pub postgres: Option<Postgres>,
    /// The web fleet to route to.
    #[serde(default)]
    pub web: Option<Web>,
    /// The proxy.
    #[serde(default)]
    pub proxy: Proxy,
    /// Where the proxy's files are kept; one bot, one directory.
    pub data_dir: PathBuf,
    /// The length of the lease.
    #[serde(default = "ttl_s")]
    pub ttl_s: u64,
}

/// The Postgres cluster to route to.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Postgres {
    /// Its scope.
    pub scope: String,
    /// Where clients find the server that accepts writes.
    pub primary: String,
    /// Where clients find those that follow it.
    #[serde(default)]
    pub replicas: Option<String>,
}

/// The web fleet to route to.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Web {
    /// Its scope.
    pub scope: String,
    /// Where clients find it.
    pub listen: String,
    /// How long a WebSocket or an event stream may be silent.
    #[serde(default = "stream_timeout_s")]
    pub stream_timeout_s: u64,
    /// Whose word about the client, its host and its protocol is believed (`X-Forwarded-For`, `-Host`, `-Proto`).
    #[serde(default = "Networks::loopback")]
    pub trusted_proxies: Networks,
}

/// The proxy.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Proxy {
    /// Whether the bot starts it if none answers at the socket.
    pub start: bool,
    /// Whether it goes when the bot is asked to stop.
    pub stop_with_bot: bool,
    /// The program.
    pub binary: PathBuf,
    /// The operator's own configuration.
    pub config_file: Option<PathBuf>,
    /// The runtime socket; in `data_dir` if it is not named.
    pub socket: Option<PathBuf>,
    /// How many servers a backend has room for.
    pub places: u64,
    /// How long a connection for the primary is held while there is none; 0: it is refused.
    pub hold_s: u64,
    /// How long sessions with a server that goes may take to end.
    pub drain_timeout_s: u64,
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            start: true,
            stop_with_bot: false,
            binary: PathBuf::from("haproxy"),
            config_file: None,
            socket: None,
            places: 16,
            hold_s: 30,
            drain_timeout_s: 30,
        }
    }
}

impl Config {
    /// Checks what the types cannot.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn check(&self) -> Result<(), String> {
        if self.postgres.is_none() && self.web.is_none() {
            return Err(String::from("postgres and web are both missing: name the scope to route to in one of them"));
        }
        let mut taken: Vec<(&str, SocketAddr)> = Vec::new();
        for (field, address) in self.listeners()? {
            if let Some((other, _)) = taken.iter().find(|(_, a)| *a == address) {
                return Err(format!("{field} and {other} are both {address}: choose another port for one of them"));
            }
            taken.push((field, address));
        }
        self.scopes()?;
        let within = |field: &str, value: u64, min: u64, max: u64| {
            let fits = (min..=max).contains(&value);
            if fits { Ok(()) } else { Err(format!("{field} is {value}: use a number from {min} to {max}")) }
        };
        within("ttl_s", self.ttl_s, TTL_S_MIN, TTL_S_MAX)?;
        within("proxy.places", self.proxy.places, 1, PLACES_MAX)?;
        within("proxy.hold_s", self.proxy.hold_s, 0, HOLD_S_MAX)?;
        let stream_timeout_s = self.web.as_ref().map_or(STREAM_S_DEFAULT, |web| web.stream_timeout_s);
        within("web.stream_timeout_s", stream_timeout_s, 1, STREAM_S_MAX)?;
        within("proxy.drain_timeout_s", self.proxy.drain_timeout_s, 0, DRAIN_S_MAX)?;
        if self.proxy.stop_with_bot && !self.proxy.start {
            return Err(String::from(
                "proxy.stop_with_bot is true and proxy.start is not: a proxy that others start is theirs to stop",
            ));
        }
        if let Some(path) = &self.proxy.config_file {
            std::fs::File::open(path).map_err(|e| format!("proxy.config_file: cannot read {}: {e}", path.display()))?;
        }
        let length = self.socket().as_os_str().len();
        if length > SOCKET_PATH_BYTES_MAX {
            let field = if self.proxy.socket.is_some() { "proxy.socket" } else { "data_dir" };
            return Err(format!(
                "{field}: the path of the socket would have {length} bytes: use a path that keeps it below \
                 {SOCKET_PATH_BYTES_MAX}"
            ));
        }
        Ok(())
    }

    /// The runtime socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.proxy.socket.clone().unwrap_or_else(|| self.data_dir.join("haproxy.sock"))
    }

    /// The machine's settings.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn settings(&self, instance: &str) -> Result<Settings, String> {
        let (postgres, web) = self.scopes()?;
        Ok(Settings {
            scope: self.common.scope(),
            replicas: self.postgres.as_ref().is_some_and(|p| p.replicas.is_some()),
            postgres,
            web,
            name: self.common.name.clone(),
            instance: instance.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            api_url: format!("{}/status", self.common.api_url()),
            ttl: Span::from_secs(self.ttl_s),
            drain_timeout: Span::from_secs(self.proxy.drain_timeout_s),
            start_proxy: self.proxy.start,
            stop_proxy: self.proxy.stop_with_bot,
        })
    }

    /// What it takes to start the proxy; nothing if that is not the bot's affair.
    ///
    /// # Errors
    /// One line, if a listener's address cannot be read.
    pub fn launch(&self) -> Result<Option<Launch>, String> {
        if !self.proxy.start {
            return Ok(None);
        }
        let mut env = vec![
            ("EDGE_SOCKET", self.socket().display().to_string()),
            ("EDGE_PLACES", self.proxy.places.to_string()),
            ("EDGE_LUA", Launch::hold_file(&self.data_dir).display().to_string()),
        ];
        if self.proxy.hold_s > 0 {
            env.push(("EDGE_HOLD_MS", Span::from_secs(self.proxy.hold_s).as_millis().to_string()));
        }
        if let Some(web) = &self.web {
            env.push(("EDGE_STREAM_S", web.stream_timeout_s.to_string()));
            let trusted: Vec<String> = web.trusted_proxies.texts().collect();
            if !trusted.is_empty() {
                env.push(("EDGE_TRUSTED", trusted.join(" ")));
            }
        }
        for (field, address) in self.listeners()? {
            let name = match field {
                "postgres.primary" => "EDGE_PRIMARY",
                "postgres.replicas" => "EDGE_REPLICAS",
                _ => "EDGE_WEB",
            };
            env.push((name, address.to_string()));
        }
        Ok(Some(Launch {
            binary: self.proxy.binary.clone(),
            config_file: self.proxy.config_file.clone(),
            data_dir: self.data_dir.clone(),
            env,
        }))
    }

    fn scopes(&self) -> Result<(Option<Scope>, Option<Scope>), String> {
        let read = |field: &str, name: &str| {
            if *name == self.common.scope {
                return Err(format!("{field}: {name} is the edge's own scope: name the one to route to"));
            }
            self.common.other_scope(name).map_err(|e| format!("{field}: {e}"))
        };
        let postgres = self.postgres.as_ref().map(|p| read("postgres.scope", &p.scope)).transpose()?;
        let web = self.web.as_ref().map(|w| read("web.scope", &w.scope)).transpose()?;
        if postgres.is_some() && postgres == web {
            return Err(String::from("web.scope and postgres.scope are the same: a scope has one kind of bots"));
        }
        Ok((postgres, web))
    }

    fn listeners(&self) -> Result<Vec<(&'static str, SocketAddr)>, String> {
        let postgres = self.postgres.as_ref();
        let all = [
            ("postgres.primary", postgres.map(|p| &p.primary)),
            ("postgres.replicas", postgres.and_then(|p| p.replicas.as_ref())),
            ("web.listen", self.web.as_ref().map(|w| &w.listen)),
        ];
        let given = all.into_iter().filter_map(|(field, text)| Some((field, text?)));
        given.map(|(field, text)| Ok((field, listener(field, text)?))).collect()
    }
}

fn listener(field: &str, text: &str) -> Result<SocketAddr, String> {
    let plain = match text.strip_prefix('*') {
        Some(port) => format!("0.0.0.0{port}"),
        None => text.replace("localhost", "127.0.0.1"),
    };
    let parsed = plain.parse::<SocketAddr>().ok().filter(|address| address.port() > 0);
    parsed.ok_or_else(|| format!("{field}: `{text}` is not an IP address with a port: write it like 127.0.0.1:5000"))
}

/// The program's file: as it is named, or where it is found. Servers live in folders that are not on every user's PATH.
///
/// # Errors
/// One line that names the field and the fix.
pub fn find_binary(name: &Path) -> Result<PathBuf, String> {
    if name.components().count() > 1 {
        let found = name.is_file();
        return if found {
            Ok(name.to_owned())
        } else {
            Err(format!("proxy.binary: there is no {}: install haproxy or name its file", name.display()))
        };
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    let found = folders.map(|folder| folder.join(name)).find(|file| file.is_file());
    found.ok_or_else(|| format!("proxy.binary: {} is not installed: install haproxy or name its file", name.display()))
}

const fn ttl_s() -> u64 {
    5
}

const fn stream_timeout_s() -> u64 {
    STREAM_S_DEFAULT
}

#[cfg(test)]
mod tests {
    use bots_core::shell::config::load;

    use super::Config;

    fn read(extra: &str) -> Result<Config, String> {
        let document = format!("{{scope: edge, name: e1, etcd3: {{host: '127.0.0.1:1'}}, {extra}}}");
        let env = [(String::from("BOT_CONFIGURATION"), document)];
        let config: Config = load(None, &env).map_err(|e| e.to_string())?;
        config.check().map(|()| config)
    }

    #[test]
    fn a_short_configuration_is_enough() {
        let config = read("data_dir: /tmp/x, postgres: {scope: main, primary: '127.0.0.1:5000'}").expect("good");
        let settings = config.settings("i").expect("good");
        assert!(settings.start_proxy && !settings.stop_proxy && !settings.replicas);
        let launch = config.launch().expect("good").expect("ours to start");
        let value = |name: &str| launch.env.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_str());
        assert_eq!(value("EDGE_PRIMARY"), Some("127.0.0.1:5000"));
        assert_eq!(value("EDGE_SOCKET"), Some("/tmp/x/haproxy.sock"));
        assert_eq!(value("EDGE_HOLD_MS"), Some("30000"));
        assert_eq!(value("EDGE_WEB"), None);
    }

    #[test]
    fn every_mistake_names_its_field() {
        let check = |extra: &str, field: &str| {
            let error = read(extra).expect_err(extra);
            assert!(error.contains(field) && !error.contains('\n'), "{extra}: {error}");
        };
        let postgres = "postgres: {scope: main, primary: '127.0.0.1:5000'}";
        check(postgres, "data_dir");
        check("data_dir: /tmp/x", "postgres");
        let good = format!("data_dir: /tmp/x, {postgres}");
        let more = |extra: &str| format!("{good}, {extra}");
        check("data_dir: /tmp/x, postgres: {scope: main}", "primary");
        check("data_dir: /tmp/x, postgres: {scope: main, primary: here}", "postgres.primary");
        check("data_dir: /tmp/x, postgres: {scope: edge, primary: '127.0.0.1:5000'}", "postgres.scope");
        check("data_dir: /tmp/x, postgres: {scope: 'a/b', primary: '127.0.0.1:5000'}", "postgres.scope");
        check(&more("web: {scope: web, listen: '127.0.0.1:5000'}"), "web.listen");
        check(&more("web: {scope: main, listen: '127.0.0.1:5001'}"), "web.scope");
        check(&more("web: {scope: web, listen: '127.0.0.1:0'}"), "web.listen");
        check(&more("web: {scope: web, listen: '127.0.0.1:1', stream_timeout_s: 0}"), "web.stream_timeout_s");
        check(&more("web: {scope: web, listen: '127.0.0.1:1', trusted_proxies: [here]}"), "web.trusted_proxies");
        check(&more("ttl_s: 1"), "ttl_s");
        check(&more("proxy: {places: 0}"), "proxy.places");
        check(&more("proxy: {hold_s: 6000}"), "proxy.hold_s");
        check(&more("proxy: {start: false, stop_with_bot: true}"), "proxy.stop_with_bot");
        check(&more("proxy: {config_file: /does/not/exist}"), "proxy.config_file");
        check(&more("proxy: {begin: true}"), "begin");
        check(&more(&format!("proxy: {{socket: /{}}}", "x".repeat(100))), "proxy.socket");
    }
}
