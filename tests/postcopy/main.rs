//! Post-copy of running machines between two hosts, by their daemons.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod cable;
mod falls_over;
mod lost;
mod restart;

use hostd::api::types::{Migration, MigrationLimits, Phase};
use migration::policy::MigrationMode;
use tests::world::{Spec, World};

/// Writes a word into each page of 48 MiB several times a second, and to its disk.
fn storm(name: &str) -> Spec {
    let mut spec = Spec::busy(name, 0);
    spec.memory_mib = 160;
    spec.workload.sweep_mib = 48;
    spec.workload.sweep_mib_per_second = 400;
    spec
}

fn limits(mode: MigrationMode, mib_per_second: u64) -> Option<MigrationLimits> {
    let bandwidth_bytes_per_second = Some(mib_per_second << 20);
    Some(MigrationLimits { mode, bandwidth_bytes_per_second, ..MigrationLimits::default() })
}

/// The migration, once its source is in post-copy.
fn in_postcopy(world: &World, id: &str) -> Migration {
    world.wait("post-copy", || {
        let migration = world.ask("a1", async |client| client.migration(id).await).ok()?;
        assert!(!migration.stage.ended(), "it ended before it could be disturbed: {migration:?}");
        let there = migration.progress.as_ref().is_some_and(|progress| progress.phase == Phase::Postcopy);
        there.then_some(migration)
    })
}
