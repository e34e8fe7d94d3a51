//! Guest memory: one memfd, mapped shared, in one or two regions.

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// Guest RAM as devices see it. Writes through it mark the bitmap, so that a migration learns of pages that devices wrote;
/// whatever writes behind its back (io_uring, a kernel ring) marks them itself. Cheap to clone.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;
