//! Which devices a container may open or make: an eBPF program on its cgroup, from `linux.resources.devices` and the
//! usual rules.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::errno::{self, Failed};
use crate::oci::DeviceRule;
use crate::validate::{Invalid, shown};

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

const fn usual(kind: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// What every container may: make any node (not open it), and use the harmless ones.
const USUAL: [Rule; 10] = [
    usual(CHAR, None, None, MKNOD),
    usual(BLOCK, None, None, MKNOD),
    usual(CHAR, Some(1), Some(3), ALL), // null
    usual(CHAR, Some(1), Some(5), ALL), // zero
    usual(CHAR, Some(1), Some(7), ALL), // full
    usual(CHAR, Some(1), Some(8), ALL), // random
    usual(CHAR, Some(1), Some(9), ALL), // urandom
    usual(CHAR, Some(5), Some(0), ALL), // tty
    usual(CHAR, Some(5), Some(2), ALL), // ptmx
    usual(CHAR, Some(136), None, ALL),  // pts/*
];

/// Rules in order; the last that fits counts, and without one access is denied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFilter(Vec<Rule>);

impl DeviceFilter {
    pub fn new(rules: &[DeviceRule]) -> Result<Self, Invalid> {
        let mut list = rules.iter().map(rule).collect::<Result<Vec<_>, _>>()?;
        list.extend(USUAL);
        Ok(Self(list))
    }

    /// Puts it on a cgroup; it holds for everything below, and a filter below can't widen it.
    pub fn attach(&self, cgroup: BorrowedFd<'_>) -> Result<(), Failed> {
        let program = load(&self.compile())?;
        attach(program.as_fd(), cgroup)
    }

    /// Checks the rules from the last to the first.
    fn compile(&self) -> Vec<Op> {
        let mut program = vec![
            Op::load(2, 0), // r2 = access << 16 | kind
            Op::load(4, 4), // r4 = major
            Op::load(5, 8), // r5 = minor
            Op::copy(3, 2),
            Op::alu(RSH, 3, 16),
            Op::alu(AND, 2, 0xffff),
        ];
        for rule in self.0.iter().rev() {
            program.extend(rule.compile());
            if rule.fits_all() {
                return program; // the kernel refuses a program with a part that is never reached
            }
        }
        program.extend([Op::set(0, 0), Op::exit()]);
        program
    }
}

fn rule(from: &DeviceRule) -> Result<Rule, Invalid> {
    const FIELD: &str = "oci_spec.linux.resources.devices";
    let kind = match from.kind.as_deref() {
        None | Some("" | "a") => None,
        Some("c" | "u") => Some(CHAR),
        Some("b") => Some(BLOCK),
        Some(other) => return Err(Invalid::new(FIELD, format!("type {}", shown(other)))),
    };
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value).map(Some).map_err(|_| Invalid::new(FIELD, format!("number {value}"))),
    };
    let mut access = 0;
    for letter in from.access.as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => return Err(Invalid::new(FIELD, format!("access {}", shown(&other.to_string())))),
        };
    }
    Ok(Rule { allow: from.allow, kind, major: number(from.major)?, minor: number(from.minor)?, access })
}

impl Rule {
    fn fits_all(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }

    fn compile(&self) -> Vec<Op> {
        let mut tests = Vec::new();
        if let Some(kind) = self.kind {
            tests.push(vec![Op::jump(JNE, 2, kind)]);
        }
        if self.access != ALL {
            // Allowed is what asks for nothing else; denied is what asks for any of it.
            tests.push(match self.allow {
                true => vec![Op::copy(1, 3), Op::alu(AND, 1, !self.access & ALL), Op::jump(JNE, 1, 0)],
                false => vec![Op::copy(1, 3), Op::alu(AND, 1, self.access), Op::jump(JEQ, 1, 0)],
            });
        }
        if let Some(major) = self.major {
            tests.push(vec![Op::jump(JNE, 4, major)]);
        }
        if let Some(minor) = self.minor {
            tests.push(vec![Op::jump(JNE, 5, minor)]);
        }
        let mut out: Vec<Op> = tests.concat();
        let end = out.len() + 2;
        for (at, op) in out.iter_mut().enumerate().filter(|(_, op)| op.is_jump()) {
            op.offset = (end - at - 1) as i16;
        }
        out.extend([Op::set(0, u32::from(self.allow)), Op::exit()]);
        out
    }
}

/// `struct bpf_insn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Op {
    code: u8,
    registers: u8,
    offset: i16,
    value: i32,
}

const JNE: u8 = 0x55;
const JEQ: u8 = 0x15;
const AND: u8 = 0x54;
const RSH: u8 = 0x74;

impl Op {
    const fn new(code: u8, to: u8, from: u8, offset: i16, value: u32) -> Self {
        let registers = if cfg!(target_endian = "little") { from << 4 | to } else { to << 4 | from };
        Self { code, registers, offset, value: value as i32 }
    }

    /// A word of the context, which r1 points to at first.
    const fn load(to: u8, offset: i16) -> Self {
        Self::new(0x61, to, 1, offset, 0)
    }

    const fn copy(to: u8, from: u8) -> Self {
        Self::new(0xbc, to, from, 0, 0)
    }

    const fn set(to: u8, value: u32) -> Self {
        Self::new(0xb7, to, 0, 0, value)
    }

    const fn alu(code: u8, to: u8, value: u32) -> Self {
        Self::new(code, to, 0, 0, value)
    }

    const fn jump(code: u8, register: u8, value: u32) -> Self {
        Self::new(code, register, 0, 0, value)
    }

    const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }

    fn is_jump(&self) -> bool {
        self.code == JNE || self.code == JEQ
    }
}

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;

fn bpf<T>(command: libc::c_int, attributes: &T) -> Result<libc::c_long, Failed> {
    // SAFETY: the attributes are a record of the kernel's layout for the command, and the pointers in it live through
    // the call.
    match unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) } {
        -1 => Err(Failed::new("bpf", "device filter", errno::last())),
        value => Ok(value),
    }
}

fn load(program: &[Op]) -> Result<OwnedFd, Failed> {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        count: u32,
        program: u64,
        license: u64,
        log: [u64; 3],
    }
    let attributes = Attributes {
        kind: PROG_TYPE_CGROUP_DEVICE,
        count: program.len() as u32,
        program: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log: [0; 3],
    };
    let fd = bpf(PROG_LOAD, &attributes)?;
    // SAFETY: a fresh descriptor that nobody else owns; the kernel makes it close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn attach(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> Result<(), Failed> {
    #[repr(C)]
    struct Attributes {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
    }
    let attributes = Attributes {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: ATTACH_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    bpf(PROG_ATTACH, &attributes).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn execute(program: &[Op], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let mut r = [0u32; 11];
        let mut pc = 0;
        loop {
            let op = program[pc];
            let (to, from) = ((op.registers & 15) as usize, (op.registers >> 4) as usize);
            pc += 1;
            match op.code {
                0x61 => {
                    r[to] = match op.offset {
                        0 => access << 16 | kind,
                        4 => major,
                        _ => minor,
                    }
                }
                0xbc => r[to] = r[from],
                0xb7 => r[to] = op.value as u32,
                AND => r[to] &= op.value as u32,
                RSH => r[to] >>= op.value,
                JNE if r[to] != op.value as u32 => pc += op.offset as usize,
                JEQ if r[to] == op.value as u32 => pc += op.offset as usize,
                JNE | JEQ => {}
                0x95 => return r[0] != 0,
                other => panic!("unknown code {other:#x}"),
            }
        }
    }

    fn expected(filter: &DeviceFilter, kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let fits = |rule: &&Rule| {
            rule.kind.is_none_or(|k| k == kind)
                && rule.major.is_none_or(|m| m == major)
                && rule.minor.is_none_or(|m| m == minor)
                && if rule.allow { access & !rule.access == 0 } else { access & rule.access != 0 }
        };
        filter.0.iter().rev().find(fits).is_some_and(|rule| rule.allow)
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let number = || prop::option::of(0u32..3);
        (any::<bool>(), prop::option::of(1u32..3), number(), number(), 1u32..8)
            .prop_map(|(allow, kind, major, minor, access)| Rule { allow, kind, major, minor, access })
    }

    proptest! {
        #[test]
        fn the_program_does_what_the_rules_say(
            rules in prop::collection::vec(any_rule(), 0..12),
            asks in prop::collection::vec((1u32..3, 1u32..8, 0u32..4, 0u32..4), 1..30),
        ) {
            let filter = DeviceFilter(rules);
            let program = filter.compile();
            for (kind, access, major, minor) in asks {
                prop_assert_eq!(
                    execute(&program, kind, access, major, minor),
                    expected(&filter, kind, access, major, minor)
                );
            }
        }
    }

    #[test]
    fn the_kernel_takes_it() {
        for rules in [vec![], vec![DeviceRule { access: Some("rwm".into()), ..DeviceRule::default() }]] {
            load(&DeviceFilter::new(&rules).expect("good").compile()).expect("the verifier is content");
        }
    }

    #[test]
    fn only_the_harmless_is_usual() {
        let program = DeviceFilter::new(&[]).expect("good").compile();
        assert!(execute(&program, CHAR, READ | WRITE, 1, 3));
        assert!(execute(&program, CHAR, READ | WRITE, 136, 7));
        assert!(execute(&program, BLOCK, MKNOD, 254, 0));
        assert!(!execute(&program, BLOCK, READ, 254, 0));
        assert!(!execute(&program, CHAR, READ, 1, 1), "mem");
    }
}
