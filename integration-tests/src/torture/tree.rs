//! The files of a commit of the tortured site: all of them bear its number, so that a mixture is seen.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
};

use anyhow::Result;

use crate::{git::Origin, random::Random};

/// Small files in a commit.
const SMALL: u64 = 8;

/// Lines of the large file that compresses well: a mebibyte.
const LONG_LINES: u64 = 24_000;

/// Numbers in the file that does not: half a mebibyte.
const NOISE_NUMBERS: u64 = 32_000;

/// The manifest's path.
pub(super) const MANIFEST: &str = "manifest.txt";

/// A commit's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The commit's number.
    pub number: u64,
    /// By path.
    pub files: BTreeMap<String, String>,
}

impl Tree {
    /// The files of the commit with this number.
    #[must_use]
    pub fn of(number: u64) -> Self {
        let mut files = BTreeMap::new();
        files.insert(String::from("index.html"), format!("<!doctype html><p>commit {number}</p>\n"));
        for small in 0..SMALL {
            files.insert(format!("pages/{small}.txt"), format!("commit {number}, page {small}\n"));
        }
        let mut long = String::new();
        for line in 0..LONG_LINES {
            let _infallible = writeln!(long, "commit {number}, line {line} of the long file");
        }
        files.insert(String::from("large/long.txt"), long);
        let (mut random, mut noise) = (Random::new(number), String::new());
        for _ in 0..NOISE_NUMBERS {
            let _infallible = write!(noise, "{:016x}", random.next());
        }
        files.insert(String::from("large/noise.txt"), noise);
        files.insert(only(number), format!("commit {number} alone has this\n"));
        let mut manifest = format!("commit {number}\n");
        for (path, body) in &files {
            let mut hasher = DefaultHasher::new();
            body.hash(&mut hasher);
            let _infallible = writeln!(manifest, "{path} {} {:016x}", body.len(), hasher.finish());
        }
        files.insert(String::from(MANIFEST), manifest);
        Self { number, files }
    }

    /// Writes them into the work tree of `origin`, in place of those of the commit before.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write(&self, origin: &Origin) -> Result<()> {
        let before = origin.work().join(only(self.number.saturating_sub(1)));
        if before.exists() {
            std::fs::remove_file(before)?;
        }
        self.files.iter().try_for_each(|(path, body)| origin.write(path, body))
    }

    /// Whether a folder holds these files.
    ///
    /// # Errors
    /// One line: what cannot be read.
    pub fn is_at(&self, folder: &Path) -> Result<bool, String> {
        for (path, body) in &self.files {
            let found = std::fs::read_to_string(folder.join(path)).map_err(|e| format!("{path}: {e}"))?;
            if found != *body {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A file that one commit has and no other.
fn only(number: u64) -> String {
    format!("only/{number}.txt")
}
