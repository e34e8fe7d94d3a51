//! The outside observer: what a client of a machine sees while it is moved.
//!
//! A thread inside the observer's namespace sends UDP echo requests (port 7) at an exact pace and holds a TCP connection to
//! the same port, for each machine. Nothing it measures comes from the VMM.
//!
//! # What is measured
//!
//! * **Network gap**: the longest time between the arrivals of two consecutive replies within a window, and, if the window
//!   ends in silence, the time since the last one. Nothing is subtracted: at 1,000 requests a second an undisturbed
//!   machine shows a gap of about 1 ms plus the variation of its answers. A reply that overtakes an earlier one counts as
//!   an arrival like any other.
//! * **Outage**: the longest time between the sends of two requests that were answered, however late, with only lost ones in
//!   between: this is what the outside sees of a downtime, and what is compared with the reported one. The gap
//!   contains it, and in addition whatever made answers late, such as a computer that is busy with something else.
//! * **Arrival** is the moment at which the kernel received the frame (`SO_TIMESTAMPNS`), so a late wake-up of this thread
//!   is not mistaken for a silent machine. The pace of sending is another matter: when this thread cannot send, nobody can
//!   answer. [`UdpSummary::send_stall_ms`] is the longest time between two sends in the window, so that the reader can
//!   tell.
//! * **Lost**: requests without a reply one second after they were sent.
//! * **Round-trip times** of all answered requests, as percentiles.
//! * **TCP**: every byte that comes back is compared with the byte that was sent at that place of the stream.
//!
//! Times are nanoseconds since the observer was started, by the monotonic clock.

mod epoll;
mod series;
mod tcp;
mod udp;
mod worker;

use std::net::Ipv4Addr;
use std::ops::Range;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::sys::eventfd::EventFd;
use serde::Serialize;

pub use series::{Series, UdpSummary};
pub use tcp::TcpSummary;

use crate::lab::namespace::Namespace;
use crate::lab::{LabError, LabResult};

/// Port of the guest's echo services.
pub const ECHO_PORT: u16 = 7;

/// One machine to be observed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// UDP requests a second; 0 is none.
    pub udp_per_second: u32,
    /// TCP messages of [`tcp::MESSAGE_BYTES`] a second; 0 keeps the connection and sends nothing.
    pub tcp_per_second: u32,
}

/// Order to the worker.
pub(crate) enum Order {
    /// Change the pace of target number `.0` to so many requests and messages a second.
    Rates(usize, u32, u32),
    /// End.
    Stop,
}

/// What the worker has seen of one target.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) series: Series,
    pub(crate) tcp: TcpSummary,
}

/// A running observer. Dropping it ends its thread.
pub struct Observer {
    targets: Vec<Target>,
    records: Arc<Vec<Mutex<Record>>>,
    orders: Sender<Order>,
    wake: Arc<EventFd>,
    clock: Clock,
    thread: Option<JoinHandle<()>>,
}

/// Nanoseconds of the monotonic clock since its start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(std::time::Instant);

impl Clock {
    pub(crate) fn now(self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Observer {
    /// Starts to observe from inside `namespace`, with all TCP connections made.
    ///
    /// # Errors
    /// When the namespace cannot be entered, a socket cannot be made or a target does not accept a TCP connection.
    pub fn start(namespace: &Namespace, targets: Vec<Target>) -> LabResult<Self> {
        let clock = Clock(std::time::Instant::now());
        let failed = |source| LabError::Io { action: "open", path: "a socket of the observer".into(), source };
        let wake = Arc::new(EventFd::new().map_err(|errno| failed(errno.into()))?);
        let records: Arc<Vec<Mutex<Record>>> = Arc::new(targets.iter().map(|_| Mutex::default()).collect());
        let (orders, inbox) = channel();
        let worker =
            namespace.run(|| worker::Worker::new(&targets, Arc::clone(&records), inbox, Arc::clone(&wake), clock))?;
        let mut worker = worker.map_err(failed)?;
        // Sockets stay in the namespace in which they were made: the thread itself need not be there.
        let thread = std::thread::Builder::new().name("observer".into()).spawn(move || worker.run()).map_err(failed)?;
        Ok(Self { targets, records, orders, wake, clock, thread: Some(thread) })
    }

    /// Nanoseconds since the start.
    pub fn now(&self) -> u64 {
        self.clock.now()
    }

    /// The machines under observation.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Changes the pace for one machine; unknown names are ignored. Returns the moment from which it holds.
    pub fn set_rates(&self, name: &str, udp_per_second: u32, tcp_per_second: u32) -> u64 {
        if let Some(index) = self.index(name) {
            // A worker that has ended does not need orders.
            let _ = self.orders.send(Order::Rates(index, udp_per_second, tcp_per_second));
            let _ = self.wake.write(1);
        }
        self.now()
    }

    /// UDP as seen within `window` (nanoseconds since the start).
    pub fn udp(&self, name: &str, window: Range<u64>) -> Option<UdpSummary> {
        let now = self.now();
        self.record(name).map(|record| record.series.summary(window.start..window.end.min(now), now))
    }

    /// Longest silence of which a part lies in `window`, in milliseconds.
    pub fn silence_over(&self, name: &str, window: &Range<u64>) -> Option<f64> {
        self.record(name)?.series.silence_over(window).map(|silence| silence as f64 / 1e6)
    }

    /// TCP so far.
    pub fn tcp(&self, name: &str) -> Option<TcpSummary> {
        self.record(name).map(|record| record.tcp.clone())
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.targets.iter().position(|target| target.name == name)
    }

    fn record(&self, name: &str) -> Option<MutexGuard<'_, Record>> {
        let record = self.records.get(self.index(name)?)?;
        Some(record.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::Stop);
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
