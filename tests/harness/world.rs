//! Hosts with machines on them, for tests: a lab whose daemons run, blocking calls to them, and clients of the guests.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use headroom_guest::{Client as GuestClient, Settings, Status, Workload};
use hostd::api::types::{
    CreateMachine, KernelChoice, Machine, MigrateRequest, Migration, MigrationLimits, MigrationStage, NewDisk,
    NewNetwork, ProbeSpec,
};
use hostd::client::{Client, ClientError};
use hostd::config::HostConfig;
use hostd::demo::observer::{ECHO_PORT, Observer, Target, UdpSummary};
use hostd::lab::{HostSpec, Lab, LabHost, fabric, interrupt, sweep};
use migration::report::Report;

/// How long anything that is waited for may take, on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A lab with running daemons.
pub struct World {
    /// The hosts.
    pub lab: Lab,
    runtime: tokio::runtime::Runtime,
}

/// One machine to be made.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Name.
    pub name: String,
    /// Its number: decides the address.
    pub number: u16,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Disk in MiB.
    pub disk_mib: u64,
    /// Whether it has a balloon.
    pub balloon: bool,
    /// What it does.
    pub workload: Workload,
}

impl Spec {
    /// A machine that sweeps its memory and writes to its disk all the time.
    pub fn busy(name: &str, number: u16) -> Self {
        let address = Lab::machine_address(number);
        let workload = Workload {
            ip: Some(headroom_guest::Address { ip: address, prefix: fabric::PREFIX_LENGTH }),
            sweep_mib: 16,
            sweep_mib_per_second: 16,
            disk_mib: 16,
            disk_mib_per_second: 4,
            fill_mib: 32,
            ..Workload::default()
        };
        Self { name: name.to_owned(), number, memory_mib: 128, disk_mib: 64, balloon: false, workload }
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        Lab::machine_address(self.number)
    }

    /// The request to a daemon.
    pub fn request(&self) -> CreateMachine {
        CreateMachine {
            name: self.name.clone(),
            vcpus: 1,
            memory_mib: self.memory_mib,
            kernel: KernelChoice::Bundled,
            initrd: None,
            cmdline: self.workload.to_string(),
            disks: vec![NewDisk {
                id: "disk0".into(),
                size_mib: Some(self.disk_mib),
                path: None,
                read_only: false,
                shared: false,
            }],
            networks: vec![NewNetwork { id: "net0".into(), mac: None }],
            balloon: self.balloon,
            probes: vec![
                ProbeSpec::Ping(self.address().into()),
                ProbeSpec::TcpEcho((self.address(), ECHO_PORT).into()),
            ],
            limits: MigrationLimits::default(),
        }
    }
}

impl World {
    /// Hosts `a1` (pool a) and `b1` (pool b) without quotas; no planner.
    pub fn two_hosts() -> Self {
        Self::new(&[HostSpec::new("a1", "a"), HostSpec::new("b1", "b")], |_| ())
    }

    /// These hosts, with their daemons answering. The planner is off unless `adjust` turns it on.
    ///
    /// # Panics
    /// When that fails.
    pub fn new(hosts: &[HostSpec], adjust: impl Fn(&mut HostConfig)) -> Self {
        let lab = Lab::new(hosts).expect("a lab");
        lab.start_daemons(|config| {
            config.planner.enabled = false;
            adjust(config);
        })
        .expect("daemons that answer");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Self { lab, runtime }
    }

    /// One host.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn host(&self, name: &str) -> &LabHost {
        self.lab.host(name).expect("a host of this lab")
    }

    /// Asks the daemon of a host something.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn ask<T>(
        &self,
        host: &str,
        ask: impl AsyncFnOnce(Client) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let client = self.host(host).client();
        self.runtime.block_on(async {
            let answer = tokio::time::timeout(DEADLINE, ask(client)).await;
            answer.unwrap_or_else(|_| panic!("no answer of {host} before the deadline\n{}", self.logs()))
        })
    }

    /// Makes a machine and waits until its guest is ready.
    ///
    /// # Panics
    /// When that fails.
    pub fn boot(&self, host: &str, spec: &Spec) -> Machine {
        let machine =
            self.ask(host, async |client| client.create_machine(&spec.request()).await).expect("a new machine");
        self.wait_guest(spec, "to be ready", |status| status.ready);
        machine
    }

    /// Waits until the guest's status satisfies `wanted`.
    ///
    /// # Panics
    /// At the deadline.
    pub fn wait_guest(&self, spec: &Spec, what: &str, mut wanted: impl FnMut(&Status) -> bool + Send) -> Status {
        let observer = self.lab.observer();
        let waited = observer.run(|| {
            let mut client = guest(spec);
            let mut last = None;
            let result = interrupt::poll(&format!("{} {what}", spec.name), DEADLINE, Duration::from_millis(10), || {
                last = client.status().ok().or(last.take());
                Ok(last.clone().filter(|status| wanted(status)))
            });
            result.map_err(|error| format!("{error}; its last status: {last:?}"))
        });
        waited.expect("the observer's namespace").unwrap_or_else(|error| panic!("{error}"))
    }

    /// Asks the guest for its status now.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn status(&self, spec: &Spec) -> Status {
        self.wait_guest(spec, "to answer", |_| true)
    }

    /// Tells the guest to do something else.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn set(&self, spec: &Spec, settings: Settings) -> Status {
        let answer = self.lab.observer().run(|| guest(spec).set(settings));
        answer.expect("the observer's namespace").expect("an answer of the guest")
    }

    /// Waits until the guest has checked so many more pages and blocks than now, and panics if any was wrong: what was
    /// moved has been read back by the guest itself.
    ///
    /// # Panics
    /// When the guest found an error or makes no progress.
    pub fn check_oracles(&self, spec: &Spec) -> Status {
        let before = self.status(spec);
        let sweep = u64::from(spec.workload.sweep_mib) * 256;
        let status = self.wait_guest(spec, "to check its memory and disk", |status| {
            status.sweep_pages_checked >= before.sweep_pages_checked + sweep
                && status.disk_blocks_checked >= before.disk_blocks_checked + 64
        });
        assert_clean(&status);
        status
    }

    /// Starts a migration.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn start_migration(
        &self,
        machine: &str,
        from: &str,
        to: &str,
        limits: Option<MigrationLimits>,
    ) -> Result<Migration, ClientError> {
        let request = MigrateRequest { destination: to.to_owned(), limits, ..MigrateRequest::default() };
        self.ask(from, async |client| client.migrate(machine, &request).await)
    }

    /// Waits until a migration has ended.
    ///
    /// # Panics
    /// At the deadline.
    pub fn wait_migration(&self, from: &str, id: &str) -> Migration {
        self.ask(from, async |client| client.wait_migration(id, DEADLINE, |_| ()).await)
            .expect("the end of the migration")
    }

    /// Moves a machine and waits for the end, whatever it is.
    ///
    /// # Panics
    /// When the daemon refuses at once.
    pub fn migrate(&self, machine: &str, from: &str, to: &str, limits: Option<MigrationLimits>) -> Migration {
        let migration = self.start_migration(machine, from, to, limits).expect("a migration that starts");
        self.wait_migration(from, &migration.id)
    }

    /// Moves a machine, which has to work; the guest then finds its memory and its disk as it left them. Returns the source's
    /// report.
    ///
    /// # Panics
    /// When it ends otherwise.
    pub fn moves(&self, spec: &Spec, from: &str, to: &str, limits: Option<MigrationLimits>) -> Report {
        let migration = self.migrate(&spec.name, from, to, limits);
        assert_eq!(migration.stage, MigrationStage::Completed, "{:?}\n{}", migration.error, self.logs());
        self.check_oracles(spec);
        migration.report.expect("a report at the source")
    }

    /// Names of the machines on a host.
    ///
    /// # Panics
    /// When the daemon does not answer.
    pub fn machines_on(&self, host: &str) -> Vec<String> {
        let machines = self.ask(host, async |client| client.machines().await).expect("a list of machines");
        machines.into_iter().map(|machine| machine.name).collect()
    }

    /// Watches machines from outside, each with so many UDP requests and TCP messages a second.
    ///
    /// # Panics
    /// When a machine does not accept a connection.
    pub fn observe(&self, specs: &[&Spec], udp_per_second: u32, tcp_per_second: u32) -> Observer {
        let target =
            |spec: &&Spec| Target { name: spec.name.clone(), address: spec.address(), udp_per_second, tcp_per_second };
        Observer::start(self.lab.observer(), specs.iter().map(target).collect()).expect("an observer")
    }

    /// Polls until `probe` has an answer.
    ///
    /// # Panics
    /// At the deadline.
    pub fn wait<T>(&self, what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
        interrupt::poll(what, DEADLINE, Duration::from_millis(10), || Ok(probe()))
            .unwrap_or_else(|error| panic!("{error}; the hosts say:\n{}", self.logs()))
    }

    /// The last lines of every daemon's log.
    pub fn logs(&self) -> String {
        let tail = |host: &LabHost| format!("-- {}\n{}\n", host.name(), host.log_tail(15));
        self.lab.hosts().iter().map(tail).collect()
    }

    /// Deletes all machines through the daemons, ends the daemons and panics if anything is left of either.
    ///
    /// # Panics
    /// When something is left behind.
    pub fn finish(self) {
        let start = Instant::now();
        let prefix = self.lab.prefix().to_owned();
        let left = hostd::demo::stage::take_down(self.lab);
        assert!(left.is_empty(), "left behind after {:?}: {left:#?}", start.elapsed());
        assert_eq!(sweep::leftovers(&prefix), Vec::<String>::new());
    }
}

/// Stops the traffic of a machine, waits until everything that was sent over TCP has come back, and returns what UDP saw since
/// `start`.
///
/// # Panics
/// When an echo does not come.
pub fn last_echoes(observer: &Observer, machine: &str, start: u64) -> UdpSummary {
    observer.set_rates(machine, 0, 0);
    let tcp = interrupt::poll("the last echoes", Duration::from_secs(5), Duration::from_millis(20), || {
        Ok(observer.tcp(machine).filter(|tcp| tcp.complete()))
    });
    tcp.unwrap_or_else(|error| panic!("{error}: {:?}", observer.tcp(machine)));
    observer.udp(machine, start..observer.now()).expect("a machine that is observed")
}

/// A client of the guest's control port; to be called inside the observer's namespace.
fn guest(spec: &Spec) -> GuestClient {
    let mut client = GuestClient::connect((spec.address(), 9000).into()).expect("a UDP socket");
    client.set_deadline(Duration::from_secs(1));
    client
}

/// The guest has found nothing wrong with its memory or disk.
///
/// # Panics
/// When it has.
pub fn assert_clean(status: &Status) {
    assert!(
        status.sweep_errors == 0 && status.disk_errors == 0 && status.fill_errors == 0,
        "the guest has found errors: {status:#?}"
    );
}
