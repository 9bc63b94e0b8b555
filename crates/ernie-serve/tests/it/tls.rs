//! HTTPS, and certificates that change while it is spoken.
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ernie_serve::{Error, ServeConfig};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, DEFAULT_VERSIONS, RootCertStore};

use crate::client::Running;

/// A certificate of `localhost`, written with its key into `dir`.
fn certificate(dir: &Path) -> CertificateDer<'static> {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(dir.join("key.pem"), signing_key.serialize_pem()).unwrap();
    std::fs::write(dir.join("cert.pem"), cert.pem()).unwrap();
    cert.der().clone()
}

fn config(dir: &Path) -> ServeConfig {
    ServeConfig { tls_certificate: Some(dir.join("cert.pem")), tls_key: Some(dir.join("key.pem")), ..ServeConfig::default() }
}

/// The answer to a request from a client that trusts `root` only.
fn get(server: &Running, root: &CertificateDer<'static>) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(root.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(DEFAULT_VERSIONS)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let stream = TcpStream::connect(server.address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        stream.write_all(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    })
}

#[test]
fn https_is_spoken_and_a_new_certificate_taken_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let first = certificate(dir.path());
    let server = Running::with(config(dir.path()));
    let answer = get(&server, &first).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("live\n"), "{answer}");

    // Files that belong to nobody change nothing.
    std::fs::write(dir.path().join("key.pem"), "no key").unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    assert!(get(&server, &first).is_ok());

    let second = certificate(dir.path());
    let began = Instant::now();
    while get(&server, &second).is_err() {
        assert!(began.elapsed() < Duration::from_secs(30), "the new certificate is not taken");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(get(&server, &first).is_err());
}

#[test]
fn plain_http_gets_no_answer_where_https_is_spoken() {
    let dir = tempfile::tempdir().unwrap();
    let root = certificate(dir.path());
    let server = Running::with(config(dir.path()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let got = runtime.block_on(async {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        let mut bytes = Vec::new();
        // It may also be an error that the connection was reset.
        let _ = stream.read_to_end(&mut bytes).await;
        bytes
    });
    assert!(!String::from_utf8_lossy(&got).contains("HTTP/1.1 200"));
    assert!(get(&server, &root).is_ok());
}

#[test]
fn a_shutdown_waits_for_no_greeting() {
    let dir = tempfile::tempdir().unwrap();
    let root = certificate(dir.path());
    let limit = 60;
    let mut server = Running::with(ServeConfig { header_timeout_s: limit, drain_timeout_s: limit, ..config(dir.path()) });
    let silent = std::net::TcpStream::connect(server.address).unwrap();
    // It was accepted before this one.
    assert!(get(&server, &root).is_ok());
    server.shut_down();
    let began = Instant::now();
    while !server.has_ended() {
        assert!(began.elapsed() < Duration::from_secs(limit / 2), "it waits for a connection that says nothing");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(silent);
}

#[test]
fn certificates_that_cannot_be_used_are_refused_with_the_file_at_fault() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    certificate(dir.path());
    certificate(other.path());
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let junk = dir.path().join("junk.pem");
    std::fs::write(&junk, "-----BEGIN NOTHING-----\n").unwrap();
    let missing = dir.path().join("missing.pem");
    for (certificate, key, at) in [
        (&missing, &key, &missing),
        (&cert, &missing, &missing),
        (&junk, &key, &junk),
        (&cert, &junk, &junk),
        (&key, &key, &key),
        (&cert, &other.path().join("key.pem"), &cert),
    ] {
        let config = ServeConfig { tls_certificate: Some(certificate.clone()), tls_key: Some(key.clone()), ..ServeConfig::default() };
        let error = Running::refused(config);
        assert!(matches!(&error, Error::Certificate { file, .. } if file == at), "{error}");
        assert!(error.to_string().contains(&at.display().to_string()));
    }
}
