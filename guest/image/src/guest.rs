//! The main loop: one thread of control that looks at every part in turn and sleeps when none has anything to do.
//!
//! ```text
//!   ┌► take interrupts ─► network ─► disk, memory, balloon ─► processor ─► heartbeat ─┐
//!   │                                                     somebody wants "now" ─────┤
//!   └── hlt until an interrupt ◄── set the timer ◄── device interrupts on ◄─────────┘
//! ```

use alloc::string::ToString;
use alloc::vec::Vec;

use crate::net::{Control, Network};
use crate::protocol::message::{Reply, Request, Settings, Status};
use crate::protocol::{REQUEST_BYTES_MAX, workload::Workload};
use crate::time::{Clock, MICROSECOND, MILLISECOND, Next, SECOND, Timer};
use crate::work::balloon::Balloon;
use crate::work::cpu::Cpu;
use crate::work::disk::Disk;
use crate::work::heartbeat::Heartbeat;
use crate::work::memory::Memory;
use crate::work::rate::Meter;
use crate::{power, ring0, say};

/// Time between the answer to a request to switch off and doing it.
const POWER_OFF_AFTER: u64 = 20 * MILLISECOND;

/// What the main loop knows of its own punctuality.
#[derive(Default)]
struct Stall {
    /// When the next pass is due at the latest.
    due: u64,
    longest: u64,
}

/// Everything but the network.
struct Machine {
    clock: Clock,
    workload: Workload,
    memory: Memory,
    disk: Option<Disk>,
    balloon: Option<Balloon>,
    cpu: Cpu,
    heartbeat: Heartbeat,
    stall: Stall,
    idle: Meter,
    frames: (u64, u64),
    ready: bool,
    power_off_at: Option<u64>,
}

/// The guest.
pub struct Guest {
    machine: Machine,
    network: Option<Network>,
    timer: Timer,
}

impl Guest {
    /// Puts the parts together.
    pub fn new(
        clock: Clock,
        timer: Timer,
        workload: Workload,
        memory: Memory,
        disk: Option<Disk>,
        network: Option<Network>,
        balloon: Option<Balloon>,
    ) -> Self {
        let heartbeat = Heartbeat::new(workload.heartbeat_ms, clock.now());
        let machine = Machine {
            clock,
            workload,
            memory,
            disk,
            balloon,
            cpu: Cpu::default(),
            heartbeat,
            stall: Stall::default(),
            idle: Meter::default(),
            frames: (0, 0),
            ready: false,
            power_off_at: None,
        };
        Self { machine, network, timer }
    }

    /// Runs for ever.
    pub fn run(mut self) -> ! {
        self.machine.stall.due = self.machine.clock.now();
        loop {
            let next = self.pass();
            if next != Next::Now {
                self.sleep(next);
            }
        }
    }

    /// Looks at every part once.
    fn pass(&mut self) -> Next {
        let Self { machine, network, .. } = self;
        let now = machine.clock.now();
        machine.stall.longest = machine.stall.longest.max(now.saturating_sub(machine.stall.due));
        machine.stall.due = now;
        let next = network.as_mut().map_or(Next::Never, |network| {
            machine.frames = network.counters();
            network.poll(now, machine)
        });
        next.or(machine.work(now))
    }

    /// Waits for the time that `next` says, or an interrupt. Frames and finished requests that came since the pass keep it
    /// from sleeping: interrupts are switched on first, then looked for.
    fn sleep(&mut self, next: Next) {
        let Self { machine, network, timer } = self;
        let busy = network.as_mut().is_some_and(|network| network.set_interrupts(true))
            | machine.disk.as_mut().is_some_and(|disk| disk.set_interrupts(true))
            | machine.balloon.as_mut().is_some_and(|balloon| balloon.set_interrupts(true));
        if !busy {
            let start = machine.clock.now();
            let deadline = match next {
                Next::At(time) => time,
                Next::Now | Next::Never => start + SECOND,
            };
            timer.arm(start, deadline);
            ring0::idle();
            let end = machine.clock.now();
            machine.idle.count(end - start);
            // Sleeping until the deadline was intended; the loop is late from then on.
            machine.stall.due = deadline.max(start).min(end);
        }
        if let Some(network) = network {
            network.set_interrupts(false);
        }
        if let Some(disk) = &mut machine.disk {
            disk.set_interrupts(false);
        }
        if let Some(balloon) = &mut machine.balloon {
            balloon.set_interrupts(false);
        }
    }
}

impl Machine {
    /// One piece of each kind of work.
    fn work(&mut self, now: u64) -> Next {
        self.idle.update(now);
        if power::asked() {
            self.power_off_at = Some(now);
        }
        if self.power_off_at.is_some_and(|time| time <= now) {
            power::off();
        }
        let mut next = self.heartbeat.poll(now).or(self.power_off_at.map_or(Next::Never, Next::At));
        if !self.ready {
            if self.memory.fill(&self.clock) {
                return Next::Now;
            }
            self.begin();
        }
        if let Some(disk) = &mut self.disk {
            next = next.or(disk.poll(now));
        }
        next = next.or(self.memory.poll(&self.clock));
        if let Some(balloon) = &mut self.balloon {
            next = next.or(balloon.poll(now, &mut self.memory));
        }
        next.or(self.cpu.poll(&self.clock))
    }

    /// The memory is filled: the workload begins.
    fn begin(&mut self) {
        self.ready = true;
        self.apply();
        say!("headroom-guest ready");
        say!("headroom-guest {} ms after the entry, doing {}", self.clock.since_entry() / MILLISECOND, self.workload);
    }

    /// Tells the parts what the workload is, and the workload what they make of it.
    fn apply(&mut self) {
        let workload = &mut self.workload;
        workload.fill_mib = self.memory.set_fill(workload.fill_mib);
        if self.ready {
            self.memory.set_churn(workload.churn_mib, workload.churn_mib_per_second);
            workload.sweep_mib = self.memory.set_sweep(workload.sweep_mib, workload.sweep_mib_per_second);
            workload.disk_mib = match &mut self.disk {
                Some(disk) => disk.set(workload.disk_mib, workload.disk_mib_per_second),
                None => 0,
            };
            self.cpu.set(workload.cpu_percent);
        }
        self.heartbeat.set(workload.heartbeat_ms, self.clock.now());
    }

    fn change(&mut self, settings: &Settings) {
        settings.apply(&mut self.workload);
        self.apply();
        if settings.reset_stall {
            self.stall.longest = 0;
        }
        if settings.verify_fill {
            self.memory.verify_fill();
        }
        if settings.power_off {
            self.power_off_at = Some(self.clock.now() + POWER_OFF_AFTER);
        }
    }

    fn status(&self, id: Option<u64>) -> Status {
        let memory = self.memory.figures();
        let disk = self.disk.as_ref().map(Disk::counters).unwrap_or_default();
        let idle_percent = (self.idle.per_second() / (SECOND / 100)).min(100) as u8;
        Status {
            id,
            ready: self.ready,
            heartbeat: self.heartbeat.count(),
            uptime_ms: self.clock.now() / MILLISECOND,
            sweep_step: memory.step,
            sweep_pages_checked: memory.checked,
            sweep_errors: memory.defects.total(),
            sweep_lost: memory.defects.lost,
            sweep_stale: memory.defects.stale,
            sweep_torn: memory.defects.torn,
            sweep_mib_per_second: memory.mib_per_second,
            disk_sequence: disk.sequence,
            disk_blocks_written: disk.blocks_written,
            disk_blocks_checked: disk.blocks_checked,
            disk_flushes: disk.flushes,
            disk_errors: disk.defects.total() + disk.io_errors,
            disk_io_errors: disk.io_errors,
            disk_mib_per_second: self.disk.as_ref().map_or(0, Disk::mib_per_second),
            cpu_percent: 100 - idle_percent,
            work_units: self.cpu.units(),
            fill_pages: memory.filled,
            fill_pages_checked: memory.fill_checked,
            fill_errors: memory.fill_errors,
            churn_pages_checked: memory.churn_checked,
            churn_errors: memory.churn_errors,
            free_mib: memory.free_mib,
            given_mib: memory.given_mib,
            balloon_mib: memory.balloon_mib,
            network_received: self.frames.0,
            network_sent: self.frames.1,
            longest_stall_us: self.stall.longest / MICROSECOND,
            workload: self.workload.clone(),
        }
    }
}

impl Control for Machine {
    fn answer(&mut self, request: &[u8]) -> Vec<u8> {
        let reply = if request.len() > REQUEST_BYTES_MAX {
            Reply::Error { error: "the request is longer than 2048 bytes".to_string() }
        } else {
            match serde_json::from_slice::<Request>(request) {
                Ok(request) => {
                    if let Some(settings) = &request.set {
                        self.change(settings);
                    }
                    Reply::Status(self.status(request.id))
                }
                Err(error) => Reply::Error { error: error.to_string() },
            }
        };
        // Numbers and strings always serialize.
        serde_json::to_vec(&reply).unwrap_or_default()
    }
}
