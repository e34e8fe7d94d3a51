//! ICMP echo, by the system's `ping`.

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Sends echo requests until one is answered. To be called inside the namespace that is to ask.
///
/// # Errors
/// When none was answered in time, or there is no `ping`.
pub fn wait(address: Ipv4Addr, deadline: Duration) -> Result<Duration, String> {
    let start = Instant::now();
    while start.elapsed() < deadline {
        // `Command` starts its child from this thread, and so in its namespace.
        let status = Command::new("ping")
            .args(["-n", "-q", "-c", "1", "-W", "1", &address.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map_err(|error| format!("ping (Debian's package iputils-ping) cannot be started: {error}"))?;
        if status.success() {
            return Ok(start.elapsed());
        }
    }
    Err(format!("{address} did not answer ping within {deadline:?}"))
}
