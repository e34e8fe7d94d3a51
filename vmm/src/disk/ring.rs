//! A small layer over io_uring, and buffers aligned for direct I/O.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue};

/// Zeroed memory, aligned to a page. It is mapped rather than taken from the heap, so that what a migration needed goes back
/// to the host when it ends.
#[derive(Debug)]
pub struct AlignedBuffer {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: it owns its memory, as a `Vec` does.
unsafe impl Send for AlignedBuffer {}

impl AlignedBuffer {
    /// `bytes` zeroed bytes, at least one.
    ///
    /// # Errors
    ///
    /// `ENOMEM` at a limit of address space or mappings.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let bytes = bytes.max(1);
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, wherever the kernel puts it.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self { start: start.cast(), bytes })
        }
    }

    /// Where it begins, for the kernel. Whoever hands it out does not touch the bytes until the kernel is done.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start
    }

    /// Gives the memory up for ever: the kernel may still write to it. Nothing is left in the buffer.
    pub fn leak(&mut self) {
        (self.start, self.bytes) = (std::ptr::NonNull::dangling().as_ptr(), 0);
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped, initialized by the kernel, and borrowed with self.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// Its bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped, initialized by the kernel, and borrowed mutably with self.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: mapped in `new`, and nobody borrows from it any more.
            unsafe { libc::munmap(self.start.cast(), self.bytes) };
        }
    }
}

/// Operations that disks and migrations ask of a ring. No filter of system calls sees them.
const OPERATIONS: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// `IORING_REGISTER_BUFFERS` (io_uring_register(2)).
const REGISTER_BUFFERS: u8 = 0;

/// An io_uring that counts what is in flight. It does what is in [`OPERATIONS`], and nothing else whoever asks it: it opens no file and makes no
/// connection.
///
/// Files are not registered with it: the kernel gives registered files up only some time after the ring was closed, and with
/// an image its lock would linger.
pub struct Ring {
    ring: IoUring,
    in_flight: usize,
}

impl Ring {
    /// A ring for at most `depth` requests in flight.
    ///
    /// # Errors
    ///
    /// What the kernel says; `ENOSYS` or `EPERM` where io_uring is switched off.
    pub fn new(depth: u32) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_clamp().dontfork();
        let ring = match builder.clone().setup_r_disabled().build(depth) {
            Ok(ring) => restricted(ring)?,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::debug!("io_uring cannot be restricted by this kernel (older than Linux 5.10)");
                builder.build(depth)?
            }
            Err(error) => return Err(error),
        };
        Ok(Self { ring, in_flight: 0 })
    }

    /// Registers buffers of `bytes` bytes each that begin at `start`; false if the limit for locked memory is too low.
    ///
    /// # Safety
    ///
    /// The memory outlives the ring.
    pub unsafe fn register_buffers(&self, start: *mut u8, bytes: usize, count: usize) -> bool {
        let buffers: Vec<libc::iovec> = (0..count)
            .map(|index| libc::iovec { iov_base: start.wrapping_add(index * bytes).cast(), iov_len: bytes })
            .collect();
        // SAFETY: the caller keeps the memory.
        unsafe { self.ring.submitter().register_buffers(&buffers) }.is_ok()
    }

    /// Requests pushed and not yet reaped.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Requests pushed and not yet seen by the kernel.
    pub fn unsubmitted(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// Queues a request.
    ///
    /// # Errors
    ///
    /// If the queue is full and the kernel does not take what is in it.
    ///
    /// # Safety
    ///
    /// Everything that the entry points to stays where it is until the request has been reaped.
    pub unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the caller keeps what the entry points to.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                break;
            }
            self.submit()?;
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Shows all queued requests to the kernel.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.unsubmitted() > 0 {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One completion, if there is any.
    pub fn reap(&mut self) -> Option<cqueue::Entry> {
        let entry = self.ring.completion().next()?;
        self.in_flight -= 1;
        Some(entry)
    }

    /// One completion; waits for it. `None` if nothing is in flight.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn wait(&mut self) -> io::Result<Option<cqueue::Entry>> {
        loop {
            if let Some(entry) = self.reap() {
                return Ok(Some(entry));
            }
            if self.in_flight == 0 {
                return Ok(None);
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Enables a disabled ring for what is asked of it here.
fn restricted(ring: IoUring) -> io::Result<IoUring> {
    let mut allowed: Vec<_> = OPERATIONS.into_iter().map(Restriction::sqe_op).collect();
    allowed.push(Restriction::register_op(REGISTER_BUFFERS));
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

/// The ring's descriptor, readable when there are completions.
impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_opens_no_file_and_reads_an_open_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"contents").unwrap();
        let mut buffer = [0u8; 8];
        let mut ring = Ring::new(4).unwrap();
        let mut result = |entry: squeue::Entry| {
            // SAFETY: paths are static, and the buffer outlives the request, whose completion is waited for.
            unsafe { ring.push(&entry) }.unwrap();
            ring.wait().unwrap().unwrap().result()
        };
        let directory = io_uring::types::Fd(libc::AT_FDCWD);
        let open = opcode::OpenAt::new(directory, c"/dev/null".as_ptr()).flags(libc::O_RDONLY).build();
        assert_eq!(result(open), -libc::EACCES);
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        assert_eq!(result(socket), -libc::EACCES);
        let open_file = io_uring::types::Fd(file.as_file().as_raw_fd());
        let read = opcode::Read::new(open_file, buffer.as_mut_ptr(), buffer.len() as u32).build();
        assert_eq!(result(read), 8);
        assert_eq!(&buffer, b"contents");
        let more = ring.ring.submitter().register_files(&[file.as_file().as_raw_fd()]).unwrap_err();
        assert_eq!(more.raw_os_error(), Some(libc::EACCES));
    }
}
