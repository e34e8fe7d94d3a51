//! A small certificate authority for operators who have none: one folder with `ca.pem`, `ca.key` and a certificate and key
//! a host. Keys are ECDSA P-256; certificates carry the host's name as DNS name and are good for both ends of a connection.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use crate::config::TlsPaths;

/// Certificates cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A name that cannot stand in a certificate.
    #[error("`{0}` is not a host name: use 1 to 64 letters, digits, `-` and `.`")]
    Name(String),
    /// A file cannot be written or read.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// There is an authority already.
    #[error("{} exists already: a second authority would not be trusted by hosts of the first; use another folder", .0.display())]
    Exists(PathBuf),
    /// The authority's key or certificate is not usable, or a certificate could not be made.
    #[error("cannot make a certificate with the authority in {}", folder.display())]
    Certificate {
        /// Folder of the authority.
        folder: PathBuf,
        /// Cause.
        #[source]
        source: rcgen::Error,
    },
}

/// Makes a new authority in `folder` (made if missing, mode 0700).
///
/// # Errors
///
/// [`PkiError::Exists`] if there is one already.
pub fn create_authority(folder: &Path, name: &str) -> Result<(), PkiError> {
    let certificate_path = folder.join("ca.pem");
    if certificate_path.exists() {
        return Err(PkiError::Exists(certificate_path));
    }
    let failed = |source| PkiError::Certificate { folder: folder.to_owned(), source };
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for_long(&mut params);
    let certificate = params.self_signed(&key).map_err(failed)?;
    make_folder(folder)?;
    write_new(&folder.join("ca.key"), 0o600, key.serialize_pem().as_bytes())?;
    write_new(&certificate_path, 0o644, certificate.pem().as_bytes())
}

/// Makes a key and a certificate for `host` in `folder`, signed by the authority there, and returns where they are.
///
/// # Errors
///
/// If the folder holds no authority, or the host has a certificate there already.
pub fn issue(folder: &Path, host: &str) -> Result<TlsPaths, PkiError> {
    if !crate::config::host_name_ok(host) {
        return Err(PkiError::Name(host.to_owned()));
    }
    let failed = |source| PkiError::Certificate { folder: folder.to_owned(), source };
    let ca = folder.join("ca.pem");
    let issuer_key = KeyPair::from_pem(&read(&folder.join("ca.key"))?).map_err(failed)?;
    let issuer = Issuer::from_ca_cert_pem(&read(&ca)?, issuer_key).map_err(failed)?;
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::new(vec![host.to_owned()]).map_err(failed)?;
    params.distinguished_name = common_name(host);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    valid_for_long(&mut params);
    let certificate = params.signed_by(&key, &issuer).map_err(failed)?;
    let paths =
        TlsPaths { ca, certificate: folder.join(format!("{host}.pem")), key: folder.join(format!("{host}.key")) };
    write_new(&paths.key, 0o600, key.serialize_pem().as_bytes())?;
    write_new(&paths.certificate, 0o644, certificate.pem().as_bytes())?;
    Ok(paths)
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// Certificates are renewed by issuing anew and restarting; a wrong clock at the start of a host must not lock it out.
fn valid_for_long(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2025, 1, 1);
    params.not_after = date_time_ymd(2045, 1, 1);
}

fn make_folder(folder: &Path) -> Result<(), PkiError> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|source| PkiError::File {
        action: "make the folder",
        path: folder.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<String, PkiError> {
    std::fs::read_to_string(path).map_err(|source| PkiError::File { action: "read", path: path.to_owned(), source })
}

/// Writes a file that must not exist: a key is never overwritten, and never readable by others, not even for a moment.
fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), PkiError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| PkiError::File { action: "write", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::security::tls::{Identity, TlsError};

    #[test]
    fn an_issued_identity_loads_and_is_bound_to_its_host() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("pki");
        create_authority(&folder, "test").unwrap();
        let paths = issue(&folder, "a1").unwrap();
        Identity::load("a1", &paths).unwrap();
        assert!(matches!(Identity::load("b1", &paths), Err(TlsError::OtherHost { .. })));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&paths.key), mode(&folder.join("ca.key"))), (0o600, 0o600));
        std::fs::set_permissions(&paths.key, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Identity::load("a1", &paths), Err(TlsError::KeyMode { mode: 0o644, .. })));
    }

    #[test]
    fn nothing_is_overwritten_and_names_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(issue(folder.path(), "a1"), Err(PkiError::File { action: "read", .. })));
        create_authority(folder.path(), "test").unwrap();
        assert!(matches!(create_authority(folder.path(), "test"), Err(PkiError::Exists(_))));
        issue(folder.path(), "a1").unwrap();
        assert!(matches!(issue(folder.path(), "a1"), Err(PkiError::File { action: "write", .. })));
        assert!(matches!(issue(folder.path(), "../a1"), Err(PkiError::Name(_))));
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        create_authority(folder.path(), "test").unwrap();
        let mut paths = issue(folder.path(), "a1").unwrap();
        paths.key = issue(folder.path(), "a2").unwrap().key;
        assert!(matches!(Identity::load("a1", &paths), Err(TlsError::Mismatch { .. })));
    }
}
