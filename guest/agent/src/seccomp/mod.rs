//! Seccomp filters: what a container's processes may ask of the guest's kernel. A policy is compiled once per container;
//! each process then only installs the program.

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod table;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod table;

mod compile;
mod default;
mod spec;
mod usual;

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::container::config::SeccompChoice;
use crate::errno::{self, Failed};
use crate::process::caps::CapSets;
use crate::validate::Invalid;

/// What happens to a system call: the filter's return value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Action(u32);

impl Action {
    pub const ALLOW: Self = Self(libc::SECCOMP_RET_ALLOW);
    pub const KILL_PROCESS: Self = Self(libc::SECCOMP_RET_KILL_PROCESS);
    pub const KILL_THREAD: Self = Self(libc::SECCOMP_RET_KILL_THREAD);
    pub const TRAP: Self = Self(libc::SECCOMP_RET_TRAP);
    pub const LOG: Self = Self(libc::SECCOMP_RET_LOG);

    pub const fn errno(number: u32) -> Self {
        Self(libc::SECCOMP_RET_ERRNO | (number & libc::SECCOMP_RET_DATA))
    }

    pub const fn trace(number: u32) -> Self {
        Self(libc::SECCOMP_RET_TRACE | (number & libc::SECCOMP_RET_DATA))
    }
}

/// A comparison of an argument, all 64 bits of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    /// 0 to 5.
    pub index: u8,
    pub test: Test,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    Equal(u64),
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    Greater(u64),
    GreaterOrEqual(u64),
    /// `argument & mask == value`
    Masked {
        mask: u64,
        value: u64,
    },
}

/// What happens to one system call: the action of the first branch whose conditions all hold, else the last word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub branches: Vec<(Vec<Condition>, Action)>,
    pub otherwise: Action,
}

impl Rule {
    pub fn always(action: Action) -> Self {
        Self { branches: Vec::new(), otherwise: action }
    }
}

/// A whole policy. Its rules are for numbers up to `last`. System calls that no rule names get `default`, those above `last` (newer than we know) `unknown`.
#[derive(Debug, Clone)]
pub struct Policy {
    pub rules: BTreeMap<u32, Rule>,
    pub default: Action,
    pub last: u32,
    pub unknown: Action,
}

/// A program ready to be installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter(Cow<'static, [Instruction]>);

/// `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

/// The number of a system call by its name.
fn number(name: &str) -> Option<u32> {
    table::TABLE.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

fn last_number() -> u32 {
    table::TABLE.iter().map(|(_, number)| *number).max().unwrap_or(0)
}

/// The filter for a container whose processes may have the capabilities `caps`. None: no filter.
pub fn filter(choice: SeccompChoice, caps: u64) -> Result<Option<Filter>, Invalid> {
    match choice {
        SeccompChoice::Unconfined => Ok(None),
        SeccompChoice::Default if caps == CapSets::DEFAULT.bounding && !usual::FILTER.is_empty() => {
            Ok(Some(Filter(Cow::Borrowed(usual::FILTER))))
        }
        SeccompChoice::Default => Ok(Some(compile::compile(&default::policy(caps)))),
        SeccompChoice::Spec(spec) => {
            let filter = compile::compile(&spec::policy(&spec)?);
            match filter.0.len() {
                0..=4096 => Ok(Some(filter)),
                n => Err(Invalid::new("oci_spec.linux.seccomp", format!("{n} instructions; at most 4096"))),
            }
        }
    }
}

impl Filter {
    /// Installs it on this process, for good. Needs CAP_SYS_ADMIN or no_new_privs.
    pub fn install(&self) -> Result<(), Failed> {
        #[repr(C)]
        struct Program {
            len: u16,
            filter: *const Instruction,
        }
        let program = Program { len: self.0.len() as u16, filter: self.0.as_ptr() };
        // SAFETY: the program has the kernel's layout and lives through the call, which copies and checks it.
        match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) } {
            0 => Ok(()),
            _ => Err(Failed::new("seccomp", "filter", errno::last())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{self, Cloned};

    /// Runs `try_it` under the default filter, in a child; gives its exit code.
    fn under_default(caps: u64, try_it: impl Fn() -> i32) -> i32 {
        let filter = filter(SeccompChoice::Default, caps).expect("compiles").expect("is one");
        // SAFETY: the child makes plain system calls and ends in _exit.
        match unsafe { sys::clone_into(0, None) }.expect("clone") {
            Cloned::Child => {
                let _ = sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0);
                let code = if filter.install().is_ok() { try_it() } else { 99 };
                sys::exit_now(code)
            }
            Cloned::Parent { pid } => {
                let pid = rustix::process::Pid::from_raw(pid);
                let waited = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
                let (_, status) = waited.expect("wait").expect("ended");
                status.exit_status().unwrap_or_else(|| 128 + status.terminating_signal().unwrap_or(0))
            }
        }
    }

    fn errno_of(ret: libc::c_long) -> i32 {
        if ret < 0 { errno::last().raw_os_error() } else { 0 }
    }

    /// A system call with integers as arguments.
    fn call(number: libc::c_long, args: [libc::c_long; 3]) -> i32 {
        // SAFETY: used with calls that take integers only, or that the filter stops before the kernel looks at them.
        errno_of(unsafe { libc::syscall(number, args[0], args[1], args[2], 0, 0) })
    }

    #[test]
    fn the_usual_goes_through() {
        assert_eq!(under_default(0, || call(libc::SYS_getppid, [0; 3])), 0);
        let unix = [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0];
        assert_eq!(under_default(0, || call(libc::SYS_socket, unix)), 0);
    }

    #[test]
    fn the_dangerous_does_not() {
        let new_user: libc::c_long = libc::CLONE_NEWUSER.into();
        for (name, number, args, want) in [
            ("vsock", libc::SYS_socket, [libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0], libc::EPERM),
            ("keyctl", libc::SYS_keyctl, [0; 3], libc::EPERM),
            ("unshare", libc::SYS_unshare, [new_user, 0, 0], libc::EPERM),
            ("clone", libc::SYS_clone, [new_user | libc::c_long::from(libc::SIGCHLD), 0, 0], libc::EPERM),
            ("clone3", libc::SYS_clone3, [0; 3], libc::ENOSYS),
            ("io_uring", libc::SYS_io_uring_setup, [1, 0, 0], libc::EPERM),
            ("the future", 4000, [0; 3], libc::ENOSYS),
        ] {
            assert_eq!(under_default(0, || call(number, args)), want, "{name}");
        }
    }

    #[test]
    fn capabilities_open_doors() {
        let unshare = || call(libc::SYS_unshare, [0; 3]);
        assert_eq!(under_default(0, unshare), libc::EPERM);
        assert_eq!(under_default(crate::process::caps::bit("CAP_SYS_ADMIN"), unshare), 0);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_i386_door_is_shut() {
        let code = under_default(0, || {
            // SAFETY: getpid by the 32-bit entry takes and changes nothing but eax.
            unsafe { std::arch::asm!("int 0x80", inout("eax") 20 => _) };
            0
        });
        assert_eq!(code, 128 + libc::SIGSYS);
    }

    /// `PYKATA_WRITE=1 cargo test usual_filter` writes it.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_usual_filter_is_that_of_the_default_policy() {
        let filter = compile::compile(&default::policy(CapSets::DEFAULT.bounding));
        if std::env::var_os("PYKATA_WRITE").is_some() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/seccomp/usual.rs");
            let text = std::fs::read_to_string(path).expect("read");
            let head = text.rsplit_once("&[\n").expect("a list").0;
            let line = |i: &Instruction| format!("    i(0x{:x}, {}, {}, 0x{:x}),\n", i.code, i.jt, i.jf, i.k);
            let list: String = filter.0.iter().map(line).collect();
            std::fs::write(path, format!("{head}&[\n{list}];\n")).expect("write");
            return;
        }
        assert_eq!(*filter.0, *usual::FILTER);
    }

    #[test]
    fn the_filter_is_small() {
        let filter = filter(SeccompChoice::Default, 0).expect("compiles").expect("is one");
        assert!(filter.0.len() < 300, "{}", filter.0.len());
    }
}
