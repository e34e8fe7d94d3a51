//! What all runs have in common.

use std::path::PathBuf;

use anyhow::Result;
use hostd::lab::Lab;

use crate::link::Link;

/// What all runs have in common.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setting {
    /// Between the hosts.
    pub link: Link,
    /// Memory channels; what each side does by itself if not given.
    pub streams: Option<u16>,
}

/// Writes the bundled guest where a VMM can read it.
pub fn kernel(lab: &Lab) -> Result<PathBuf> {
    let path = lab.directory().join("guest.elf");
    std::fs::write(&path, headroom_guest::IMAGE)?;
    Ok(path)
}
