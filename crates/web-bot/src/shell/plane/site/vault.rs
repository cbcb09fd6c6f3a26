//! Where the bytes of files are: in memory while the ceiling allows it, the rest in unnamed files on disk. A file that
//! several commits share is held once, and compressed once.
//!
//! Large files are not read out of git's packs at each request: packs are compressed and can only be read from the
//! front. They are written out once, to a file without a name, which goes when the last commit that needs it goes, and
//! with the process at the latest. What one of them takes of it goes before, with the last who reads it.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use rustix::fs::{FallocateFlags, fallocate};

use super::encoding::{COMPRESSED, Encoding, compressed};

/// A file that is larger than this is left on disk, whatever room there is: at this size reading it from the page cache
/// costs nothing beside sending it.
const MEMORY_FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Compressing more than this at once would keep a core from its requests for too long.
const COMPRESS_BYTES_MAX: usize = 8 * 1024 * 1024;

/// The bytes of all sites. Shared by all commits.
#[derive(Debug)]
pub(crate) struct Vault {
    dir: PathBuf,
    memory_max: u64,
    memory_used: AtomicU64,
    /// One thread compresses at a time.
    press: Mutex<()>,
    blobs: Mutex<BTreeMap<String, Weak<Blob>>>,
}

/// What is kept of one preparation on disk: all that memory has no room for, in one unnamed file.
#[derive(Debug, Default)]
pub(crate) struct Spill {
    file: Option<Arc<File>>,
    length: u64,
}

/// The bytes of one file.
#[derive(Debug)]
pub(super) struct Blob {
    pub(super) id: String,
    data: Data,
    /// Its compressed forms, once they are made, in the order of [`COMPRESSED`].
    forms: OnceLock<[Option<Bytes>; 3]>,
    lent: AtomicU64,
    vault: Arc<Vault>,
}

#[derive(Debug)]
enum Data {
    Memory(Bytes),
    Disk(Extent),
}

/// A file on disk, or a part of it.
#[derive(Debug, Clone)]
pub(crate) struct Extent {
    stretch: Arc<Stretch>,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// What one file takes of the unnamed one. Its room is given back when nobody has or reads it any more, whatever lives beside it.
#[derive(Debug)]
struct Stretch {
    file: Arc<File>,
    offset: u64,
    length: u64,
}

/// The bytes to send.
#[derive(Debug, Clone)]
pub(super) enum Bits {
    Memory(Bytes),
    Disk(Extent),
}

impl Vault {
    /// A vault that holds up to `memory_max` bytes in memory and writes the rest below `dir`.
    pub(crate) fn new(dir: &Path, memory_max: u64) -> Arc<Self> {
        Arc::new(Self {
            dir: dir.to_owned(),
            memory_max,
            memory_used: AtomicU64::new(0),
            press: Mutex::new(()),
            blobs: Mutex::default(),
        })
    }

    /// The bytes that are held in memory.
    pub(crate) fn memory_used(&self) -> u64 {
        self.memory_used.load(Ordering::Relaxed)
    }

    /// Takes in a file, unless it is here already.
    pub(super) fn take(self: &Arc<Self>, id: &str, data: &[u8], spill: &mut Spill) -> io::Result<Arc<Blob>> {
        let known = self.blobs.lock().unwrap_or_else(PoisonError::into_inner).get(id).and_then(Weak::upgrade);
        if let Some(blob) = known {
            return Ok(blob);
        }
        let length = length_of(data);
        let in_memory = length <= MEMORY_FILE_BYTES_MAX && self.lend(length);
        let data = match in_memory {
            true => Data::Memory(Bytes::copy_from_slice(data)),
            false => Data::Disk(spill.write(&self.dir, data)?),
        };
        let lent = AtomicU64::new(if in_memory { length } else { 0 });
        let blob = Arc::new(Blob { id: id.to_owned(), data, forms: OnceLock::new(), lent, vault: Arc::clone(self) });
        let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        blobs.insert(id.to_owned(), Arc::downgrade(&blob));
        Ok(blob)
    }

    /// Forgets files that no commit has any more.
    pub(super) fn sweep(&self) {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, blob| blob.strong_count() > 0);
    }

    fn lend(&self, length: u64) -> bool {
        let more = |used: u64| used.checked_add(length).filter(|sum| *sum <= self.memory_max);
        self.memory_used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Compresses what is not compressed yet, one file after another; what is thrown away meanwhile is left out.
    pub(super) fn compress(&self, blobs: Vec<Weak<Blob>>) {
        let _turn = self.press.lock().unwrap_or_else(PoisonError::into_inner);
        for blob in blobs {
            if let Some(blob) = blob.upgrade() {
                blob.compress();
            }
        }
    }
}

impl Spill {
    fn write(&mut self, dir: &Path, data: &[u8]) -> io::Result<Extent> {
        let file = match &self.file {
            Some(file) => Arc::clone(file),
            None => Arc::clone(self.file.insert(Arc::new(tempfile::tempfile_in(dir)?))),
        };
        (&*file).write_all(data)?;
        let (offset, length) = (self.length, length_of(data));
        self.length += length;
        Ok(Extent { stretch: Arc::new(Stretch { file, offset, length }), offset, length })
    }
}

impl Extent {
    pub(crate) fn file(&self) -> &File {
        &self.stretch.file
    }
}

impl Drop for Stretch {
    fn drop(&mut self) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Where a file system cannot do that, the room comes back with the whole file.
        let _best_effort = fallocate(&*self.file, flags, self.offset, self.length);
    }
}

impl Blob {
    /// Whether compression has been tried, or is not for this file.
    pub(super) fn is_settled(&self) -> bool {
        self.forms.get().is_some()
    }

    pub(super) fn has(&self, encoding: Encoding) -> bool {
        encoding == Encoding::Identity || self.form(encoding).is_some()
    }

    /// The bytes in one form; as they are if that form is not there.
    pub(super) fn bits(&self, encoding: Encoding) -> Bits {
        match (self.form(encoding), &self.data) {
            (Some(bytes), _) => Bits::Memory(bytes.clone()),
            (None, Data::Memory(bytes)) => Bits::Memory(bytes.clone()),
            (None, Data::Disk(extent)) => Bits::Disk(extent.clone()),
        }
    }

    fn form(&self, encoding: Encoding) -> Option<&Bytes> {
        let index = COMPRESSED.iter().position(|e| *e == encoding)?;
        self.forms.get()?.get(index)?.as_ref()
    }

    fn compress(&self) {
        let Data::Memory(bytes) = &self.data else { return };
        if self.is_settled() {
            return;
        }
        let make = |encoding| {
            let made = compressed(encoding, bytes).filter(|made| self.vault.lend(length_of(made)))?;
            self.lent.fetch_add(length_of(&made), Ordering::Relaxed);
            Some(made)
        };
        let forms = if bytes.len() > COMPRESS_BYTES_MAX { [None, None, None] } else { COMPRESSED.map(make) };
        // Only one thread compresses.
        let _set = self.forms.set(forms);
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        self.vault.memory_used.fetch_sub(*self.lent.get_mut(), Ordering::Relaxed);
    }
}

fn length_of(data: &[u8]) -> u64 {
    u64::try_from(data.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use bots_core::shell::testing::skipped;

    use super::*;

    #[test]
    fn what_the_ceiling_leaves_no_room_for_is_on_disk() {
        let dir = tempfile::tempdir().expect("a folder");
        let vault = Vault::new(dir.path(), 100);
        let mut spill = Spill::default();
        let small = vault.take("a", &[1; 80], &mut spill).expect("taken");
        let second = vault.take("b", &[2; 30], &mut spill).expect("taken");
        let third = vault.take("c", &[3; 40], &mut spill).expect("taken");
        assert!(matches!(small.bits(Encoding::Identity), Bits::Memory(b) if b.len() == 80));
        let offset = |blob: &Blob| match blob.bits(Encoding::Identity) {
            Bits::Disk(extent) => Some((extent.offset, extent.length)),
            Bits::Memory(_) => None,
        };
        assert_eq!((offset(&second), offset(&third)), (Some((0, 30)), Some((30, 40))));
        assert_eq!(std::fs::read_dir(dir.path()).expect("read").count(), 0, "files on disk have no name");
        let again = vault.take("a", &[1; 80], &mut spill).expect("taken");
        assert!(Arc::ptr_eq(&small, &again) && vault.memory_used() == 80);
        drop((small, again));
        assert_eq!(vault.memory_used(), 0);
        vault.sweep();
        assert!(matches!(
            vault.take("a", &[1; 80], &mut spill).expect("taken").bits(Encoding::Identity),
            Bits::Memory(_)
        ));
    }

    #[test]
    fn room_on_disk_is_given_back_with_the_last_who_reads_it_whatever_lives_beside_it() {
        use std::os::unix::fs::{FileExt, MetadataExt};

        const LENGTH: u64 = 1 << 20;
        let full_of = |byte: u8| vec![byte; usize::try_from(LENGTH).expect("small")];
        let dir = tempfile::tempdir().expect("a folder");
        let probe = tempfile::tempfile_in(dir.path()).expect("a file");
        probe.write_all_at(&[1; 8192], 0).expect("written");
        if fallocate(&probe, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 8192).is_err() {
            return skipped("room on disk that is given back", "this file system gives none");
        }
        let vault = Vault::new(dir.path(), 0);
        let mut spill = Spill::default();
        let [first, second] = [1, 2].map(|n| vault.take(&n.to_string(), &full_of(n), &mut spill).expect("taken"));
        let disk = |blob: &Blob| match blob.bits(Encoding::Identity) {
            Bits::Disk(extent) => extent,
            Bits::Memory(_) => panic!("there is no room in memory"),
        };
        let (lent, stays) = (disk(&first), disk(&second));
        let taken = || {
            let metadata = stays.file().metadata().expect("metadata");
            assert_eq!(metadata.len(), 2 * LENGTH);
            metadata.blocks() * 512
        };
        let read = |extent: &Extent| {
            let mut found = full_of(0);
            extent.file().read_exact_at(&mut found, extent.offset).expect("read");
            found
        };
        stays.file().sync_all().expect("on disk");
        let before = taken();
        drop(first);
        assert!(read(&lent) == full_of(1) && taken() == before, "it is being sent yet");
        drop(lent);
        assert!(taken() <= before - LENGTH / 2, "{} of {before}", taken());
        assert!(read(&stays) == full_of(2), "its neighbour is whole");
    }

    #[test]
    fn compressed_forms_count_too_and_are_given_back() {
        let dir = tempfile::tempdir().expect("a folder");
        let vault = Vault::new(dir.path(), 10_000);
        let blob = vault.take("a", "word ".repeat(1_000).as_bytes(), &mut Spill::default()).expect("taken");
        vault.compress(vec![Arc::downgrade(&blob)]);
        assert!(blob.has(Encoding::Gzip) && blob.has(Encoding::Brotli) && blob.has(Encoding::Zstd));
        assert!(vault.memory_used() > 5_000, "{}", vault.memory_used());
        drop(blob);
        assert_eq!(vault.memory_used(), 0);
    }
}
