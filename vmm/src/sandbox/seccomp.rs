//! Filters of system calls, made of the lists in [`super::calls`].
//!
//! Calls that are made at each exit of a vCPU or for each request of a device are on the lists without a look at their arguments: the kernel then
//! remembers for each filter that they are allowed, and does not run it (Linux 5.11). The arguments of rarer ones are looked at where that
//! is what makes the call harmless.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::calls::{self, Role};

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// `SECCOMP_SET_MODE_FILTER` (seccomp(2)).
const SET_FILTER: u64 = 1;

/// `PR_GET_AUXV` (Linux 6.4), by which rustix finds the kernel's page of functions.
const GET_AUXV: libc::c_int = 0x4155_5856;

/// What a thread's `clone` must and must not have: no process, no namespace.
const THREAD: u64 = libc::CLONE_THREAD as u64;
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// The filters of the whole process `pid`, in the order in which they are installed. What no list has is answered with `ENOSYS`.
pub(super) fn of_process(pid: u32) -> Result<[BpfProgram; 2], seccompiler::Error> {
    Ok([
        compile(forbidden()?, SeccompAction::Allow, SeccompAction::KillProcess)?,
        compile(allowed(pid)?, SeccompAction::Errno(libc::ENOSYS.unsigned_abs()), SeccompAction::Allow)?,
    ])
}

/// The filter of a thread, on top of those of the process: calls of the process that are not of the role are refused with
/// `EPERM`. What the process may not call stays as it is.
pub(super) fn of_role(role: Role) -> Result<BpfProgram, seccompiler::Error> {
    let own: Vec<c_long> = calls::of(role).collect();
    let refused: Rules = calls::process().filter(|call| !own.contains(call)).map(|call| (call, Vec::new())).collect();
    compile(refused, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM.unsigned_abs()))
}

/// A foreign architecture ends the process, whatever the actions are.
fn compile(rules: Rules, others: SeccompAction, listed: SeccompAction) -> Result<BpfProgram, seccompiler::Error> {
    Ok(SeccompFilter::new(rules, others, listed, TargetArch::x86_64)?.try_into()?)
}

fn forbidden() -> Result<Rules, BackendError> {
    let mut rules: Rules = calls::FORBIDDEN.iter().copied().flatten().map(|&call| (call, Vec::new())).collect();
    // A new process, whichever way.
    rules.insert(libc::SYS_clone, vec![all([bits(0, THREAD, 0)?])?]);
    Ok(rules)
}

fn allowed(pid: u32) -> Result<Rules, BackendError> {
    let mut rules: Rules = calls::process().map(|call| (call, Vec::new())).collect();
    let mut only = |call, ways: Vec<SeccompRule>| rules.insert(call, ways);
    only(libc::SYS_clone, vec![all([bits(0, THREAD | NAMESPACES, THREAD)?])?]);
    // No new code.
    let executable = libc::PROT_EXEC as u64;
    only(libc::SYS_mmap, vec![all([bits(2, executable, 0)?])?]);
    only(libc::SYS_mprotect, vec![all([bits(2, executable, 0)?])?]);
    // Signals to own threads, limits and slices of its own.
    only(libc::SYS_tgkill, vec![all([is(0, pid.into())?])?]);
    only(libc::SYS_prlimit64, vec![all([is(0, 0)?])?]);
    only(libc::SYS_sched_getattr, vec![all([is(0, 0)?])?]);
    only(libc::SYS_sched_setattr, vec![all([is(0, 0)?])?]);
    // Names of threads, what comes with a filter, what the process was started with.
    let about = |option: libc::c_int| all([is(0, option as u64)?]);
    only(libc::SYS_prctl, vec![about(libc::PR_SET_NAME)?, about(libc::PR_SET_NO_NEW_PRIVS)?, about(GET_AUXV)?]);
    only(libc::SYS_seccomp, vec![all([is(0, SET_FILTER)?, is(1, 0)?])?]);
    let family = |family: libc::c_int| all([is(0, family as u64)?]);
    only(libc::SYS_socket, vec![family(libc::AF_UNIX)?, family(libc::AF_INET)?, family(libc::AF_INET6)?]);
    only(libc::SYS_socketpair, vec![family(libc::AF_UNIX)?]);
    Ok(rules)
}

fn all<const N: usize>(conditions: [SeccompCondition; N]) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(conditions.into())
}

/// Argument `index`, an int, has this value.
fn is(index: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

/// Argument `index` has these bits of `mask` and no others.
fn bits(index: u8, mask: u64, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_every_exit_and_request_are_allowed_by_their_number() {
        let rules = allowed(1).unwrap();
        let (kernel, threads) = ([libc::SYS_ioctl, libc::SYS_io_uring_enter], [libc::SYS_futex, libc::SYS_epoll_wait]);
        let data = [libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev];
        for call in kernel.iter().chain(&threads).chain(&data) {
            assert!(rules[call].is_empty(), "{call}");
        }
        assert!(!forbidden().unwrap().contains_key(&libc::SYS_ioctl));
    }
}
