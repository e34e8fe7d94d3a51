//! Whether a block device of this host is one of another host: by what the kernel says of it.
//!
//! Nothing can be put beside a device to show that it is the same one, as is done for files ([`super::shared`]): all of it belongs to the guest.
//! What is left is its name in the world: the identifier of a SCSI or NVMe volume, the device-mapper's of a logical or multipath
//! volume, the serial number of a virtio disk. Two daemons below one kernel, which have the same devices, compare their numbers.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};

/// Longest identifier that is read, in bytes: SCSI's are the longest, with some 80.
const TEXT_MAX: usize = 256;

/// Unit of `size` in sysfs, whatever the device's sectors are (Documentation/ABI/stable/sysfs-block).
const SECTOR_BYTES: u64 = 512;

/// Where the kernel says which device has which number.
const SYSFS: &str = "/sys/dev/block";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What tells one device from all others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Size in bytes.
    pub bytes: u64,
    /// Its name in the world, if it has one: kind and value, as in `wwid naa.6001405a7c1b2d3e`.
    pub name: Option<String>,
    /// The kernel that numbers it: this boot of it.
    pub kernel: String,
    /// Its number there, as `MAJOR:MINOR`.
    pub number: String,
}

/// What the kernel says of a device, as it says it.
#[derive(Clone, Debug, Default)]
struct Texts {
    size: String,
    /// SCSI: `device/wwid`.
    scsi: Option<String>,
    /// NVMe: `wwid`.
    nvme: Option<String>,
    /// `dm/uuid`.
    mapper: Option<String>,
    /// virtio: `serial`.
    serial: Option<String>,
}

impl Texts {
    fn read(folder: &Path) -> io::Result<Self> {
        let optional = |name: &str| text(&folder.join(name)).ok();
        Ok(Self {
            size: text(&folder.join("size"))?,
            scsi: optional("device/wwid"),
            nvme: optional("wwid"),
            mapper: optional("dm/uuid"),
            serial: optional("serial"),
        })
    }

    /// The device's name in the world. Of a logical or multipath volume that of the volume.
    fn name(&self) -> Option<String> {
        let kinds = [("dm", &self.mapper), ("wwid", &self.scsi), ("wwid", &self.nvme), ("serial", &self.serial)];
        let named = |(kind, value): (&str, &Option<String>)| {
            let value = value.as_deref()?.trim();
            let printable = value.bytes().all(|byte| (b' '..=b'~').contains(&byte));
            // Some devices have an identifier that says nothing: eui.0000000000000000.
            let digits = value.split_once('.').map_or(value, |(_, digits)| digits);
            let says_something = digits.bytes().any(|byte| byte.is_ascii_alphanumeric() && byte != b'0');
            (printable && says_something && value.len() < TEXT_MAX).then(|| format!("{kind} {value}"))
        };
        kinds.into_iter().find_map(named)
    }

    fn bytes(&self) -> Option<u64> {
        self.size.trim().parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)
    }
}

impl Identity {
    /// That of the device at `path`; `None` if it is no block device.
    ///
    /// # Errors
    ///
    /// If the path leads nowhere, or the kernel says nothing of the device.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        let metadata = path.metadata()?;
        if !metadata.file_type().is_block_device() {
            return Ok(None);
        }
        let number = format!("{}:{}", major(metadata.rdev()), minor(metadata.rdev()));
        let texts = Texts::read(&Path::new(SYSFS).join(&number))?;
        let bytes = texts.bytes().ok_or_else(|| io::Error::other("the kernel does not say its size"))?;
        let kernel = text(Path::new(BOOT_ID))?.trim().to_owned();
        Ok(Some(Self { bytes, name: texts.name(), kernel, number }))
    }

    /// Why `here` is not the device that `self` is at the source, and what to do; nothing if it is.
    pub fn differs(&self, here: &Self) -> Option<String> {
        if self.bytes != here.bytes {
            return Some(format!(
                "is another device than at the source: it has {} bytes, and that one {}",
                here.bytes, self.bytes
            ));
        }
        match (&self.name, &here.name) {
            (Some(there), Some(here)) if there == here => None,
            (Some(there), Some(here)) => Some(format!(
                "is another device than at the source: it is `{}`, and that one `{}`; give both hosts the same path for the same volume",
                here.escape_debug(),
                there.escape_debug()
            )),
            (None, None) if self.kernel == here.kernel && self.number == here.number => None,
            _ => Some(
                "cannot be told from other devices: it has no identifier (wwid, device-mapper uuid, serial) on both hosts; use a volume that has one, or create the machine without `shared`"
                    .to_owned(),
            ),
        }
    }
}

/// A short file of the kernel.
fn text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(TEXT_MAX as u64).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As these kinds of devices say it.
    fn texts(files: &[(&str, &str)]) -> Texts {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Texts::read(folder.path()).unwrap()
    }

    #[test]
    fn a_device_is_named_by_what_the_kernel_says() {
        let name = |file: &str, text: &str| texts(&[("size", "8\n"), (file, text)]).name();
        let iscsi = name("device/wwid", "naa.600140512c4c3ba2a6b4a93b2b5e4f0d\n");
        assert_eq!(iscsi.as_deref(), Some("wwid naa.600140512c4c3ba2a6b4a93b2b5e4f0d"));
        let ata = name("device/wwid", "t10.ATA     QEMU HARDDISK                           QM00001             \n");
        assert_eq!(ata.as_deref(), Some("wwid t10.ATA     QEMU HARDDISK                           QM00001"));
        assert_eq!(name("wwid", "eui.0025385b71b0a8e3\n").as_deref(), Some("wwid eui.0025385b71b0a8e3"));
        let logical = name("dm/uuid", "LVM-cXyJ3yVdUWpYrWfN1p3kC0m2eXzY1o5TqkU3b5vJzQHfD7e2\n");
        assert!(logical.is_some_and(|name| name.starts_with("dm LVM-cXyJ")));
        assert_eq!(name("serial", "vol-0f3e").as_deref(), Some("serial vol-0f3e"));
        for (file, text) in [
            ("wwid", "eui.0000000000000000\n"),
            ("serial", "\n"),
            ("dm/uuid", ""),
            ("device/wwid", "naa.6001\u{e9}\n"),
            ("serial", "0000"),
        ] {
            assert_eq!(name(file, text), None, "{file}: {text:?}");
        }
        assert_eq!(name("wwid", &"x".repeat(10_000)), None, "more than any has");
        // A multipath volume over a SCSI path is the volume.
        let both = texts(&[("size", "41943040\n"), ("dm/uuid", "mpath-36001\n"), ("device/wwid", "naa.6001\n")]);
        assert_eq!((both.name().as_deref(), both.bytes()), (Some("dm mpath-36001"), Some(20 << 30)));
        assert_eq!(texts(&[("size", "garbage\n")]).bytes(), None);
        assert_eq!(texts(&[("size", &u64::MAX.to_string())]).bytes(), None);
    }

    #[test]
    fn two_are_the_same_by_name_or_by_number_below_one_kernel() {
        let device = |name: Option<&str>, kernel: &str, number: &str| Identity {
            bytes: 4096,
            name: name.map(str::to_owned),
            kernel: kernel.to_owned(),
            number: number.to_owned(),
        };
        let named = device(Some("wwid naa.1"), "k1", "8:0");
        assert_eq!(named.differs(&device(Some("wwid naa.1"), "k2", "8:16")), None);
        let differs = |source: &Identity, here: &Identity| source.differs(here).unwrap_or_default();
        assert!(differs(&named, &device(Some("wwid naa.2"), "k1", "8:0")).contains("naa.2"));
        assert!(differs(&named, &device(None, "k2", "8:0")).contains("no identifier"));
        assert!(differs(&named, &Identity { bytes: 8192, ..named.clone() }).contains("8192 bytes"));
        let plain = device(None, "k1", "7:0");
        assert_eq!(plain.differs(&plain), None);
        assert!(differs(&plain, &device(None, "k1", "7:1")).contains("no identifier"));
        assert!(differs(&plain, &device(None, "k2", "7:0")).contains("no identifier"), "another host counts anew");
    }

    #[test]
    fn what_is_no_block_device_has_no_identity() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(Identity::read(file.path()).unwrap(), None);
        assert_eq!(Identity::read(Path::new("/dev/null")).unwrap(), None);
        assert!(Identity::read(Path::new("/nonexistent")).is_err());
    }
}
