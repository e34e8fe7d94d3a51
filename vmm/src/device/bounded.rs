//! A file that a guest writes without end and that does not grow without end.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What a file has at most, in bytes; with the one before it, twice as much is kept.
pub const BYTES_MAX: u64 = 1 << 20;

/// Appends to a file. One that is full gets the ending `.old`, in place of the one that had it, and a new one begins.
#[derive(Debug)]
pub struct Bounded {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// A pipe or a terminal keeps nothing.
    grows: bool,
}

impl Bounded {
    /// Appends to the file at `path`, which is made if it is not there.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = append_to(path)?;
        let metadata = file.metadata()?;
        Ok(Self { path: path.to_owned(), file, bytes: metadata.len(), grows: metadata.is_file() })
    }

    fn begin_anew(&mut self) -> io::Result<()> {
        let mut old = OsString::from(&self.path);
        old.push(".old");
        if std::fs::rename(&self.path, old).is_ok() {
            self.file = append_to(&self.path)?;
        } else {
            // Somebody has removed it, or its folder may not be written.
            self.file.set_len(0)?;
        }
        self.bytes = 0;
        Ok(())
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.grows && self.bytes >= BYTES_MAX {
            self.begin_anew()?;
        }
        let written = self.file.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
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
