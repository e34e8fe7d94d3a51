//! The machine: memory, disks, one vCPU thread, and the world that watches it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use super::absent::Arrivals;
use super::disk::Handle;
use super::{FakeDisk, FakeMemory, Faults, Registers, Workload};
use crate::guest::{
    CpuProfile, DestinationDisk, DestinationGuest, DeviceSlot, DiskLayout, GuestError, GuestResult, MachineLayout,
    MemoryRegion, Missing, PAGE_BYTES, SourceDisk, SourceGuest, StatePayload,
};
use crate::page::Bitmap;

/// Watches one machine, wherever it is.
#[derive(Default)]
pub struct World {
    running: Mutex<Vec<&'static str>>,
    violations: Mutex<Vec<String>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// A world in which the machine does not run yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Notes something that must not happen.
    pub fn violation(&self, text: impl Into<String>) {
        locked(&self.violations).push(text.into());
    }

    /// Everything that must not have happened and did.
    pub fn violations(&self) -> Vec<String> {
        locked(&self.violations).clone()
    }

    /// Where the machine runs.
    pub fn running(&self) -> Vec<&'static str> {
        locked(&self.running).clone()
    }

    fn started(&self, host: &'static str) {
        let mut running = locked(&self.running);
        running.push(host);
        if running.len() > 1 {
            self.violation(format!("the machine runs on {running:?} at once"));
        }
    }

    fn stopped(&self, host: &'static str) {
        locked(&self.running).retain(|&name| name != host);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// Built, never started here.
    Empty,
    Running(u64),
    Paused,
    Discarded,
}

/// How its vCPU is held.
#[derive(Default)]
struct Throttle {
    percent: AtomicU8,
    most: AtomicU8,
    held_ms: AtomicU64,
}

/// A fake machine on one host; it can be the source or the destination of a migration.
pub struct FakeMachine {
    host: &'static str,
    layout: MachineLayout,
    /// Its memory.
    pub memory: Arc<FakeMemory>,
    /// Its disks.
    pub disks: Vec<Arc<FakeDisk>>,
    /// Its processor.
    pub registers: Arc<Mutex<Registers>>,
    /// What goes wrong in it.
    pub faults: Arc<Faults>,
    /// It can run before all of it is there.
    pub offers_postcopy: AtomicBool,
    /// What it warns of.
    pub warnings: Mutex<Vec<String>>,
    throttle: Arc<Throttle>,
    run: Arc<RwLock<Run>>,
    fenced: Mutex<bool>,
    lost: Mutex<Option<String>>,
    world: Arc<World>,
    generation: AtomicU64,
}

impl FakeMachine {
    /// The layout of a machine with `pages` pages in two regions and disks of the given sizes.
    pub fn layout(pages: u64, disks: &[u64]) -> MachineLayout {
        let low = (pages / 2).max(1);
        let mut memory = vec![MemoryRegion { gpa: 0, bytes: low * PAGE_BYTES }];
        if pages > low {
            memory.push(MemoryRegion { gpa: 1 << 32, bytes: (pages - low) * PAGE_BYTES });
        }
        let disks = disks.iter().enumerate().map(|(number, &bytes)| DiskLayout {
            id: format!("disk{number}"),
            bytes,
            read_only: false,
        });
        MachineLayout {
            machine: "fake".to_owned(),
            vcpus: 1,
            memory,
            disks: disks.collect(),
            devices: vec![DeviceSlot { name: "vcpu/0".to_owned(), version: 1 }],
            cpu: CpuProfile::default(),
        }
    }

    /// A machine on `host` that is built and does not run.
    pub fn new(host: &'static str, layout: MachineLayout, world: &Arc<World>) -> Arc<Self> {
        let faults = Arc::new(Faults::default());
        Arc::new(Self {
            host,
            memory: Arc::new(FakeMemory::new(layout.pages())),
            disks: layout.disks.iter().map(|disk| FakeDisk::new(disk.clone(), Arc::clone(&faults))).collect(),
            layout,
            registers: Arc::default(),
            faults,
            offers_postcopy: AtomicBool::new(false),
            warnings: Mutex::default(),
            throttle: Arc::default(),
            run: Arc::new(RwLock::new(Run::Empty)),
            fenced: Mutex::new(false),
            lost: Mutex::default(),
            world: Arc::clone(world),
            generation: AtomicU64::new(0),
        })
    }

    /// Starts a new machine here, as an operator would.
    pub fn boot(&self, workload: Workload) {
        {
            let mut registers = locked(&self.registers);
            *registers = Registers { workload, ..Registers::default() };
            registers.fill(&self.memory);
        }
        self.go();
    }

    fn go(&self) {
        let generation = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        *self.run.write().unwrap_or_else(PoisonError::into_inner) = Run::Running(generation);
        self.world.started(self.host);
        let vcpu = Vcpu {
            memory: Arc::clone(&self.memory),
            disk: self.disks.first().cloned(),
            registers: Arc::clone(&self.registers),
            throttle: Arc::clone(&self.throttle),
            run: Arc::clone(&self.run),
            world: Arc::clone(&self.world),
            generation,
        };
        std::thread::spawn(move || vcpu.run());
    }

    /// The share of its time for which its vCPU is held, and the largest there was, in per cent.
    pub fn throttle_percent(&self) -> (u8, u8) {
        (self.throttle.percent.load(Ordering::SeqCst), self.throttle.most.load(Ordering::SeqCst))
    }

    fn run_state(&self) -> Run {
        *self.run.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it runs here.
    pub fn is_running(&self) -> bool {
        matches!(self.run_state(), Run::Running(_))
    }

    /// Whether it must not run here.
    pub fn is_fenced(&self) -> bool {
        *locked(&self.fenced)
    }

    /// Why a part of it was lost, if one was.
    pub fn lost(&self) -> Option<String> {
        locked(&self.lost).clone()
    }

    /// Whether it was discarded.
    pub fn is_discarded(&self) -> bool {
        self.run_state() == Run::Discarded
    }

    /// Stops it and checks all it holds against what its guest has written.
    ///
    /// # Errors
    ///
    /// The first thing that is not as the guest left it.
    pub fn check(&self) -> Result<(), String> {
        self.stop();
        let registers = locked(&self.registers).clone();
        registers.check_all(&self.memory, self.disks.first().map(|disk| &**disk), self.layout.pages())
    }

    /// Stops the vCPU and waits until it has.
    pub fn stop(&self) {
        let mut run = self.run.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(*run, Run::Running(_)) {
            *run = Run::Paused;
            self.world.stopped(self.host);
        }
    }

    fn handles(&self) -> impl Iterator<Item = Handle> {
        self.disks.iter().map(|disk| Handle(Arc::clone(disk)))
    }
}

struct Vcpu {
    memory: Arc<FakeMemory>,
    disk: Option<Arc<FakeDisk>>,
    registers: Arc<Mutex<Registers>>,
    throttle: Arc<Throttle>,
    run: Arc<RwLock<Run>>,
    world: Arc<World>,
    generation: u64,
}

impl Vcpu {
    fn run(self) {
        let mut held = 0;
        loop {
            held += self.throttle.percent.load(Ordering::SeqCst);
            if held >= 100 {
                held -= 100;
                self.throttle.held_ms.fetch_add(1, Ordering::SeqCst);
            } else {
                // Held while it works: whoever wants to stop the machine waits for the end of the batch.
                let run = self.run.read().unwrap_or_else(PoisonError::into_inner);
                if *run != Run::Running(self.generation) {
                    return;
                }
                if let Err(error) = self.work() {
                    // What never arrived is no error of the engine's.
                    if !self.memory.absent.is_lost() {
                        self.world.violation(error);
                    }
                    return;
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn work(&self) -> Result<(), String> {
        let mut registers = locked(&self.registers);
        let workload = registers.workload.clone();
        for number in 0..workload.pages_per_ms {
            if workload.sweep_pages > 0 {
                registers.sweep_page(&self.memory)?;
            }
            if let (Some(disk), true, 0) = (&self.disk, workload.sweep_blocks > 0, number % 16) {
                for _ in 0..workload.blocks_per_16_pages {
                    if !disk.is_answered() {
                        break;
                    }
                    registers.sweep_block(disk)?;
                }
            }
        }
        Ok(())
    }
}

impl SourceGuest for FakeMachine {
    fn layout(&self) -> GuestResult<MachineLayout> {
        self.faults.hit("layout")?;
        Ok(self.layout.clone())
    }

    fn start_dirty_tracking(&self) -> GuestResult<()> {
        self.faults.hit("start_dirty_tracking")?;
        self.memory.track(true);
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> GuestResult<()> {
        self.faults.hit("stop_dirty_tracking")?;
        self.memory.track(false);
        Ok(())
    }

    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()> {
        self.faults.hit("collect_dirty")?;
        self.memory.collect(into);
        Ok(())
    }

    fn next_populated(&self, from: u64) -> GuestResult<Option<Range<u64>>> {
        self.faults.hit("next_populated")?;
        Ok(self.memory.next_populated(from))
    }

    fn read_pages(&self, first: u64, buffer: &mut [u8]) -> GuestResult<()> {
        self.faults.hit("read_pages")?;
        self.memory.read(first, buffer);
        Ok(())
    }

    fn throttle(&self, percent: &[u8]) -> GuestResult<bool> {
        let percent = percent.first().copied().unwrap_or(0);
        self.throttle.percent.store(percent, Ordering::SeqCst);
        self.throttle.most.fetch_max(percent, Ordering::SeqCst);
        self.faults.hit("throttle")?;
        Ok(true)
    }

    fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn throttled(&self) -> Vec<Duration> {
        vec![Duration::from_millis(self.throttle.held_ms.load(Ordering::SeqCst))]
    }

    fn pause(&self) -> GuestResult<()> {
        self.faults.hit("pause")?;
        self.stop();
        Ok(())
    }

    fn resume(&self) -> GuestResult<()> {
        self.faults.hit("resume")?;
        if self.is_fenced() {
            self.world.violation(format!("{} was asked to run a fenced machine", self.host));
            return Err(GuestError::new("the machine is fenced"));
        }
        if !self.is_running() {
            self.go();
        }
        Ok(())
    }

    fn save_state(&self) -> GuestResult<Vec<StatePayload>> {
        self.faults.hit("save_state")?;
        if self.is_running() {
            self.world.violation("state was saved while the machine ran");
        }
        let bytes =
            postcard::to_stdvec(&*locked(&self.registers)).map_err(|error| GuestError::new(error.to_string()))?;
        Ok(vec![StatePayload { slot: self.layout.devices[0].clone(), bytes }])
    }

    fn fence(&self) -> GuestResult<()> {
        self.faults.hit("fence")?;
        if self.is_running() {
            self.world.violation("a running machine was fenced");
        }
        *locked(&self.fenced) = true;
        Ok(())
    }

    fn unfence(&self) -> GuestResult<()> {
        self.faults.hit("unfence")?;
        *locked(&self.fenced) = false;
        Ok(())
    }

    fn disks(&self) -> Vec<Arc<dyn SourceDisk>> {
        self.handles().map(|disk| Arc::new(disk) as _).collect()
    }
}

impl DestinationGuest for FakeMachine {
    fn prepare(&self, layout: &MachineLayout) -> GuestResult<()> {
        self.faults.hit("prepare")?;
        if layout != &self.layout {
            return Err(GuestError::new("this host cannot build such a machine"));
        }
        self.memory.clear();
        *self.run.write().unwrap_or_else(PoisonError::into_inner) = Run::Empty;
        *locked(&self.fenced) = false;
        Ok(())
    }

    fn write_pages(&self, first: u64, data: &[u8]) -> GuestResult<()> {
        self.faults.hit("write_pages")?;
        if self.run_state() != Run::Empty {
            self.world.violation("pages were stored into a machine that is not being built");
        }
        self.memory.write(first, data, false);
        Ok(())
    }

    fn zero_pages(&self, pages: Range<u64>) -> GuestResult<()> {
        self.faults.hit("zero_pages")?;
        for page in pages {
            self.memory.write(page, &[0; PAGE_BYTES as usize], false);
        }
        Ok(())
    }

    fn restore_state(&self, payloads: &[StatePayload]) -> GuestResult<()> {
        self.faults.hit("restore_state")?;
        if self.disks.iter().any(|disk| disk.unflushed() > 0) {
            self.world.violation("state was restored before the disks were on stable storage");
        }
        let payload = payloads.first().ok_or_else(|| GuestError::new("no state"))?;
        *locked(&self.registers) =
            postcard::from_bytes(&payload.bytes).map_err(|error| GuestError::new(error.to_string()))?;
        Ok(())
    }

    fn resume(&self) -> GuestResult<()> {
        self.faults.hit("destination.resume")?;
        self.memory.track(true);
        self.disks.iter().for_each(|disk| disk.track(true));
        self.go();
        Ok(())
    }

    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()> {
        self.faults.hit("destination.collect_dirty")?;
        self.memory.collect(into);
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> GuestResult<()> {
        self.faults.hit("destination.stop_dirty_tracking")?;
        self.memory.track(false);
        Ok(())
    }

    fn read_pages(&self, first: u64, buffer: &mut [u8]) -> GuestResult<()> {
        self.faults.hit("destination.read_pages")?;
        self.memory.read(first, buffer);
        Ok(())
    }

    fn disks(&self) -> Vec<Arc<dyn DestinationDisk>> {
        self.handles().map(|disk| Arc::new(disk) as _).collect()
    }

    fn discard(&self) {
        if self.is_running() {
            self.world.violation("a running machine was discarded");
        }
        *self.run.write().unwrap_or_else(PoisonError::into_inner) = Run::Discarded;
    }

    fn postcopy(&self) -> GuestResult<()> {
        match self.offers_postcopy.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err(GuestError::new("the test has not asked for post-copy")),
        }
    }

    fn forget_pages(&self, pages: &Bitmap) -> GuestResult<()> {
        self.faults.hit("forget_pages")?;
        // What must not be seen again is easily recognised.
        for page in (0..pages.len()).filter(|&page| pages.contains(page)) {
            self.memory.write(page, &[0xdd; PAGE_BYTES as usize], false);
        }
        Ok(())
    }

    fn expect_pages(&self, missing: &Bitmap) -> GuestResult<Arc<dyn Missing>> {
        self.faults.hit("expect_pages")?;
        let memory = Arc::clone(&self.memory);
        let store = Box::new(move |page: u64, data: Option<&[u8]>| {
            memory.write(page, data.unwrap_or(&[0; PAGE_BYTES as usize]), false);
        });
        Ok(Arrivals::expect(&self.memory.absent, &self.faults, missing, PAGE_BYTES as usize, store))
    }

    fn lose(&self, reason: &str) {
        *locked(&self.lost) = Some(reason.to_owned());
        self.memory.absent.lose();
        self.disks.iter().for_each(|disk| disk.absent.lose());
        self.stop();
    }
}
