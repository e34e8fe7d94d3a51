//! What the guest does while it moves.

use clap::ValueEnum;
use headroom_guest::Workload;
use migration::policy::MigrationMode;
use serde::Serialize;

/// RAM of the machine in MiB.
pub const MEMORY_MIB: u64 = 1024;

/// Memory that holds something, in MiB.
pub const FILLED_MIB: u32 = 512;

/// Size of the disk in the scenarios that have one, in MiB.
pub const DISK_MIB: u64 = 256;

/// Downtime allowed in milliseconds, to ours and to the peer: less demand on one would let it stop earlier, with less total
/// time and a longer gap.
pub const DOWNTIME_LIMIT_MS: u64 = 100;

/// One workload; all have 1 GiB of RAM of which 512 MiB are filled, and one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scenario {
    /// Nothing but the heartbeat.
    Idle,
    /// One word in each page of 100 MiB, at 100 MiB/s.
    Dirty100,
    /// One word in each page of 400 MiB, at 512 MiB/s.
    Dirty512,
    /// `dirty512`, moved by post-copy after one round.
    Postcopy,
    /// A disk of 256 MiB, half of it written, while the guest writes 16 MiB/s.
    Disk,
    /// `dirty100` and `disk` together.
    Mixed,
}

impl Scenario {
    /// Every scenario.
    pub const ALL: [Self; 6] = [Self::Idle, Self::Dirty100, Self::Dirty512, Self::Postcopy, Self::Disk, Self::Mixed];

    /// What the guest is told.
    pub fn workload(self) -> Workload {
        let (sweep_mib, sweep_mib_per_second) = match self {
            Self::Idle | Self::Disk => (0, 0),
            Self::Dirty100 | Self::Mixed => (100, 100),
            Self::Dirty512 | Self::Postcopy => (400, 512),
        };
        let (disk_mib, disk_mib_per_second) = if self.has_disk() { (128, 16) } else { (0, 0) };
        Workload {
            fill_mib: FILLED_MIB - sweep_mib,
            sweep_mib,
            sweep_mib_per_second,
            disk_mib,
            disk_mib_per_second,
            ..Workload::default()
        }
    }

    /// Whether the machine has a disk that must move with it.
    pub fn has_disk(self) -> bool {
        matches!(self, Self::Disk | Self::Mixed)
    }

    /// How the machine is to move.
    pub fn mode(self) -> MigrationMode {
        if self == Self::Postcopy { MigrationMode::Postcopy } else { MigrationMode::Precopy }
    }

    /// Whether the peer does the same work here: QEMU moves no disk without a second protocol beside the migration.
    pub fn has_peer(self) -> bool {
        !self.has_disk()
    }
}
