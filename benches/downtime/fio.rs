//! What the disk does, by fio: the same sizes and depth as the migration's own reads and writes.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

const MIB: u64 = 256;

/// Bytes per second reading and writing a file in `directory`, direct, in blocks of 64 KiB, 32 in flight. `None` without fio.
pub fn rates(directory: &Path) -> Result<Option<(f64, f64)>> {
    if Command::new("fio").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        return Ok(None);
    }
    let file = directory.join("fio.raw");
    let one = |kind: &str| -> Result<f64> {
        let output = Command::new("fio")
            .arg(format!("--filename={}", file.display()))
            .args([format!("--rw={kind}"), format!("--size={MIB}m")])
            .args("--name=limit --bs=64k --iodepth=32 --ioengine=io_uring --direct=1 --output-format=json".split(' '))
            .output()
            .context("run fio")?;
        let report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("fio {kind}: {}", String::from_utf8_lossy(&output.stderr)))?;
        report["jobs"][0][kind]["bw_bytes"].as_f64().context("fio's report has no bandwidth")
    };
    let rates = one("write").and_then(|write| Ok((one("read")?, write)));
    let _ = std::fs::remove_file(&file);
    rates.map(Some)
}
