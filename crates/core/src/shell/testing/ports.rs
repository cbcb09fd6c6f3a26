//! Free ports on loopback. A port stays ours until this process ends, also against other runs at the same time.

use std::{
    fs::{self, File, OpenOptions},
    io,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use rustix::fs::{FlockOperation, flock};

/// Below the range from which the system takes the ports of outgoing connections, so that none of them gets in the way.
const FIRST: u16 = 20_000;
const COUNT: u16 = 10_000;

/// The locks of the ports that this process has taken, and where it looks next.
static TAKEN: Mutex<(Vec<File>, u16)> = Mutex::new((Vec::new(), 0));

/// Takes a port that nobody listens on.
///
/// # Errors
/// If all are taken, or their locks cannot be.
pub fn free_port() -> io::Result<u16> {
    let folder = lock_folder()?;
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    // Runs at the same time begin at different places.
    let start = u16::try_from(std::process::id().wrapping_mul(97) % u32::from(COUNT)).unwrap_or(0);
    for _ in 0..COUNT {
        let port = FIRST + (start + taken.1) % COUNT;
        taken.1 = (taken.1 + 1) % COUNT;
        let path = folder.join(port.to_string());
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
        let locked = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if locked && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            taken.0.push(file);
            return Ok(port);
        }
    }
    Err(io::Error::other(format!("no free port between {FIRST} and {}", FIRST + COUNT)))
}

/// One folder a user, so that no run meets files that it may not open.
fn lock_folder() -> io::Result<PathBuf> {
    let user = rustix::process::getuid().as_raw();
    let folder = std::env::temp_dir().join(format!("bots-ports-{user}"));
    fs::create_dir_all(&folder)?;
    Ok(folder)
}
