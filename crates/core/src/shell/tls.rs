//! TLS by files: read, checked, and read again when they are needed anew, so that a renewed certificate needs no restart.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};

/// The largest PEM file. All authorities that browsers know are a quarter of a megabyte; a disk image is more.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// How long a disk may take to read the files again. What they held before is better than no connection.
const READ_DEADLINE: Duration = Duration::from_millis(200);

/// A certificate with its chain, and its key. Both may be in one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The chain, the own certificate first.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// The files of a client: whom it trusts, and who it is if it says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFiles {
    /// What the authorities, the certificate and the key are called in the configuration.
    pub fields: [&'static str; 3],
    /// Who may have signed the server's certificate.
    pub authorities: PathBuf,
    /// What the server is shown.
    pub pair: Option<Pair>,
}

/// What the files hold: PEM that can be used.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientPems {
    /// The authorities.
    pub authorities: Vec<u8>,
    /// The certificate with its chain, and the key.
    pub pair: Option<(Vec<u8>, Vec<u8>)>,
}

/// The files of a client, and what they held when they could last be used.
pub(super) struct Client {
    files: ClientFiles,
    last: Mutex<Last>,
}

struct Last {
    pems: Arc<ClientPems>,
    /// Why the files could not be used since.
    trouble: Option<String>,
}

impl fmt::Debug for ClientPems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientPems(***)")
    }
}

impl ClientFiles {
    /// Reads the files and checks that they can be used.
    ///
    /// # Errors
    /// One line that names the field, the file and what is wrong with it.
    pub fn read(&self) -> Result<ClientPems, String> {
        let [of_authorities, of_certificate, of_key] = self.fields;
        let authorities = read(of_authorities, &self.authorities)?;
        let (usable, _others) = RootCertStore::empty().add_parsable_certificates(certificates(
            of_authorities,
            &self.authorities,
            &authorities,
        )?);
        if usable == 0 {
            let path = self.authorities.display();
            return Err(format!("{of_authorities}: {path} holds no certificate of an authority: name another file"));
        }
        let pair = self.pair.as_ref().map(|pair| pair.read(of_certificate, of_key)).transpose()?;
        Ok(ClientPems { authorities, pair })
    }
}

impl Pair {
    fn read(&self, of_certificate: &str, of_key: &str) -> Result<(Vec<u8>, Vec<u8>), String> {
        let chain_pem = read(of_certificate, &self.certificate)?;
        let chain = certificates(of_certificate, &self.certificate, &chain_pem)?;
        let (certificate, key) = (self.certificate.display(), self.key.display());
        let key_pem = read(of_key, &self.key)?;
        let private = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|_none| {
            if self.key == self.certificate {
                format!(
                    "{of_key} is missing, and {of_certificate}: {certificate} holds no private key: name the key's file"
                )
            } else {
                format!("{of_key}: {key} holds no private key: name a PEM file with one, without a passphrase")
            }
        })?;
        CertifiedKey::from_der(chain, private, &rustls::crypto::ring::default_provider())
            .map_err(|e| format!("{of_key}: {key} does not go with {of_certificate}: {certificate}: {e}"))?;
        Ok((chain_pem, key_pem))
    }
}

impl Client {
    /// Reads the files for the first time.
    ///
    /// # Errors
    /// One line that names the field, the file and what is wrong with it.
    pub(super) fn new(files: ClientFiles) -> Result<Self, String> {
        let last = Last { pems: Arc::new(files.read()?), trouble: None };
        Ok(Self { files, last: Mutex::new(last) })
    }

    /// What the files hold now; if that cannot be used, as while a new pair is half written, what they held before.
    pub(super) async fn current(&self) -> Arc<ClientPems> {
        let files = self.files.clone();
        let reading = tokio::task::spawn_blocking(move || files.read());
        let read = match tokio::time::timeout(READ_DEADLINE, reading).await {
            Ok(Ok(read)) => read,
            Ok(Err(e)) => Err(format!("{}: {e}", self.files.fields[0])),
            Err(_elapsed) => Err(format!("{}: not read within {READ_DEADLINE:?}", self.files.fields[0])),
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(pems) => {
                if *last.pems != pems {
                    last.pems = Arc::new(pems);
                }
                last.trouble = None;
            }
            Err(trouble) if last.trouble.as_ref() != Some(&trouble) => {
                tracing::warn!(trouble, "a changed certificate is not used: the one before goes on");
                last.trouble = Some(trouble);
            }
            Err(_known) => {}
        }
        Arc::clone(&last.pems)
    }
}

fn read(field: &str, path: &Path) -> Result<Vec<u8>, String> {
    let failed = |e: std::io::Error| format!("{field}: cannot read {}: {e}", path.display());
    let len = fs::metadata(path).map_err(failed)?.len();
    if len > FILE_BYTES_MAX {
        return Err(format!(
            "{field}: {} has {len} bytes, more than {FILE_BYTES_MAX}: name a PEM file",
            path.display()
        ));
    }
    fs::read(path).map_err(failed)
}

fn certificates(field: &str, path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let path = path.display();
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let all = all.map_err(|e| format!("{field}: {path}: {e}: name a PEM file with certificates"))?;
    if all.is_empty() {
        return Err(format!("{field}: {path} holds no certificate: name a PEM file with certificates"));
    }
    Ok(all)
}
