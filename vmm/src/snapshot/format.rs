//! The `machine` file: a fixed head, then one encoded structure.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use super::{Contents, SnapshotError, file_error};

const MAGIC: [u8; 8] = *b"HEADROOM";
/// Raised whenever [`Contents`] changes in a way that an older build cannot read.
const VERSION: u32 = 1;
/// Magic, version, CRC-32 of the body, length of the body.
const HEAD_BYTES: usize = 8 + 4 + 4 + 8;
/// 64 vCPUs with large extended state stay well below.
const MAX_BODY_BYTES: u64 = 16 << 20;

pub(super) fn write(path: &Path, contents: &Contents) -> Result<(), SnapshotError> {
    let body = postcard::to_stdvec(contents).map_err(|error| damaged(path, error.to_string()))?;
    let mut bytes = head(&body);
    bytes.extend_from_slice(&body);
    let mut file = File::create_new(path).map_err(file_error("create", path))?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(file_error("write", path))
}

/// What goes before `body`.
pub(crate) fn head(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes
}

pub(super) fn read(path: &Path) -> Result<Contents, SnapshotError> {
    let mut file = File::open(path).map_err(file_error("open", path))?;
    let mut head = [0; HEAD_BYTES];
    file.read_exact(&mut head).map_err(|_| damaged(path, "it is shorter than its head"))?;
    let (magic, version, crc, length) = (&head[..8], word(&head, 8), word(&head, 12), long(&head, 16));
    if magic != MAGIC {
        return Err(damaged(path, "it does not begin as a snapshot does"));
    }
    if version != VERSION {
        return Err(SnapshotError::Version { path: path.to_owned(), found: version, known: VERSION });
    }
    if length > MAX_BODY_BYTES {
        return Err(damaged(path, format!("it claims {length} bytes, at most {MAX_BODY_BYTES} are possible")));
    }
    let mut body = Vec::new();
    file.take(length + 1).read_to_end(&mut body).map_err(file_error("read", path))?;
    if body.len() as u64 != length {
        return Err(damaged(path, format!("it should hold {length} bytes and holds {} or more", body.len())));
    }
    if crc32fast::hash(&body) != crc {
        return Err(damaged(path, "its checksum is wrong"));
    }
    postcard::from_bytes(&body).map_err(|error| damaged(path, error.to_string()))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn damaged(path: &Path, what: impl Into<String>) -> SnapshotError {
    SnapshotError::Damaged { path: path.to_owned(), what: what.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents() -> Contents {
        Contents {
            config: "{}".into(),
            cpu: Default::default(),
            payloads: vec![],
            memory: super::super::image::Summary { pages: 1, data_pages: 0, hash: 2 },
        }
    }

    #[test]
    fn damage_is_found_and_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("machine");
        write(&path, &contents()).unwrap();
        let good = std::fs::read(&path).unwrap();
        assert_eq!(read(&path).unwrap().config, "{}");
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
            read(&path).err().unwrap().to_string()
        };
        assert!(with(&|bytes| bytes[0] = 0).contains("does not begin as"));
        assert!(with(&|bytes| bytes[8] = 9).contains("version 9"));
        assert!(with(&|bytes| bytes[HEAD_BYTES] ^= 1).contains("checksum"));
        assert!(with(&|bytes| bytes.truncate(bytes.len() - 1)).contains("should hold"));
        assert!(with(&|bytes| bytes.push(0)).contains("should hold"));
        assert!(with(&|bytes| bytes[22] = 1).contains("at most"));
        assert!(with(&|bytes| bytes.truncate(5)).contains("shorter"));
    }
}
