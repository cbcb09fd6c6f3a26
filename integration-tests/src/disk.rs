//! A disk of a node's own: a file with a file system, mounted by the run itself, that can be filled, stalled and slowed down.
//! It needs root and loop devices. Stalling freezes the file system: reads go on, and whoever writes waits and cannot even be
//! killed. Slowing throttles the node's processes by the kernel's block-I/O controller (version 1); what the file system's own
//! threads write is not throttled.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::process::{run_now, system_binary};

/// Room for a server of a test, a second copy of it that a rewind has set aside, and their logs.
const SIZE: u64 = 1_536 * 1024 * 1024;

/// Where version 1 of the block-I/O controller is.
const CONTROLLER: &str = "/sys/fs/cgroup/blkio";

/// Its file that limits writes: a device, and how many a second.
const LIMIT: &str = "blkio.throttle.write_iops_device";

/// The file that takes up what is free.
const BALLAST: &str = "ballast";

/// A mounted disk; it is healed and unmounted when dropped.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
    /// The device, as `major:minor`.
    device: String,
    group: Option<PathBuf>,
}

impl Disk {
    /// Makes a disk in the file `image` and mounts it at `folder`.
    ///
    /// # Errors
    /// If this is not root's run, or the kernel or a program is missing something.
    pub fn mount(image: &Path, folder: &Path) -> Result<Self> {
        ensure!(rustix::process::getuid().is_root(), "only root can mount disks");
        system_binary("mkfs.ext4", &["/usr/sbin".into()]).context("package e2fsprogs")?;
        File::create(image).and_then(|file| file.set_len(SIZE)).context("make a file for a disk")?;
        fs::create_dir_all(folder).context("make a folder for a disk")?;
        let (image_text, folder_text) = (image.to_string_lossy(), folder.to_string_lossy());
        // Nothing is reserved for root, so that the disk is full for all at the same moment.
        run_now("mkfs.ext4", &["-q", "-F", "-m", "0", &image_text])?;
        run_now("mount", &["-o", "loop", &image_text, &folder_text])?;
        let device = fs::metadata(folder).context("look at a disk")?.dev();
        let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        let mut disk = Self { folder: folder.to_owned(), device, group: None };
        disk.group = disk.make_group();
        Ok(disk)
    }

    /// The control group that the node's processes must be started in, if the disk can be slowed down at all.
    #[must_use]
    pub fn group(&self) -> Option<&Path> {
        self.group.as_deref()
    }

    /// Takes up all that is free.
    ///
    /// # Errors
    /// If that fails for another reason than that there is no more.
    pub fn fill(&self) -> Result<()> {
        let ballast = File::create(self.folder.join(BALLAST)).context("make the ballast")?;
        let free = statvfs(&self.folder).context("look at a disk")?;
        let (mut size, mut step) = (0, free.f_bavail * free.f_frsize);
        // What is said to be free is not always to be had in one piece.
        while step >= free.f_frsize {
            match fallocate(&ballast, FallocateFlags::empty(), size, step) {
                Ok(()) => size += step,
                Err(_no_room) => step /= 2,
            }
        }
        ensure!(size > 0, "nothing could be taken up");
        Ok(())
    }

    /// Gives back what [`Self::fill`] has taken.
    ///
    /// # Errors
    /// If the file system does not.
    pub fn free(&self) -> Result<()> {
        fs::remove_file(self.folder.join(BALLAST)).context("remove the ballast")
    }

    /// Stalls every write.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn stall(&self) -> Result<()> {
        run_now("fsfreeze", &["--freeze", &self.folder.to_string_lossy()]).map(drop)
    }

    /// Lets the stalled writes go on.
    ///
    /// # Errors
    /// If it was not stalled.
    pub fn go_on(&self) -> Result<()> {
        run_now("fsfreeze", &["--unfreeze", &self.folder.to_string_lossy()]).map(drop)
    }

    /// Lets the node's processes write only `per_second` times; 0 is no limit.
    ///
    /// # Errors
    /// If there is no controller.
    pub fn limit(&self, per_second: u32) -> Result<()> {
        let group = self.group().context("there is no block-I/O controller")?;
        fs::write(group.join(LIMIT), format!("{} {per_second}", self.device)).context("limit the writes")
    }

    /// Frees, thaws and quickens it, whatever was done to it.
    pub fn heal(&self) {
        let _was_not_stalled = self.go_on();
        let _was_not_full = self.free();
        let _was_not_slow = self.limit(0);
    }

    fn make_group(&self) -> Option<PathBuf> {
        let name = self.folder.file_name()?.to_string_lossy();
        let group = Path::new(CONTROLLER).join(format!("bots-{}-{name}", std::process::id()));
        fs::create_dir(&group).ok()?;
        group.join(LIMIT).exists().then_some(group)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.heal();
        let folder = self.folder.to_string_lossy();
        if let Err(error) = run_now("umount", &[&folder]).or_else(|_| run_now("umount", &["--lazy", &folder])) {
            eprintln!("could not unmount {folder}: {error:#}");
        }
        if let Some(group) = &self.group {
            let _left_empty = fs::remove_dir(group);
        }
    }
}
