//! One accepted request on its way through the ring.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

use io_uring::{opcode, squeue, types};

use super::request::{Status, Work, slice};
use crate::device::virtio::{Chain, Segment};
use crate::disk::{AlignedBuffer, SECTOR_BYTES};
use crate::memory::GuestRam;

/// Bytes that pass through a bounce buffer at once.
pub const BOUNCE_BYTES: usize = 128 * 1024;

/// What the ring is to do next for a request.
pub enum Step {
    /// Submit this entry.
    Submit(squeue::Entry),
    /// It needs a bounce buffer to go on.
    NeedsBounce,
    /// Answer the guest.
    Done(Status),
}

/// How the image wants to be used.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// Its descriptor.
    pub image: RawFd,
    /// Alignment in bytes that buffers need; 1 if the page cache is used.
    pub alignment: usize,
    /// Each write goes to stable storage, since the driver cannot flush (virtio 1.2, section 5.2.6.2).
    pub write_through: bool,
}

/// A request in one of the worker's slots. Its vectors are reused from request to request.
pub struct Transfer {
    /// Names the chain in the used ring.
    pub head: u16,
    work: Work,
    data: Vec<Segment>,
    status: Option<Segment>,
    /// What the kernel was given last.
    iovecs: Vec<libc::iovec>,
    bounce: Option<AlignedBuffer>,
    bounce_wanted: bool,
    /// Bytes in the bounce buffer that are under way.
    bounced: usize,
    length: usize,
    done: usize,
    range: usize,
    /// The file system cannot do what was tried first: try the second way.
    second_way: bool,
}

// SAFETY: the iovecs point into guest RAM or the transfer's own bounce buffer; see `Segment`.
unsafe impl Send for Transfer {}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            head: 0,
            work: Work::Flush,
            data: Vec::new(),
            status: None,
            iovecs: Vec::new(),
            bounce: None,
            bounce_wanted: false,
            bounced: 0,
            length: 0,
            done: 0,
            range: 0,
            second_way: false,
        }
    }
}

impl Transfer {
    /// Begins a request; `data` is taken over, and a used vector left in its place.
    pub fn begin(&mut self, head: u16, work: Work, data: &mut Vec<Segment>, status: Segment, mode: Mode) {
        std::mem::swap(&mut self.data, data);
        self.head = head;
        self.work = work;
        self.status = Some(status);
        self.length = Chain::bytes(&self.data);
        (self.done, self.range, self.bounced, self.second_way) = (0, 0, 0, false);
        let aligned = |segment: &Segment| {
            (segment.host.as_ptr() as usize).is_multiple_of(mode.alignment)
                && segment.bytes.is_multiple_of(SECTOR_BYTES as usize)
        };
        self.bounce_wanted = mode.alignment > 1
            && matches!(self.work, Work::Read { .. } | Work::Write { .. })
            && !self.data.iter().all(aligned);
    }

    /// Byte ranges of the image that the request changes.
    pub fn for_each_change(&self, mut mark: impl FnMut(u64, u64)) {
        let mut range = |range: &Range<u64>| mark(range.start, range.end - range.start);
        match &self.work {
            Work::Read { .. } | Work::Flush => {}
            Work::Write { offset } => range(&(*offset..*offset + self.length as u64)),
            Work::Discard(ranges) => ranges.iter().for_each(range),
            Work::WriteZeroes(ranges) => ranges.iter().for_each(|(bytes, _)| range(bytes)),
        }
    }

    /// Byte ranges of the image that the request reads or changes.
    pub fn for_each_touched(&self, mut touch: impl FnMut(u64, u64)) {
        match &self.work {
            Work::Read { offset } => touch(*offset, self.length as u64),
            _ => self.for_each_change(touch),
        }
    }

    /// Waits until every page of the request's data is in memory, by reading a byte of each (post-copy). Otherwise the kernel
    /// would wait for them in the middle of the request, holding the file's lock, while a block that has arrived waits for that
    /// lock, in the thread that would have brought the page.
    pub fn touch(&self) {
        const PAGE: usize = migration::guest::PAGE_BYTES as usize;
        for segment in &self.data {
            let mut at = 0;
            while at < segment.bytes {
                // SAFETY: `at` is inside of the segment, which lies in mapped guest RAM; the value is not used.
                let byte = unsafe { segment.host.as_ptr().add(at) };
                // SAFETY: as above.
                unsafe { byte.read_volatile() };
                at += PAGE - byte as usize % PAGE;
            }
        }
    }

    /// Bytes (read, written) by the finished request.
    pub fn volume(&self) -> (u64, u64) {
        match self.work {
            Work::Read { .. } => (self.done as u64, 0),
            Work::Write { .. } => (0, self.done as u64),
            Work::Flush | Work::Discard(_) | Work::WriteZeroes(_) => (0, 0),
        }
    }

    /// Whether it waits for a bounce buffer that it does not hold.
    fn lacks_bounce(&self) -> bool {
        self.bounce_wanted && self.bounce.is_none() && self.done < self.length
    }

    /// Lends it a bounce buffer of [`BOUNCE_BYTES`].
    pub fn lend(&mut self, buffer: AlignedBuffer) {
        self.bounce = Some(buffer);
    }

    /// What is to be done next.
    pub fn next(&mut self, mode: Mode) -> Step {
        let file = types::Fd(mode.image);
        match &self.work {
            Work::Flush if self.range > 0 => Step::Done(Status::Ok),
            Work::Flush => Step::Submit(opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build()),
            Work::Discard(ranges) => match ranges.get(self.range) {
                Some(range) => {
                    Step::Submit(fallocate(file, range, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE))
                }
                None => Step::Done(Status::Ok),
            },
            Work::WriteZeroes(ranges) => match ranges.get(self.range) {
                Some((range, unmap)) => {
                    // Without the permission to give space back, zeroed space stays allocated.
                    let punch = *unmap || self.second_way;
                    let way = if punch { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
                    Step::Submit(fallocate(file, range, way | libc::FALLOC_FL_KEEP_SIZE))
                }
                None => Step::Done(Status::Ok),
            },
            Work::Read { .. } | Work::Write { .. } if self.done >= self.length => Step::Done(Status::Ok),
            Work::Read { .. } | Work::Write { .. } if self.lacks_bounce() => Step::NeedsBounce,
            Work::Read { offset } => {
                let at = *offset + self.done as u64;
                self.fill_iovecs();
                let (start, count) = (self.iovecs.as_ptr(), self.iovecs.len() as u32);
                Step::Submit(opcode::Readv::new(file, start, count).offset(at).build())
            }
            Work::Write { offset } => {
                let at = *offset + self.done as u64;
                self.fill_iovecs();
                let (start, count) = (self.iovecs.as_ptr(), self.iovecs.len() as u32);
                let flags = if mode.write_through { libc::RWF_DSYNC } else { 0 };
                Step::Submit(opcode::Writev::new(file, start, count).offset(at).rw_flags(flags).build())
            }
        }
    }

    /// Points the kernel to what is left of the data, or to the bounce buffer.
    fn fill_iovecs(&mut self) {
        self.iovecs.clear();
        if let Some(bounce) = &mut self.bounce {
            self.bounced = (self.length - self.done).min(BOUNCE_BYTES);
            if matches!(self.work, Work::Write { .. }) {
                Chain::copy_out(&self.data, self.done, &mut bounce.bytes_mut()[..self.bounced]);
            }
            self.iovecs.push(libc::iovec { iov_base: bounce.as_mut_ptr().cast(), iov_len: self.bounced });
        } else {
            let mut rest = Vec::new();
            let segments = if self.done == 0 {
                &self.data
            } else {
                slice(&self.data, self.done, usize::MAX, &mut rest);
                &rest
            };
            self.iovecs.extend(segments.iter().map(Segment::iovec));
        }
    }

    /// Takes the kernel's answer to the last entry. `None`: [`Transfer::next`] tells how to go on.
    pub fn advance(&mut self, result: i32, ram: &GuestRam, mode: Mode) -> Option<Status> {
        match (&self.work, usize::try_from(result)) {
            (Work::Flush | Work::Discard(_) | Work::WriteZeroes(_), Ok(_)) => {
                self.range += 1;
                None
            }
            (Work::Read { .. } | Work::Write { .. }, Ok(0)) => {
                tracing::error!("a disk image ends early: was it truncated while the machine runs?");
                Some(Status::Error)
            }
            (Work::Read { .. } | Work::Write { .. }, Ok(moved)) => {
                if let (Work::Read { .. }, Some(bounce)) = (&self.work, &self.bounce) {
                    Chain::copy_in(ram, &self.data, self.done, &bounce.bytes()[..moved.min(self.bounced)]);
                }
                self.done += moved;
                None
            }
            (_, Err(_)) => self.recover(-result, mode),
        }
    }

    fn recover(&mut self, error: i32, mode: Mode) -> Option<Status> {
        match (&self.work, error) {
            (_, libc::EAGAIN | libc::EINTR) => None,
            // The file system is stricter about alignment than it said.
            (Work::Read { .. } | Work::Write { .. }, libc::EINVAL) if mode.alignment > 1 && !self.bounce_wanted => {
                self.bounce_wanted = true;
                None
            }
            // A hint that cannot be followed. EINVAL: a block device does it to its own, larger blocks only.
            (Work::Discard(_), libc::EOPNOTSUPP | libc::EINVAL) => Some(Status::Ok),
            (Work::WriteZeroes(ranges), libc::EOPNOTSUPP | libc::EINVAL) => {
                let unmap = ranges.get(self.range).is_some_and(|(_, unmap)| *unmap);
                if self.second_way || unmap {
                    return Some(Status::Unsupported);
                }
                self.second_way = true;
                None
            }
            _ => {
                let error = io::Error::from_raw_os_error(error);
                tracing::error!(%error, work = ?self.work, bytes = self.length, "a disk image failed a request of the guest");
                Some(Status::Error)
            }
        }
    }

    /// Ends the request: marks guest memory that the kernel wrote, and writes the status byte. Returns what the used ring
    /// shall say was written, and the bounce buffer, if it had one.
    pub fn finish(&mut self, status: Status, ram: &GuestRam) -> (u32, Option<AlignedBuffer>) {
        let mut written = 1;
        if matches!(self.work, Work::Read { .. }) {
            // All of it, after an error too: the kernel may have written more than it says.
            Chain::mark_dirty(ram, &self.data, self.length);
            written += self.done as u32;
        }
        if let Some(segment) = self.status.take() {
            segment.write(ram, &[status as u8]);
        }
        self.data.clear();
        self.iovecs.clear();
        (written, self.bounce.take())
    }
}

fn fallocate(file: types::Fd, range: &Range<u64>, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(file, range.end - range.start).offset(range.start).mode(mode).build()
}
