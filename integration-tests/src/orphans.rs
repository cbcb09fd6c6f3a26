//! Orphans: processes whose parents have died come to this process, and are reaped when they end.
//!
//! A postmaster whose supervisor was killed would otherwise go to a process 1 that, in a container, may never reap it: it
//! would stay a zombie, and Postgres would refuse to start again, because the process in its lock file seems to live.
//! Children that the harness started itself are left to it: whoever holds one learns of its end.

use std::{
    collections::BTreeSet,
    io,
    process::{Child, Command},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitOptions, getpid, set_child_subreaper, waitid, waitpid};

use crate::process::{children_of, lives};

/// Between two looks at whether an orphan has ended: less than a server needs to start again.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// The harness's own children.
static CHILDREN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// From now on, orphans among our descendants come to us, and are reaped as long as this process lives.
///
/// # Errors
/// If the kernel refuses, or no thread can be started.
pub fn adopt() -> Result<()> {
    set_child_subreaper(Some(getpid())).context("become the parent of orphans")?;
    let reaper = thread::Builder::new().name(String::from("reaper"));
    reaper.spawn(reap_for_ever).context("start a thread that reaps orphans").map(drop)
}

/// Starts a child of the harness, which the reaper leaves alone until it is [forgotten](forget).
pub(crate) fn spawn(command: &mut Command) -> io::Result<Child> {
    let mut children = children();
    let child = command.spawn()?;
    children.insert(child.id());
    Ok(child)
}

/// A child of the harness has been reaped.
pub(crate) fn forget(pid: u32) {
    children().remove(&pid);
}

fn reap_for_ever() {
    // Only looks: the ended process may be somebody's child whose end is not ours to take.
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    loop {
        if matches!(waitid(WaitId::All, look), Ok(Some(_))) {
            reap();
        }
        thread::sleep(LOOK_INTERVAL);
    }
}

fn reap() {
    let own = children();
    for pid in children_of(std::process::id()) {
        let orphan = (!own.contains(&pid) && !lives(pid)).then_some(pid);
        let orphan = orphan.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(pid) = orphan {
            let _gone_already = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

fn children() -> MutexGuard<'static, BTreeSet<u32>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}
