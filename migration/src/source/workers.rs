//! The threads of the data channels at the source.
//!
//! A worker owns one channel for the whole migration. Rounds are handed to all workers at once; a round is over when each
//! has sent its marker and the destination has acknowledged it, so no page of a later round can overtake one of an earlier
//! round on another channel.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::context::{Context, Sent, by_peer};
use super::disk::DiskWorker;
use super::job::{Carry, Job, Share};
use super::memory::MemoryWorker;
use crate::error::MigrationError;
use crate::transport::channels::Channel;
use crate::transport::limiter::Limiter;
use crate::urgency::Bulk;
use crate::wire::WireError;
use crate::wire::handshake::{Role, Welcome};
use crate::wire::message::{Message, Totals};
use crate::wire::version::REUSE;

pub(super) struct Finished {
    pub(super) role: Role,
    pub(super) result: Result<Share, MigrationError>,
    pub(super) at: Instant,
}

struct Worker {
    role: Role,
    jobs: Sender<Job>,
    socket: TcpStream,
    thread: JoinHandle<()>,
}

/// All data channels.
pub(super) struct Workers {
    workers: Vec<Worker>,
    finished: Receiver<Finished>,
}

impl Workers {
    pub(super) fn start(
        context: &Context,
        sent: &Sent,
        memory: Vec<Channel>,
        disk: Option<(Channel, Welcome)>,
    ) -> Result<Self, MigrationError> {
        let (report, finished) = mpsc::channel();
        let limiter = Arc::new(Limiter::new(context.control.clone()));
        let mut workers = Vec::new();
        for channel in memory {
            let worker = MemoryWorker::new(context, sent, Arc::clone(&limiter));
            workers.push(Worker::spawn(channel, worker, report.clone())?);
        }
        if let Some((channel, welcome)) = disk {
            let reuse = welcome.features.iter().any(|name| name == REUSE);
            let worker = DiskWorker::new(context, sent, limiter, reuse)?;
            workers.push(Worker::spawn(channel, worker, report)?);
        }
        Ok(Self { workers, finished })
    }

    /// Starts a round on every channel; returns how many will finish it.
    pub(super) fn start_round(&self, job: &Job) -> Result<usize, MigrationError> {
        for worker in &self.workers {
            worker.jobs.send(job.clone()).map_err(|_| MigrationError::Bug("data channel"))?;
        }
        Ok(self.workers.len())
    }

    /// The next channel that has finished its share, if there is one within `wait`.
    pub(super) fn finished(&self, wait: Duration) -> Result<Option<(Role, Share, Instant)>, MigrationError> {
        match self.finished.recv_timeout(wait) {
            Ok(Finished { role, result, at }) => Ok(Some((role, result?, at))),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(MigrationError::Bug("data channel")),
        }
    }

    /// Cuts all data channels off and waits for their threads.
    pub(super) fn end(self) {
        for worker in &self.workers {
            let _ = worker.socket.shutdown(Shutdown::Both);
        }
        for Worker { role, jobs, thread, .. } in self.workers {
            drop(jobs);
            if thread.join().is_err() {
                tracing::error!(%role, "the thread of a data channel panicked");
            }
        }
    }
}

impl Worker {
    fn spawn(channel: Channel, mut carrier: impl Carry, report: Sender<Finished>) -> Result<Self, MigrationError> {
        let role = channel.role();
        let socket = channel.socket()?;
        let (jobs, todo) = mpsc::channel::<Job>();
        let span = tracing::Span::current();
        let work = move || {
            let _entered = span.enter();
            let bulk = Bulk::here();
            let mut channel = channel;
            let mut totals = Totals::default();
            for job in todo {
                if job.last {
                    bulk.hurry();
                }
                let result = round(&mut carrier, &job, &mut channel, &mut totals);
                let failed = result.is_err();
                if report.send(Finished { role, result, at: Instant::now() }).is_err() || failed {
                    return;
                }
            }
            channel.close();
        };
        let thread = std::thread::Builder::new()
            .name(format!("send {role}"))
            .spawn(work)
            .map_err(|error| MigrationError::Options(format!("no thread for the {role} channel: {error}")))?;
        Ok(Self { role, jobs, socket, thread })
    }
}

fn round(
    carrier: &mut impl Carry,
    job: &Job,
    channel: &mut Channel,
    totals: &mut Totals,
) -> Result<Share, MigrationError> {
    let start = Instant::now();
    let mut share = carrier.carry(job, channel)?;
    share.settle = acknowledge(job, channel, totals, &share)?;
    share.busy = start.elapsed();
    carrier.acknowledged(job);
    while let Some(mut more) = carrier.carry_on(job, channel)? {
        more.settle = acknowledge(job, channel, totals, &more)?;
        carrier.acknowledged(job);
        share.follow(&more);
    }
    Ok(share)
}

/// Waits until what was sent has arrived. Returns for how long.
fn acknowledge(
    job: &Job,
    channel: &mut Channel,
    totals: &mut Totals,
    share: &Share,
) -> Result<Duration, MigrationError> {
    totals.data += share.totals.data;
    totals.zero += share.totals.zero;
    channel.send(&Message::RoundEnd { round: job.round, last: job.last, totals: *totals })?;
    let sent = Instant::now();
    match channel.receive("waiting for a round to be acknowledged").map_err(by_peer)? {
        Message::RoundAck { round } if round == job.round => Ok(sent.elapsed()),
        other => Err(WireError::Unexpected { found: other.name(), expected: "RoundAck" }.into()),
    }
}
