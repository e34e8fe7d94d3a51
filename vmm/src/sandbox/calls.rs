//! System calls: which a VMM makes, and which it never does.
//!
//! Found by reading, and by tracing all tests. The lists are for x86-64, whose C library and standard library make these calls;
//! a call that a newer one makes is answered with `ENOSYS`, as by an older kernel, and it falls back to an older call.

use libc::{c_long, *};

/// What a thread does that reads what a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs a vCPU and serves the registers of all devices.
    Vcpu,
    /// Serves the queues of one device.
    Device,
}

/// Calls with one reason to be on a list.
pub(super) type Group = &'static [c_long];

/// Memory of the process: the allocator, guest RAM, buffers.
const MEMORY: Group = &[SYS_brk, SYS_madvise, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap];

/// Between threads, and for their own sake: locks, turns, stacks of signal handlers, what the allocator asks of processors, panics, aborts.
const THREADS: Group = &[
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_getpid,
    SYS_gettid,
    SYS_restart_syscall,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_getaffinity,
    SYS_sched_yield,
    SYS_sigaltstack,
    SYS_tgkill,
];

/// The time, where the kernel's own page has none to read (vdso(7)), and waiting for it. Seeds of hash tables.
const TIME: Group =
    &[SYS_clock_getres, SYS_clock_gettime, SYS_clock_nanosleep, SYS_getrandom, SYS_gettimeofday, SYS_nanosleep];

/// On descriptors that are open: KVM, eventfds, taps, the console, the log.
const DESCRIPTORS: Group = &[SYS_close, SYS_fcntl, SYS_ioctl, SYS_poll, SYS_read, SYS_readv, SYS_write, SYS_writev];

/// A console's file that is full begins anew.
const CONSOLE: Group = &[SYS_ftruncate, SYS_lseek, SYS_pread64];

/// Queues of a device: what it waits for, and its ring.
const QUEUES: Group =
    &[SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_wait, SYS_io_uring_enter, SYS_timerfd_gettime, SYS_timerfd_settime];

/// Making threads and confining them; `clone` for threads only, `prctl` for names and the auxiliary vector.
const MAKING_THREADS: Group =
    &[SYS_capget, SYS_capset, SYS_clone, SYS_prctl, SYS_rseq, SYS_seccomp, SYS_set_robust_list, SYS_set_tid_address];

/// Whose turn it is (`slice`, `migration::urgency`), and limits that the C library looks up.
const TURNS: Group =
    &[SYS_getpriority, SYS_getrlimit, SYS_prlimit64, SYS_sched_getattr, SYS_sched_setattr, SYS_setpriority];

/// Files by path: kernels, images, snapshots, certificates, the console, what the kernel tells in /proc.
const PATHS: Group = &[
    SYS_access,
    SYS_chmod,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_fchmodat,
    SYS_getcwd,
    SYS_getdents64,
    SYS_mkdir,
    SYS_mkdirat,
    SYS_newfstatat,
    SYS_open,
    SYS_openat,
    SYS_readlink,
    SYS_readlinkat,
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
    SYS_rmdir,
    SYS_statx,
    SYS_umask,
    SYS_unlink,
    SYS_unlinkat,
];

/// Open files: contents, sizes, holes, locks.
const FILES: Group = &[
    SYS_copy_file_range,
    SYS_dup,
    SYS_fadvise64,
    SYS_fallocate,
    SYS_fdatasync,
    SYS_flock,
    SYS_fstat,
    SYS_fstatfs,
    SYS_fsync,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_sendfile,
    SYS_statfs,
];

/// The API's socket and the connections of a migration.
const SOCKETS: Group = &[
    SYS_accept4,
    SYS_bind,
    SYS_connect,
    SYS_getpeername,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_listen,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_setsockopt,
    SYS_shutdown,
    SYS_socket,
    SYS_socketpair,
];

/// Making what threads wait for.
const WAITING: Group = &[SYS_epoll_create1, SYS_eventfd2, SYS_pipe2, SYS_ppoll, SYS_signalfd4, SYS_timerfd_create];

/// Disks, missing pages, the guest's clock (`adjtimex`, under either name, only tells whether the host's is right: setting it needs a capability), who
/// the process is.
const MACHINE: Group = &[
    SYS_adjtimex,
    SYS_clock_adjtime,
    SYS_getegid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getrusage,
    SYS_getuid,
    SYS_io_uring_register,
    SYS_io_uring_setup,
    SYS_sysinfo,
    SYS_uname,
    SYS_userfaultfd,
];

/// Other programs. A VMM never executes one, and has no children.
const PROGRAMS: Group = &[SYS_execve, SYS_execveat, SYS_fork, SYS_vfork];

/// Other processes: their memory, descriptors and registers.
const PROCESSES: Group =
    &[SYS_kcmp, SYS_pidfd_getfd, SYS_process_madvise, SYS_process_vm_readv, SYS_process_vm_writev, SYS_ptrace];

/// Who the process is, and which files and namespaces it sees.
const IDENTITY: Group = &[
    SYS_chroot,
    SYS_fsconfig,
    SYS_fsmount,
    SYS_fsopen,
    SYS_fspick,
    SYS_mount,
    SYS_mount_setattr,
    SYS_move_mount,
    SYS_open_by_handle_at,
    SYS_open_tree,
    SYS_pivot_root,
    SYS_setfsgid,
    SYS_setfsuid,
    SYS_setgid,
    SYS_setgroups,
    SYS_setns,
    SYS_setregid,
    SYS_setresgid,
    SYS_setresuid,
    SYS_setreuid,
    SYS_setuid,
    SYS_umount2,
    SYS_unshare,
];

/// The kernel itself: code in it, its keys, its clock and name, the machine.
const KERNEL: Group = &[
    SYS_acct,
    SYS_add_key,
    SYS_bpf,
    SYS_clock_settime,
    SYS_delete_module,
    SYS_finit_module,
    SYS_init_module,
    SYS_ioperm,
    SYS_iopl,
    SYS_kexec_file_load,
    SYS_kexec_load,
    SYS_keyctl,
    SYS_perf_event_open,
    SYS_quotactl,
    SYS_reboot,
    SYS_request_key,
    SYS_setdomainname,
    SYS_sethostname,
    SYS_settimeofday,
    SYS_swapoff,
    SYS_swapon,
    SYS_syslog,
    SYS_vhangup,
];

/// Calls that no part of a VMM makes and an intruder wants: they end the process.
pub(super) const FORBIDDEN: &[Group] = &[PROGRAMS, PROCESSES, IDENTITY, KERNEL];

const COMMON: &[Group] = &[MEMORY, THREADS, TIME, DESCRIPTORS];

/// What any thread of the process may call.
pub(super) fn process() -> impl Iterator<Item = c_long> {
    let rest: &[Group] = &[CONSOLE, QUEUES, MAKING_THREADS, TURNS, PATHS, FILES, SOCKETS, WAITING, MACHINE];
    COMMON.iter().chain(rest).copied().flatten().copied()
}

/// What a thread of this role may call.
pub(super) fn of(role: Role) -> impl Iterator<Item = c_long> {
    let own: &[Group] = match role {
        Role::Vcpu => &[CONSOLE],
        Role::Device => &[QUEUES],
    };
    COMMON.iter().chain(own).copied().flatten().copied()
}
