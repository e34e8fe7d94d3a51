//! Mutual TLS 1.3 between daemons.
//!
//! Both sides present a certificate of the same authority. A client checks that the server's certificate carries the name
//! of the host that it means to talk to; a server takes the client's host name from the certificate and refuses a name
//! that its configuration does not declare. All of this happens in the handshake or right after it: not one byte of an
//! undeclared peer reaches the HTTP parser.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use vmm::config::TlsIdentity;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::config::TlsPaths;

/// An identity that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {what} {}: make one with `headroom pki`, or correct `tls` in the configuration", path.display())]
    Read {
        /// Which one.
        what: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} holds no usable {what}: it must be PEM", path.display())]
    Pem {
        /// What it should hold.
        what: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// A private key that others can read.
    #[error("{} can be read by others (mode {mode:03o}): `chmod 600` it", path.display())]
    KeyMode {
        /// File.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The certificate is somebody else's.
    #[error("the certificate {} is for {names:?} and not for this host `{host}`: issue one with `headroom pki issue {host}`", path.display())]
    OtherHost {
        /// File.
        path: PathBuf,
        /// Names that it carries.
        names: Vec<String>,
        /// This host.
        host: String,
    },
    /// TLS refuses the parts.
    #[error("certificate, key and authority do not fit together: issue them anew with `headroom pki`")]
    Mismatch {
        /// Cause.
        #[source]
        source: rustls::Error,
    },
    /// The authority cannot be used to check peers.
    #[error("the authority {} cannot be used to check peers", path.display())]
    Authority {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// This host's identity, ready for use.
#[derive(Clone)]
pub struct Identity {
    pem: TlsIdentity,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Identity(..)")
    }
}

impl Identity {
    /// Reads and checks the files of `paths`, which must be for `host`.
    ///
    /// # Errors
    ///
    /// [`TlsError`] names the file and the remedy.
    pub fn load(host: &str, paths: &TlsPaths) -> Result<Self, TlsError> {
        let pem = TlsIdentity {
            ca_pem: read("authority", &paths.ca)?,
            certificate_pem: read("certificate", &paths.certificate)?,
            key_pem: read("key", &paths.key)?,
        };
        check_key_mode(&paths.key)?;
        let chain = certificates("certificate", &paths.certificate, &pem.certificate_pem)?;
        let names = chain.first().map(host_names).unwrap_or_default();
        if !names.iter().any(|name| name == host) {
            return Err(TlsError::OtherHost { path: paths.certificate.clone(), names, host: host.to_owned() });
        }
        let key = || {
            PrivateKeyDer::from_pem_slice(pem.key_pem.as_bytes()).map_err(|source| TlsError::Pem {
                what: "private key",
                path: paths.key.clone(),
                source,
            })
        };
        let roots = Arc::new(roots(paths, &pem.ca_pem)?);
        let server = server_config(paths, Arc::clone(&roots), chain.clone(), key()?)?;
        let client = client_config(roots, chain, key()?)?;
        Ok(Self { pem, server: Arc::new(server), client: Arc::new(client) })
    }

    /// The same as PEM, for a VMM.
    pub fn pem(&self) -> &TlsIdentity {
        &self.pem
    }

    /// Accepts connections of peers.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.server))
    }

    /// Connects to peers.
    pub fn connector(&self) -> TlsConnector {
        TlsConnector::from(Arc::clone(&self.client))
    }
}

/// The name that `host`'s certificate must carry.
///
/// # Errors
///
/// If it is no DNS name; configurations with such a name are refused when they are read.
pub fn server_name(host: &str) -> io::Result<ServerName<'static>> {
    ServerName::try_from(host.to_owned()).map_err(io::Error::other)
}

/// DNS names that a certificate carries as subject alternative names; empty if it cannot be parsed.
pub fn host_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return Vec::new() };
    let dns = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    });
    dns.collect()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn server_config(
    paths: &TlsPaths,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|source| TlsError::Authority { path: paths.ca.clone(), source: source.into() })?;
    let mismatch = |source| TlsError::Mismatch { source };
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(mismatch)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(mismatch)
}

fn client_config(
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, TlsError> {
    let mismatch = |source| TlsError::Mismatch { source };
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(mismatch)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(mismatch)
}

fn roots(paths: &TlsPaths, pem: &str) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("authority", &paths.ca, pem)? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Authority { path: paths.ca.clone(), source: source.into() })?;
    }
    Ok(roots)
}

fn certificates(what: &'static str, path: &Path, pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bad = |source| TlsError::Pem { what, path: path.to_owned(), source };
    let list = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>().map_err(bad)?;
    if list.is_empty() { Err(bad(rustls::pki_types::pem::Error::NoItemsFound)) } else { Ok(list) }
}

fn read(what: &'static str, path: &Path) -> Result<String, TlsError> {
    std::fs::read_to_string(path).map_err(|source| TlsError::Read { what, path: path.to_owned(), source })
}

fn check_key_mode(path: &Path) -> Result<(), TlsError> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = std::fs::metadata(path);
    let mode =
        metadata.map_err(|source| TlsError::Read { what: "key", path: path.to_owned(), source })?.permissions().mode()
            & 0o777;
    if mode & 0o077 == 0 { Ok(()) } else { Err(TlsError::KeyMode { path: path.to_owned(), mode }) }
}
