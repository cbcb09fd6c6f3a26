//! Everything that the jobs need to know of this machine: paths, programs, users. Fixed at start; decides nothing.

use std::path::PathBuf;

use bots_core::shell::Secret;

use super::binaries::Binaries;

/// This member's place.
#[derive(Debug, Clone)]
pub struct Node {
    /// The member's name.
    pub name: String,
    /// The data directory.
    pub data_dir: PathBuf,
    /// Beside the data directory, for the owner alone: the server's socket, the password file, marks.
    pub run_dir: PathBuf,
    /// What the server says.
    pub log_file: PathBuf,
    /// Postgres' programs.
    pub binaries: Binaries,
    /// The program that guards a running server: this one.
    pub guard: PathBuf,
    /// Where the server listens.
    pub listen: Listen,
    /// Whom the bot connects as.
    pub superuser: Login,
    /// Whom replicas connect as.
    pub replication: Login,
    /// Whom `pg_rewind` connects as, if not as the superuser.
    pub rewind: Option<Login>,
    /// The options of `initdb`.
    pub initdb: Vec<String>,
    /// The watchdog device, if one is used.
    pub watchdog: PathBuf,
    /// The name of the user that we and the server run as, if it has one.
    pub os_user: Option<String>,
}

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// As in `listen_addresses`.
    pub addresses: String,
    /// The port.
    pub port: u16,
}

/// A user of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// Its name.
    pub username: String,
    /// Its password.
    pub password: Option<Secret>,
    /// What libpq is to be told besides, such as `sslmode`.
    pub options: Vec<(&'static str, String)>,
}

impl Node {
    /// The passwords, for libpq.
    pub fn passfile(&self) -> PathBuf {
        self.run_dir.join("pgpass")
    }

    /// The mark of a rewind that has not come to its end. Not in the data directory, whose files a rewind replaces.
    pub fn rewinding(&self) -> PathBuf {
        self.run_dir.join("rewinding")
    }

    /// Where the guard of the running server listens.
    pub fn guard_socket(&self) -> PathBuf {
        self.run_dir.join("guard.sock")
    }

    /// What the guard of the running server keeps locked.
    pub fn guard_lock(&self) -> PathBuf {
        self.run_dir.join("guard.lock")
    }

    /// The server starts read-only if this is there.
    pub fn standby_signal(&self) -> PathBuf {
        self.data_dir.join("standby.signal")
    }

    /// The superuser's password, while `initdb` reads it.
    pub fn initdb_password(&self) -> PathBuf {
        self.run_dir.join("initdb-password")
    }

    /// Where `initdb` and `pg_basebackup` work before the data directory has their files.
    pub fn staging(&self) -> PathBuf {
        self.data_dir.join(super::files::STAGING)
    }

    /// The mark of a bootstrap or a clone that has not come to its end.
    pub fn unfinished(&self) -> PathBuf {
        self.data_dir.join(super::files::UNFINISHED)
    }

    /// Whom `pg_rewind` connects as.
    pub fn rewinder(&self) -> &Login {
        self.rewind.as_ref().unwrap_or(&self.superuser)
    }
}
