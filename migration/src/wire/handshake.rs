//! The first frame of every channel: who connects, for which migration, in which role, and the proof that it may.
//!
//! The one-time token itself never travels. Each channel proves that it knows it with a keyed BLAKE3 hash over a value
//! that only this TLS session has (`export_keying_material`, RFC 8446 section 7.5, RFC 5705), the migration id and the
//! role. A hello that was recorded in one session proves nothing in another one, nor for another role.

use serde::{Deserialize, Serialize};

/// First bytes of every hello; says that this is a migration and not some other service behind the same authority.
pub const MAGIC: [u8; 8] = *b"HEADROOM";

/// Label of the exported keying material.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-headroom-migration";

/// What a channel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// Messages; exactly one.
    Control,
    /// Pages; numbered from 0.
    Memory(u16),
    /// Blocks of all disks; one, if the machine has disks.
    Disk,
    /// Post-copy: what the guest waits for, apart from all that is pushed.
    Fault,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Role::Control => f.write_str("control"),
            Role::Memory(number) => write!(f, "memory {number}"),
            Role::Disk => f.write_str("disk"),
            Role::Fault => f.write_str("fault"),
        }
    }
}

/// The first message on a channel, from the source.
///
/// Its layout never changes, so that any two releases can at least tell each other that they do not fit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// Oldest and newest protocol version.
    pub versions: (u16, u16),
    /// Names of features.
    #[serde(deserialize_with = "crate::wire::bounded::items")]
    pub features: Vec<String>,
    /// Migration id.
    pub id: String,
    /// What the channel is for.
    pub role: Role,
    /// See [`proof`].
    pub proof: [u8; 32],
    /// Room for later releases; ignored by this one.
    pub extension: Vec<u8>,
}

/// The destination's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that is used from here on.
    pub version: u16,
    /// Features that both ends have.
    #[serde(deserialize_with = "crate::wire::bounded::items")]
    pub features: Vec<String>,
    /// Room for later releases; ignored by this one.
    pub extension: Vec<u8>,
}

/// What a channel has to present: a MAC under `token` over this TLS session, the migration and the role.
pub fn proof(token: &[u8; 32], session: &[u8; 32], id: &str, role: Role) -> blake3::Hash {
    let mut mac = blake3::Hasher::new_keyed(token);
    mac.update(session);
    mac.update(&(id.len() as u64).to_le_bytes());
    mac.update(id.as_bytes());
    let (kind, number) = match role {
        Role::Control => (0u16, 0),
        Role::Memory(number) => (1, number),
        Role::Disk => (2, 0),
        Role::Fault => (3, 0),
    };
    mac.update(&kind.to_le_bytes());
    mac.update(&number.to_le_bytes());
    mac.finalize()
}

/// Whether `presented` is the right proof; takes the same time wherever they differ.
pub fn proves(presented: &[u8; 32], token: &[u8; 32], session: &[u8; 32], id: &str, role: Role) -> bool {
    // Equality of `blake3::Hash` is constant-time.
    blake3::Hash::from_bytes(*presented) == proof(token, session, id, role)
}
