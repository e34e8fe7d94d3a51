//! The observer's thread: one loop over all sockets and timers.

use std::io;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::EventFd;

use super::epoll::{Pace, Poller, raise_priority};
use super::tcp::TcpProbe;
use super::udp::UdpProbe;
use super::{Clock, Order, Record, Target};

/// Token of the wake-up descriptor; the others are `4 * target + kind`.
const WAKE: u64 = u64::MAX;

const UDP_READY: u64 = 0;
const UDP_PACE: u64 = 1;
const TCP_READY: u64 = 2;
const TCP_PACE: u64 = 3;

/// After a stall no more requests than this are sent at once.
const BURST_MAX: u64 = 20;

struct Probe {
    udp: UdpProbe,
    udp_pace: Pace,
    tcp: TcpProbe,
    tcp_pace: Pace,
}

pub(super) struct Worker {
    poller: Poller,
    probes: Vec<Probe>,
    records: Arc<Vec<Mutex<Record>>>,
    orders: Receiver<Order>,
    wake: Arc<EventFd>,
}

impl Worker {
    /// Makes all sockets, in the namespace of the calling thread.
    pub(super) fn new(
        targets: &[Target],
        records: Arc<Vec<Mutex<Record>>>,
        orders: Receiver<Order>,
        wake: Arc<EventFd>,
        clock: Clock,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(&*wake, WAKE)?;
        let mut probes = Vec::with_capacity(targets.len());
        for (index, target) in targets.iter().enumerate() {
            let tcp = TcpProbe::connect(target.address, clock)
                .map_err(|error| io::Error::new(error.kind(), format!("TCP to {}: {error}", target.name)))?;
            let probe = Probe {
                udp: UdpProbe::new(target.address, clock)?,
                udp_pace: Pace::new(target.udp_per_second)?,
                tcp,
                tcp_pace: Pace::new(target.tcp_per_second)?,
            };
            let token = index as u64 * 4;
            poller.add(&probe.udp, token + UDP_READY)?;
            poller.add(&probe.udp_pace, token + UDP_PACE)?;
            poller.add(&probe.tcp, token + TCP_READY)?;
            poller.add(&probe.tcp_pace, token + TCP_PACE)?;
            probes.push(probe);
        }
        Ok(Self { poller, probes, records, orders, wake })
    }

    /// Runs until told to stop.
    pub(super) fn run(&mut self) {
        raise_priority();
        loop {
            let Ok(tokens) = self.poller.wait() else { return };
            for token in tokens {
                if token == WAKE {
                    // Only the count of wake-ups: the orders say what for.
                    let _ = self.wake.read();
                    if !self.obey() {
                        return;
                    }
                } else {
                    self.serve(token);
                }
            }
        }
    }

    fn serve(&mut self, token: u64) {
        let Ok(index) = usize::try_from(token / 4) else { return };
        let (Some(probe), Some(record)) = (self.probes.get_mut(index), self.records.get(index)) else { return };
        let mut record = lock(record);
        let record = &mut *record;
        match token % 4 {
            UDP_READY => probe.udp.receive(&mut record.series),
            UDP_PACE => (0..probe.udp_pace.elapsed().min(BURST_MAX)).for_each(|_| probe.udp.send(&mut record.series)),
            TCP_READY => {
                if !probe.tcp.receive(&mut record.tcp) {
                    self.poller.remove(&probe.tcp);
                }
            }
            _ => (0..probe.tcp_pace.elapsed().min(BURST_MAX)).for_each(|_| probe.tcp.send(&mut record.tcp)),
        }
    }

    /// Carries out what was ordered; false if that is to end.
    fn obey(&mut self) -> bool {
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Stop => return false,
                Order::Rates(index, udp, tcp) => {
                    if let Some(probe) = self.probes.get_mut(index) {
                        // A refused timer keeps its old pace.
                        let _ = probe.udp_pace.set(udp);
                        let _ = probe.tcp_pace.set(tcp);
                    }
                }
            }
        }
        true
    }
}

fn lock(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}
