//! Disks on block devices: loop devices here.

use std::path::Path;
use std::process::Command;

use super::*;
use crate::disk::DiskError;

/// A loop device over a file, detached when dropped.
struct Loop {
    directory: Option<TempDir>,
    file: PathBuf,
    device: PathBuf,
}

impl Loop {
    /// With blocks of `block` bytes; `None` where none can be made.
    fn new(block: &str) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let file = image(&directory);
        let device = losetup(&["--show", "--sector-size", block, "--find", file.to_str().unwrap()])?;
        Some(Self { directory: Some(directory), file, device: device.trim().into() })
    }

    fn rig(&mut self, features: u64) -> Rig {
        let disk = disk(&self.device, false);
        Rig::over(features, self.directory.take().unwrap(), self.file.clone(), disk)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        losetup(&["--detach", self.device.to_str().unwrap()]);
    }
}

fn losetup(arguments: &[&str]) -> Option<String> {
    let output = Command::new("losetup").args(arguments).output();
    match output {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        other => {
            println!("skipped: no loop device: {other:?}");
            None
        }
    }
}

fn allocated(file: &Path) -> u64 {
    std::fs::metadata(file).unwrap().blocks() * 512
}

/// Range of a discard or write-zeroes request.
fn range(sector: u64, sectors: u32, unmap: bool) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &u32::from(unmap).to_le_bytes()].concat()
}

#[test]
fn a_block_device_is_read_written_flushed_and_given_back() {
    for block in ["512", "4096"] {
        let Some(mut device) = Loop::new(block) else { return };
        let mut rig = device.rig(ALL);
        assert_eq!(rig.block.disk().image().bytes(), DISK_BYTES, "its capacity");
        let data = pattern(1 << 20, 5);
        assert_eq!(rig.write(2048, &data), 0);
        assert_eq!(rig.request(4, 0, &[]), (0, 1));
        assert!(rig.content(1 << 20, data.len()) == data, "what was flushed is in the file behind the device");
        assert_eq!(rig.request(0, 2048, &[(BUFFER, 4096, true)]), (0, 4097));
        assert!(rig.driver.get(BUFFER, 4096) == data[..4096]);
        // One sector, whatever the device's own blocks are.
        assert_eq!(rig.write(2049, &pattern(512, 9)), 0);
        assert_eq!(rig.request(0, 2048, &[(BUFFER, 1536, true)]), (0, 1537));
        let expected = [&data[..512], &pattern(512, 9), &data[1024..1536]].concat();
        assert!(rig.driver.get(BUFFER, 1536) == expected);

        let before = allocated(&rig.path);
        rig.driver.put(BUFFER, &range(2048, 2048, false));
        assert_eq!(rig.request(11, 0, &[(BUFFER, 16, false)]).0, 0);
        assert!(allocated(&rig.path) < before, "discarded space goes back to the file system");
        assert_eq!(rig.write(4096, &data), 0);
        rig.driver.put(BUFFER, &range(4096, 64, false));
        assert_eq!(rig.request(13, 0, &[(BUFFER, 16, false)]).0, 0);
        assert_eq!(rig.request(0, 4096, &[(BUFFER, 33_280, true)]).0, 0);
        let back = rig.driver.get(BUFFER, 33_280);
        assert!(back[..32_768].iter().all(|&byte| byte == 0) && back[32_768..] == data[32_768..33_280]);
    }
}

/// A driver knows sectors of 512 bytes. What the device can only do to its own larger blocks is not done, and is no error.
#[test]
fn parts_of_a_devices_blocks_are_left_alone() {
    let Some(mut device) = Loop::new("4096") else { return };
    let mut rig = device.rig(ALL);
    assert_eq!(rig.write(0, &pattern(8192, 5)), 0);
    rig.driver.put(BUFFER, &range(1, 3, false));
    assert_eq!(rig.request(11, 0, &[(BUFFER, 16, false)]).0, 0, "a discard is a hint");
    let (zeroed, _) = rig.request(13, 0, &[(BUFFER, 16, false)]);
    assert_eq!(zeroed, 2, "unsupported: a driver then writes zeroes itself");
    assert_eq!(rig.request(0, 0, &[(BUFFER, 8192, true)]).0, 0);
    assert!(rig.driver.get(BUFFER, 8192) == pattern(8192, 5));
}

#[test]
fn a_block_device_grows_when_it_has_been_enlarged() {
    let Some(mut device) = Loop::new("512") else { return };
    let mut rig = device.rig(ALL);
    let refused = rig.block.grow(2 * DISK_BYTES).unwrap_err();
    assert!(matches!(refused, DiskError::Unlike { found: DISK_BYTES, .. }), "{refused}");
    File::options().write(true).open(&rig.path).unwrap().set_len(2 * DISK_BYTES).unwrap();
    losetup(&["--set-capacity", device.device.to_str().unwrap()]).unwrap();
    rig.block.grow(2 * DISK_BYTES).unwrap();
    assert_eq!(rig.write(2 * DISK_BYTES / 512 - 1, &pattern(512, 1)), 0);
}
