//! Tidying up the mirror: every fetch leaves a pack, and many small ones are made into one, while fetches go on. Only small
//! packs: what is large is never packed again, so that the work does not grow with the history.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use git2::{Oid, PackBuilder, Repository};

use super::{fault::Fault, guard::Guard};

/// Above this many small packs they are made into one. A look for an object asks each of them.
const SMALL_PACKS_MAX: usize = 40;

/// A pack up to this size is small: packing it again takes a second or two.
const SMALL_LEN_MAX: u64 = 8 * 1024 * 1024;

/// Where the names begin in an index of version 2: behind eight bytes of heading and 256 sums of four.
const NAMES_AT: usize = 8 + 256 * 4;
const INDEX_HEADING: [u8; 8] = [0xff, b't', b'O', b'c', 0, 0, 0, 2];
const NAME_LEN: usize = 20;

/// The small packs of a repository, if there are too many of them.
pub(super) fn crowd(repository: &Path) -> Option<Vec<PathBuf>> {
    let entries = fs::read_dir(repository.join("objects/pack")).into_iter().flatten().flatten();
    let small = entries.filter(|entry| entry.metadata().is_ok_and(|m| m.len() <= SMALL_LEN_MAX)).map(|e| e.path());
    let packs =
        small.filter(|path| path.extension().is_some_and(|e| e == "pack") && path.with_extension("idx").exists());
    let packs: Vec<PathBuf> = packs.collect();
    (packs.len() > SMALL_PACKS_MAX).then_some(packs)
}

/// Makes one pack of all objects of these, and yields those that need not stay any more.
pub(super) fn merge(repository: &Repository, mut packs: Vec<PathBuf>, guard: &Guard) -> Result<Vec<PathBuf>, Fault> {
    let (mut all, mut lens) = (BTreeSet::new(), Vec::new());
    for pack in &packs {
        let names = names(&pack.with_extension("idx"))?;
        lens.push(names.len());
        all.extend(names);
    }
    if let Some(whole) = lens.iter().position(|len| *len == all.len()) {
        // It was made of the others before they could go. Made again it would have the same name, and go with them.
        packs.remove(whole);
        return Ok(packs);
    }
    let local = |e: git2::Error| guard.breach().unwrap_or_else(|| Fault::local(&e));
    let mut builder = repository.packbuilder().map_err(local)?;
    builder.set_progress_callback(|_stage, _done, _all| guard.allows()).map_err(local)?;
    for name in all {
        builder.insert_object(name, None).map_err(local)?;
    }
    write(&mut builder, repository, guard)?;
    Ok(packs)
}

/// Writes what was gathered into a repository, as one pack.
pub(super) fn write(builder: &mut PackBuilder<'_>, into: &Repository, guard: &Guard) -> Result<(), Fault> {
    let local = |e: git2::Error| guard.breach().unwrap_or_else(|| Fault::local(&e));
    let odb = into.odb().map_err(local)?;
    let mut writer = odb.packwriter().map_err(local)?;
    let mut failed = None;
    let built = builder.foreach(|chunk| {
        failed = writer.write_all(chunk).err();
        failed.is_none() && guard.allows()
    });
    if let Some(error) = failed {
        return Err(Fault::Failed(format!("cannot write a pack: {error}")));
    }
    built.and_then(|()| writer.commit()).map(|_code| ()).map_err(local)
}

/// Removes packs. The index goes first: without it a pack is nothing.
pub(super) fn remove(packs: &[PathBuf]) -> std::io::Result<()> {
    for pack in packs {
        fs::remove_file(pack.with_extension("idx"))?;
        fs::remove_file(pack)?;
    }
    Ok(())
}

/// The objects of a pack, by its index.
fn names(index: &Path) -> Result<Vec<Oid>, Fault> {
    let damaged = || Fault::Damaged(format!("{} is no index of a pack", index.display()));
    let bytes = fs::read(index).map_err(|e| Fault::Failed(format!("cannot read {}: {e}", index.display())))?;
    let heading = bytes.get(..NAMES_AT).filter(|heading| heading.starts_with(&INDEX_HEADING)).ok_or_else(damaged)?;
    let count: [u8; 4] = heading.get(NAMES_AT - 4..).and_then(|b| b.try_into().ok()).ok_or_else(damaged)?;
    let len = usize::try_from(u32::from_be_bytes(count)).unwrap_or(usize::MAX).saturating_mul(NAME_LEN);
    let names = bytes.get(NAMES_AT..NAMES_AT.saturating_add(len)).ok_or_else(damaged)?;
    names.chunks_exact(NAME_LEN).map(|name| Oid::from_bytes(name).map_err(|e| Fault::local(&e))).collect()
}
