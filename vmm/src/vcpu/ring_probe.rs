//! Whether this host's KVM stops a vCPU in time when its dirty ring is full.
//!
//! KVM keeps a part of a ring in reserve, looks at each entry to the guest whether the rest is used up, and leaves with
//! `KVM_EXIT_DIRTY_RING_FULL` (KVM API, 8.29). That is enough where each write to a protected page leaves the guest. A KVM that
//! emulates the guest's kernel code many instructions at a time looks too seldom: it writes past the reserve, over entries that
//! nobody has read, and those pages are lost.
//!
//! So a throw-away machine writes more pages than a small ring may hold, though not more than it has entries, and it is counted how
//! many are used when it stops. Nothing overflows in the attempt: a kernel would complain of that in its log.

use std::fmt::Display;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::shared::{install_kick_handler, kick_signal};
use crate::boot::{self, Entry};
use crate::kvm::dirty_ring::{self, EXIT_RING_FULL, Ring};
use crate::kvm::{Host, irq};
use crate::memory::{Memory, Slots};

/// Entries of the ring that is tried.
const ENTRIES: u32 = 1024;
/// Pages that are written in a pass. KVM's reserve is 64 entries at least (`KVM_DIRTY_RING_RSVD_ENTRIES`), so that a ring is full
/// before the end of a pass, and there is room for all of them.
const PAGES: u32 = ENTRIES - 4;
/// Most entries that may be used when the vCPU stops: the reserve, of which a last instruction may use some.
const MOST: u32 = ENTRIES - 48;
/// So many times it has to stop in time: a batch of instructions may end in the right place by chance.
const STOPS: u32 = 8;

const MEMORY_MIB: u64 = 16;
const CODE: u64 = 0x10_0000;
const DATA: u32 = 0x20_0000;
/// Written to at the end of a pass (POST codes).
const PORT: u8 = 0x80;

/// It takes some milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);
/// After it the vCPU is kicked so often, for a second.
const KICKS: (Duration, u32) = (Duration::from_millis(10), 100);

/// Dirty rings cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// Entries would be lost.
    #[error(
        "this host's KVM stops a vCPU too late when its dirty ring is full ({used} of {ENTRIES} entries were used, {MOST} may be), as one does that emulates kernel code"
    )]
    Late {
        /// Entries that were used when it stopped.
        used: u32,
    },
    /// It does not stop, or does not record.
    #[error("this host's KVM neither records all pages that a vCPU writes nor stops it when its dirty ring is full")]
    Never,
    /// It does not come back.
    #[error("a vCPU with a dirty ring did not leave the guest within {DEADLINE:?}")]
    Hangs,
    /// The attempt itself.
    #[error("dirty rings could not be tried: {0}")]
    Failed(String),
}

fn failed(error: impl Display) -> Unfit {
    Unfit::Failed(error.to_string())
}

/// Tries it, in a thread that is abandoned if it does not come back.
///
/// # Errors
///
/// [`Unfit`] says why rings must not be used.
pub fn stops_in_time(host: &Host) -> Result<(), Unfit> {
    install_kick_handler();
    let vm = host.create_vm(Some(ENTRIES)).map_err(failed)?;
    let abandoned = Arc::new(AtomicBool::new(false));
    let (sender, receiver) = channel();
    let given_up = Arc::clone(&abandoned);
    let attempt = move || {
        let result = Attempt::new(vm).and_then(|mut attempt| attempt.run(&given_up));
        let _ = sender.send(result);
    };
    let thread = std::thread::Builder::new().name("ring-probe".into()).spawn(attempt).map_err(failed)?;
    match receiver.recv_timeout(DEADLINE) {
        Ok(result) => {
            let _ = thread.join();
            result
        }
        Err(RecvTimeoutError::Disconnected) => Err(Unfit::Failed("its thread panicked".into())),
        Err(RecvTimeoutError::Timeout) => {
            abandoned.store(true, Ordering::Release);
            // Again and again, since a signal that comes before KVM_RUN is lost.
            let came = (0..KICKS.1).any(|_| {
                // SAFETY: the thread has neither been joined nor detached, so that its id is valid.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
                receiver.recv_timeout(KICKS.0).is_ok()
            });
            if came {
                let _ = thread.join();
            }
            Err(Unfit::Hangs)
        }
    }
}

/// A machine of one vCPU that writes pages.
struct Attempt {
    // Dropped in this order: the ring is a mapping of the vCPU's, the slots lead into the memory.
    ring: Ring,
    vcpu: VcpuFd,
    _slots: Slots,
    vm: Arc<VmFd>,
}

impl Attempt {
    fn new(vm: VmFd) -> Result<Self, Unfit> {
        let vm = Arc::new(vm);
        irq::create(&vm).map_err(failed)?;
        let memory = Memory::new(MEMORY_MIB).map_err(failed)?;
        let slots = Slots::new(Arc::clone(&vm), memory.clone());
        let vcpu = vm.create_vcpu(0).map_err(failed)?;
        let ring = Ring::new(&vcpu, ENTRIES).map_err(failed)?;
        memory.ram().write_slice(&code(), GuestAddress(CODE)).map_err(failed)?;
        boot::enter(&vcpu, memory.ram(), Entry::Pvh { entry: CODE }).map_err(failed)?;
        slots.log(true).map_err(failed)?;
        Ok(Self { ring, vcpu, _slots: slots, vm })
    }

    fn run(&mut self, given_up: &AtomicBool) -> Result<(), Unfit> {
        let (mut stops, mut stopped_in_pass) = (0, false);
        let start = Instant::now();
        while stops < STOPS {
            if given_up.load(Ordering::Acquire) || start.elapsed() > DEADLINE {
                return Err(Unfit::Hangs);
            }
            match self.vcpu.run() {
                Ok(VcpuExit::Unsupported(EXIT_RING_FULL)) => {
                    self.empty()?;
                    (stops, stopped_in_pass) = (stops + 1, true);
                }
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(PORT) => {
                    self.empty()?;
                    if !std::mem::take(&mut stopped_in_pass) {
                        return Err(Unfit::Never);
                    }
                }
                Ok(other) => return Err(Unfit::Failed(format!("KVM left the guest with {other:?}"))),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    fn empty(&mut self) -> Result<(), Unfit> {
        let used = self.ring.harvest(|_, _| ());
        if used > MOST {
            return Err(Unfit::Late { used });
        }
        dirty_ring::reset(&self.vm).map_err(failed).map(drop)
    }
}

/// Writes a word to each page, one instruction a page, tells the port, and begins again.
fn code() -> Vec<u8> {
    let mut code = Vec::with_capacity(PAGES as usize * 5 + 7);
    for page in 0..PAGES {
        code.push(0xa3); // mov [page], eax
        code.extend_from_slice(&(DATA + page * 4096).to_le_bytes());
    }
    code.extend_from_slice(&[0xe6, PORT]); // out PORT, al
    let back = -i32::try_from(code.len() + 5).unwrap_or(0);
    code.push(0xe9); // jmp back
    code.extend_from_slice(&back.to_le_bytes());
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::capability::host_for_test;

    #[test]
    fn the_code_fits_and_ends_where_it_begins() {
        let code = code();
        assert!(CODE + (code.len() as u64) < u64::from(DATA));
        assert!(u64::from(DATA + PAGES * 4096) <= MEMORY_MIB << 20);
        let back = i32::from_le_bytes(code[code.len() - 4..].try_into().unwrap());
        assert_eq!(code.len() as i32 + back, 0);
    }

    /// What comes of it depends on the host; that it comes, and always the same, does not.
    #[test]
    fn it_is_found_out_whether_rings_can_be_used() {
        let Some(host) = host_for_test("it_is_found_out_whether_rings_can_be_used") else { return };
        if host.capabilities().dirty_ring.is_none() {
            eprintln!("dirty rings are not tried: this host's KVM has none");
            return;
        }
        let start = Instant::now();
        let results: Vec<_> = (0..3).map(|_| stops_in_time(&host).map_err(|unfit| unfit.to_string())).collect();
        eprintln!("{:?} in {:?}", results[0], start.elapsed() / 3);
        assert!(results.iter().all(|result| result.is_ok() == results[0].is_ok()), "{results:?}");
        assert!(
            !results.iter().any(|result| matches!(result, Err(text) if text.contains("could not be tried"))),
            "{results:?}"
        );
    }
}
