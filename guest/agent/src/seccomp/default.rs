//! The default policy, with the meaning of the one that container engines share: what a program usually needs is
//! allowed; what reaches deep into the kernel is not, unless the container has the capability for it. It is written as
//! what is denied; what is newer than our table doesn't exist (ENOSYS), as programs expect it of an older kernel.

use std::collections::BTreeMap;

use super::{Action, Condition, Policy, Rule, Test, last_number, number};
use crate::process::caps::bit;

const DENIED: Action = Action::errno(libc::EPERM as u32);
const MISSING: Action = Action::errno(libc::ENOSYS as u32);

/// Denied, whatever the capabilities.
const NEVER: &[&str] = &[
    "add_key",
    "get_kernel_syms",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "nfsservctl",
    "pivot_root",
    "request_key",
    "swapoff",
    "swapon",
    "sysfs",
    "_sysctl",
    "uselib",
    "userfaultfd",
    "ustat",
    "vm86",
    "vm86old",
];

/// Denied unless one of the capabilities is there.
const GUARDED: &[(&[&str], &[&str])] = &[
    (
        &["CAP_SYS_ADMIN"],
        &[
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    (&["CAP_SYS_ADMIN", "CAP_BPF"], &["bpf"]),
    (&["CAP_SYS_ADMIN", "CAP_PERFMON"], &["perf_event_open"]),
    (&["CAP_SYS_ADMIN", "CAP_SYSLOG"], &["syslog"]),
    (&["CAP_DAC_READ_SEARCH"], &["open_by_handle_at"]),
    (&["CAP_SYS_BOOT"], &["reboot"]),
    (&["CAP_SYS_CHROOT"], &["chroot"]),
    (&["CAP_SYS_MODULE"], &["delete_module", "finit_module", "init_module"]),
    (&["CAP_SYS_NICE"], &["get_mempolicy", "mbind", "move_pages", "set_mempolicy", "set_mempolicy_home_node"]),
    (&["CAP_SYS_PACCT"], &["acct"]),
    (&["CAP_SYS_PTRACE"], &["pidfd_getfd", "process_madvise"]),
    (&["CAP_SYS_RAWIO"], &["ioperm", "iopl"]),
    (&["CAP_SYS_TIME"], &["clock_settime", "settimeofday"]),
    (&["CAP_SYS_TTY_CONFIG"], &["vhangup"]),
];

/// `CLONE_NEW*` as `clone` knows them.
const NEW_NAMESPACES: u64 = 0x7e02_0000;
/// Which personalities a program may take: Linux, and Linux with 32-bit uname or without address randomisation.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// The policy for processes that may have the capabilities `caps`.
pub fn policy(caps: u64) -> Policy {
    let may = |names: &[&str]| names.iter().any(|name| caps & bit(name) != 0);
    let mut rules = BTreeMap::new();
    let mut set = |name: &str, rule: Rule| {
        if let Some(number) = number(name) {
            rules.insert(number, rule);
        }
    };
    for name in NEVER {
        set(name, Rule::always(DENIED));
    }
    for (needed, names) in GUARDED {
        if !may(needed) {
            names.iter().for_each(|name| set(name, Rule::always(DENIED)));
        }
    }
    if !may(&["CAP_SYS_ADMIN"]) {
        set("clone", unless(Condition { index: 0, test: Test::Masked { mask: NEW_NAMESPACES, value: 0 } }));
        // Its flags lie in memory, where no filter can look: C libraries fall back to clone.
        set("clone3", Rule::always(MISSING));
    }
    // The host talks to the guest's agent by vsock; a container has no business there.
    set("socket", unless(Condition { index: 0, test: Test::NotEqual(libc::AF_VSOCK as u64) }));
    let allowed = |value| (vec![Condition { index: 0, test: Test::Equal(value) }], Action::ALLOW);
    set("personality", Rule { branches: PERSONALITIES.map(allowed).to_vec(), otherwise: DENIED });
    Policy { rules, default: Action::ALLOW, last: last_number(), unknown: MISSING }
}

/// Allowed where the condition holds.
fn unless(good: Condition) -> Rule {
    Rule { branches: vec![(vec![good], Action::ALLOW)], otherwise: DENIED }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_somewhere() {
        // Numbers of calls that Linux has dropped are missing from the table; nothing else may be.
        let dropped = ["get_kernel_syms", "nfsservctl", "uselib", "lookup_dcookie", "_sysctl"];
        let elsewhere = ["vm86", "vm86old", "umount", "ioperm", "iopl", "sysfs", "ustat"];
        for name in NEVER.iter().chain(GUARDED.iter().flat_map(|(_, names)| names.iter())) {
            let known = number(name).is_some() || dropped.contains(name) || elsewhere.contains(name);
            assert!(known, "{name}");
        }
    }

    #[test]
    fn every_capability_exists() {
        for name in GUARDED.iter().flat_map(|(caps, _)| caps.iter()) {
            assert_ne!(bit(name), 0, "{name}");
        }
    }
}
