//! Certificates for tests: an authority of its own, and what it signs. By the program openssl, which the set-up installs.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use crate::shell::tls::Pair;

/// An authority whose files are in a folder.
#[derive(Debug, Clone)]
pub struct Authority {
    dir: PathBuf,
}

impl Authority {
    /// A new one; if there was one in the folder, it takes its place.
    ///
    /// # Errors
    /// If there is no openssl, or it fails.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let authority = Self { dir: dir.to_owned() };
        let who = ["-x509", "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"];
        authority.openssl(&[&NEW_KEY, &who])?;
        Ok(authority)
    }

    /// Its own certificate.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// Makes a certificate for somebody called `name`, who may be a server on this machine as well as a client; if there was
    /// one, it takes its place.
    ///
    /// # Errors
    /// If openssl fails.
    pub fn issue(&self, name: &str) -> io::Result<Pair> {
        let (certificate, key) = (format!("{name}.pem"), format!("{name}.key"));
        let extensions = "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=critical,CA:FALSE\n";
        fs::write(self.dir.join("extensions"), extensions)?;
        let subject = format!("/CN={name}");
        self.openssl(&[&NEW_KEY, &["-subj", &subject, "-keyout", &key, "-out", "request"]])?;
        let signed_by =
            ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extensions", "-days", "2"];
        self.openssl(&[&["x509", "-req", "-in", "request", "-out", &certificate], &signed_by])?;
        Ok(Pair { certificate: self.dir.join(certificate), key: self.dir.join(key) })
    }

    fn openssl(&self, args: &[&[&str]]) -> io::Result<()> {
        run(Command::new("openssl").current_dir(&self.dir).args(args.concat()))
    }
}

/// A new key without a passphrase, of the kind that is made the fastest.
const NEW_KEY: [&str; 6] = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];

/// Runs a command that must succeed; an error has its words.
pub(super) fn run(command: &mut Command) -> io::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.output();
    let done = done.map_err(|e| io::Error::new(e.kind(), format!("cannot run {program}: {e}: is it installed?")))?;
    if done.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{program}: {}", String::from_utf8_lossy(&done.stderr))))
}
