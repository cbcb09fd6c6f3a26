//! Configuration: where values come from, which one wins, and what is said of bad ones.

use std::{fs, path::Path};

use bots_core::shell::{
    Common, Secret,
    config::{self, LogFormat, LogLevel, load},
};
use serde::Deserialize;

/// A bot's configuration as the bots write theirs.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(flatten)]
    common: Common,
    #[serde(default)]
    git: Git,
    #[serde(default)]
    postgresql: Postgresql,
    #[serde(default)]
    web_scopes: Vec<String>,
    ttl_s: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Git {
    url: String,
    poll_interval_s: Option<u64>,
    password: Option<Secret>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Postgresql {
    data_dir: String,
    authentication: Authentication,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Authentication {
    superuser: Option<config::Credentials>,
}

const BASE: &str = "scope: site\nname: one\netcd3: {hosts: 'a:1,b:2'}\n";

fn read(text: &str, env: &[(&str, &str)]) -> Result<Config, String> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("bot.yml");
    fs::write(&path, text).expect("write");
    read_path(Some(&path), env).map_err(|e| e.replace(path.to_str().expect("UTF-8"), "bot.yml"))
}

fn read_path(path: Option<&Path>, env: &[(&str, &str)]) -> Result<Config, String> {
    let env: Vec<(String, String)> = env.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    load(path, &env).map_err(|e| e.to_string())
}

fn refused(text: &str, env: &[(&str, &str)]) -> String {
    let line = read(text, env).expect_err("refused");
    assert!(!line.contains('\n'), "one line: {line}");
    line
}

#[test]
fn a_short_file_is_enough() {
    let config = read(BASE, &[]).expect("good");
    assert_eq!(config.common.namespace, "service");
    assert_eq!(config.common.etcd3.endpoints().expect("good"), ["a:1", "b:2"]);
    assert_eq!(config.common.api_url(), "http://127.0.0.1:8008");
    assert_eq!((config.common.log.level, config.common.log.format), (LogLevel::Info, LogFormat::Plain));
    assert_eq!(config.common.scope().prefix(), "/service/site/");
}

#[test]
fn a_patroni_file_is_read() {
    let text = "
scope: batman
namespace: /db/
name: pg-1
etcd: {host: 'etcd1'}
restapi: {listen: 0.0.0.0:8008, connect_address: pg-1:8008, certfile: /x}
log: {type: json, level: WARNING}
bootstrap: {dcs: {ttl: 30}}
watchdog: {mode: off}
";
    let config = read(text, &[]).expect("good");
    assert_eq!(config.common.scope().leader(), "/db/batman/leader");
    assert_eq!(config.common.etcd3.endpoints().expect("good"), ["etcd1:2379"]);
    assert_eq!(config.common.api_url(), "http://pg-1:8008");
    assert_eq!((config.common.log.level, config.common.log.format), (LogLevel::Warn, LogFormat::Json));
    assert_eq!(config.common.unknown.keys().collect::<Vec<_>>(), ["bootstrap", "watchdog"]);
}

#[test]
fn the_environment_wins_and_bots_own_names_win_over_patronis() {
    let env = [
        ("PATRONI_NAME", "two"),
        ("BOT_NAME", "three"),
        ("PATRONI_SCOPE", "other"),
        ("BOT_ETCD3_HOSTS", "c:3"),
        ("BOT_GIT_POLL_INTERVAL_S", "7"),
        ("BOT_GIT_URL", "https://example.org/x.git"),
        ("BOT_WEB_SCOPES", "[web, shop]"),
        ("BOT_TTL_S", "9"),
        ("BOT_LOG_LEVEL", "debug"),
        ("BOT_RESTAPI_CONNECT_ADDRESS", "me:1"),
        ("PATRONI_SUPERUSER_USERNAME", "postgres"),
        ("PATRONI_SUPERUSER_PASSWORD", "12345"),
        ("PATRONI_POSTGRESQL_DATA_DIR", "/data"),
        ("UNRELATED", "x"),
    ];
    let config = read(BASE, &env).expect("good");
    assert_eq!((config.common.name.as_str(), config.common.scope.as_str()), ("three", "other"));
    assert_eq!(config.common.etcd3.hosts, ["c:3"]);
    assert_eq!((config.git.url.as_str(), config.git.poll_interval_s), ("https://example.org/x.git", Some(7)));
    assert_eq!((config.web_scopes, config.ttl_s), (vec!["web".into(), "shop".into()], Some(9)));
    assert_eq!(config.common.log.level, LogLevel::Debug);
    assert_eq!(config.common.restapi.connect_address(), "me:1");
    let superuser = config.postgresql.authentication.superuser.expect("given");
    assert_eq!(superuser.secret("x").expect("given").expose(), "12345", "a number was meant as text");
    assert_eq!(config.postgresql.data_dir, "/data");
}

#[test]
fn the_environment_alone_is_enough() {
    let env = [("BOT_SCOPE", "1"), ("BOT_NAME", "no"), ("BOT_ETCD3_HOST", "a:1")];
    let config = read_path(None, &env).expect("good");
    assert_eq!((config.common.scope.as_str(), config.common.name.as_str()), ("1", "no"));
    let whole = [("BOT_CONFIGURATION", BASE), ("BOT_NAME", "two")];
    assert_eq!(read_path(None, &whole).expect("good").common.name, "two");
}

#[test]
fn a_password_in_the_environment_is_what_it_is() {
    for password in ["a # b", "\"quoted\"", "0x1F", "007", "~", "no", "{a: b}", " x "] {
        let env = [("PATRONI_SUPERUSER_USERNAME", "postgres"), ("PATRONI_SUPERUSER_PASSWORD", password)];
        let config = read(BASE, &env);
        let superuser = config.expect("good").postgresql.authentication.superuser.expect("given");
        assert_eq!(superuser.secret("x").expect("given").expose(), password);
    }
}

#[test]
fn the_files_of_a_directory_are_merged_in_order() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::write(dir.path().join("10-base.yml"), format!("{BASE}git: {{url: 'file:///a', poll_interval_s: 1}}"))
        .expect("write");
    fs::write(dir.path().join("20-over.yaml"), "git: {poll_interval_s: 2}").expect("write");
    fs::write(dir.path().join("README"), "not: [read").expect("write");
    let config = read_path(Some(dir.path()), &[]).expect("good");
    assert_eq!((config.git.url.as_str(), config.git.poll_interval_s), ("file:///a", Some(2)));
}

#[test]
fn bad_fields_are_named_with_their_path_and_the_fix() {
    let cases = [
        ("name: one", "missing field `scope`: add it to the file or set BOT_SCOPE"),
        ("scope: s\nname: one", "missing field `etcd3`: add it to the file or set BOT_ETCD3"),
        ("git: {poll_interval_s: soon}", "field git.poll_interval_s: invalid type: string \"soon\", expected u64"),
        ("git: {url: 5}", "field git.url: invalid type: integer `5`, expected a string: put the value in quotes"),
        ("etcd3: {hosts: 5}", "field etcd3.hosts: expected `host:port,host:port` or a list"),
        ("restapi: {listen: '8008'}", "field restapi.listen: `8008` is not an IP address with a port"),
        ("restapi: {authentication: {password: x}}", "field restapi.authentication: missing field `username`"),
        ("log: {format: xml}", "field log.format: unknown variant `xml`, expected `plain` or `json`"),
        ("name: ../x", "field name: name `../x` has the character `.`"),
        ("namespace: a b", "field namespace: namespace `a b` has the character ` `"),
        ("web_scopes: [1]", "field web_scopes[0]: invalid type: integer `1`, expected a string"),
    ];
    for (text, wanted) in cases {
        let text = if text.contains("name: one") { text.to_owned() } else { replace_in_base(text) };
        let line = refused(&text, &[]);
        assert!(line.contains(wanted), "{text:?}\n  said   {line}\n  wanted {wanted}");
    }
    let line = refused(BASE, &[("BOT_GIT_POLL_INTERVAL_S", "soon")]);
    assert!(line.contains("field git.poll_interval_s"), "{line}");
}

/// The base with the field of `text` replaced.
fn replace_in_base(text: &str) -> String {
    let field = text.split(':').next().expect("a field");
    let kept = BASE.lines().filter(|line| !line.starts_with(&format!("{field}:")));
    kept.chain([text]).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_is_no_configuration_is_named() {
    let line = refused("scope: [a", &[]);
    assert!(line.starts_with("bot.yml is not valid YAML: ") && line.contains("line"), "{line}");
    assert_eq!(refused("- a\n- b", &[]), "bot.yml must be a mapping of fields such as `scope: main`");
    let line = refused("scope: a\nscope: b", &[]);
    assert!(line.contains("duplicate"), "{line}");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let line = read_path(Some(dir.path()), &[]).expect_err("refused");
    assert!(line.contains("the directory has no *.yml or *.yaml"), "{line}");
    let line = read_path(Some(&dir.path().join("none.yml")), &[]).expect_err("refused");
    assert!(line.contains("none.yml: No such file"), "{line}");
}

#[test]
fn secrets_come_from_files_and_do_not_show() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("password");
    fs::write(&file, "hidden\n").expect("write");
    let text = format!(
        "{BASE}restapi: {{authentication: {{username: u, password_file: {}}}}}\ngit: {{password: hidden}}",
        file.display()
    );
    let config = read(&text, &[]).expect("good");
    let credentials = config.common.restapi.authentication.as_ref().expect("given");
    assert_eq!(credentials.secret("restapi.authentication").expect("given").expose(), "hidden");
    assert!(config.git.password.is_some());
    assert!(!format!("{config:?}").contains("hidden"));

    let both = config::one_secret("x.password", Some(&Secret::new("a")), Some(&file)).expect_err("refused");
    assert_eq!(both, "x.password and x.password_file are both given: remove one");
    let gone = config::one_secret("x.password", None, Some(&dir.path().join("gone"))).expect_err("refused");
    assert!(gone.starts_with("x.password_file: cannot read"), "{gone}");
}

#[test]
fn hosts_are_checked() {
    let endpoints = |hosts: &str| config::Etcd::from_hosts(hosts).endpoints();
    assert_eq!(endpoints("http://a:1/, b ,[::1]:3,[::1]").expect("good"), ["a:1", "b:2379", "[::1]:3", "[::1]:2379"]);
    for bad in ["", "https://a:1", "a:port", ":1", "a b:1"] {
        let line = endpoints(bad).expect_err(bad);
        assert!(line.starts_with("etcd3.hosts"), "{bad:?}: {line}");
    }
}
