//! Traffic keys of a session (RFC 8446, section 7): rustls agrees on the secrets, the records are protected here.

use std::fmt;
use std::sync::OnceLock;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Algorithm, NONCE_LEN};
use aws_lc_rs::hkdf::{self, HKDF_SHA256, HKDF_SHA384, KeyType, Prk};
use rustls::{CipherSuite, KeyLog};
use zeroize::Zeroizing;

/// The first traffic secrets of one session, which rustls hands over in the handshake as it would write them into a key log
/// (`SSLKEYLOGFILE`). Each session has its own; nothing is logged.
#[derive(Default)]
pub struct Handover {
    client: OnceLock<Zeroizing<Vec<u8>>>,
    server: OnceLock<Zeroizing<Vec<u8>>>,
}

impl Handover {
    fn of(&self, label: &str) -> Option<&OnceLock<Zeroizing<Vec<u8>>>> {
        match label {
            "CLIENT_TRAFFIC_SECRET_0" => Some(&self.client),
            "SERVER_TRAFFIC_SECRET_0" => Some(&self.server),
            _ => None,
        }
    }

    /// What the client and the server encrypt with. `None` before the end of the handshake, or for a suite that is not
    /// offered.
    pub(super) fn take(&self, suite: CipherSuite) -> Option<(Traffic, Traffic)> {
        let suite = Suite::of(suite)?;
        Some((
            Traffic { suite, secret: self.client.get()?.clone() },
            Traffic { suite, secret: self.server.get()?.clone() },
        ))
    }
}

impl fmt::Debug for Handover {
    /// Never prints a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handover").finish_non_exhaustive()
    }
}

impl KeyLog for Handover {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        if let Some(place) = self.of(label) {
            let _ = place.set(Zeroizing::new(secret.to_vec()));
        }
    }

    fn will_log(&self, label: &str) -> bool {
        self.of(label).is_some()
    }
}

/// A cipher suite of TLS 1.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Suite {
    Aes128GcmSha256,
    Aes256GcmSha384,
}

impl Suite {
    fn of(suite: CipherSuite) -> Option<Self> {
        match suite {
            CipherSuite::TLS13_AES_128_GCM_SHA256 => Some(Self::Aes128GcmSha256),
            CipherSuite::TLS13_AES_256_GCM_SHA384 => Some(Self::Aes256GcmSha384),
            _ => None,
        }
    }

    fn aead(self) -> &'static Algorithm {
        match self {
            Self::Aes128GcmSha256 => &AES_128_GCM,
            Self::Aes256GcmSha384 => &AES_256_GCM,
        }
    }

    fn hkdf(self) -> hkdf::Algorithm {
        match self {
            Self::Aes128GcmSha256 => HKDF_SHA256,
            Self::Aes256GcmSha384 => HKDF_SHA384,
        }
    }
}

/// The secret of one direction.
pub(super) struct Traffic {
    suite: Suite,
    secret: Zeroizing<Vec<u8>>,
}

/// What records of one direction are protected with until the next update.
pub(super) struct Keys {
    pub(super) aead: &'static Algorithm,
    pub(super) key: Zeroizing<Vec<u8>>,
    pub(super) iv: [u8; NONCE_LEN],
}

impl Traffic {
    /// RFC 8446, section 7.3.
    pub(super) fn keys(&self) -> Keys {
        let aead = self.suite.aead();
        let key = self.expand_label("key", aead.key_len());
        let mut iv = [0; NONCE_LEN];
        iv.copy_from_slice(&self.expand_label("iv", NONCE_LEN));
        Keys { aead, key, iv }
    }

    /// The next generation (RFC 8446, section 7.2).
    pub(super) fn update(&mut self) {
        self.secret = self.expand_label("traffic upd", self.secret.len());
    }

    /// HKDF-Expand-Label with an empty context (RFC 8446, section 7.1).
    fn expand_label(&self, label: &str, length: usize) -> Zeroizing<Vec<u8>> {
        const PREFIX: &[u8] = b"tls13 ";
        let lengths = [(length >> 8) as u8, length as u8, (PREFIX.len() + label.len()) as u8];
        let info = [&lengths, PREFIX, label.as_bytes(), &[0]];
        let mut out = Zeroizing::new(vec![0; length]);
        let secret = Prk::new_less_safe(self.suite.hkdf(), &self.secret);
        // It fails for lengths beyond 255 hashes only; the longest here is one.
        secret.expand(&info, Length(length)).and_then(|okm| okm.fill(&mut out)).expect("at most a hash is asked for");
        out
    }
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn hex(text: &str) -> Vec<u8> {
        text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).expect("hexadecimal")).collect()
    }

    /// The client's secret of the trace in RFC 8448, section 3.
    pub(crate) fn rfc8448_client() -> Traffic {
        let secret = "9e 40 64 6c e7 9a 7f 9d c0 5a f8 88 9b ce 65 52 87 5a fa 0b 06 df 00 87 f7 92 eb b7 c1 75 04 a5";
        Traffic { suite: Suite::Aes128GcmSha256, secret: Zeroizing::new(hex(secret)) }
    }

    #[test]
    fn keys_are_those_of_the_rfcs_trace() {
        let keys = rfc8448_client().keys();
        assert_eq!(*keys.key, hex("17 42 2d da 59 6e d5 d9 ac d8 90 e3 c6 3f 50 51"));
        assert_eq!(keys.iv, *hex("5b 78 92 3d ee 08 57 90 33 e5 23 d9"));
    }

    #[test]
    fn only_the_traffic_secrets_are_taken() {
        let handover = Handover::default();
        for label in ["CLIENT_HANDSHAKE_TRAFFIC_SECRET", "EXPORTER_SECRET", "CLIENT_RANDOM"] {
            assert!(!handover.will_log(label));
            handover.log(label, &[], &[1; 48]);
        }
        handover.log("CLIENT_TRAFFIC_SECRET_0", &[], &[2; 48]);
        assert!(handover.take(CipherSuite::TLS13_AES_256_GCM_SHA384).is_none(), "the server's is missing");
        handover.log("SERVER_TRAFFIC_SECRET_0", &[], &[3; 48]);
        let (client, server) = handover.take(CipherSuite::TLS13_AES_256_GCM_SHA384).expect("both are there");
        assert_ne!(*client.keys().key, *server.keys().key);
        assert!(handover.take(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256).is_none(), "it is not offered");
        assert!(!format!("{handover:?}").contains('2'));
    }
}
