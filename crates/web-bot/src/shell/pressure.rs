//! The kernel's word that work waits for a processor (pressure stall information): a trigger that is waited for, nothing that
//! is read again and again. A kernel without it is done without.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use bots_core::shell::Events;
use prometheus_client::metrics::counter::Counter;
use tokio::io::{Interest, unix::AsyncFd};

use crate::machine::Event;

/// The whole machine's file: whoever has a processor, it is not us.
const MACHINE: &str = "/proc/pressure/cpu";

/// Where control groups (the second version) stand.
const GROUPS: &str = "/sys/fs/cgroup";

/// Some work waits for one second within two. Only windows of whole pairs of seconds are for everybody (Linux 6.5); older
/// kernels give none to those without `CAP_SYS_RESOURCE`.
const TRIGGER: &[u8] = b"some 1000000 2000000\0";

/// Tells of every stall, at most once within the window, for as long as the bot runs.
pub(super) async fn follow(events: Events<Event>, stalls: Counter) {
    let trigger = match open() {
        Ok(trigger) => trigger,
        Err(why) => {
            tracing::info!(why, "no pressure-stall events here: load is told by requests alone");
            return;
        }
    };
    while let Ok(mut ready) = trigger.ready(Interest::PRIORITY).await {
        if !ready.ready().is_priority() {
            break;
        }
        ready.clear_ready();
        stalls.inc();
        events.send(Event::ProcessorStalled).await;
    }
    tracing::warn!("the kernel has withdrawn its pressure-stall events");
}

/// Sets the trigger on the first file that takes it.
fn open() -> Result<AsyncFd<File>, String> {
    let own_group = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| group_file(&text));
    let mut failures = Vec::new();
    for path in [Some(PathBuf::from(MACHINE)), own_group].into_iter().flatten() {
        match set(&path) {
            Ok(trigger) => return Ok(trigger),
            Err(error) => failures.push(format!("{}: {error}", path.display())),
        }
    }
    Err(failures.join("; "))
}

#[expect(deprecated, reason = "unsound only for types that may close their descriptor early; the substitute is unsafe")]
fn set(path: &Path) -> io::Result<AsyncFd<File>> {
    let mut file = File::options().read(true).write(true).open(path)?;
    file.write_all(TRIGGER)?;
    AsyncFd::with_interest(file, Interest::PRIORITY)
}

/// The file of our control group, by what `/proc/self/cgroup` says; nothing where there is only the first version.
fn group_file(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some([GROUPS, path, "cpu.pressure"].iter().collect())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::group_file;

    #[test]
    fn the_own_group_is_found_among_others() {
        let check =
            |text: &str, wanted: Option<&str>| assert_eq!(group_file(text), wanted.map(PathBuf::from), "{text}");
        let service = "/sys/fs/cgroup/system.slice/web-bot.service/cpu.pressure";
        check("0::/system.slice/web-bot.service\n", Some(service));
        check("1:cpu:/\n9:name=systemd:/\n0::/system.slice/web-bot.service\n", Some(service));
        check("0::/\n", Some("/sys/fs/cgroup/cpu.pressure"));
        check("2:cpuacct:/x\n1:cpu:/x\n", None);
        check("", None);
    }
}
