//! Machines whose record cannot be stored stay what they were.

use super::*;
use crate::api::types::Capacity;
use crate::metrics::room::tests::record;
use crate::store::testing::{Disk, store};

fn machines(folder: &std::path::Path, disk: &Disk) -> Machines {
    let pem = |name: &str| folder.join(name);
    let config = serde_json::json!({
        "host": "a1", "pool": "a", "run_dir": folder.join("run"), "state_dir": folder.join("state"),
        "socket": folder.join("hostd.sock"), "listen": "127.0.0.1:1", "migration_address": "127.0.0.1",
        "tls": {"ca": pem("ca"), "certificate": pem("certificate"), "key": pem("key")}
    });
    let config: HostConfig = serde_json::from_value(config).unwrap();
    let capacity = Capacity { memory_mib: 1000.0, ..Capacity::default() };
    let room = Room::new(capacity, Some(1000.0), config.images_dir());
    Machines::new(Arc::new(config), store(disk), room)
}

#[tokio::test]
async fn what_cannot_be_stored_does_not_begin() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), Disk::default());
    let machines = machines(folder.path(), &disk);
    let entry = machines.enter(record(16, 1), None).unwrap();
    machines.save(&entry).unwrap();
    disk.fill();
    machines.begin_migration("vm", "mig-1").unwrap_err();
    // It has no process here, and so does not go on either.
    assert_eq!((entry.status(), entry.record().migration), (MachineStatus::Stopped, None));
    machines.delete("vm").await.unwrap_err();
    assert_eq!(entry.status(), MachineStatus::Stopped);
    disk.make_room();
    machines.delete("vm").await.unwrap();
    assert!(machines.all().is_empty());
}

#[tokio::test]
async fn a_name_that_is_taken_is_told_and_not_the_image_of_who_has_it() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), Disk::default());
    let machines = machines(folder.path(), &disk);
    machines.enter(record(16, 1), None).unwrap();
    let images = machines.inner.config.machine_state_dir("vm");
    std::fs::create_dir_all(&images).unwrap();
    std::fs::write(images.join("d.raw"), b"its disk").unwrap();
    let again = r#"{"name": "vm", "memory_mib": 16, "disks": [{"id": "d", "size_mib": 1}]}"#;
    let refused = machines.create(&serde_json::from_str(again).unwrap()).await.unwrap_err();
    assert!(matches!(refused, MachineError::Exists(_)), "{refused}");
}
