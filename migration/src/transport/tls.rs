//! Mutual TLS 1.3, and its refusals in words.
//!
//! Only TLS 1.3 is compiled in (`rustls` without its `tls12` feature), with the aws-lc-rs provider passed explicitly.
//! Both ends present a certificate of the same authority, and each checks that the other's carries the host name that it
//! was told to expect. Sessions are never resumed: each channel runs the whole handshake.

use std::sync::Arc;

use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, Error, RootCertStore, ServerConfig,
    ServerConnection,
};

use super::keys::Handover;

/// Who this end is, and which authority it trusts. PEM texts, not paths.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// Certificates of the authority that must have issued the peer's certificate.
    pub ca_pem: String,
    /// This host's certificate chain, leaf first; its subject alternative names hold the host name as a DNS name, its
    /// extended key usage, if any, both client and server authentication.
    pub certificate_pem: String,
    /// This host's private key (PKCS#8, SEC1 or PKCS#1).
    pub key_pem: String,
}

impl std::fmt::Debug for Identity {
    /// Never prints the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("certificate_pem", &self.certificate_pem).finish_non_exhaustive()
    }
}

/// TLS cannot be used, or refused the peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// One of our own PEM texts is unusable.
    #[error("this host's TLS {what} cannot be used: {detail}; check the files under `tls` in its configuration")]
    Identity {
        /// Which one.
        what: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// A host name that cannot be one.
    #[error("`{name}` is not a DNS name, so no certificate can carry it")]
    BadName {
        /// The name.
        name: String,
    },
    /// The peer's certificate comes from somebody else.
    #[error(
        "the peer's certificate was not issued by this host's authority: give both hosts certificates of the same authority (tls.ca)"
    )]
    WrongAuthority,
    /// Out of date.
    #[error(
        "the peer's certificate is expired or not valid yet ({detail}): renew it, or correct the clock of either host"
    )]
    OutOfDate {
        /// As rustls tells it.
        detail: String,
    },
    /// A good certificate of another host.
    #[error(
        "the peer's certificate is not that of host `{expected}` ({detail}): check the address, or the names in the certificate"
    )]
    WrongName {
        /// Who should be there.
        expected: String,
        /// What the certificate says.
        detail: String,
    },
    /// Otherwise unusable.
    #[error("the peer's certificate is refused: {detail}")]
    BadCertificate {
        /// As rustls tells it.
        detail: String,
    },
    /// It has none.
    #[error("the peer presented no certificate: both ends of a migration need one (tls.certificate, tls.key)")]
    NoCertificate,
    /// It refused ours.
    #[error("the peer refused this host's certificate ({alert}): {remedy}")]
    RefusedByPeer {
        /// Its TLS alert.
        alert: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Another version of TLS.
    #[error("the peer does not speak TLS 1.3 ({detail}); nothing else is accepted")]
    OtherVersion {
        /// As rustls tells it.
        detail: String,
    },
    /// Not TLS at all.
    #[error("the peer does not speak TLS: it sent {found}; is this the migration port of a host?")]
    PlainText {
        /// The first bytes.
        found: String,
    },
    /// It left.
    #[error("the peer closed the connection during the TLS handshake; its log says why")]
    ClosedInHandshake,
    /// Anything else.
    #[error("the TLS session failed: {detail}")]
    Session {
        /// As rustls tells it.
        detail: String,
    },
}

/// Only with suites whose records can be protected here.
fn provider() -> Arc<CryptoProvider> {
    let cipher_suites =
        vec![aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384, aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() })
}

/// A session that is about to begin.
pub struct Session {
    pub(super) connection: Connection,
    /// Gets its keys.
    pub(super) handover: Arc<Handover>,
}

impl Session {
    /// The same as rustls runs it by itself, to the end.
    #[cfg(any(test, feature = "testing"))]
    pub fn into_connection(self) -> Connection {
        self.connection
    }
}

struct Parsed {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn parse(identity: &Identity) -> Result<Parsed, TlsError> {
    let bad = |what, detail: String| TlsError::Identity { what, detail };
    let certificates = |what: &'static str, pem: &str| -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        match all {
            Ok(list) if list.is_empty() => Err(bad(what, "no certificate in it".to_owned())),
            Ok(list) => Ok(list),
            Err(error) => Err(bad(what, error.to_string())),
        }
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates("authority (ca)", &identity.ca_pem)? {
        roots.add(certificate).map_err(|error| bad("authority (ca)", error.to_string()))?;
    }
    let key =
        PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).map_err(|error| bad("key", error.to_string()))?;
    Ok(Parsed { roots: Arc::new(roots), chain: certificates("certificate", &identity.certificate_pem)?, key })
}

/// Makes client sessions towards one host.
#[derive(Clone)]
pub struct Connector {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Connector {
    /// For connections to `host`, as `identity`.
    ///
    /// # Errors
    ///
    /// [`TlsError::Identity`], [`TlsError::BadName`].
    pub fn new(identity: &Identity, host: &str) -> Result<Self, TlsError> {
        let Parsed { roots, chain, key } = parse(identity)?;
        let session = |error: Error| TlsError::Identity { what: "certificate or key", detail: error.to_string() };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(session)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(session)?;
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        let name = ServerName::try_from(host.to_owned()).map_err(|_| TlsError::BadName { name: host.to_owned() })?;
        Ok(Self { config: Arc::new(config), name })
    }

    /// A new session.
    ///
    /// # Errors
    ///
    /// [`TlsError::Session`].
    pub fn session(&self) -> Result<Session, TlsError> {
        let handover = Arc::<Handover>::default();
        let mut config = ClientConfig::clone(&self.config);
        config.key_log = handover.clone();
        let connection = ClientConnection::new(Arc::new(config), self.name.clone())
            .map_err(|error| TlsError::Session { detail: error.to_string() })?;
        Ok(Session { connection: connection.into(), handover })
    }
}

/// Makes server sessions for one expected host.
#[derive(Clone)]
pub struct Acceptor {
    config: Arc<ServerConfig>,
    name: ServerName<'static>,
}

impl Acceptor {
    /// For connections from `host`, as `identity`.
    ///
    /// # Errors
    ///
    /// [`TlsError::Identity`], [`TlsError::BadName`].
    pub fn new(identity: &Identity, host: &str) -> Result<Self, TlsError> {
        let Parsed { roots, chain, key } = parse(identity)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|error| TlsError::Identity { what: "authority (ca)", detail: error.to_string() })?;
        let session = |error: Error| TlsError::Identity { what: "certificate or key", detail: error.to_string() };
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(session)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(session)?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        let name = ServerName::try_from(host.to_owned()).map_err(|_| TlsError::BadName { name: host.to_owned() })?;
        Ok(Self { config: Arc::new(config), name })
    }

    /// A new session.
    ///
    /// # Errors
    ///
    /// [`TlsError::Session`].
    pub fn session(&self) -> Result<Session, TlsError> {
        let handover = Arc::<Handover>::default();
        let mut config = ServerConfig::clone(&self.config);
        config.key_log = handover.clone();
        let connection =
            ServerConnection::new(Arc::new(config)).map_err(|error| TlsError::Session { detail: error.to_string() })?;
        Ok(Session { connection: connection.into(), handover })
    }

    /// Checks after the handshake that the client is the expected host. (rustls checks the name of servers only.)
    ///
    /// # Errors
    ///
    /// [`TlsError::NoCertificate`], [`TlsError::WrongName`].
    pub fn check_name(&self, certificate: Option<&CertificateDer<'_>>) -> Result<(), TlsError> {
        let certificate = certificate.ok_or(TlsError::NoCertificate)?;
        ParsedCertificate::try_from(certificate)
            .and_then(|parsed| verify_server_name(&parsed, &self.name))
            .map_err(|error| explain(&error, &[]))
            .map_err(|error| match error {
                TlsError::WrongName { detail, .. } => {
                    TlsError::WrongName { expected: self.name.to_str().into_owned(), detail }
                }
                other => other,
            })
    }
}

/// Says in words what rustls refused; `received` are the bytes that it was reading.
pub fn explain(error: &Error, received: &[u8]) -> TlsError {
    match error {
        Error::InvalidCertificate(reason) => explain_certificate(reason),
        Error::NoCertificatesPresented => TlsError::NoCertificate,
        Error::PeerIncompatible(detail) => TlsError::OtherVersion { detail: format!("{detail:?}") },
        Error::InvalidMessage(_) if !looks_like_tls(received) => {
            let shown: Vec<u8> = received.iter().take(16).flat_map(|&byte| std::ascii::escape_default(byte)).collect();
            TlsError::PlainText { found: format!("\"{}\"", String::from_utf8_lossy(&shown)) }
        }
        Error::AlertReceived(alert) => explain_alert(*alert),
        other => TlsError::Session { detail: other.to_string() },
    }
}

fn explain_certificate(reason: &CertificateError) -> TlsError {
    let detail = reason.to_string();
    match reason {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => TlsError::WrongAuthority,
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => TlsError::OutOfDate { detail },
        CertificateError::NotValidForNameContext { expected, presented } => TlsError::WrongName {
            expected: expected.to_str().into_owned(),
            detail: format!(
                "it carries {}",
                if presented.is_empty() { "no name".to_owned() } else { presented.join(", ") }
            ),
        },
        CertificateError::NotValidForName => TlsError::WrongName { expected: "expected".to_owned(), detail },
        _ => TlsError::BadCertificate { detail },
    }
}

fn explain_alert(alert: AlertDescription) -> TlsError {
    let refused = |remedy| TlsError::RefusedByPeer { alert: format!("{alert:?}"), remedy };
    match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            refused("it was not issued by the peer's authority; give both hosts certificates of the same one (tls.ca)")
        }
        AlertDescription::CertificateExpired => refused("it is expired; renew it, or correct a clock"),
        AlertDescription::CertificateRequired => refused("none was presented; set tls.certificate and tls.key"),
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::CertificateRevoked
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::AccessDenied => refused("the peer's log says what is wrong with it"),
        AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure => {
            TlsError::OtherVersion { detail: format!("{alert:?}") }
        }
        other => TlsError::Session { detail: format!("the peer sent the alert {other:?}") },
    }
}

/// Content types 20 to 23 and major version 3 (RFC 8446, section 5.1).
pub(super) fn looks_like_tls(received: &[u8]) -> bool {
    matches!(received, [] | [20..=23]) || matches!(received, [20..=23, 3, ..])
}
