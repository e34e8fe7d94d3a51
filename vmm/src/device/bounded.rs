//! A file that a guest writes without end and that does not grow without end.
//!
//! All files are opened at the beginning: the thread that writes runs a vCPU and may open none ([`crate::sandbox`]).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

/// What a file has at most, in bytes; with the one before it, twice as much is kept.
pub const BYTES_MAX: u64 = 1 << 20;

/// Appends to a file. One that is full is copied to the file beside it with the ending `.old`, in place of what that had, and begins anew.
#[derive(Debug)]
pub struct Bounded {
    file: File,
    bytes: u64,
    /// None for a pipe or a terminal, which keep nothing.
    before: Option<Before>,
}

/// Where the contents go that make room.
#[derive(Debug)]
struct Before {
    /// The same file, to be read.
    reader: File,
    /// None where it cannot be made: what makes room is lost then.
    old: Option<File>,
}

impl Bounded {
    /// Appends to the file at `path`, which is made if it is not there.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let metadata = file.metadata()?;
        let before = if metadata.is_file() { Some(Before::open(path)?) } else { None };
        Ok(Self { file, bytes: metadata.len(), before })
    }
}

impl Before {
    fn open(path: &Path) -> io::Result<Self> {
        let mut name = path.as_os_str().to_owned();
        name.push(".old");
        let old = OpenOptions::new().write(true).create(true).truncate(false).open(name);
        let old = old.inspect_err(|error| tracing::debug!(%error, "a console's old contents will not be kept")).ok();
        Ok(Self { reader: File::open(path)?, old })
    }

    fn keep(&mut self) -> io::Result<()> {
        let Some(old) = &mut self.old else { return Ok(()) };
        old.set_len(0)?;
        old.rewind()?;
        self.reader.rewind()?;
        let mut piece = vec![0; 64 << 10];
        loop {
            let read = self.reader.read(&mut piece)?;
            if read == 0 {
                return Ok(());
            }
            old.write_all(&piece[..read])?;
        }
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(before) = self.before.as_mut().filter(|_| self.bytes >= BYTES_MAX) {
            // On a full file system the old contents are lost: the guest must not fill it further.
            let _ = before.keep();
            self.file.set_len(0)?;
            self.bytes = 0;
        }
        let written = self.file.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_what_was_written_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut line = vec![b'.'; 1023];
        line.push(b'\n');
        for start in 0..3u8 {
            // Opened again, as by a machine that goes on from a snapshot.
            let mut file = Bounded::open(&path).unwrap();
            for count in 0..1000u16 {
                line[..5].copy_from_slice(format!("{start}{count:04}").as_bytes());
                file.write_all(&line).unwrap();
            }
        }
        let text =
            ["console.log.old", "console.log"].map(|name| std::fs::read_to_string(folder.path().join(name)).unwrap());
        assert!(text.iter().all(|part| part.len() as u64 <= BYTES_MAX), "{:?}", text.map(|part| part.len()));
        let kept: Vec<String> = text.concat().lines().map(|line| line[..5].to_owned()).collect();
        assert!(kept.len() >= 1024 && kept.last().is_some_and(|last| last == "20999"), "{:?}", kept.last());
        assert!(kept.windows(2).all(|pair| pair[0] < pair[1]), "nothing in between is lost");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_file_that_was_removed_does_not_grow_either() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut file = Bounded::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        for _ in 0..3 * BYTES_MAX / 1024 {
            file.write_all(&[b'.'; 1024]).unwrap();
        }
        assert!(file.file.metadata().unwrap().len() <= BYTES_MAX);
    }
}
