//! What can go wrong does, and the machine keeps running at its source; then it is put right, and the same move works.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

mod before;
mod boundaries;
mod during;
mod processor;
mod relay;
mod retry;
mod storage;

use hostd::api::types::MigrationStage;
use tests::world::{Spec, World};

/// Ends a process as a crash would. Its number comes from the daemon that waits for it, so it cannot belong to another one.
fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// The move fails with an error that contains all of `expected`, and the machine goes on at `a1`.
fn refused(world: &World, spec: &Spec, expected: &[&str]) {
    let error = match world.start_migration(&spec.name, "a1", "b1", None) {
        Err(error) => error.to_string(),
        Ok(migration) => {
            let migration = world.wait_migration("a1", &migration.id);
            assert_eq!(migration.stage, MigrationStage::Failed, "{migration:?}");
            migration.error.expect("why it failed")
        }
    };
    for part in expected {
        assert!(error.contains(part), "`{part}` is not in the error: {error}");
    }
    assert_eq!(world.machines_on("a1"), std::slice::from_ref(&spec.name));
    assert_eq!(world.machines_on("b1"), Vec::<String>::new());
    let files = std::fs::read_dir(world.host("b1").directory().join("run/machines"));
    assert_eq!(files.map_or(0, Iterator::count), 0, "files are left at the destination");
    world.check_oracles(spec);
}
