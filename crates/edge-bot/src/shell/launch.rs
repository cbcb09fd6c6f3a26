//! Starting the proxy: its files, its environment, a session of its own so that it outlives the bot.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::process::Command;

use crate::machine::Started;

/// The built-in configuration.
const CONFIGURATION: &str = include_str!("haproxy.cfg");
/// What holds connections while there is no primary.
const HOLD: &str = include_str!("hold.lua");

/// HAProxy reads its configuration, binds its ports and goes into the background; name servers may make it wait.
const DEADLINE: Duration = Duration::from_secs(20);

/// How much of what HAProxy complains of is shown: its first alert is there, all that follows from it need not be.
const COMPLAINT_CHARS_MAX: usize = 400;

/// What it takes to start the proxy.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program.
    pub binary: PathBuf,
    /// The operator's own configuration; the built-in one if there is none.
    pub config_file: Option<PathBuf>,
    /// Where the built-in one and the process id are written.
    pub data_dir: PathBuf,
    /// The variables that the configuration reads.
    pub env: Vec<(&'static str, String)>,
}

impl Launch {
    /// Where the file is that holds connections; written in any case, so that an operator's configuration can load it.
    #[must_use]
    pub fn hold_file(data_dir: &Path) -> PathBuf {
        data_dir.join("hold.lua")
    }

    /// Starts it. It has bound its ports when this returns. One of ours that still runs, and is not heard of any more
    /// since its socket is gone, hands its ports over and ends with its last session.
    pub async fn start(&self) -> Started {
        let config = match self.write_files() {
            Ok(config) => config,
            Err(error) => {
                let why = format!("data_dir: cannot write to {}: {error}: make it writable", self.data_dir.display());
                return Started::Failed { why };
            }
        };
        let mut command = Command::new(&self.binary);
        let pid_file = self.data_dir.join("haproxy.pid");
        command.arg("-D").arg("-f").arg(&config).arg("-p").arg(&pid_file);
        if let Some(lost) = living(&pid_file) {
            tracing::warn!(pid = lost, "a proxy runs whose socket is gone: the new one takes its ports over");
            command.arg("-sf").arg(lost.to_string());
        }
        // Nothing of ours but the path: configuration may come from the environment, and passwords with it.
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.envs(self.env.iter().map(|(name, value)| (*name, value)));
        command.stdin(Stdio::null()).kill_on_drop(true);
        match tokio::time::timeout(DEADLINE, command.output()).await {
            Ok(Ok(ended)) if ended.status.success() => Started::Done,
            Ok(Ok(ended)) => {
                Started::Failed { why: format!("haproxy -f {} fails: {}", config.display(), complaint(&ended.stderr)) }
            }
            Ok(Err(error)) => {
                Started::Failed { why: format!("proxy.binary: cannot start {}: {error}", self.binary.display()) }
            }
            Err(_elapsed) => Started::Failed { why: format!("haproxy is not up within {DEADLINE:?}") },
        }
    }

    fn write_files(&self) -> io::Result<PathBuf> {
        write(&Self::hold_file(&self.data_dir), HOLD)?;
        match &self.config_file {
            Some(own) => Ok(own.clone()),
            None => {
                let path = self.data_dir.join("haproxy.cfg");
                write(&path, CONFIGURATION)?;
                Ok(path)
            }
        }
    }
}

/// The proxy that has written this file, if it lives. Its number may be another process's by now, so the file must stand
/// in its command line.
fn living(pid_file: &Path) -> Option<u32> {
    let pid = fs::read_to_string(pid_file).ok()?.trim().parse().ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = command.split(|byte| *byte == 0);
    words.any(|word| word == pid_file.as_os_str().as_encoded_bytes()).then_some(pid)
}

/// Whole or not at all.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let unfinished = path.with_extension("new");
    let mut file = fs::File::create(&unfinished)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&unfinished, path)
}

/// The alerts among the lines that HAProxy wrote, in one line.
fn complaint(output: &[u8]) -> String {
    let output = String::from_utf8_lossy(output);
    let alerts = output.lines().filter(|line| line.starts_with("[ALERT]"));
    let text: Vec<&str> = alerts.filter_map(|line| line.split_once(" : ").map(|(_, text)| text.trim())).collect();
    let text = if text.is_empty() { output.trim().replace('\n', "; ") } else { text.join("; ") };
    text.chars().take(COMPLAINT_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::complaint;

    #[test]
    fn a_complaint_is_one_line_of_alerts() {
        let output = b"[NOTICE]   (1) : haproxy version is 2.6\n\
            [ALERT]    (1) : Starting proxy primary: cannot bind socket (Address already in use) [127.0.0.1:5000]\n\
            [ALERT]    (1) : [haproxy.main()] Some protocols failed to start their listeners! Exiting.\n";
        assert_eq!(
            complaint(output),
            "Starting proxy primary: cannot bind socket (Address already in use) [127.0.0.1:5000]; \
             [haproxy.main()] Some protocols failed to start their listeners! Exiting."
        );
        assert_eq!(complaint(b"cannot open\nfile\n"), "cannot open; file");
    }
}
