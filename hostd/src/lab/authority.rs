//! A private certificate authority for one lab: hosts that it did not sign are strangers.

use std::net::Ipv4Addr;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

use super::error::{LabError, LabResult};

/// An authority with its key in memory only.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What one host is given, as PEM.
#[derive(Clone)]
pub struct HostCertificate {
    /// Certificate of the authority.
    pub ca_pem: String,
    /// The host's certificate.
    pub certificate_pem: String,
    /// The host's private key.
    pub key_pem: String,
}

impl Authority {
    /// Makes a new authority.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new(name: &str) -> LabResult<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(failed)?;
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, key).map_err(failed)? })
    }

    /// Signs a certificate, for both ends of a TLS session, that carries `host` and `address`.
    ///
    /// # Errors
    /// When no key can be made or the name is not a DNS name.
    pub fn issue(&self, host: &str, address: Option<Ipv4Addr>) -> LabResult<HostCertificate> {
        let names = std::iter::once(host.to_owned()).chain(address.map(|address| address.to_string()));
        let mut params = CertificateParams::new(names.collect::<Vec<_>>()).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, host);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &*self.issuer).map_err(failed)?;
        Ok(HostCertificate {
            ca_pem: self.issuer.pem(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }
}

impl HostCertificate {
    /// Writes `ca.pem`, `certificate.pem` and `key.pem` (readable by the owner only) into `directory`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, directory: &Path) -> LabResult<()> {
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        for (name, text, mode) in [
            ("ca.pem", &self.ca_pem, 0o644),
            ("certificate.pem", &self.certificate_pem, 0o644),
            ("key.pem", &self.key_pem, 0o600),
        ] {
            let path = directory.join(name);
            let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&path);
            file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(LabError::io("write", path))?;
        }
        Ok(())
    }
}

fn failed(error: rcgen::Error) -> LabError {
    LabError::Certificates(error.to_string())
}
