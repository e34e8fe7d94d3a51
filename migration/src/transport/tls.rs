//! Mutual TLS 1.3.

/// Who this end is, and which authority it trusts. PEM texts, not paths.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// Certificates of the authority that must have issued the peer's certificate.
    pub ca_pem: String,
    /// This host's certificate chain, leaf first; its subject alternative names hold the host name as a DNS name.
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
