//! A device's interrupt line.

use std::io;

/// An edge-triggered interrupt line, as a device sees it.
pub trait Line: Send + Sync {
    /// Raises the line and lowers it again.
    ///
    /// # Errors
    ///
    /// What the kernel says; the interrupt is lost then.
    fn pulse(&self) -> io::Result<()>;
}

/// In tests the line ends in a descriptor that can be waited on.
#[cfg(test)]
impl Line for vmm_sys_util::eventfd::EventFd {
    fn pulse(&self) -> io::Result<()> {
        self.write(1)
    }
}
