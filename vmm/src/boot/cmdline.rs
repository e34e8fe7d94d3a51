//! The kernel command line.

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::kvm::irq::FIRST_VIRTIO_GSI;
use crate::memory::GuestRam;

/// Linux keeps 2048 bytes with the final zero (`COMMAND_LINE_SIZE`) and silently cuts what is longer.
pub const MAX_CMDLINE_BYTES: usize = 2047;

/// Where it lies in guest memory.
pub(super) const ADDRESS: u64 = 0x2_0000;

/// Words that announce `count` virtio-mmio devices (kernel parameter `virtio_mmio.device=`), each with a leading space.
pub fn virtio_words(count: usize) -> String {
    (0..count).map(|index| virtio_word(index as u64)).collect()
}

fn virtio_word(index: u64) -> String {
    let (address, gsi) = (crate::builder::virtio_window(index).start, u64::from(FIRST_VIRTIO_GSI) + index);
    format!(" virtio_mmio.device=4K@{address:#x}:{gsi}")
}

pub(super) fn write(ram: &GuestRam, cmdline: &str) -> Result<(), BootError> {
    let bytes = cmdline.as_bytes();
    if bytes.len() > MAX_CMDLINE_BYTES {
        return Err(BootError::CmdlineTooLong { length: bytes.len() });
    }
    if let Some(position) = bytes.iter().position(|byte| !matches!(byte, b' '..=b'~' | b'\t')) {
        return Err(BootError::CmdlineCharacter(position));
    }
    ram.write_slice(bytes, GuestAddress(ADDRESS))?;
    Ok(ram.write_obj(0u8, GuestAddress(ADDRESS + bytes.len() as u64))?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn devices_are_announced_in_order() {
        assert_eq!(super::virtio_words(2), " virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6");
    }
}
