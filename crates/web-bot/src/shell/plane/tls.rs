//! TLS for clients: certificate and key from files, read again when they change, so that a renewal needs no restart.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio_rustls::TlsAcceptor;

/// How often the files are looked at: renewals come weeks before they are needed.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// The protocols that we speak, the one we like best first.
const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// Where certificate and key are.
#[derive(Debug, Clone)]
pub(crate) struct TlsFiles {
    /// The chain, the server's own first.
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

/// The certificate of the moment.
#[derive(Debug)]
pub(super) struct Keys {
    files: TlsFiles,
    provider: Arc<CryptoProvider>,
    current: RwLock<Arc<CertifiedKey>>,
}

/// What tells one version of a file from the next.
pub(super) type Mark = Option<(u64, i64, i64, u64)>;

impl Keys {
    /// Reads the files.
    ///
    /// # Errors
    /// One line that names the file and what is wrong with it.
    pub(super) fn read(files: TlsFiles) -> Result<Arc<Self>, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let current = RwLock::new(Arc::new(load(&files, &provider)?));
        Ok(Arc::new(Self { files, provider, current }))
    }

    /// What accepts connections with them.
    ///
    /// # Errors
    /// If the library has no protocol version that it may speak.
    pub(super) fn acceptor(self: &Arc<Self>) -> Result<TlsAcceptor, String> {
        let config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| format!("TLS: {e}"))?;
        let mut config =
            config.with_no_client_auth().with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }

    /// Reads the files again whenever they change. A pair that does not fit together is left alone: the one before goes on.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut seen = self.mark();
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            self.look(&mut seen);
        }
    }

    /// Reads the files again if they are others than those that were seen.
    pub(super) fn look(&self, seen: &mut [Mark; 2]) {
        let now = self.mark();
        if now == *seen {
            return;
        }
        *seen = now;
        match load(&self.files, &self.provider) {
            Ok(key) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
                tracing::info!(certificate = %self.files.certificate.display(), "a new certificate is used");
            }
            Err(error) => tracing::warn!(error, "the changed certificate is not used: the one before goes on"),
        }
    }

    /// The pair of the moment.
    pub(super) fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the files look like now.
    pub(super) fn mark(&self) -> [Mark; 2] {
        use std::os::unix::fs::MetadataExt;
        let of = |path: &Path| fs::metadata(path).ok().map(|m| (m.ino(), m.mtime(), m.mtime_nsec(), m.len()));
        [of(&self.files.certificate), of(&self.files.key)]
    }
}

impl ResolvesServerCert for Keys {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

/// Whether the two ends have agreed on HTTP/2.
pub(super) fn is_http2(protocol: Option<&[u8]>) -> bool {
    protocol == Some(HTTP2)
}

fn load(files: &TlsFiles, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let (certificate, key) = (files.certificate.display(), files.key.display());
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(|chain| chain.collect::<Result<Vec<_>, _>>())
        .map_err(|e| format!("web.tls.certificate: {certificate}: {e}: name a PEM file with the chain"))?;
    if chain.is_empty() {
        return Err(format!("web.tls.certificate: {certificate} holds no certificate: name a PEM file with the chain"));
    }
    let private = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|e| format!("web.tls.key: {key}: {e}: name a PEM file with the private key"))?;
    CertifiedKey::from_der(chain, private, provider)
        .map_err(|e| format!("web.tls.key: {key} does not go with {certificate}: {e}"))
}
