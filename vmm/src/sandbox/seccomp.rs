//! Filters of system calls, made of the lists in [`super::calls`].
//!
//! Calls that are made at each exit of a vCPU or for each request of a device are on the lists without a look at their arguments: the kernel then
//! remembers for each filter that they are allowed, and does not run it (Linux 5.11). The arguments of rarer ones are looked at where that
//! is what makes the call harmless.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
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
        compile(forbidden()?, &SeccompAction::Allow, &SeccompAction::KillProcess)?,
        compile(allowed(pid)?, &SeccompAction::Errno(libc::ENOSYS.unsigned_abs()), &SeccompAction::Allow)?,
    ])
}

/// The filter of a thread, on top of those of the process: calls of the process that are not of the role are refused with
/// `EPERM`. What the process may not call stays as it is.
pub(super) fn of_role(role: Role) -> Result<BpfProgram, seccompiler::Error> {
    let own: Vec<c_long> = calls::of(role).collect();
    let refused: Rules = calls::process().filter(|call| !own.contains(call)).map(|call| (call, Vec::new())).collect();
    compile(refused, &SeccompAction::Allow, &SeccompAction::Errno(libc::EPERM.unsigned_abs()))
}

/// So many calls are looked through one by one.
const RANGE_CALLS: usize = 12;

/// One program for all rules. A foreign architecture ends the process, whatever the actions are.
///
/// seccompiler compares a call's number with each on the list in turn, and the kernel tries all numbers that there are when a filter is
/// installed: with 130 on the list that takes 0.3 ms. So the list is cut into ranges, each a program of its own, and a few
/// jumps by number lead to the right one.
fn compile(mut rules: Rules, others: &SeccompAction, listed: &SeccompAction) -> Result<BpfProgram, seccompiler::Error> {
    let mut ranges = Vec::new();
    while !rules.is_empty() {
        let end = rules.keys().nth(RANGE_CALLS).copied();
        let rest = end.map(|end| rules.split_off(&end)).unwrap_or_default();
        let filter = SeccompFilter::new(rules, others.clone(), listed.clone(), TargetArch::x86_64)?;
        let program: BpfProgram = filter.try_into()?;
        ranges.push((end, program));
        rules = rest;
    }
    Ok(join(ranges))
}

/// Puts complete programs behind jumps: each is for the numbers below the one beside it, the last, which has none, for the rest.
fn join(ranges: Vec<(Option<c_long>, BpfProgram)>) -> BpfProgram {
    // The offset of the number in `seccomp_data` is 0 (seccomp(2)).
    let mut joined = vec![instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    // Two instructions for each range with an end, one for the last.
    let mut start = joined.len() + 2 * ranges.len() - 1;
    for (end, program) in &ranges {
        if let Some(end) = end {
            joined.push(instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, *end as u32));
        }
        // Counted from the instruction that follows.
        let distance = start - (joined.len() + 1);
        joined.push(instruction(libc::BPF_JMP | libc::BPF_JA, 0, distance as u32));
        start += program.len();
    }
    joined.extend(ranges.into_iter().flat_map(|(_, program)| program));
    joined
}

/// `then` is how many instructions are left out if its condition is met.
fn instruction(code: u32, then: u8, operand: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: then, jf: 0, k: operand }
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

    /// What a program answers to a call without arguments.
    fn answer(program: &BpfProgram, call: c_long) -> u32 {
        let (mut at, mut value) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at].clone();
            at += 1;
            match u32::from(code) {
                0x20 if k == 0 => value = call as u32,
                // The architecture is right, and all arguments are zero.
                0x20 if k == 4 => value = 0xc000_003e,
                0x20 => value = 0,
                0x54 => value &= k,
                0x05 => at += k as usize,
                0x15 => at += usize::from(if value == k { jt } else { jf }),
                0x35 => at += usize::from(if value >= k { jt } else { jf }),
                0x06 => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn each_number_has_the_answer_of_its_list() {
        const ALLOW: u32 = 0x7fff_0000;
        let [kill, allow] = of_process(1).unwrap();
        let vcpu = of_role(Role::Vcpu).unwrap();
        let (forbidden, allowed) = (forbidden().unwrap(), allowed(1).unwrap());
        // Numbers beyond all lists too, and those of the x32 ABI.
        for call in (0..600).chain(0x4000_0000..0x4000_0250) {
            // Without arguments: no flag of a thread, no process 1.
            let refused_arguments = [
                libc::SYS_clone,
                libc::SYS_tgkill,
                libc::SYS_prctl,
                libc::SYS_seccomp,
                libc::SYS_socket,
                libc::SYS_socketpair,
            ];
            assert_eq!(answer(&kill, call), if forbidden.contains_key(&call) { 0x8000_0000 } else { ALLOW }, "{call}");
            let works = allowed.contains_key(&call) && !refused_arguments.contains(&call);
            assert_eq!(answer(&allow, call), if works { ALLOW } else { 0x0005_0000 | 38 }, "{call}");
            let refused = allowed.contains_key(&call) && !calls::of(Role::Vcpu).any(|own| own == call);
            assert_eq!(answer(&vcpu, call), if refused { 0x0005_0000 | 1 } else { ALLOW }, "{call}");
        }
    }

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
