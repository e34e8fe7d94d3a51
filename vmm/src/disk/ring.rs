//! A small layer over io_uring, and buffers aligned for direct I/O.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, cqueue, squeue};

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

/// An io_uring that counts what is in flight.
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
        Ok(Self { ring: IoUring::builder().setup_clamp().dontfork().build(depth)?, in_flight: 0 })
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

/// The ring's descriptor, readable when there are completions.
impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}
