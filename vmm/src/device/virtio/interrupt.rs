//! The interrupt line of a device and the status bits that explain it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::device::Line;

/// A used ring has new entries (virtio 1.2, section 4.2.2, `InterruptStatus`).
const USED_BUFFER: u32 = 1;
/// The configuration space or the device status has changed.
const CONFIG_CHANGE: u32 = 2;

/// Shared by the registers (vCPU) and the worker.
pub struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicBool,
    generation: AtomicU32,
    line: Arc<dyn Line>,
}

impl Interrupt {
    /// Nothing pending.
    pub fn new(line: Arc<dyn Line>) -> Self {
        Self { status: AtomicU32::new(0), needs_reset: AtomicBool::new(false), generation: AtomicU32::new(0), line }
    }

    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        self.pulse();
    }

    fn pulse(&self) {
        if let Err(error) = self.line.pulse() {
            tracing::warn!(%error, "cannot raise an interrupt");
        }
    }

    /// Tells the driver of used buffers.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.note_config_change();
        self.pulse();
    }

    /// The configuration space has changed, and the driver hears of it with the next interrupt.
    pub fn note_config_change(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.status.fetch_or(CONFIG_CHANGE, Ordering::SeqCst);
    }

    /// Tells the driver that the device has given up (virtio 1.2, section 2.1.2).
    pub fn mark_needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            self.raise(CONFIG_CHANGE);
        }
    }

    /// Whether the device has given up.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// `InterruptStatus`.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// `InterruptACK`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// `ConfigGeneration`.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Back to the beginning. The generation goes on: a driver that compares it must see a difference.
    pub fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// As it was saved.
    pub fn restore(&self, status: u32, needs_reset: bool, generation: u32) {
        self.status.store(status & (USED_BUFFER | CONFIG_CHANGE), Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
    }

    /// Raises the line again for what the driver has not acknowledged. An interrupt too many is harmless; one too few
    /// would leave the driver waiting.
    pub fn reassert(&self) {
        if self.status() != 0 {
            self.pulse();
        }
    }
}
