//! Certificates for HTTPS, read again when their files change.
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{DEFAULT_VERSIONS, ServerConfig};

use crate::error::{Error, Result};

/// How long files are taken for unchanged.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A certificate with its key, as their files have them now.
#[derive(Debug)]
pub struct Certificates {
    certificate: PathBuf,
    key: PathBuf,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    config: Arc<ServerConfig>,
    /// The files that were looked at last, read or refused.
    stamps: [Stamp; 2],
    looked: Instant,
}

/// What tells a file from the one that stood there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp(Option<(SystemTime, u64, u64)>);

impl Stamp {
    fn of(path: &Path) -> Self {
        let stamp = |meta: Metadata| Some((meta.modified().ok()?, meta.len(), inode(&meta)));
        Stamp(std::fs::metadata(path).ok().and_then(stamp))
    }
}

#[cfg(unix)]
fn inode(meta: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(meta)
}

#[cfg(not(unix))]
fn inode(_: &Metadata) -> u64 {
    0
}

impl Certificates {
    /// `certificate`: PEM, the server's own first, then those that lead to the root; `key`: its private key, PEM.
    ///
    /// # Errors
    /// Files that cannot be read, hold no such thing, or do not belong together.
    pub fn load(certificate: &Path, key: &Path) -> Result<Self> {
        let stamps = [certificate, key].map(Stamp::of);
        let config = Arc::new(read(certificate, key)?);
        let current = Mutex::new(Current { config, stamps, looked: Instant::now() });
        Ok(Certificates { certificate: certificate.to_owned(), key: key.to_owned(), current })
    }

    /// For the next connection. Files that changed since the last are read; if they cannot be used, the ones before stay, and the log says why.
    pub fn acceptor(&self) -> TlsAcceptor {
        // What is behind the lock is never half changed.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() >= LOOK_AGAIN {
            current.looked = Instant::now();
            let stamps = [&self.certificate, &self.key].map(|path| Stamp::of(path));
            if stamps != current.stamps {
                current.stamps = stamps;
                match read(&self.certificate, &self.key) {
                    Ok(config) => {
                        current.config = Arc::new(config);
                        tracing::info!(certificate = %self.certificate.display(), "certificate read again");
                    }
                    Err(error) => tracing::warn!(%error, "the certificate from before stays"),
                }
            }
        }
        TlsAcceptor::from(Arc::clone(&current.config))
    }
}

fn read(certificate: &Path, key: &Path) -> Result<ServerConfig> {
    let refuse = |file: &Path, reason: String| Error::Certificate { file: file.to_owned(), reason };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
        .map_err(|error| refuse(certificate, format!("expected certificates in PEM, got: {error}")))?;
    if chain.is_empty() {
        return Err(refuse(certificate, "expected certificates in PEM, got none".to_owned()));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| refuse(key, format!("expected a private key in PEM, got: {error}")))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(DEFAULT_VERSIONS)
        .map_err(|error| refuse(certificate, error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| refuse(certificate, format!("not usable with {}: {error}", key.display())))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}
