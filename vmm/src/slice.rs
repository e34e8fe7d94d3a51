//! How soon a thread that wakes gets its processor.
//!
//! Since Linux 6.12 a thread can ask for short time slices (`sched_setattr`(2), `sched_runtime` of `SCHED_OTHER`). It gets no more of a
//! processor than before, but in smaller pieces: when it wakes it takes the place of a thread with longer slices at once, which otherwise
//! keeps the processor until its own slice is over. Where processors are short, that is a tick of the clock or two for the thread of a
//! device, and as much again for the vCPU that it interrupts. Older kernels ignore the request.

use std::mem::MaybeUninit;
use std::time::Duration;

/// For threads that sleep most of the time and do little when they wake.
pub(crate) const DEVICE: Duration = Duration::from_micros(200);

/// For guests: below what other threads have (0.7 ms and more, with the number of processors), above devices.
pub(crate) const VCPU: Duration = Duration::from_micros(500);

/// Asks for slices of this length, from 0.1 to 100 ms, for the calling thread. Leaves threads alone that the operator has put into another
/// scheduling class.
pub(crate) fn ask_for(slice: Duration) {
    let Some(mut attributes) = current() else { return };
    if attributes.sched_policy != libc::SCHED_OTHER as u32 {
        return;
    }
    attributes.sched_runtime = slice.as_nanos() as u64;
    // SAFETY: the kernel reads a structure that lives until the call returns and whose size is in it; 0 is the calling thread.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "a thread keeps its usual time slices");
    }
}

/// How the calling thread is scheduled.
fn current() -> Option<libc::sched_attr> {
    let mut attributes = MaybeUninit::<libc::sched_attr>::zeroed();
    let size = size_of::<libc::sched_attr>();
    // SAFETY: the kernel writes at most `size` bytes to a structure of that size; 0 is the calling thread.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, attributes.as_mut_ptr(), size, 0) };
    // SAFETY: all of it was zero, which is a value of each field, before the kernel wrote to it.
    (result == 0).then(|| unsafe { attributes.assume_init() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_the_slices_it_asked_for_and_is_otherwise_as_before() {
        let check = || {
            let before = current().unwrap();
            ask_for(VCPU);
            let after = current().unwrap();
            let kept = |attributes: &libc::sched_attr| {
                (attributes.sched_policy, attributes.sched_nice, attributes.sched_flags)
            };
            assert_eq!(kept(&after), kept(&before));
            // A kernel that knows of slices tells the usual one, others tell nothing.
            let expected = if before.sched_runtime == 0 { 0 } else { VCPU.as_nanos() as u64 };
            assert_eq!(after.sched_runtime, expected);
        };
        std::thread::spawn(check).join().unwrap();
    }
}
