//! The files that we write for Postgres: `postgresql.conf`, `pg_hba.conf`, `pg_ident.conf`, the password file, the signal
//! file, and our marks. Each is ours as a whole and written in one piece.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::Context;
use bots_core::wire::Timeline;

use super::{conninfo::Conninfo, node::Node, quote};
use crate::machine::{IN_DOUBT, Rules, STANDBY_NAMES, Upstream};

/// In the data directory: a bootstrap or a clone of ours that has not come to its end.
pub(super) const UNFINISHED: &str = ".bots-unfinished";

/// In the data directory, while it is unfinished: where `initdb` and `pg_basebackup` work, which want an empty place.
pub(super) const STAGING: &str = ".bots-new";

/// What the mark says of a data directory that was being made new, and of one that was being copied.
pub(super) const MAKING: &str = "making a new cluster\n";
/// See [`MAKING`].
pub(super) const COPYING: &str = "copying another member\n";

const HEADER: &str =
    "# Written by postgres-bot at every start and every change of configuration: changes here are lost.\n";

/// What `ALTER SYSTEM` must not change under us.
const OURS: &[&str] = &[
    "primary_conninfo",
    "primary_slot_name",
    "restore_command",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "listen_addresses",
    "port",
    "unix_socket_directories",
    "hba_file",
    "ident_file",
    "cluster_name",
    "hot_standby",
    "wal_log_hints",
    "full_page_writes",
];

/// Parameters that stand in the way of ours whoever sets them.
const REFUSED: &[&str] =
    &["data_directory", "config_file", "hba_file", "ident_file", "listen_addresses", "port", "external_pid_file"];

/// How the server shall run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mode {
    /// Writable.
    Primary,
    /// Read-only, following if there is somebody to follow.
    Standby(Option<Upstream>),
    /// Read-only, following nobody and going no further than its own timeline: one that it knows of may have left that before.
    Settling(Timeline),
}

/// Writes every configuration file of the data directory. The signal file is left alone: it may only change while the
/// server is down.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn write_configuration(
    node: &Node,
    mode: &Mode,
    parameters: &BTreeMap<String, String>,
    rules: &Rules,
) -> anyhow::Result<()> {
    let dir = &node.data_dir;
    keep_base(dir).context("keep initdb's postgresql.conf as postgresql.base.conf")?;
    replace(&dir.join("pg_ident.conf"), &ident(node, rules), 0o600)?;
    replace(&dir.join("pg_hba.conf"), &hba(node, rules), 0o600)?;
    write_passfile(node)?;
    neutralise_alter_system(dir, parameters.contains_key(STANDBY_NAMES))?;
    replace(&dir.join("postgresql.conf"), &main_configuration(node, mode, parameters), 0o600)
}

/// Makes the server start the way it shall: the signal file is what recovery looks at.
///
/// # Errors
/// If a file cannot be written or removed.
pub(super) fn write_signal(node: &Node, mode: &Mode) -> anyhow::Result<()> {
    remove(&node.data_dir.join("recovery.signal"))?;
    let signal = node.standby_signal();
    match mode {
        Mode::Primary => remove(&signal),
        Mode::Standby(_) | Mode::Settling(_) if signal.exists() => Ok(()),
        Mode::Standby(_) | Mode::Settling(_) => replace(&signal, "", 0o600),
    }
}

/// Writes the passwords for libpq.
///
/// # Errors
/// If the file cannot be written.
pub(super) fn write_passfile(node: &Node) -> anyhow::Result<()> {
    private_dir(&node.run_dir)?;
    replace(&node.passfile(), &pgpass(node), 0o600)
}

fn main_configuration(node: &Node, mode: &Mode, parameters: &BTreeMap<String, String>) -> String {
    let mut out = format!("{HEADER}include_if_exists 'postgresql.base.conf'\n");
    for (name, value) in parameters {
        if may_be_set(name) {
            out += &format!("{name} = {}\n", quote::conf(value));
        } else {
            tracing::error!(name, "postgresql.parameters: not a parameter that may be set here: left out");
        }
    }
    let mut sockets = node.run_dir.display().to_string();
    if let Some(also) = parameters.get("unix_socket_directories").filter(|list| !list.is_empty()) {
        sockets = format!("{sockets}, {also}");
    }
    let own = [
        ("listen_addresses", node.listen.addresses.clone()),
        ("port", node.listen.port.to_string()),
        ("unix_socket_directories", sockets),
        ("hba_file", node.data_dir.join("pg_hba.conf").display().to_string()),
        ("ident_file", node.data_dir.join("pg_ident.conf").display().to_string()),
        (
            "recovery_target_timeline",
            match mode {
                Mode::Settling(timeline) => timeline.to_string(),
                Mode::Standby(_) | Mode::Primary => String::from("latest"),
            },
        ),
        (
            "primary_conninfo",
            match mode {
                Mode::Standby(Some(upstream)) => primary_conninfo(node, upstream),
                Mode::Standby(None) | Mode::Settling(_) | Mode::Primary => String::new(),
            },
        ),
    ];
    for (name, value) in own {
        out += &format!("{name} = {}\n", quote::conf(&value));
    }
    out
}

fn primary_conninfo(node: &Node, upstream: &Upstream) -> String {
    match Conninfo::new(upstream, &node.replication) {
        Ok(conninfo) => conninfo.passfile(&node.passfile()).application_name(&node.name).to_string(),
        Err(error) => {
            tracing::error!(%error, name = upstream.name, "a member cannot be followed");
            String::new()
        }
    }
}

/// Who may connect. Our own superuser comes first, by the user of the operating system; what follows is the operator's,
/// or passwords for everybody.
fn hba(node: &Node, rules: &Rules) -> String {
    let superuser = quote::hba(&node.superuser.username);
    let method = if node.os_user.is_some() { "peer map=bots" } else { "scram-sha-256" };
    let mut out = format!("{HEADER}local all {superuser} {method}\n");
    let in_doubt = rules.hba == [IN_DOUBT];
    if rules.hba.is_empty() || in_doubt {
        out += &format!("host replication {} all scram-sha-256\n", quote::hba(&node.replication.username));
    }
    if rules.hba.is_empty() {
        out += "local all all scram-sha-256\n";
        out += "host all all all scram-sha-256\n";
    }
    for line in &rules.hba {
        out += &format!("{}\n", line.replace(['\n', '\r'], " "));
    }
    out
}

fn ident(node: &Node, rules: &Rules) -> String {
    let mut out = HEADER.to_owned();
    if let Some(user) = &node.os_user {
        out += &format!("bots {} {}\n", quote::hba(user), quote::hba(&node.superuser.username));
    }
    for line in &rules.ident {
        out += &format!("{}\n", line.replace(['\n', '\r'], " "));
    }
    out
}

fn pgpass(node: &Node) -> String {
    let mut out = HEADER.to_owned();
    for login in [Some(&node.replication), node.rewind.as_ref(), Some(&node.superuser)].into_iter().flatten() {
        if let Some(password) = &login.password {
            out += &format!("*:*:*:{}:{}\n", quote::pgpass(&login.username), quote::pgpass(password.expose()));
        }
    }
    out
}

/// What initdb (or whoever was here before us) wrote stays in force below ours.
fn keep_base(dir: &Path) -> io::Result<()> {
    let (main, base) = (dir.join("postgresql.conf"), dir.join("postgresql.base.conf"));
    if base.exists() || !main.exists() {
        return Ok(());
    }
    fs::rename(main, base)
}

/// Takes our parameters out of `postgresql.auto.conf`, which is read last. Which standbys commits wait for is one of them where the
/// cluster's configuration decides it.
fn neutralise_alter_system(dir: &Path, waits: bool) -> anyhow::Result<()> {
    let path = dir.join("postgresql.auto.conf");
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    let is_ours = |line: &&str| {
        let name = line.trim_start().split(|c: char| c == '=' || c.is_whitespace()).next().unwrap_or_default();
        let name = name.to_ascii_lowercase();
        OURS.contains(&name.as_str()) || waits && name == STANDBY_NAMES
    };
    let found: Vec<&str> = text.lines().filter(is_ours).collect();
    if found.is_empty() {
        return Ok(());
    }
    tracing::warn!(count = found.len(), "ALTER SYSTEM had set parameters that are ours: taken out again");
    let kept: String = text.lines().filter(|line| !is_ours(line)).flat_map(|line| [line, "\n"]).collect();
    replace(&path, &kept, 0o600)
}

/// Whether it is the name of a parameter that others than we may set.
pub(super) fn may_be_set(name: &str) -> bool {
    is_parameter(name) && !REFUSED.contains(&name)
}

fn is_parameter(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '$'))
}

/// Puts `text` at `path` in one piece, with these permissions from the first byte on; durable when it returns. Leaves a
/// file alone that already holds it.
///
/// # Errors
/// If it cannot be written.
pub(super) fn replace(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    if fs::read(path).is_ok_and(|found| found == text.as_bytes()) {
        return Ok(());
    }
    let write = || {
        let mut name = path.as_os_str().to_owned();
        name.push(".bots-tmp");
        let draft = PathBuf::from(name);
        remove_if_there(&draft)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)?;
        sync_dir_of(path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// Removes a file, if it is there; durable when it returns.
///
/// # Errors
/// If it cannot be removed.
pub(super) fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = remove_if_there(path).and_then(|found| if found { sync_dir_of(path) } else { Ok(()) });
    removed.with_context(|| format!("remove {}", path.display()))
}

fn remove_if_there(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Makes what was created, renamed or removed beside `path` durable.
///
/// # Errors
/// If the kernel cannot.
pub(super) fn sync_dir_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

/// Makes a directory that only its owner may enter, with its parents; leaves alone one that exists.
///
/// # Errors
/// If it cannot be made.
pub(super) fn private_dir(path: &Path) -> anyhow::Result<()> {
    let make = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    make.with_context(|| format!("make the directory {}", path.display()))
}

/// Opens a log file to append to.
///
/// # Errors
/// If it cannot be opened.
pub(super) fn append_only(path: &Path) -> anyhow::Result<File> {
    let open = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    open.with_context(|| format!("open {}", path.display()))
}

/// The last complaint in a server's log, on one line; empty if there is none.
pub(super) fn last_words(log: &Path) -> String {
    const TAIL: u64 = 4_096;
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.take(TAIL).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let tail = read().unwrap_or_default();
    let complaint = tail.lines().rev().find_map(|line| {
        ["PANIC:", "FATAL:", "ERROR:"].iter().find_map(|word| line.find(word).and_then(|at| line.get(at..)))
    });
    complaint.unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::{fs, is_parameter, last_words, neutralise_alter_system};

    #[test]
    fn alter_system_keeps_what_is_not_ours() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("postgresql.auto.conf");
        let text = "# Do not edit\nwork_mem = '8MB'\nPrimary_Conninfo = 'host=evil'\nport=1\n";
        fs::write(&path, text).expect("write");
        neutralise_alter_system(dir.path(), false).expect("neutralise");
        assert_eq!(fs::read_to_string(&path).expect("read"), "# Do not edit\nwork_mem = '8MB'\n");
        fs::write(&path, "synchronous_standby_names = ''\n").expect("write");
        neutralise_alter_system(dir.path(), false).expect("neutralise");
        assert_eq!(fs::read_to_string(&path).expect("read"), "synchronous_standby_names = ''\n", "nobody decides it");
        neutralise_alter_system(dir.path(), true).expect("neutralise");
        assert_eq!(fs::read_to_string(&path).expect("read"), "");
    }

    #[test]
    fn names_that_could_smuggle_a_line_are_no_parameters() {
        assert!(is_parameter("auto_explain.log_min_duration"));
        for bad in ["", "1x", "a b", "a\nb", "a='", "include 'x'"] {
            assert!(!is_parameter(bad), "{bad:?}");
        }
    }

    #[test]
    fn the_last_complaint_of_a_log_is_found() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("log");
        let text =
            "t [1] LOG:  x\nt [1] FATAL:  could not create lock file\nt [1] LOG:  database system is shut down\n";
        fs::write(&path, text).expect("write");
        assert_eq!(last_words(&path), "FATAL:  could not create lock file");
        assert_eq!(last_words(&dir.path().join("none")), "");
    }
}
