//! Real processes are killed at every message that decides something, and real connections are cut there. In the end exactly one
//! machine runs, or it died with the process that owned it; the guest finds its memory and its disk as it left them.

use std::time::{Duration, Instant};

use headroom_guest::Workload;
use hostd::api::types::{CreateMachine, MachineStatus, Migration, MigrationLimits, MigrationStage};
use hostd::lab::{HostSpec, binary};
use migration::policy::MigrationMode;
use tests::world::{DEADLINE, Spec, World};
use tests::{Need, ready};

use crate::kill;
use crate::relay::{ADDRESS, Boundary, Relay, Release};

/// Who is killed while the message is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Nobody,
    SourceVmm,
    DestinationVmm,
    SourceDaemon,
    DestinationDaemon,
    BothDaemons,
    /// VMM and daemon, as a host that loses its power; the daemon starts again.
    SourceHost,
    DestinationHost,
}

/// Where the machine is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    AtSource,
    AtDestination,
    /// Either, but only one of them.
    Somewhere,
    /// It died with its process, and is stopped there.
    DiedAtSource,
    DiedAtDestination,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    at: Boundary,
    victim: Victim,
    release: Release,
    mode: MigrationMode,
}

impl Case {
    fn precopy(at: Boundary, victim: Victim) -> Self {
        Self { at, victim, release: Release::Deliver, mode: MigrationMode::Precopy }
    }

    /// By the table in `docs/migration-protocol.md`.
    fn end(self) -> End {
        let Self { at, victim, release, .. } = self;
        let past = |boundary| Boundary::ALL.iter().position(|&one| one == boundary);
        let before_commit = past(at) < past(Boundary::Commit);
        let arrives = at != Boundary::Commit || release == Release::Deliver;
        match victim {
            Victim::SourceVmm | Victim::SourceHost if before_commit || !arrives => End::DiedAtSource,
            Victim::DestinationVmm | Victim::DestinationHost if before_commit || at == Boundary::Commit => {
                End::AtSource
            }
            // What it has done since is there: its source must not go back to what it was before.
            Victim::DestinationVmm | Victim::DestinationHost => End::DiedAtDestination,
            _ if before_commit && release == Release::Cut => End::AtSource,
            // The switchover may be given up for taking too long meanwhile.
            _ if before_commit => End::Somewhere,
            _ if !arrives => End::AtSource,
            _ => End::AtDestination,
        }
    }
}

fn spec(number: u16) -> Spec {
    let mut spec = Spec::busy("vm1", number);
    let sweep = Workload {
        sweep_mib: 4,
        sweep_mib_per_second: 32,
        disk_mib: 4,
        disk_mib_per_second: 8,
        fill_mib: 8,
        ..spec.workload
    };
    (spec.memory_mib, spec.disk_mib, spec.workload) = (64, 16, sweep);
    spec
}

struct Stage {
    world: World,
    relay: Relay,
    spec: Spec,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(&[HostSpec::new("a1", "a"), HostSpec::new("b1", "b")], |config| {
            if config.host == "b1" {
                config.migration_address = ADDRESS.into();
            }
        });
        let relay = Relay::start(world.host("a1"), world.host("b1"));
        let mut stage = Self { world, relay, spec: spec(0) };
        stage.boot();
        stage
    }

    /// Each machine has an address of its own: the network remembers where an old one was.
    fn boot(&mut self) {
        self.spec = spec(self.spec.number + 1);
        // Probes of a machine that has died would be asked for a long time.
        let request = CreateMachine { probes: Vec::new(), ..self.spec.request() };
        // What peers know of each other's machines is a moment old: the name may still count as taken.
        let create = || self.world.ask("a1", async |client| client.create_machine(&request).await).ok();
        self.world.wait("a new machine", create);
        self.world.wait_guest(&self.spec, "to be ready", |status| status.ready);
    }

    fn status(&self, host: &str) -> Option<MachineStatus> {
        self.world.ask(host, async |client| client.machine("vm1").await).ok().map(|machine| machine.status)
    }

    fn vmm_of(&self, host: &str) -> u32 {
        self.world.wait("the VMM", || self.world.ask(host, async |client| client.machine("vm1").await).ok()?.pid)
    }

    fn kill_host(&self, host: &str) {
        let vmm = self.vmm_of(host);
        self.world.host(host).kill_daemon();
        kill(vmm);
        self.restart_daemon(host);
    }

    fn restart_daemon(&self, host: &str) {
        let host = self.world.host(host);
        host.kill_daemon();
        host.spawn_daemon(&binary("hostd").unwrap()).unwrap();
        host.wait_ready().unwrap();
    }

    fn strike(&self, victim: Victim) {
        match victim {
            Victim::Nobody => {}
            Victim::SourceVmm => kill(self.vmm_of("a1")),
            Victim::DestinationVmm => kill(self.vmm_of("b1")),
            Victim::SourceHost => self.kill_host("a1"),
            Victim::DestinationHost => self.kill_host("b1"),
            Victim::SourceDaemon => self.restart_daemon("a1"),
            Victim::DestinationDaemon => self.restart_daemon("b1"),
            Victim::BothDaemons => {
                self.world.host("b1").kill_daemon();
                self.restart_daemon("a1");
                self.restart_daemon("b1");
            }
        }
    }

    /// One migration, disturbed.
    fn play(&mut self, case: Case) {
        self.relay.arm(&[case.at], case.mode == MigrationMode::Postcopy);
        let limits = MigrationLimits { mode: case.mode, ..MigrationLimits::default() };
        let started = self.world.start_migration("vm1", "a1", "b1", Some(limits)).expect("a migration that starts");
        assert!(self.relay.wait(DEADLINE), "{case:?}: the message never came:\n{}", self.world.logs());
        // With the message lost, what daemons do after it has to work without those that were there before.
        if case.release == Release::Cut {
            self.relay.release(case.release);
            self.strike(case.victim);
        } else {
            self.strike(case.victim);
            self.relay.release(case.release);
        }
        let ended = self.world.wait_migration("a1", &started.id);
        self.judge(case, &ended);
    }

    fn judge(&mut self, case: Case, ended: &Migration) {
        let wanted = |host: &str| match (case.end(), host) {
            (End::AtSource, "a1") | (End::AtDestination, "b1") => Some(MachineStatus::Running),
            (End::DiedAtSource, "a1") | (End::DiedAtDestination, "b1") => Some(MachineStatus::Stopped),
            (End::Somewhere, "a1") => (ended.stage != MigrationStage::Completed).then_some(MachineStatus::Running),
            (End::Somewhere, _) => (ended.stage == MigrationStage::Completed).then_some(MachineStatus::Running),
            _ => None,
        };
        let start = Instant::now();
        while ["a1", "b1"].iter().any(|host| self.status(host) != wanted(host)) {
            let found = ["a1", "b1"].map(|host| self.status(host));
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{case:?}: {found:?}, {ended:#?}\n{}",
                self.world.logs()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        for host in ["a1", "b1"] {
            match wanted(host) {
                Some(MachineStatus::Running) => drop(self.world.check_oracles(&self.spec)),
                Some(_) => self.world.ask(host, async |client| client.delete_machine("vm1").await).unwrap(),
                None => {}
            }
        }
        self.back_to_the_start();
    }

    fn back_to_the_start(&mut self) {
        if self.status("b1").is_some() {
            // The destination may still be busy with the end of the migration.
            self.world.wait("a way back", || {
                let back = self.world.start_migration("vm1", "b1", "a1", None).ok()?;
                (self.world.wait_migration("b1", &back.id).stage == MigrationStage::Completed).then_some(())
            });
        } else if self.status("a1").is_none() {
            self.boot();
        }
    }
}

fn play_all(cases: impl Iterator<Item = Case>) {
    if !ready(Need::Kvm) {
        return;
    }
    let mut stage = Stage::new();
    for case in cases {
        let start = Instant::now();
        stage.play(case);
        println!("{case:?}: {:?}, {} ms", case.end(), start.elapsed().as_millis());
    }
    stage.world.finish();
}

#[test]
fn every_process_is_killed_at_every_message() {
    let victims = [Victim::SourceVmm, Victim::DestinationVmm, Victim::SourceDaemon, Victim::DestinationDaemon];
    let precopy = |at: &Boundary| !matches!(at, Boundary::PostcopyPrepare | Boundary::PostcopyReady);
    play_all(Boundary::ALL.into_iter().filter(precopy).flat_map(|at| victims.map(|victim| Case::precopy(at, victim))));
}

/// A host that dies takes its daemon with it: what the other one asks it afterwards it knows from its disk only.
#[test]
fn hosts_die_around_commit() {
    let victims = [Victim::SourceHost, Victim::DestinationHost];
    let around = [Boundary::Prepared, Boundary::Commit, Boundary::Resumed, Boundary::Verified];
    play_all(around.into_iter().flat_map(|at| victims.map(|victim| Case::precopy(at, victim))));
}

/// Post-copy enters by more messages. (What follows its Commit takes minutes by design: `migration/tests/postcopy.rs` and
/// `vmm/tests/postcopy.rs` have it.)
#[test]
fn processes_are_killed_on_the_way_into_postcopy() {
    if vmm::memory::uffd::check().is_err() {
        eprintln!("skipped: this host cannot do post-copy");
        return;
    }
    let daemons = [Victim::SourceDaemon, Victim::DestinationDaemon];
    let all = [Victim::SourceVmm, Victim::DestinationVmm, Victim::SourceDaemon, Victim::DestinationDaemon];
    let before = [Boundary::PostcopyPrepare, Boundary::PostcopyReady, Boundary::Prepared];
    let after = [Boundary::Commit, Boundary::Resumed];
    let cases = before.into_iter().flat_map(|at| all.map(|victim| Case::precopy(at, victim)));
    // From Prepared on the source commits, and then waits for half a minute for somebody to listen there.
    let cases = cases.filter(|case| (case.at, case.victim) != (Boundary::Prepared, Victim::DestinationVmm));
    let cases = cases.chain(after.into_iter().flat_map(|at| daemons.map(|victim| Case::precopy(at, victim))));
    play_all(cases.map(|case| Case { mode: MigrationMode::Postcopy, ..case }));
}

/// What is lost around Commit is settled by the daemons, also if they have to start again for it.
#[test]
fn messages_are_lost_and_daemons_with_them() {
    let victims = [Victim::Nobody, Victim::SourceDaemon, Victim::DestinationDaemon, Victim::BothDaemons];
    let around = [Boundary::Prepared, Boundary::Commit, Boundary::Resumed];
    let cases = around.into_iter().flat_map(|at| victims.map(|victim| Case::precopy(at, victim)));
    play_all(cases.map(|case| Case { release: Release::Cut, ..case }));
}

/// The destination dies with Commit on its way and never comes back: nobody can say whether it ran the machine, until an operator
/// does.
#[test]
fn a_machine_in_doubt_is_taken_back_from_a_host_that_is_gone() {
    if !ready(Need::Kvm) {
        return;
    }
    let stage = Stage::new();
    let world = &stage.world;
    let take_back = |id: &str| world.ask("a1", async |client| client.take_back_migration(id).await);
    stage.relay.arm(&[Boundary::Commit], false);
    let precopy = MigrationLimits { mode: MigrationMode::Precopy, ..MigrationLimits::default() };
    let started = world.start_migration("vm1", "a1", "b1", Some(precopy)).expect("a migration that starts");
    assert!(stage.relay.wait(DEADLINE), "Commit never came:\n{}", world.logs());
    let early = take_back(&started.id).expect_err("it is not in doubt yet").to_string();
    assert!(early.contains("not in doubt"), "{early}");
    let vmm = stage.vmm_of("b1");
    world.host("b1").kill_daemon();
    kill(vmm);
    stage.relay.release(Release::Cut);
    let waiting = world.wait("doubt", || {
        let now = world.ask("a1", async |client| client.migration(&started.id).await).ok()?;
        assert!(!now.stage.ended(), "{now:?}");
        (now.stage == MigrationStage::Settling).then_some(now.error?)
    });
    assert!(waiting.contains("take-back") && waiting.contains(&started.id), "{waiting}");
    assert_eq!(stage.status("a1"), Some(MachineStatus::InDoubt));
    take_back(&started.id).expect("the destination does not answer");
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!(ended.stage, MigrationStage::Failed, "{ended:#?}");
    world.wait("the machine", || (stage.status("a1") == Some(MachineStatus::Running)).then_some(()));
    world.check_oracles(&stage.spec);
    // It comes back, and had not run it: all is well, and moves go on.
    stage.restart_daemon("b1");
    let again = world.wait("another move", || world.start_migration("vm1", "a1", "b1", None).ok());
    assert_eq!(world.wait_migration("a1", &again.id).stage, MigrationStage::Completed, "{}", world.logs());
    stage.world.finish();
}

/// The operator was wrong: the machine ran at the destination, and runs twice now. Nothing can undo that, but both hosts' operators
/// learn of it as soon as they can.
#[test]
fn a_machine_that_was_taken_back_and_had_run_is_an_alarm() {
    if !ready(Need::Kvm) {
        return;
    }
    let stage = Stage::new();
    let world = &stage.world;
    stage.relay.arm(&[Boundary::Commit, Boundary::Resumed], false);
    let precopy = MigrationLimits { mode: MigrationMode::Precopy, ..MigrationLimits::default() };
    let started = world.start_migration("vm1", "a1", "b1", Some(precopy)).expect("a migration that starts");
    assert!(stage.relay.wait(DEADLINE), "Commit never came:\n{}", world.logs());
    let vmm = stage.vmm_of("b1");
    world.host("b1").kill_daemon();
    stage.relay.release(Release::Deliver);
    assert!(stage.relay.wait(DEADLINE), "Resumed never came:\n{}", world.logs());
    stage.relay.release(Release::Cut);
    world.wait("doubt", || (stage.status("a1") == Some(MachineStatus::InDoubt)).then_some(()));
    world.ask("a1", async |client| client.take_back_migration(&started.id).await).expect("no daemon answers");
    world.wait("the machine", || (stage.status("a1") == Some(MachineStatus::Running)).then_some(()));
    let alarms = || {
        let records = world.ask("a1", async |client| client.audit(100).await).expect("the audit log");
        records.into_iter().filter(|record| record.action == "alarm").map(|record| record.detail).collect::<Vec<_>>()
    };
    assert_eq!(alarms(), Vec::<String>::new());
    // What was done on the operator's word is not forgotten with the daemon that did it.
    let before = world.wait_migration("a1", &started.id);
    assert_eq!((before.stage, before.taken_back), (MigrationStage::Failed, Some(started.id.clone())));
    world.host("a1").kill_daemon();
    stage.restart_daemon("a1");
    stage.restart_daemon("b1");
    let alarm = world.wait("an alarm", || alarms().pop());
    assert!(alarm.contains("vm1") && alarm.contains("b1") && alarm.contains("stop one of them"), "{alarm}");
    let now = world.wait("the end of the question", || {
        let now = world.ask("a1", async |client| client.migration(&started.id).await).ok()?;
        now.taken_back.is_none().then_some(now)
    });
    assert_eq!(now.alarm, Some(alarm));
    // One of them is stopped; the other goes on.
    kill(vmm);
    world.wait("its end", || (stage.status("b1") == Some(MachineStatus::Stopped)).then_some(()));
    world.ask("b1", async |client| client.delete_machine("vm1").await).expect("it is stopped");
    assert_eq!(stage.status("a1"), Some(MachineStatus::Running));
    stage.world.finish();
}

/// The source is in doubt, the destination's daemon is down while its VMM takes the machine over, and then that dies too: what
/// the guest has done there must not be undone by running it at its source as it was before.
#[test]
fn a_machine_that_has_run_is_not_taken_back() {
    if !ready(Need::Kvm) {
        return;
    }
    let stage = Stage::new();
    let world = &stage.world;
    stage.relay.arm(&[Boundary::Commit, Boundary::Resumed], false);
    let precopy = MigrationLimits { mode: MigrationMode::Precopy, ..MigrationLimits::default() };
    let started = world.start_migration("vm1", "a1", "b1", Some(precopy)).expect("a migration that starts");
    assert!(stage.relay.wait(DEADLINE), "Commit never came:\n{}", world.logs());
    let vmm = stage.vmm_of("b1");
    world.host("b1").kill_daemon();
    stage.relay.release(Release::Deliver);
    assert!(stage.relay.wait(DEADLINE), "Resumed never came:\n{}", world.logs());
    stage.relay.release(Release::Cut);
    world.check_oracles(&stage.spec);
    kill(vmm);
    stage.restart_daemon("b1");
    let ended = world.wait_migration("a1", &started.id);
    assert_eq!(ended.stage, MigrationStage::Completed, "{ended:#?}\n{}", world.logs());
    assert_eq!((stage.status("a1"), stage.status("b1")), (None, Some(MachineStatus::Stopped)), "{ended:#?}");
    stage.world.finish();
}
