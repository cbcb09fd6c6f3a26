//! Postgres' own programs as children with an end: `initdb`, `pg_basebackup`, `pg_rewind`, `pg_controldata`.
//!
//! Each dies with the bot and with the job that started it, and its last words become the error.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    path::Path,
    process::{Output, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::AsyncReadExt,
    process::{Child, ChildStderr, Command},
};

use super::{postmaster::die_with_bot, processes};

/// What children may see of our environment. The rest stays here: it may hold the configuration with its passwords,
/// and `PG*` would turn connections elsewhere.
const ENVIRONMENT: &[&str] = &["PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LOCPATH"];

/// So much of what a program said last goes into an error.
const LAST_WORDS_LEN_MAX: usize = 500;

/// How often a killed program is looked at until it is gone.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A command with nothing of the environment but what every program needs.
pub fn clean_command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear();
    for (name, value) in std::env::vars_os() {
        let known = name.to_str().is_some_and(|n| ENVIRONMENT.contains(&n) || n.starts_with("LC_"));
        if known {
            command.env(name, value);
        }
    }
    command
}

/// The programs that run now.
#[derive(Debug, Default)]
pub struct Tools {
    running: Mutex<BTreeSet<i32>>,
}

impl Tools {
    /// Runs a program to its end. A future that is dropped kills the program.
    ///
    /// # Errors
    /// If it cannot be started or says that it failed; the error carries its last words.
    pub async fn run(&self, command: Command) -> anyhow::Result<Output> {
        let name = name_of(&command);
        let output = self.run_to_any_end(command).await?;
        check(&name, &output)?;
        Ok(output)
    }

    /// The same for a program that tells on its standard error how far it is: `told` hears every piece of that.
    ///
    /// # Errors
    /// If it cannot be started or says that it failed.
    pub async fn run_telling(&self, command: Command, told: impl FnMut(&str)) -> anyhow::Result<()> {
        let name = name_of(&command);
        let (mut child, family) = self.spawn(command)?;
        let pid = child.id().map(u32::cast_signed);
        let said = match child.stderr.take() {
            Some(stderr) => listen(stderr, told).await,
            None => Vec::new(),
        };
        let status = child.wait().await.with_context(|| format!("wait for {name}"))?;
        family.has_ended();
        if let Some(pid) = pid {
            self.running().remove(&pid);
        }
        check(&name, &Output { status, stdout: Vec::new(), stderr: said })
    }

    /// The same for a program whose failure has to be looked into.
    ///
    /// # Errors
    /// If it cannot be started.
    pub async fn run_to_any_end(&self, mut command: Command) -> anyhow::Result<Output> {
        let name = name_of(&command);
        command.stdout(Stdio::piped());
        let (child, family) = self.spawn(command)?;
        let pid = child.id().map(u32::cast_signed);
        let output = child.wait_with_output().await.with_context(|| format!("wait for {name}"))?;
        family.has_ended();
        if let Some(pid) = pid {
            self.running().remove(&pid);
        }
        Ok(output)
    }

    fn spawn(&self, mut command: Command) -> anyhow::Result<(Child, Family)> {
        command.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true).process_group(0);
        die_with_bot(&mut command, Signal::KILL);
        let child = command.spawn().with_context(|| format!("start {}", name_of(&command)))?;
        let pid = child.id().map(u32::cast_signed);
        self.running().extend(pid);
        Ok((child, Family(pid.and_then(Pid::from_raw))))
    }

    /// Waits until no program of a job that was given up is left: it might still write.
    pub async fn quiet(&self) {
        loop {
            self.running().retain(|pid| Pid::from_raw(*pid).is_some_and(processes::lives));
            if self.running().is_empty() {
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn running(&self) -> std::sync::MutexGuard<'_, BTreeSet<i32>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A program with all that it starts, in a process group of its own: `initdb` runs a shell that runs Postgres. Killed if it is dropped
/// before the program has ended.
struct Family(Option<Pid>);

impl Family {
    fn has_ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _already_gone = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Reads to the end; keeps the last of it.
async fn listen(mut from: ChildStderr, mut told: impl FnMut(&str)) -> Vec<u8> {
    let (mut last, mut piece) = (Vec::new(), [0_u8; 4_096]);
    while let Ok(count) = from.read(&mut piece).await
        && count > 0
    {
        let said = &piece[..count];
        told(&String::from_utf8_lossy(said));
        last.extend_from_slice(said);
        let surplus = last.len().saturating_sub(2 * LAST_WORDS_LEN_MAX);
        last.drain(..surplus);
    }
    last
}

/// A failure as an error.
///
/// # Errors
/// What the program said last, if it failed.
pub fn check(name: &str, output: &Output) -> anyhow::Result<()> {
    if !output.status.success() {
        bail!("{name} failed ({}): {}", output.status, last_words(&output.stderr));
    }
    Ok(())
}

fn name_of(command: &Command) -> String {
    let program = Path::new(command.as_std().get_program());
    program.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// The end of what a program said, on one line.
fn last_words(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let joined = lines.join("; ");
    let surplus = joined.len().saturating_sub(LAST_WORDS_LEN_MAX);
    let start = (surplus..=joined.len()).find(|at| joined.is_char_boundary(*at)).unwrap_or(0);
    joined[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::last_words;

    #[test]
    fn last_words_are_one_short_line() {
        assert_eq!(last_words(b"a\n\n  b  \n"), "a; b");
        assert_eq!(last_words(&[b'x'; 2_000]).len(), 500);
        assert!(last_words("ä".repeat(400).as_bytes()).chars().all(|c| c == 'ä'));
    }
}
