//! A small real Linux: it finds its virtio disk, answers ping, and moves.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hostd::api::types::{DiskSize, KernelChoice, MachineStatus, MigrationStage, ProbeSpec, StopMachine};
use hostd::lab::interrupt;
use tests::world::{Spec, World};
use tests::{Need, ping, ready};

/// It boots in emulated ring 0 where KVM has neither VMX nor SVM, which takes half a minute on a quiet machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(240);

/// What it needs to be told: the first four for a KVM whose ring 0 is emulated, harmless elsewhere. The numbers are those of
/// smap, smep, popcnt and cx16 (arch/x86/include/asm/cpufeatures.h): a kernel this small does not know their names.
const COMMAND_LINE: &str = "console=ttyS0 earlyprintk=ttyS0 noxsave nopti mitigations=off clearcpuid=308,295,151,141 \
                            tsc=reliable random.trust_cpu=on no_timer_check lpj=5000000 8250.nr_uarts=1 root=/dev/vdz rootwait";

/// The kernel that `tests/linux/build.sh` made, as `vmlinux` or `bzImage`, or the one that `HEADROOM_LINUX` names.
fn kernel(form: &str) -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("HEADROOM_LINUX") {
        return Some(named.into());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("linux/build.sh");
    let output = std::process::Command::new(script).output().expect("tests/linux/build.sh");
    let folder = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if folder.is_empty() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr).trim());
        return None;
    }
    Some(Path::new(&folder).join(form))
}

fn not_built() {
    let required = std::env::var_os("HEADROOM_REQUIRE_KVM").is_some_and(|value| value == "1");
    assert!(!required, "HEADROOM_REQUIRE_KVM=1, but the small Linux could not be built");
    eprintln!("skipped: the small Linux could not be built");
}

/// The boot protocol of a compressed kernel: it unpacks itself, moves, and speaks.
#[test]
fn a_compressed_linux_unpacks_itself_and_speaks() {
    if !ready(Need::Kvm) {
        return;
    }
    let Some(kernel) = kernel("bzImage") else {
        return not_built();
    };
    let world = World::two_hosts();
    let mut request = Spec::busy("packed", 0).request();
    request.kernel = KernelChoice::Path(kernel);
    request.memory_mib = 256;
    request.cmdline = COMMAND_LINE.into();
    request.probes.clear();
    let machine = world.ask("a1", async |client| client.create_machine(&request).await).expect("a machine with Linux");
    let deadline = Instant::now() + BOOT_DEADLINE;
    loop {
        let text = std::fs::read_to_string(&machine.console).unwrap_or_default();
        if text.contains("Linux version") && text.contains("BIOS-e820") {
            break;
        }
        assert!(Instant::now() < deadline, "it said only: {text}");
        interrupt::wait_until(Instant::now() + Duration::from_millis(200)).unwrap();
    }
    // Its keyboard driver comes much later: who cannot be asked is not waited for.
    let stop = |how: StopMachine| world.ask("a1", async |client| client.stop_machine("packed", &how).await);
    let refused = stop(StopMachine::default()).unwrap_err();
    assert!(refused.status() == Some(409) && refused.to_string().contains("does not listen"), "{refused}");
    let stopped = stop(StopMachine { force: true, ..StopMachine::default() }).expect("it is stopped by force");
    assert_eq!(stopped.status, MachineStatus::Stopped);
    world.finish();
}

#[test]
fn linux_boots_finds_its_disk_answers_ping_gives_memory_back_and_moves() {
    if !ready(Need::Kvm) {
        return;
    }
    let Some(kernel) = kernel("vmlinux") else {
        return not_built();
    };
    let world = World::two_hosts();
    let spec = Spec::busy("linux", 0);
    let address = spec.address();
    let mut request = spec.request();
    request.kernel = KernelChoice::Path(kernel);
    request.memory_mib = 256;
    request.balloon = true;
    request.vcpus = 2;
    request.cmdline = format!("{COMMAND_LINE} ip={address}::10.77.0.1:255.255.0.0::eth0:off");
    request.probes = vec![ProbeSpec::Ping(address.into())];
    let machine = world.ask("a1", async |client| client.create_machine(&request).await).expect("a machine with Linux");
    let console = || std::fs::read_to_string(&machine.console).unwrap_or_default();
    let answered = world.lab.observer().run(|| ping::wait(address, BOOT_DEADLINE)).unwrap();
    answered.unwrap_or_else(|error| panic!("{error}; its console:\n{}", console()));
    let text = console();
    assert!(text.contains("Linux version"), "{text}");
    assert!(text.contains("Brought up 1 node, 2 CPUs"), "the second processor did not start:\n{text}");
    assert!(text.contains("virtio_blk") && text.contains("[vda]"), "the disk was not found:\n{text}");
    // Its own balloon driver: figures, free pages reported after two seconds, and what an operator asks for.
    let balloon = |host: &str| world.ask(host, async |client| client.balloon("linux").await).expect("a balloon");
    let figures = world.wait("the driver's figures", || {
        let told = balloon("a1").statistics;
        Some((told.total_bytes?, told.free_bytes?))
    });
    assert!(figures.1 <= figures.0 && figures.0 < 256 << 20, "{figures:?}");
    world.wait("free pages to be reported", || (balloon("a1").reported_bytes > 64 << 20).then_some(()));
    let filled = |host: &str, mib: u64| {
        world.ask(host, async |client| client.inflate("linux", mib).await).expect("it is asked");
        world.wait("the balloon to have its size", || (balloon(host).actual_bytes == mib << 20).then_some(()));
    };
    filled("a1", 64);
    world.wait("less free memory", || (balloon("a1").statistics.free_bytes? < figures.1).then_some(()));

    // It hears of a larger disk by itself.
    let size = DiskSize { id: "disk0".into(), bytes: 96 << 20 };
    world.ask("a1", async |client| client.resize_disk("linux", &size).await).expect("a larger disk");
    world.wait("Linux to see its larger disk", || console().contains("new size: 196608 512-byte").then_some(()));

    let migration = world.migrate("linux", "a1", "b1", None);
    assert_eq!(migration.stage, MigrationStage::Completed, "{:?}\n{}", migration.error, world.logs());
    let verification = migration.report.expect("a report").verification;
    assert_eq!((verification.memory_digest_ok, verification.disk_digest_ok), (Some(true), Some(true)));
    assert!(verification.probes.iter().all(|probe| probe.ok), "{verification:?}");
    world.lab.observer().run(|| ping::wait(address, Duration::from_secs(20))).unwrap().unwrap();
    let there = world.ask("b1", async |client| client.machine("linux").await).expect("it is there");
    let told = std::fs::read_to_string(&there.console).unwrap_or_default();
    assert!(!told.contains("stall") && !told.contains("lockup"), "a processor stands still:\n{told}");
    // It announces its addresses itself, as it is asked.
    let vmm = vmm::api::client::Client::new(&there.api_socket);
    world.wait("Linux to announce itself", || (vmm.metrics().ok()?.net_announcements == 1).then_some(()));
    // The driver goes on where it was.
    assert_eq!(balloon("b1").actual_bytes, 64 << 20);
    filled("b1", 16);
    filled("b1", 0);
    world.lab.observer().run(|| ping::wait(address, Duration::from_secs(20))).unwrap().unwrap();
    // Ctrl-Alt-Del, which has no process to go to here: the kernel restarts, and resets the machine.
    let stopped = world.ask("b1", async |client| client.stop_machine("linux", &StopMachine::default()).await);
    let stopped =
        stopped.unwrap_or_else(|error| panic!("{error}: {}", std::fs::read_to_string(&there.console).unwrap()));
    assert_eq!(stopped.status, MachineStatus::Stopped);
    let told = std::fs::read_to_string(&there.console).unwrap_or_default();
    assert!(told.contains("reboot: Restarting system"), "{told}");
    world.finish();
}
