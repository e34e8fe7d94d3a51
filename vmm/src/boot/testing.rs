//! Tiny kernels for tests.

/// Where [`kernel`] loads its code.
pub(crate) const LOAD_ADDRESS: u64 = 0x20_0000;

/// A PVH kernel of 32-bit machine code.
pub(crate) fn kernel(code: &[u8]) -> Vec<u8> {
    let mut elf = elf_of(LOAD_ADDRESS, code.len() as u64);
    let offset = elf.len() as u64;
    elf[64 + 8..64 + 16].copy_from_slice(&offset.to_le_bytes());
    elf[64 + 32..64 + 40].copy_from_slice(&(code.len() as u64).to_le_bytes());
    elf.extend_from_slice(code);
    elf
}

/// An ELF with a loadable segment of `bytes` bytes at `address`, and a PVH note that points there (ELF-64 object file format;
/// Xen `docs/misc/pvh.pandoc`).
pub(crate) fn elf_of(address: u64, bytes: u64) -> Vec<u8> {
    let mut elf = vec![0u8; 64 + 2 * 56 + 20];
    elf[..20].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0]);
    let mut put = |offset: usize, value: &[u8]| elf[offset..offset + value.len()].copy_from_slice(value);
    put(20, &1u32.to_le_bytes());
    put(24, &address.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &[56, 0, 2, 0]);
    put(64, &1u32.to_le_bytes());
    put(64 + 24, &address.to_le_bytes());
    put(64 + 32, &16u64.to_le_bytes());
    put(64 + 40, &bytes.to_le_bytes());
    put(120, &4u32.to_le_bytes());
    put(120 + 8, &176u64.to_le_bytes());
    put(120 + 32, &20u64.to_le_bytes());
    put(176, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
    put(192, &(address as u32).to_le_bytes());
    elf
}
