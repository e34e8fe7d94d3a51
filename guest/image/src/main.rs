//! The bundled guest's program. Ring 0 is the assembled part in `ring0/entry.s`; everything else is here, in ring 3.

#![no_std]
#![no_main]

mod console;
mod port;
mod ring0;
mod runtime;

/// Where ring 0 ends and Rust begins.
#[unsafe(no_mangle)]
extern "C" fn ring3_entry() -> ! {
    console::init();
    say!("headroom-guest ready");
    let facts = ring0::facts();
    say!(
        "system_time {} khz {} tsc {} {} {}",
        facts.system_time,
        facts.kvm_tsc_khz,
        facts.tsc_denominator,
        facts.tsc_numerator,
        facts.crystal_hz
    );
    for _ in 0..5 {
        let tsc = unsafe { core::arch::x86_64::_rdtsc() };
        let p = ring0::system_time();
        unsafe {
            say!(
                "tsc {} entry {} version {} tsc_timestamp {} system_time {} mul {} shift {} flags {}",
                tsc,
                facts.entry_tsc,
                (p as *const u32).read_volatile(),
                (p.add(8) as *const u64).read_volatile(),
                (p.add(16) as *const u64).read_volatile(),
                (p.add(24) as *const u32).read_volatile(),
                (p.add(28) as *const i8).read_volatile(),
                (p.add(29)).read_volatile()
            );
        }
    }
    ring0::stop()
}
