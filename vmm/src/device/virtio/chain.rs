//! One request of the guest: a descriptor chain, checked and resolved to host memory.

use std::ptr::NonNull;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::memory::GuestRam;

/// A run of guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Guest-physical address.
    pub gpa: u64,
    /// Host address.
    pub host: NonNull<u8>,
    /// Length in bytes.
    pub bytes: usize,
}

// SAFETY: the address lies in guest RAM, which every owner of segments keeps mapped by owning a clone of `GuestRam`; guest
// RAM may be accessed from any thread, by volatile accesses or by the kernel.
unsafe impl Send for Segment {}

impl Segment {
    /// Resolves guest memory. Appends to `into`: more than one segment if the range spans regions of RAM. False, and what
    /// was appended means nothing, if a byte of it is not RAM.
    pub fn resolve(ram: &GuestRam, gpa: u64, bytes: usize, into: &mut Vec<Self>) -> bool {
        let mut address = gpa;
        for slice in ram.get_slices(GuestAddress(gpa), bytes) {
            let Ok(slice) = slice else { return false };
            let Some(host) = NonNull::new(slice.ptr_guard_mut().as_ptr()) else { return false };
            into.push(Self { gpa: address, host, bytes: slice.len() });
            address += slice.len() as u64;
        }
        true
    }

    /// The part of it that remains after `skip` bytes, at most `limit` long.
    pub fn part(&self, skip: usize, limit: usize) -> Self {
        let skip = skip.min(self.bytes);
        let bytes = (self.bytes - skip).min(limit);
        // SAFETY: `skip` is at most the length of the segment, which lies in one mapping.
        Self { gpa: self.gpa + skip as u64, host: unsafe { self.host.add(skip) }, bytes }
    }

    /// As the kernel takes it.
    pub fn iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.host.as_ptr().cast(), iov_len: self.bytes }
    }

    /// Marks its first `bytes` bytes as written: for writes that the kernel made behind `vm_memory`'s back.
    pub fn mark_dirty(&self, ram: &GuestRam, bytes: usize) {
        for slice in ram.get_slices(GuestAddress(self.gpa), bytes.min(self.bytes)).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }

    /// Copies guest memory out; returns how many bytes fit.
    pub fn read(&self, into: &mut [u8]) -> usize {
        let bytes = self.bytes.min(into.len());
        // SAFETY: the segment is mapped and `bytes` long at least; guest memory and a Rust slice do not overlap. A guest
        // that writes meanwhile makes the copy a mixture, which callers validate as they would anything of a guest.
        unsafe { std::ptr::copy_nonoverlapping(self.host.as_ptr(), into.as_mut_ptr(), bytes) };
        bytes
    }

    /// Copies into guest memory and marks it; returns how many bytes fit.
    pub fn write(&self, ram: &GuestRam, from: &[u8]) -> usize {
        let bytes = self.bytes.min(from.len());
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.host.as_ptr(), bytes) };
        self.mark_dirty(ram, bytes);
        bytes
    }
}

/// A checked descriptor chain: all readable segments come before all writable ones (virtio 1.2, section 2.7.4.2).
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// Index of its first descriptor: names it in the used ring.
    pub head: u16,
    /// What the device may read.
    pub readable: Vec<Segment>,
    /// What the device may write.
    pub writable: Vec<Segment>,
}

impl Chain {
    /// Total length of segments in bytes.
    pub fn bytes(segments: &[Segment]) -> usize {
        segments.iter().map(|segment| segment.bytes).sum()
    }

    /// Copies the first bytes of `segments` out; returns how many there were.
    pub fn copy_out(segments: &[Segment], mut skip: usize, into: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in segments {
            if done == into.len() {
                break;
            }
            let part = segment.part(skip, usize::MAX);
            skip -= skip.min(segment.bytes);
            done += part.read(&mut into[done..]);
        }
        done
    }

    /// Copies bytes into `segments` after skipping some; returns how many found room.
    pub fn copy_in(ram: &GuestRam, segments: &[Segment], mut skip: usize, from: &[u8]) -> usize {
        let mut done = 0;
        for segment in segments {
            if done == from.len() {
                break;
            }
            let part = segment.part(skip, usize::MAX);
            skip -= skip.min(segment.bytes);
            done += part.write(ram, &from[done..]);
        }
        done
    }

    /// Marks the first `bytes` bytes of `segments` as written.
    pub fn mark_dirty(ram: &GuestRam, segments: &[Segment], mut bytes: usize) {
        for segment in segments {
            if bytes == 0 {
                break;
            }
            segment.mark_dirty(ram, bytes);
            bytes -= bytes.min(segment.bytes);
        }
    }
}
