//! Each case confines a process of its own: this test binary, started again with the case's name in its environment.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use libc::{c_int, c_long};

use super::*;

const CASE: &str = "HEADROOM_SANDBOX_CASE";

/// What a case does once its process is confined. What it returns is the exit code: 0 for a call that worked, or its errno.
type Case = (&'static str, fn() -> i32);

const CASES: &[Case] = &[
    ("execve", || call(libc::SYS_execve, [c"/bin/true".as_ptr() as c_long, 0, 0, 0])),
    ("fork", || call(libc::SYS_fork, [0; 4])),
    ("clone a process", || call(libc::SYS_clone, [c_long::from(libc::SIGCHLD), 0, 0, 0])),
    ("ptrace", || call(libc::SYS_ptrace, [0; 4])),
    ("mount", || call(libc::SYS_mount, [0; 4])),
    ("bpf", || call(libc::SYS_bpf, [0; 4])),
    ("old architecture", old_architecture),
    ("execve in a device", || as_role(Role::Device, || call(libc::SYS_execve, [0; 4]))),
    ("a call of tomorrow", || call(5000, [0; 4])),
    ("memfd_create", || call(libc::SYS_memfd_create, [0; 4])),
    ("code", || map(libc::PROT_READ | libc::PROT_EXEC)),
    ("netlink", || call(libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0, 0])),
    ("signal to another process", || call(libc::SYS_tgkill, [1, 1, 0, 0])),
    ("limit of another process", || call(libc::SYS_prlimit64, [1, libc::RLIMIT_NOFILE.into(), 0, 0])),
    ("memory", || map(libc::PROT_READ | libc::PROT_WRITE)),
    ("file", open_file),
    ("socket", || call(libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0, 0])),
    ("thread", start_thread),
    ("clock", look_at_clock),
    ("capabilities", capabilities_are_few),
    ("capabilities of a device", capabilities_are_none),
    ("niceness", niceness_comes_back),
    ("file in a device", || as_role(Role::Device, open_file)),
    ("file in a vCPU", || as_role(Role::Vcpu, open_file)),
    ("socket in a device", || {
        as_role(Role::Device, || call(libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0]))
    }),
    ("connect in a vCPU", || as_role(Role::Vcpu, || call(libc::SYS_connect, [-1, 0, 0, 0]))),
    ("thread in a device", || as_role(Role::Device, start_thread)),
    ("rename in a vCPU", || as_role(Role::Vcpu, || call(libc::SYS_rename, [0; 4]))),
    ("ring in a device", || as_role(Role::Device, || call(libc::SYS_io_uring_setup, [1, 0, 0, 0]))),
    ("ring's work in a vCPU", || as_role(Role::Vcpu, || call(libc::SYS_io_uring_enter, [-1, 0, 0, 0]))),
    ("ring's work in a device", || as_role(Role::Device, || call(libc::SYS_io_uring_enter, [-1, 0, 0, 0]))),
    ("a call of tomorrow in a vCPU", || as_role(Role::Vcpu, || call(5000, [0; 4]))),
    ("KVM in a vCPU", || as_role(Role::Vcpu, || call(libc::SYS_ioctl, [-1, 0, 0, 0]))),
    ("memory in a vCPU", || as_role(Role::Vcpu, || map(libc::PROT_READ | libc::PROT_WRITE))),
    ("panic in a device", || {
        as_role(Role::Device, || std::panic::catch_unwind(|| panic!("as asked")).map_or(0, |()| 1))
    }),
];

fn call(number: c_long, arguments: [c_long; 4]) -> i32 {
    let [first, second, third, fourth] = arguments;
    // SAFETY: no case passes a pointer but to a static string; null pointers are refused by the kernel.
    errno(unsafe { libc::syscall(number, first, second, third, fourth) } < 0)
}

fn errno(failed: bool) -> i32 {
    if failed { std::io::Error::last_os_error().raw_os_error().unwrap() } else { 0 }
}

fn map(protection: c_int) -> i32 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: maps new memory, which nobody uses.
    errno(unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) } == libc::MAP_FAILED)
}

/// `getpid` as a program for 32 bits asks for it.
fn old_architecture() -> i32 {
    // SAFETY: the call has no argument and writes to the named register only.
    unsafe { std::arch::asm!("int 0x80", inlateout("eax") 20 => _) };
    0
}

fn open_file() -> i32 {
    std::fs::File::open("/dev/null").map_or_else(|error| error.raw_os_error().unwrap(), |_| 0)
}

/// Refused, a machine that arrives would take its host's clock for a wrong one.
fn look_at_clock() -> i32 {
    // SAFETY: all zeroes is a valid request that changes nothing.
    let mut request: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `request` is valid for reading and writing.
    errno(unsafe { libc::adjtimex(&raw mut request) } < 0)
}

fn start_thread() -> i32 {
    match std::thread::Builder::new().spawn(|| 0) {
        Ok(thread) => thread.join().unwrap(),
        Err(error) => error.raw_os_error().unwrap(),
    }
}

fn as_role(role: Role, action: impl FnOnce() -> i32 + Send + 'static) -> i32 {
    let confined = move || {
        confine(role).unwrap();
        action()
    };
    std::thread::spawn(confined).join().unwrap()
}

fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
}

fn capabilities_are_few() -> i32 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let few = privileges::kept(false).bits();
    assert_eq!(field(&status, "CapEff") & !few, 0);
    assert_eq!(field(&status, "CapPrm") & !few, 0);
    assert_eq!([field(&status, "CapInh"), field(&status, "CapAmb")], [0, 0]);
    // SAFETY: no pointers.
    if unsafe { libc::geteuid() } == 0 {
        assert_eq!(field(&status, "CapBnd"), 0);
    }
    assert_eq!(field(&status, "NoNewPrivs"), 1);
    0
}

fn capabilities_are_none() -> i32 {
    let (tell, told) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        confine(Role::Device).unwrap();
        tell.send(rustix::thread::gettid()).unwrap();
        let _ = ended.recv();
    });
    let path = format!("/proc/self/task/{}/status", told.recv().unwrap());
    let status = std::fs::read_to_string(path).unwrap();
    assert_eq!([field(&status, "CapEff"), field(&status, "CapPrm")], [0, 0]);
    drop(end);
    thread.join().unwrap();
    0
}

/// As a thread of a migration does it.
fn niceness_comes_back() -> i32 {
    let usual = rustix::process::getpriority_process(None).unwrap();
    rustix::process::nice(3).unwrap();
    let thread = rustix::thread::gettid();
    rustix::process::setpriority_process(Some(thread), usual).map_or_else(|error| error.raw_os_error(), |()| 0)
}

/// The process of a case; does nothing where no case is named.
#[test]
fn confined_process() {
    let Ok(wanted) = std::env::var(CASE) else { return };
    let (_, action) = CASES.iter().find(|(name, _)| *name == wanted).unwrap();
    enter(false, None).unwrap();
    std::process::exit(action());
}

fn run(case: &str) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "sandbox::tests::confined_process", "--nocapture"]).env(CASE, case);
    command.output().unwrap().status
}

fn expect(cases: &[(&str, i32)]) {
    for (case, errno) in cases {
        let status = run(case);
        assert_eq!(status.code(), Some(*errno), "{case}: {status}");
    }
}

#[test]
fn what_no_vmm_does_ends_the_process() {
    for case in ["execve", "fork", "clone a process", "ptrace", "mount", "bpf", "execve in a device"] {
        let status = run(case);
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{case}: {status}");
    }
    let old = run("old architecture");
    // A kernel without programs of 32 bits knows no such interrupt.
    assert!(matches!(old.signal(), Some(libc::SIGSYS | libc::SIGSEGV)), "{old}");
}

#[test]
fn what_is_on_no_list_does_not_exist() {
    let refused = [
        "a call of tomorrow",
        "memfd_create",
        "code",
        "netlink",
        "signal to another process",
        "limit of another process",
        "a call of tomorrow in a vCPU",
    ];
    expect(&refused.map(|case| (case, libc::ENOSYS)));
}

#[test]
fn what_a_vmm_does_works() {
    expect(
        &["memory", "file", "socket", "thread", "clock", "memory in a vCPU", "panic in a device"].map(|case| (case, 0)),
    );
    expect(&["ring's work in a device", "KVM in a vCPU"].map(|case| (case, libc::EBADF)));
}

#[test]
fn threads_of_the_guest_open_and_make_nothing() {
    let refused = [
        "file in a device",
        "file in a vCPU",
        "socket in a device",
        "connect in a vCPU",
        "thread in a device",
        "rename in a vCPU",
        "ring in a device",
        "ring's work in a vCPU",
    ];
    expect(&refused.map(|case| (case, libc::EPERM)));
}

#[test]
fn privileges_are_gone_and_niceness_can_come_back() {
    expect(&[("capabilities", 0), ("capabilities of a device", 0)]);
    // SAFETY: no pointers.
    if unsafe { libc::geteuid() } == 0 {
        expect(&[("niceness", 0)]);
    }
}

#[test]
fn the_lists_do_not_contradict_each_other() {
    let process: Vec<c_long> = calls::process().collect();
    let forbidden: Vec<c_long> = calls::FORBIDDEN.iter().copied().flatten().copied().collect();
    for list in [&process, &forbidden] {
        let mut once = list.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), list.len(), "a call stands twice");
    }
    assert!(forbidden.iter().all(|call| !process.contains(call)));
    for role in [Role::Vcpu, Role::Device] {
        assert!(calls::of(role).all(|call| process.contains(&call)), "{role:?}");
    }
}
