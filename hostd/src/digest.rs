//! Hashes and random numbers, from the same library that does TLS.

use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};

/// SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let suite = cipher_suite::TLS13_AES_128_GCM_SHA256.tls13();
    // The suite is a TLS 1.3 one with SHA-256 by its very name.
    let hash = suite.map(|suite| suite.common.hash_provider.hash(bytes));
    let mut digest = [0; 32];
    if let Some(hash) = hash {
        digest.copy_from_slice(hash.as_ref());
    }
    digest
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The system has no random numbers.
#[derive(Debug, thiserror::Error)]
#[error("the system gives no random numbers: is /dev/urandom there?")]
pub struct NoRandom;

/// `N` random bytes, fit for secrets.
///
/// # Errors
///
/// [`NoRandom`] if the system's source fails.
pub fn random<const N: usize>() -> Result<[u8; N], NoRandom> {
    let mut bytes = [0; N];
    default_provider().secure_random.fill(&mut bytes).map_err(|_| NoRandom)?;
    Ok(bytes)
}

/// A new id: `prefix-` and 12 hexadecimal digits.
///
/// # Errors
///
/// As [`random`].
pub fn new_id(prefix: &str) -> Result<String, NoRandom> {
    Ok(format!("{prefix}-{}", hex(&random::<6>()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_is_that_of_the_standard() {
        // FIPS 180-2, appendix B.1.
        assert_eq!(hex(&sha256(b"abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn ids_differ() {
        assert_ne!(new_id("mig").unwrap(), new_id("mig").unwrap());
    }
}
