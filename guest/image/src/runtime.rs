//! What a program without a C library has to bring along: memory functions, symbols of unwinding, the panic handler, and
//! the report of a fault.

use core::arch::asm;
use core::panic::PanicInfo;

use crate::{ring0, say};

/// `rep movsb` is the fast way on every processor with KVM; it is also immune to the compiler turning a copy loop into a
/// call of itself.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller passes two valid areas of `bytes` bytes that do not overlap.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: the target does not begin inside the source, so copying upwards is right; else as the caller promises.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: the caller passes two valid areas; copying downwards is right when the target begins inside the source.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") bytes => _,
            inout("rdi") to.wrapping_add(bytes).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(bytes).wrapping_sub(1) => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller passes a valid area of `bytes` bytes. The truncation is memset's contract.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    for index in 0..bytes {
        // SAFETY: the caller passes two valid areas of `bytes` bytes. Volatile, so that this loop is not made a memcmp.
        let (left, right) = unsafe { (left.add(index).read_volatile(), right.add(index).read_volatile()) };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(left, right, bytes) }
}

// The prebuilt `alloc` refers to these two; with `panic = "abort"` nobody calls them.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    ring0::stop()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("headroom-guest {info}");
    ring0::stop()
}

/// Where ring 0 sends a fault, on a stack of its own and with interrupts off.
#[unsafe(no_mangle)]
extern "C" fn ring3_fault() -> ! {
    let fault = ring0::fault();
    say!(
        "headroom-guest fault: vector {} error {:#x} rip {:#x} cs {:#x} rsp {:#x} cr2 {:#x}",
        fault.vector,
        fault.error,
        fault.rip,
        fault.cs,
        fault.rsp,
        fault.cr2
    );
    ring0::stop()
}
