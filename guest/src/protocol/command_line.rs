//! The guest's command line: the words of a [`Workload`] and the devices that the VMM announces.

extern crate alloc;

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;
use core::str::FromStr;

use super::workload::Workload;

/// Devices and rejected words kept from one command line; more are ignored.
const WORDS_KEPT_MAX: usize = 32;

/// A virtio-mmio device as the VMM announces it: `virtio_mmio.device=4K@0xd0000000:5`, the form that Linux reads too
/// (Documentation/admin-guide/kernel-parameters, `virtio_mmio.device`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical address of its registers.
    pub base: u64,
    /// Bytes of its register window.
    pub size: u64,
    /// Global system interrupt: the input of the I/O APIC.
    pub gsi: u32,
}

impl FromStr for MmioDevice {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (size, rest) = text.split_once('@').ok_or(())?;
        let mut parts = rest.split(':');
        let base = number(parts.next().ok_or(())?).ok_or(())?;
        let gsi = parts.next().and_then(number).and_then(|gsi| u32::try_from(gsi).ok()).ok_or(())?;
        let (digits, unit) = match size.as_bytes().last() {
            Some(b'K' | b'k') => (&size[..size.len() - 1], 1 << 10),
            Some(b'M' | b'm') => (&size[..size.len() - 1], 1 << 20),
            _ => (size, 1),
        };
        let size = number(digits).and_then(|size| size.checked_mul(unit)).ok_or(())?;
        base.checked_add(size).ok_or(())?;
        Ok(Self { base, size, gsi })
    }
}

/// What a command line says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// What to do.
    pub workload: Workload,
    /// The announced devices in order: disks, networks, the balloon.
    pub devices: Vec<MmioDevice>,
    /// Known words whose value could not be read; the guest reports them and uses its defaults.
    pub rejected: Vec<String>,
}

impl CommandLine {
    /// Reads a command line. Unknown words are ignored (the same line may hold words for other kernels), a known word
    /// with a bad value is kept in `rejected`, the last of equal words counts.
    #[must_use]
    pub fn parse(line: &str) -> Self {
        let mut parsed = Self::default();
        for word in line.split_ascii_whitespace() {
            if let Some((key, value)) = word.split_once('=')
                && parsed.apply(key, value).is_none()
                && parsed.rejected.len() < WORDS_KEPT_MAX
            {
                parsed.rejected.push(word.to_owned());
            }
        }
        parsed.workload.clamp();
        parsed
    }

    /// Applies one word; `None` means that its value is bad.
    fn apply(&mut self, key: &str, value: &str) -> Option<()> {
        let workload = &mut self.workload;
        match key {
            "ip" => workload.ip = Some(value.parse().ok()?),
            "gw" => workload.gateway = Some(value.parse().ok()?),
            "sweep" => (workload.sweep_mib, workload.sweep_mib_per_second) = size_and_rate(value)?,
            "disk" => (workload.disk_mib, workload.disk_mib_per_second) = size_and_rate(value)?,
            "churn" => (workload.churn_mib, workload.churn_mib_per_second) = size_and_rate(value)?,
            "cpu" => workload.cpu_percent = value.parse().ok()?,
            "fill" => workload.fill_mib = value.parse().ok()?,
            "hb" => workload.heartbeat_ms = value.parse().ok()?,
            "virtio_mmio.device" => {
                let device = value.parse().ok()?;
                if self.devices.len() < WORDS_KEPT_MAX {
                    self.devices.push(device);
                }
            }
            _ => {}
        }
        Some(())
    }
}

/// `64:100` is 64 MiB at 100 MiB/s.
fn size_and_rate(text: &str) -> Option<(u32, u32)> {
    let (size, rate) = text.split_once(':')?;
    Some((size.parse().ok()?, rate.parse().ok()?))
}

/// A number in decimal, or in hexadecimal after `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) if !digits.starts_with('+') => u64::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None => text.parse().ok(),
    }
}
