//! The MP table: processors and interrupt wiring for kernels that have no ACPI (Intel MultiProcessor Specification 1.4).

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use super::memmap::LOW_RAM_END;
use crate::kvm::irq::LAST_GSI;
use crate::memory::GuestRam;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// Version of KVM's LAPIC and IOAPIC.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;

const INTERRUPT: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;

/// All local APICs.
const EVERY: u8 = 0xff;

/// Writes the floating pointer at the end of conventional memory, where kernels look for it, and the table behind it.
pub(super) fn write(ram: &GuestRam, vcpus: u16) -> Result<(), BootError> {
    let table = table(vcpus.min(u16::from(u8::MAX) - 1) as u8);
    let mut pointer = [0u8; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(LOW_RAM_END as u32 + 16).to_le_bytes());
    pointer[8..10].copy_from_slice(&[1, 4]);
    pointer[10] = checksum(&pointer);
    ram.write_slice(&pointer, GuestAddress(LOW_RAM_END))?;
    Ok(ram.write_slice(&table, GuestAddress(LOW_RAM_END + 16))?)
}

fn table(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        let mut processor = [0u8; 20];
        processor[..4].copy_from_slice(&[0, id, LOCAL_APIC_VERSION, flags]);
        processor[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        processor[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        add(&processor);
    }
    add(b"\x01\x00ISA   ");
    let [a, b, c, d] = IO_APIC.to_le_bytes();
    add(&[2, io_apic_id, IO_APIC_VERSION, ENABLED, a, b, c, d]);
    // KVM wires GSI n to pin n; polarity and trigger mode are those of the bus: high, edge.
    for gsi in 0..=LAST_GSI as u8 {
        add(&[3, INTERRUPT, 0, 0, 0, gsi, io_apic_id, gsi]);
    }
    add(&[4, EXTERNAL, 0, 0, 0, 0, 0, 0]);
    add(&[4, NMI, 0, 0, 0, 0, EVERY, 1]);

    let mut table = vec![0u8; 44];
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    table[6] = 4;
    table[8..16].copy_from_slice(b"HEADROOM");
    table[16..28].copy_from_slice(b"VMM         ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_sub(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_sums_to_zero_and_fits() {
        for vcpus in [1, 2, 64] {
            let table = table(vcpus);
            assert_eq!(table.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(u16::from_le_bytes([table[34], table[35]]), u16::from(vcpus) + 28);
            // From the end of conventional memory to the video memory at 640 KiB and, for many vCPUs, into its hole.
            assert!(LOW_RAM_END + 16 + (table.len() as u64) < super::super::KERNEL_START);
        }
    }
}
