//! The configuration: Patroni's file, read into types, checked, and made into the machine's settings and a [`Node`].
//!
//! What Patroni knows and we do not act on yet is accepted with one line in the log each; what nobody knows is an error.

use std::{
    fs,
    path::{Path, PathBuf},
};

use bots_core::{
    shell::{Common, Secret, config::one_secret},
    wire::{config::misfits, tags},
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    binaries::Binaries,
    callbacks,
    node::{Listen, Login, Node},
    watchdog::Watchdog,
};
use crate::machine::{RemoveData, Rules, Settings, Tags};

/// The longest path of a socket that the kernel takes, less `/.s.PGSQL.65535` and the lock file's ending.
const RUN_DIR_LEN_MAX: usize = 107 - 20;

/// The whole document.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    /// What every bot has.
    #[serde(flatten)]
    pub common: Common,
    /// How a new cluster begins.
    #[serde(default)]
    pub bootstrap: Bootstrap,
    /// The server.
    pub postgresql: Postgresql,
    /// What the member says of itself.
    #[serde(default)]
    pub tags: Map<String, Value>,
    /// What resets the machine if it stands still.
    #[serde(default)]
    pub watchdog: Watchdog,
    /// For Patroni's own tools.
    #[serde(default)]
    pub ctl: Value,
}

/// How a new cluster begins.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Bootstrap {
    /// What the cluster's `config` key begins with.
    pub dcs: Map<String, Value>,
    /// Options of `initdb`: names, or names with a value.
    pub initdb: Vec<Value>,
    /// Lines of `pg_hba.conf`, if `postgresql.pg_hba` has none.
    pub pg_hba: Vec<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// The server.
#[derive(Debug, Clone, Deserialize)]
pub struct Postgresql {
    /// Where it listens: `127.0.0.1:5432`, `*:5432`, several addresses separated by commas.
    #[serde(default = "default_listen")]
    pub listen: String,
    /// Where others reach it, if that differs.
    pub connect_address: Option<String>,
    /// Its data directory.
    pub data_dir: PathBuf,
    /// Where Postgres' programs are.
    pub bin_dir: Option<PathBuf>,
    /// Where the server's log goes.
    pub log_directory: Option<PathBuf>,
    /// Who connects for what.
    pub authentication: Authentication,
    /// Parameters of this member alone.
    #[serde(default)]
    pub parameters: Map<String, Value>,
    /// Lines of `pg_hba.conf`.
    #[serde(default)]
    pub pg_hba: Vec<String>,
    /// Lines of `pg_ident.conf`.
    #[serde(default)]
    pub pg_ident: Vec<String>,
    /// Rewind rather than copy anew.
    pub use_pg_rewind: Option<bool>,
    /// What is told of what becomes of the server.
    pub callbacks: Option<Value>,
    /// Delete what a rewind has failed on.
    pub remove_data_directory_on_rewind_failure: Option<bool>,
    /// Delete what would have to be rewound, where rewinding is off.
    pub remove_data_directory_on_diverged_timelines: Option<bool>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Who connects for what.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Authentication {
    /// The bot itself.
    #[serde(default)]
    pub superuser: Account,
    /// Replicas and new copies.
    #[serde(default)]
    pub replication: Account,
    /// `pg_rewind`; the superuser if there is none.
    pub rewind: Option<Account>,
}

/// A user of the database.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Account {
    /// Its name.
    pub username: Option<String>,
    /// Its password.
    pub password: Option<Secret>,
    /// The file that holds the password.
    pub password_file: Option<PathBuf>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// What Patroni knows below `postgresql` and we do not act on yet.
const POSTGRESQL_LATER: &[&str] = &[
    "basebackup",
    "before_stop",
    "bin_name",
    "config_dir",
    "create_replica_method",
    "create_replica_methods",
    "custom_conf",
    "pg_ctl_timeout",
    "pgpass",
    "pre_promote",
    "proxy_address",
    "recovery_conf",
    "use_slots",
    "use_unix_socket",
    "use_unix_socket_repl",
];
/// The same below `bootstrap`.
const BOOTSTRAP_LATER: &[&str] = &["method", "post_bootstrap", "post_init", "users"];
/// What libpq takes from an account.
const CONNECTION_OPTIONS: &[&str] = &[
    "channel_binding",
    "gssencmode",
    "sslcert",
    "sslcrl",
    "sslcrldir",
    "sslkey",
    "sslmode",
    "sslnegotiation",
    "sslpassword",
    "sslrootcert",
];
/// Options of `initdb` that are ours to give.
const INITDB_OURS: &[&str] = &["pgdata", "username", "pwfile", "pwprompt", "auth", "auth-local", "auth-host"];

impl Config {
    /// Checks everything that can be checked without looking at the machine.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn check(&self) -> Result<(), String> {
        self.logins()?;
        self.initdb_options()?;
        self.listen()?;
        self.connect_address()?;
        self.warnings()?;
        self.callbacks()?;
        self.watchdog.check()?;
        if let Some(misfit) = tags::misfit(&self.tags) {
            return Err(misfit);
        }
        if let Some(misfit) = misfits(&Value::Object(self.bootstrap.dcs.clone())).first() {
            return Err(format!("bootstrap.dcs.{misfit}"));
        }
        let mut parameters = self.postgresql.parameters.iter().filter(|(_, value)| !value.is_null());
        if let Some((name, value)) = parameters.find(|(_, value)| crate::machine::parameter_text(value).is_none()) {
            return Err(format!("postgresql.parameters.{name} is {value}: use a text, a number, true or false"));
        }
        let run_dir = self.run_dir()?;
        if run_dir.as_os_str().len() > RUN_DIR_LEN_MAX {
            return Err(format!(
                "postgresql.data_dir: {} is too long for the server's socket, which stands beside it: use a path of at \
                 most {} bytes",
                self.postgresql.data_dir.display(),
                RUN_DIR_LEN_MAX - ".run".len()
            ));
        }
        Ok(())
    }

    /// The fields that are accepted and not acted on, one line each.
    ///
    /// # Errors
    /// The first field that nobody knows.
    pub fn warnings(&self) -> Result<Vec<String>, String> {
        let mut out = Vec::new();
        let methods = ["create_replica_methods", "create_replica_method"];
        let listed = methods.iter().filter_map(|m| self.postgresql.rest.get(*m)?.as_array()).flatten();
        let listed: Vec<&str> = listed.filter_map(Value::as_str).collect();
        let method = self.bootstrap.rest.get("method").and_then(Value::as_str);
        accept("postgresql", &self.postgresql.rest, POSTGRESQL_LATER, &listed, &mut out)?;
        accept("bootstrap", &self.bootstrap.rest, BOOTSTRAP_LATER, method.as_slice(), &mut out)?;
        Ok(out)
    }

    /// The machine's settings.
    pub fn settings(&self, instance: String, version: &str, epoch_unix_ms: u64) -> Settings {
        let text = |(name, value): (&String, &Value)| Some((name.clone(), crate::machine::parameter_text(value)?));
        let (host, port) = self.connect_address().unwrap_or_default();
        let bracketed = if host.contains(':') { format!("[{host}]") } else { host };
        let postgresql = &self.postgresql;
        let hba = [&postgresql.pg_hba, &self.bootstrap.pg_hba].into_iter().find(|lines| !lines.is_empty());
        let remove_data = RemoveData {
            on_rewind_failure: postgresql.remove_data_directory_on_rewind_failure,
            on_diverged_timelines: postgresql.remove_data_directory_on_diverged_timelines,
        };
        Settings {
            scope: self.common.scope(),
            name: self.common.name.clone(),
            instance,
            version: version.to_owned(),
            api_url: format!("{}/patroni", self.common.api_url()),
            conn_url: format!("postgres://{bracketed}:{port}/postgres"),
            epoch_unix_ms,
            tags: Tags(self.tags.clone()),
            parameters: postgresql.parameters.iter().filter_map(text).collect(),
            bootstrap_config: Value::Object(self.bootstrap.dcs.clone()),
            rules: Rules { hba: hba.cloned().unwrap_or_default(), ident: postgresql.pg_ident.clone() },
            use_pg_rewind: postgresql.use_pg_rewind,
            remove_data,
            watchdog: self.watchdog.settings(),
        }
    }

    /// The operator's callbacks.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub(super) fn callbacks(&self) -> Result<callbacks::Programs, String> {
        callbacks::programs(self.postgresql.callbacks.as_ref())
    }

    /// The sections that differ in `new` in what a bot that runs cannot take over.
    pub fn fixed_differences(&self, new: &Self) -> Vec<&'static str> {
        let fixed = |c: &Self| {
            let p = &c.postgresql;
            format!(
                "{:?}",
                (
                    &p.listen,
                    &p.connect_address,
                    &p.data_dir,
                    &p.bin_dir,
                    &p.log_directory,
                    &p.authentication,
                    &p.callbacks
                )
            )
        };
        let bootstrap = |c: &Self| format!("{:?}", (&c.bootstrap.dcs, &c.bootstrap.initdb));
        let watchdog = |c: &Self| format!("{:?}", c.watchdog);
        let sections = [
            ("postgresql", fixed(self) != fixed(new)),
            ("bootstrap", bootstrap(self) != bootstrap(new)),
            ("watchdog", watchdog(self) != watchdog(new)),
        ];
        let all = sections.into_iter().chain([("scope, name, etcd3, restapi or log", self.common != new.common)]);
        all.filter(|(_, differs)| *differs).map(|(section, _)| section).collect()
    }

    /// Everything that the jobs need to know of this machine.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn node(&self, binaries: Binaries) -> Result<Node, String> {
        let (superuser, replication, rewind) = self.logins()?;
        let data_dir = self.data_dir()?;
        let log_dir = self.postgresql.log_directory.as_deref().or(data_dir.parent()).unwrap_or(Path::new("/"));
        let os_user = os_user();
        if os_user.is_none() && superuser.password.is_none() {
            return Err(String::from(
                "postgresql.authentication.superuser.password is missing, and the user that runs the bot has no name to \
                 go by: give a password",
            ));
        }
        Ok(Node {
            name: self.common.name.clone(),
            run_dir: self.run_dir()?,
            log_file: log_dir.join(format!("{}-postgres.log", self.common.name)),
            binaries,
            guard: PathBuf::from("/proc/self/exe"),
            listen: self.listen()?,
            superuser,
            replication,
            rewind,
            initdb: self.initdb_options()?,
            watchdog: self.watchdog.device.clone(),
            os_user,
            data_dir,
        })
    }

    /// The data directory, absolute.
    ///
    /// # Errors
    /// If the working directory is gone.
    pub fn data_dir(&self) -> Result<PathBuf, String> {
        let path = &self.postgresql.data_dir;
        if path.as_os_str().is_empty() {
            return Err(String::from("postgresql.data_dir is empty: give it a directory of its own"));
        }
        // A slash at its end would put what stands beside it into it.
        std::path::absolute(path)
            .map(|path| path.components().collect())
            .map_err(|e| format!("postgresql.data_dir: {}: {e}: use an absolute path", path.display()))
    }

    fn run_dir(&self) -> Result<PathBuf, String> {
        let mut path = self.data_dir()?.into_os_string();
        path.push(".run");
        Ok(PathBuf::from(path))
    }

    fn cluster_wide(&self, field: &str) -> Option<&Value> {
        self.bootstrap.dcs.get("postgresql")?.get(field)
    }

    fn logins(&self) -> Result<(Login, Login, Option<Login>), String> {
        let accounts = &self.postgresql.authentication;
        let superuser = login("superuser", &accounts.superuser, "postgres")?;
        let replication = login("replication", &accounts.replication, "replicator")?;
        let rewind = accounts.rewind.as_ref().map(|account| login("rewind", account, "rewind_user")).transpose()?;
        let own_rules = !self.postgresql.pg_hba.is_empty() || !self.bootstrap.pg_hba.is_empty();
        if replication.password.is_none() && !own_rules && self.cluster_wide("pg_hba").is_none() {
            return Err(String::from(
                "postgresql.authentication.replication.password is missing: give it (or password_file), the same on \
                 every member",
            ));
        }
        Ok((superuser, replication, rewind))
    }

    /// The options of `initdb`, as it takes them.
    fn initdb_options(&self) -> Result<Vec<String>, String> {
        let mut out = Vec::new();
        for (n, option) in self.bootstrap.initdb.iter().enumerate() {
            let bad = || {
                format!(
                    "bootstrap.initdb[{n}]: `{option}` is neither a name nor one name with a value: write `- encoding: UTF8`"
                )
            };
            let (name, value) = match option {
                Value::String(name) => (name.clone(), None),
                Value::Object(map) if map.len() == 1 => {
                    let (name, value) = map.iter().next().ok_or_else(bad)?;
                    (name.clone(), Some(crate::machine::parameter_text(value).ok_or_else(bad)?))
                }
                _ => return Err(bad()),
            };
            let name = name.trim_start_matches('-');
            if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
                return Err(bad());
            }
            if INITDB_OURS.contains(&name) {
                return Err(format!("bootstrap.initdb[{n}]: {name} is the bot's own to give: remove it"));
            }
            out.push(value.map_or_else(|| format!("--{name}"), |value| format!("--{name}={value}")));
        }
        Ok(out)
    }

    fn listen(&self) -> Result<Listen, String> {
        let text = &self.postgresql.listen;
        let (addresses, port) = host_and_port(text).ok_or_else(|| {
            format!("postgresql.listen: `{text}` is not an address with a port: write it like 127.0.0.1:5432")
        })?;
        Ok(Listen { addresses, port })
    }

    fn connect_address(&self) -> Result<(String, u16), String> {
        let listen = self.listen()?;
        let Some(text) = &self.postgresql.connect_address else {
            let first = listen.addresses.split(',').next().unwrap_or_default().trim().to_owned();
            if matches!(first.as_str(), "*" | "0.0.0.0" | "::" | "") {
                return Err(String::from(
                    "postgresql.connect_address is missing, and postgresql.listen is no address that others could use: \
                     give the address by which other members reach this server",
                ));
            }
            return Ok((first, listen.port));
        };
        let parsed = host_and_port(text).or_else(|| host_and_port(&format!("{text}:{}", listen.port)));
        parsed.ok_or_else(|| {
            format!("postgresql.connect_address: `{text}` is not a host with a port: write it like 10.0.0.1:5432")
        })
    }
}

/// Takes note of the fields of a section that we do not act on; `named` are sections that other fields speak of.
fn accept(
    section: &str,
    rest: &Map<String, Value>,
    later: &[&str],
    named: &[&str],
    out: &mut Vec<String>,
) -> Result<(), String> {
    for field in rest.keys().map(String::as_str) {
        if !later.contains(&field) && !named.contains(&field) {
            return Err(format!("{section}.{field}: nobody knows this field: correct its name or remove it"));
        }
        out.push(format!("{section}.{field} is known and has no effect yet"));
    }
    Ok(())
}

fn login(kind: &str, account: &Account, default: &str) -> Result<Login, String> {
    let field = format!("postgresql.authentication.{kind}");
    let username = account.username.clone().unwrap_or_else(|| default.to_owned());
    if username.is_empty() || username.contains(['\n', '\r', '\0']) {
        return Err(format!("{field}.username: `{username}` cannot be a user's name: choose another"));
    }
    let password = match (&account.password, &account.password_file) {
        (None, None) => None,
        (secret, file) => Some(one_secret(&format!("{field}.password"), secret.as_ref(), file.as_ref())?),
    };
    if password.as_ref().is_some_and(|p| p.expose().is_empty() || p.expose().contains(['\n', '\r', '\0'])) {
        return Err(format!("{field}.password is empty or has a line break: choose another"));
    }
    let mut options = Vec::new();
    for (name, value) in &account.rest {
        let known = CONNECTION_OPTIONS.iter().find(|known| *known == name);
        let known =
            known.ok_or_else(|| format!("{field}.{name}: nobody knows this field: correct its name or remove it"))?;
        options.extend(crate::machine::parameter_text(value).map(|text| (*known, text)));
    }
    Ok(Login { username, password, options })
}

/// `a,b:5432`, `*:5432`, `[::1]:5432`.
fn host_and_port(text: &str) -> Option<(String, u16)> {
    let (hosts, port) = text.trim().rsplit_once(':')?;
    let port: u16 = port.parse().ok().filter(|port| *port > 0)?;
    let bare: Vec<&str> =
        hosts.split(',').map(|host| host.trim().trim_start_matches('[').trim_end_matches(']')).collect();
    let whole = bare.iter().all(|host| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '*' | '%');
        !host.is_empty() && host.chars().all(plain)
    });
    // An IPv6 address without brackets would lose its last part to the port.
    let ambiguous = hosts.contains(':') && !hosts.contains('[');
    (whole && !ambiguous).then(|| (bare.join(","), port))
}

/// The name of the user that we run as; the server's peer authentication goes by it.
fn os_user() -> Option<String> {
    let uid = rustix::process::getuid().as_raw().to_string();
    let named = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1) == Some(uid.as_str())).then(|| name.to_owned())
    };
    let known = fs::read_to_string("/etc/passwd").unwrap_or_default().lines().find_map(named);
    known.or_else(|| {
        // Users of a directory service are not in the file.
        let told = std::process::Command::new("id").arg("-un").output().ok().filter(|told| told.status.success())?;
        Some(String::from_utf8(told.stdout).ok()?.trim().to_owned()).filter(|name| !name.is_empty())
    })
}

fn default_listen() -> String {
    String::from("127.0.0.1:5432")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Config, RemoveData, host_and_port};

    fn document() -> Value {
        json!({
            "scope": "main", "name": "pg1", "etcd3": {"hosts": "127.0.0.1:2379"},
            "postgresql": {
                "listen": "127.0.0.1:5433", "data_dir": "/var/lib/x/data",
                "authentication": {"replication": {"username": "r", "password": "p"}},
            },
        })
    }

    /// What is said of the document with `value` at `pointer`.
    fn told(pointer: &str, value: Value) -> String {
        let mut document = document();
        let (parent, field) = pointer.rsplit_once('/').expect("a pointer");
        document
            .pointer_mut(parent)
            .expect("the parent")
            .as_object_mut()
            .expect("an object")
            .insert(field.to_owned(), value);
        match serde_json::from_value::<Config>(document) {
            Ok(config) => config.check().err().unwrap_or_else(|| String::from("good")),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_wrong_field_is_named_with_the_fix() {
        for (pointer, value, expected) in [
            ("/postgresql/listen", json!("5432"), "postgresql.listen: `5432` is not an address with a port"),
            ("/postgresql/listen", json!("*:5432"), "postgresql.connect_address is missing"),
            ("/postgresql/connect_address", json!("a b:1"), "postgresql.connect_address: `a b:1` is not a host"),
            ("/postgresql/data_dir", json!(""), "postgresql.data_dir is empty"),
            ("/postgresql/data_dir", json!(format!("/{}", "x".repeat(90))), "is too long for the server's socket"),
            ("/postgresql/datadir", json!("/x"), "postgresql.datadir: nobody knows this field"),
            (
                "/postgresql/authentication/replication",
                json!({}),
                "postgresql.authentication.replication.password is missing",
            ),
            (
                "/postgresql/authentication/superuser",
                json!({"pasword": "x"}),
                "superuser.pasword: nobody knows this field",
            ),
            ("/postgresql/authentication/superuser", json!({"password": "x", "password_file": "/x"}), "both given"),
            ("/postgresql/authentication/superuser", json!({"password_file": "/nowhere"}), "cannot read /nowhere"),
            ("/postgresql/authentication/replcation", json!({}), "unknown field `replcation`"),
            ("/bootstrap", json!({"initdb": [{"a": 1, "b": 2}]}), "bootstrap.initdb[0]"),
            ("/bootstrap", json!({"initdb": ["x", {"pwfile": "/x"}]}), "bootstrap.initdb[1]: pwfile is the bot's own"),
            ("/bootstrap", json!({"initdb": ["--x; rm"]}), "bootstrap.initdb[0]"),
            ("/bootstrap", json!({"dcss": {}}), "bootstrap.dcss: nobody knows this field"),
            ("/watchdog", json!({"mode": "on"}), "watchdog.mode: `on` is none of off, automatic, required"),
            ("/watchdog", json!({"mode": "required", "device": "watchdog"}), "watchdog.device: `watchdog`"),
            ("/watchdog", json!({"safety_margin": -2}), "watchdog.safety_margin: -2"),
            ("/watchdog", json!({"devise": "/x"}), "unknown field `devise`"),
            ("/tags", json!({"nofailover": "ture"}), r#"tags.nofailover is "ture": use true or false"#),
            ("/postgresql/parameters", json!({"work_mem": [4]}), "postgresql.parameters.work_mem is [4]: use a text"),
            ("/tags", json!({"nosync": [true]}), "tags.nosync is [true]: use true or false"),
            ("/tags", json!({"failover_priority": "high"}), r#"tags.failover_priority is "high": use a whole number"#),
            (
                "/bootstrap",
                json!({"dcs": {"synchronous_mode_strict": "ture"}}),
                r#"bootstrap.dcs.synchronous_mode_strict is "ture": use true or false"#,
            ),
        ] {
            let said = told(pointer, value.clone());
            assert!(said.contains(expected), "{pointer} = {value}: {said}");
            assert!(!said.contains('\n'), "{said}");
        }
    }

    #[test]
    fn patronis_own_sample_is_taken_with_a_warning_for_what_has_no_effect_yet() {
        let mut document = document();
        document["bootstrap"] = json!({
            "dcs": {"ttl": 30, "postgresql": {"use_pg_rewind": false, "pg_hba": ["host all all all md5"]}},
            "initdb": [{"encoding": "UTF8"}, "data-checksums"], "post_init": "/usr/local/bin/setup",
        });
        document["postgresql"]["pgpass"] = json!("/tmp/pgpass0");
        document["postgresql"]["create_replica_methods"] = json!(["wal_e", "basebackup"]);
        document["postgresql"]["wal_e"] = json!({"command": "x"});
        document["tags"] = json!({"noloadbalance": false, "failover_priority": 0, "clonefrom": "on", "mine": "ture"});
        let config: Config = serde_json::from_value(document).expect("read");
        config.check().expect("good");
        assert_eq!(config.warnings().expect("known").len(), 4);
        let settings = config.settings(String::from("i"), "1", 0);
        assert_eq!(settings.conn_url, "postgres://127.0.0.1:5433/postgres");
        assert_eq!(settings.api_url, "http://127.0.0.1:8008/patroni");
        assert!(settings.use_pg_rewind.is_none() && settings.tags.nofailover());
        assert_eq!(config.initdb_options().expect("good"), ["--encoding=UTF8", "--data-checksums"]);
    }

    #[test]
    fn the_two_leaves_to_delete_data_are_read_apart() {
        for (on_rewind_failure, on_diverged_timelines) in
            [(None, None), (Some(true), None), (None, Some(true)), (Some(true), Some(true))]
        {
            let mut document = document();
            document["postgresql"]["remove_data_directory_on_rewind_failure"] = json!(on_rewind_failure);
            document["postgresql"]["remove_data_directory_on_diverged_timelines"] = json!(on_diverged_timelines);
            let config: Config = serde_json::from_value(document).expect("read");
            let read = config.settings(String::from("i"), "1", 0).remove_data;
            assert_eq!(read, RemoveData { on_rewind_failure, on_diverged_timelines });
        }
    }

    #[test]
    fn addresses_are_read() {
        let read = |text| host_and_port(text);
        assert_eq!(read("a,10.0.0.1:1"), Some((String::from("a,10.0.0.1"), 1)));
        assert_eq!(read("[::1]:5432"), Some((String::from("::1"), 5432)));
        assert_eq!(read("*:5432"), Some((String::from("*"), 5432)));
        for bad in ["", "x", "x:0", "x:y", ":1", "::1:5432", "a;b:1"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
