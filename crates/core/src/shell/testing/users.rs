//! Users of a test's etcd, made by the program etcdctl, which the set-up installs.

use std::{io, process::Command};

use super::certificates::run;
use crate::shell::config;

/// Gives etcd the user of `config`, who may read and write all below `prefix` and nothing else, and has it ask for logins from
/// then on. `config` may do everything until then.
///
/// # Errors
/// If there is no etcdctl, or etcd does not do it.
pub fn enable_users(config: &config::Etcd, prefix: &str) -> io::Result<()> {
    let missing = || io::Error::other("there is no user");
    let (name, password) = config.user().map_err(io::Error::other)?.ok_or_else(missing)?;
    let user = format!("{name}:{}", password.expose());
    let commands: [&[&str]; 7] = [
        &["user", "add", "root:root"],
        &["user", "grant-role", "root", "root"],
        &["user", "add", &user],
        &["role", "add", "bots"],
        &["role", "grant-permission", "bots", "readwrite", "--prefix=true", prefix],
        &["user", "grant-role", &name, "bots"],
        &["auth", "enable"],
    ];
    commands.into_iter().try_for_each(|args| etcdctl(config, args))
}

fn etcdctl(config: &config::Etcd, args: &[&str]) -> io::Result<()> {
    let mut command = Command::new("etcdctl");
    // The programs of etcd 3.4 speak the protocol of etcd 2 unless they are told.
    command.env("ETCDCTL_API", "3").args(["--command-timeout", "20s"]).args(args);
    command.arg(format!("--endpoints={}", config.endpoints().map_err(io::Error::other)?.join(",")));
    let files = [("cacert", &config.cacert), ("cert", &config.cert), ("key", &config.key)];
    for (name, path) in files {
        command.args(path.iter().map(|path| format!("--{name}={}", path.display())));
    }
    run(&mut command)
}
