//! Feature bits of every device (virtio 1.2, section 6).

/// Descriptors that point to a table of descriptors.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Notifications and interrupts only at an index that the other side asked for.
pub const EVENT_IDX: u64 = 1 << 29;
/// Not a legacy device.
pub const VERSION_1: u64 = 1 << 32;
/// What every device here offers.
pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
