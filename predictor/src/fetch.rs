//! Asks the processor for memory that is going to be needed.
//!
//! Of ten thousand machines nothing is in a cache when its turn comes, and waiting for it takes longer than what is then computed. What
//! is asked for while the machine before is computed is there in time. It is a hint: nothing is read, and nothing but the time depends on it.

/// Bytes that a processor fetches together.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Asks for all of `of`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn fetch<T: ?Sized>(of: &T) {
    use pulp::core_arch::x86::Sse;
    use std::arch::x86_64::_MM_HINT_T0;
    let (Some(sse), bytes) = (Sse::try_new(), size_of_val(of)) else { return };
    let start = std::ptr::from_ref(of).cast::<i8>();
    for at in (0..bytes).step_by(LINE) {
        sse._mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at));
    }
    // What does not begin where a line does may end in one more.
    sse._mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(bytes.saturating_sub(1)));
}

/// Asks for nothing: there is no such hint for this processor.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn fetch<T: ?Sized>(_of: &T) {}
