//! Is there memory on this host for a machine that wants to come?

/// Kept free for the VMM itself and for what the kernel needs to serve it.
const RESERVE_BYTES: u64 = 64 << 20;

/// There is not.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "this host has {available_mib} MiB of memory available and the machine needs {needed_mib} MiB: free memory here, or choose another destination"
)]
pub struct NoRoom {
    needed_mib: u64,
    available_mib: u64,
}

/// Checks that `bytes` of guest memory fit into what the kernel says is available without swapping.
pub fn check(bytes: u64) -> Result<(), NoRoom> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available(&text) {
        Some(available) => compare(bytes, available),
        // Without the figure the allocation itself decides.
        None => Ok(()),
    }
}

fn compare(bytes: u64, available: u64) -> Result<(), NoRoom> {
    let needed = bytes.saturating_add(RESERVE_BYTES);
    if needed <= available { Ok(()) } else { Err(NoRoom { needed_mib: needed >> 20, available_mib: available >> 20 }) }
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_needs_its_memory_and_a_reserve() {
        let available = available("MemTotal: 9 kB\nMemAvailable:    1048576 kB\n").unwrap();
        assert_eq!(available, 1 << 30);
        assert_eq!(compare((1 << 30) - RESERVE_BYTES, available), Ok(()));
        let error = compare(1 << 30, available).unwrap_err();
        assert_eq!(error, NoRoom { needed_mib: 1088, available_mib: 1024 });
        assert!(check(1 << 50).unwrap_err().to_string().contains("choose another destination"));
    }
}
