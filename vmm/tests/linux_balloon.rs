//! Linux's own balloon driver, in the small Linux of the tests: it inflates, reports, hints to a migration, and goes on after it.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Lab, Vmm, listen, ready, sending, until};
use migration::report::Outcome;
use migration::testing::Authority;
use serde_json::json;
use vmm::api::BalloonInfo;
use vmm::config::MigrationLimits;

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 256;
/// It boots in emulated ring 0 where KVM has neither VMX nor SVM, which takes half a minute on a quiet machine.
const BOOT: Duration = Duration::from_secs(240);
const PATIENCE: Duration = Duration::from_secs(120);

/// As in `tests/boot/linux.rs`, which says what for.
const COMMAND_LINE: &str = "console=ttyS0 earlyprintk=ttyS0 noxsave nopti mitigations=off clearcpuid=308,295,151,141 \
                            tsc=reliable random.trust_cpu=on no_timer_check lpj=5000000 8250.nr_uarts=1 root=/dev/vdz rootwait";

/// The kernel that `tests/linux/build.sh` made, or the one that `HEADROOM_LINUX` names.
fn kernel() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("HEADROOM_LINUX") {
        return Some(named.into());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/linux/build.sh");
    let output = std::process::Command::new(script).output().expect("tests/linux/build.sh");
    let folder = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    (!folder.is_empty()).then(|| Path::new(&folder).join("vmlinux"))
}

fn host(lab: &Lab, number: u32, kernel: &Path, arguments: &[&str]) -> Vmm {
    let name = format!("vmm{number}");
    let config = json!({
        "name": "vm1", "memory_mib": MEMORY_MIB, "kernel": kernel, "cmdline": COMMAND_LINE, "balloon": {},
        "serial": {"file": lab.directory.path().join(format!("serial-{name}"))},
    });
    lab.vmm(&name, &config, arguments)
}

fn info(vmm: &Vmm) -> BalloonInfo {
    vmm.client.balloon().expect("a balloon")
}

fn inflate(vmm: &Vmm, mib: u64) {
    vmm.client.inflate(mib).expect("a balloon");
    until("the balloon to have its size", PATIENCE, || (info(vmm).actual_bytes == mib * MIB).then_some(()));
}

#[test]
fn linux_gives_memory_back_and_moves() {
    if !ready("linux_gives_memory_back_and_moves") {
        return;
    }
    let Some(kernel) = kernel() else {
        let required = std::env::var_os("HEADROOM_REQUIRE_KVM").is_some_and(|value| value == "1");
        assert!(!required, "HEADROOM_REQUIRE_KVM=1, but the small Linux could not be built");
        return;
    };
    let lab = Lab::new();
    let here = host(&lab, 1, &kernel, &[]);
    let figures =
        until("the driver", BOOT, || Some(info(&here).statistics).filter(|figures| figures.total_bytes.is_some()));
    assert!(figures.free_bytes <= figures.total_bytes && figures.total_bytes < Some(MEMORY_MIB * MIB), "{figures:?}");
    // Linux reports what has been free for two seconds.
    let reported = until("reports", PATIENCE, || Some(info(&here).reported_bytes).filter(|&bytes| bytes > 64 * MIB));
    inflate(&here, 64);
    until("less free memory", PATIENCE, || (info(&here).statistics.free_bytes < figures.free_bytes).then_some(()));
    assert!(info(&here).inflated_bytes >= 64 * MIB);
    inflate(&here, 16);

    let there = host(&lab, 2, &kernel, &["--incoming"]);
    let authority = Authority::new();
    let address = listen(&authority, &there, "m1", 20);
    here.client.send(&sending(&authority, "m1", address, MigrationLimits::default())).expect("it starts");
    let report = here.migrated().report.expect("the source has a report");
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    assert_eq!(report.verification.memory_digest_ok, Some(true), "{:?}", report.verification);
    assert_eq!(there.migrated().error, None);
    let before = info(&here);
    eprintln!(
        "reported {} MiB, named {} MiB to the migration, which sent {} MiB",
        reported / MIB,
        before.hinted_bytes / MIB,
        report.memory.bytes_sent / MIB
    );
    assert!(before.hinted_bytes > 0, "Linux named nothing");
    // The driver goes on where it was.
    assert_eq!((info(&there).target_bytes, info(&there).actual_bytes), (16 * MIB, 16 * MIB));
    inflate(&there, 48);
    inflate(&there, 0);
    until("its figures", PATIENCE, || info(&there).statistics.total_bytes);
    assert_eq!((here.quit(), there.quit()), (Some(0), Some(0)));
}
