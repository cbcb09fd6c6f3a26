//! Where Postgres' programs are and how old they are.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The oldest server that we keep: the first whose upstream changes by reload and whose `pg_rewind` recovers by itself.
pub const MAJOR_MIN: u32 = 13;

const NEEDED: &[&str] = &["postgres", "initdb", "pg_basebackup", "pg_controldata", "pg_rewind"];

/// Where distributions put them, if not on the path.
const USUAL_PLACES: &[(&str, &str, &str)] = &[("/usr/lib/postgresql", "", "bin"), ("/usr", "pgsql-", "bin")];

/// A version as Postgres counts: 15.4 is major 15, number 150004.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The part that a data directory is bound to.
    pub major: u32,
    /// The part that fixes.
    pub minor: u32,
}

impl Version {
    /// As in `server_version_num`.
    pub const fn number(self) -> u32 {
        self.major * 10_000 + self.minor
    }

    fn parse(said: &str) -> Option<Self> {
        // `postgres (PostgreSQL) 15.4 (Debian 15.4-1)`, `... 17beta2`
        let word = said.split_ascii_whitespace().nth(2)?;
        let mut numbers = word.split(|c: char| !c.is_ascii_digit());
        let major = numbers.next()?.parse().ok()?;
        let minor = word.strip_prefix(&format!("{major}.")).and_then(|_| numbers.next()?.parse().ok()).unwrap_or(0);
        Some(Self { major, minor })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The programs of one installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    dir: PathBuf,
    version: Version,
}

impl Binaries {
    /// Finds the programs: in `bin_dir` if it is given; else on the path, else the newest in the usual places, of the
    /// major version that `data_dir` was made by if it was made.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn find(bin_dir: Option<&Path>, data_dir: &Path) -> Result<Self, String> {
        let wanted = major_of(data_dir);
        if let Some(dir) = bin_dir {
            let found = Self::at(dir).map_err(|why| format!("postgresql.bin_dir: {why}"))?;
            return found.check(wanted, data_dir);
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut found: Vec<Self> = std::env::split_paths(&path).filter_map(|dir| Self::at(&dir).ok()).collect();
        let mut usual: Vec<Self> = usual_places().iter().filter_map(|dir| Self::at(dir).ok()).collect();
        usual.sort_by_key(|b| std::cmp::Reverse(b.version));
        found.extend(usual);
        let fits = found.iter().find(|b| wanted.is_none_or(|major| b.version.major == major));
        match fits.or(found.first()) {
            Some(best) => best.clone().check(wanted, data_dir),
            None => Err(String::from(
                "postgresql.bin_dir: the programs of PostgreSQL were found neither on the PATH nor in \
                 /usr/lib/postgresql: install PostgreSQL 13 or newer, or set the directory",
            )),
        }
    }

    /// The version of the server.
    pub const fn version(&self) -> Version {
        self.version
    }

    /// The path of one of the programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn at(dir: &Path) -> Result<Self, String> {
        for name in NEEDED {
            if !dir.join(name).is_file() {
                return Err(format!("{} has no {name}: set the directory that holds it", dir.display()));
            }
        }
        let said = Command::new(dir.join("postgres")).arg("--version").output();
        let said = said.map_err(|e| format!("{}/postgres cannot be run: {e}", dir.display()))?;
        let version = Version::parse(&String::from_utf8_lossy(&said.stdout));
        let version = version.ok_or_else(|| format!("{}/postgres does not tell its version", dir.display()))?;
        Ok(Self { dir: dir.to_owned(), version })
    }

    fn check(self, wanted: Option<u32>, data_dir: &Path) -> Result<Self, String> {
        let (dir, version) = (self.dir.display(), self.version);
        if version.major < MAJOR_MIN {
            return Err(format!(
                "postgresql.bin_dir: PostgreSQL {version} in {dir} is too old: use {MAJOR_MIN} or newer"
            ));
        }
        match wanted {
            Some(major) if major != version.major => Err(format!(
                "postgresql.bin_dir: {} was made by PostgreSQL {major}, and {dir} has {version}: set the directory of \
                 PostgreSQL {major}",
                data_dir.display()
            )),
            Some(_) | None => Ok(self),
        }
    }
}

/// The major version that made the data directory, if it was made.
pub fn major_of(data_dir: &Path) -> Option<u32> {
    fs::read_to_string(data_dir.join("PG_VERSION")).ok()?.trim().parse().ok()
}

fn usual_places() -> Vec<PathBuf> {
    let mut out = Vec::new();
    for (root, prefix, below) in USUAL_PLACES {
        let Ok(entries) = fs::read_dir(root) else { continue };
        let names = entries.flatten().filter(|e| e.file_name().to_str().is_some_and(|name| name.starts_with(prefix)));
        out.extend(names.map(|entry| entry.path().join(below)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{Binaries, Version};

    #[test]
    fn versions_are_read_as_they_are_told() {
        let read = |said| Version::parse(said).map(|v| v.number());
        assert_eq!(read("postgres (PostgreSQL) 15.4 (Debian 15.4-1)"), Some(150_004));
        assert_eq!(read("postgres (PostgreSQL) 17beta2"), Some(170_000));
        assert_eq!(read("postgres (PostgreSQL) 9.6.24"), Some(90_006));
        assert_eq!(read("nothing"), None);
    }

    #[test]
    fn what_is_missing_or_too_old_or_of_another_version_is_named_with_its_field() {
        let dir = tempfile::tempdir().expect("dir");
        let told = Binaries::find(Some(dir.path()), dir.path()).expect_err("empty");
        assert!(told.starts_with("postgresql.bin_dir: ") && told.contains("has no postgres"), "{told}");
        for name in super::NEEDED {
            let script = "#!/bin/sh\necho 'postgres (PostgreSQL) 12.3'\n";
            super::fs::write(dir.path().join(name), script).expect("write");
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            super::fs::set_permissions(dir.path().join(name), mode).expect("chmod");
        }
        let told = Binaries::find(Some(dir.path()), dir.path()).expect_err("old");
        assert!(told.contains("12.3") && told.contains("too old"), "{told}");
    }
}
