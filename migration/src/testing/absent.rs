//! What has not arrived at a fake machine yet: its guest waits for it, as on userfaultfd.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Faults;
use crate::guest::{GuestResult, Missing};
use crate::page::Bitmap;

/// Absent pages or blocks.
pub struct Absent {
    state: Mutex<State>,
    changed: Condvar,
    /// Whether any are, so that a machine that has everything pays little.
    any: AtomicBool,
    lost: AtomicBool,
    bell: (UnixStream, UnixStream),
}

#[derive(Default)]
struct State {
    absent: Bitmap,
    wanted: Vec<u64>,
    /// Told of already.
    told: HashSet<u64>,
    /// Filled twice: the second copy must change nothing.
    duplicates: u64,
}

impl Absent {
    /// Nothing is.
    pub fn new() -> Arc<Self> {
        let bell = UnixStream::pair().expect("a pair of sockets");
        bell.0.set_nonblocking(true).and_then(|()| bell.1.set_nonblocking(true)).expect("nonblocking sockets");
        Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            any: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            bell,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `number` is there, or will never be.
    pub fn wait(&self, number: u64) {
        if !self.any.load(Ordering::SeqCst) {
            return;
        }
        let mut state = self.state();
        while state.absent.contains(number) && !self.is_lost() {
            if state.told.insert(number) {
                state.wanted.push(number);
                let _ = (&self.bell.0).write(&[1]);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Copies that came although the thing was there.
    pub fn duplicates(&self) -> u64 {
        self.state().duplicates
    }

    /// Nobody waits any more: the machine is stopped for good.
    pub fn lose(&self) {
        let _state = self.state();
        self.lost.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Whether it is.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }
}

/// Stores one page or block, or zeroes.
pub(super) type Store = Box<dyn Fn(u64, Option<&[u8]>) + Send + Sync>;

/// The engine's view of it.
pub(super) struct Arrivals {
    absent: Arc<Absent>,
    faults: Arc<Faults>,
    bytes: usize,
    store: Store,
}

impl Arrivals {
    pub(super) fn expect(
        absent: &Arc<Absent>,
        faults: &Arc<Faults>,
        missing: &Bitmap,
        bytes: usize,
        store: Store,
    ) -> Arc<dyn Missing> {
        absent.state().absent = missing.clone();
        absent.any.store(true, Ordering::SeqCst);
        Arc::new(Self { absent: Arc::clone(absent), faults: Arc::clone(faults), bytes, store })
    }

    fn one(&self, number: u64, data: Option<&[u8]>) {
        let mut state = self.absent.state();
        if state.absent.contains(number) {
            (self.store)(number, data);
            state.absent.remove(number);
            self.absent.changed.notify_all();
        } else {
            state.duplicates += 1;
        }
    }
}

impl Missing for Arrivals {
    fn ready(&self) -> BorrowedFd<'_> {
        self.absent.bell.1.as_fd()
    }

    fn wanted(&self, into: &mut Vec<u64>) -> GuestResult<()> {
        self.faults.hit("missing.wanted")?;
        let mut state = self.absent.state();
        while matches!((&self.absent.bell.1).read(&mut [0; 64]), Ok(1..)) {}
        into.append(&mut state.wanted);
        Ok(())
    }

    fn fill(&self, first: u64, data: &[u8]) -> GuestResult<()> {
        self.faults.hit("missing.fill")?;
        for (number, bytes) in (first..).zip(data.chunks(self.bytes)) {
            self.one(number, Some(bytes));
        }
        Ok(())
    }

    fn fill_zero(&self, range: Range<u64>) -> GuestResult<()> {
        self.faults.hit("missing.fill_zero")?;
        range.for_each(|number| self.one(number, None));
        Ok(())
    }

    fn finish(&self) -> GuestResult<()> {
        self.faults.hit("missing.finish")?;
        let mut state = self.absent.state();
        *state = State { duplicates: state.duplicates, ..State::default() };
        self.absent.any.store(false, Ordering::SeqCst);
        self.absent.changed.notify_all();
        Ok(())
    }
}
