//! From a policy to a BPF program: a binary search over ranges of numbers that share a rule. The kernel runs it for
//! every number when it is installed (to learn what is always allowed), so its depth is start-up time, too.

use super::{Action, Condition, Filter, Instruction, Policy, Rule, Test};

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;

// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCH_FIELD: u32 = 4;
const ARGUMENTS: u32 = 16;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const IF_EQ: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_GE: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const IF_GT: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;

fn op(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

fn branch(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

fn ret(action: Action) -> Instruction {
    op(RETURN, action.0)
}

pub fn compile(policy: &Policy) -> Filter {
    let ranges = ranges(policy);
    // Another architecture's entry has other numbers: nothing here would mean what it says.
    let mut program =
        vec![op(LOAD, ARCH_FIELD), branch(IF_EQ, ARCH, 1, 0), ret(Action::KILL_PROCESS), op(LOAD, NUMBER)];
    program.extend(search(&ranges));
    Filter(program.into())
}

/// First numbers of ranges and their rules, covering all numbers.
fn ranges(policy: &Policy) -> Vec<(u32, Rule)> {
    let mut out: Vec<(u32, Rule)> = Vec::new();
    let mut push = |first: u32, rule: Rule| {
        if out.last().is_none_or(|(_, last)| *last != rule) {
            out.push((first, rule));
        }
    };
    let mut next = 0;
    for (&number, rule) in &policy.rules {
        if number > next {
            push(next, Rule::always(policy.default));
        }
        push(number, rule.clone());
        next = number + 1;
    }
    if next <= policy.last {
        push(next, Rule::always(policy.default));
        next = policy.last + 1;
    }
    push(next, Rule::always(policy.unknown));
    out
}

/// With the number in the accumulator.
fn search(ranges: &[(u32, Rule)]) -> Vec<Instruction> {
    if let [(_, rule)] = ranges {
        return leaf(rule);
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let (low, pivot) = (search(low), high[0].0);
    let mut out = match u8::try_from(low.len()) {
        Ok(skip) => vec![branch(IF_GE, pivot, skip, 0)],
        Err(_) => vec![branch(IF_GE, pivot, 0, 1), op(JUMP, low.len() as u32)],
    };
    out.extend(low);
    out.extend(search(high));
    out
}

fn leaf(rule: &Rule) -> Vec<Instruction> {
    let mut out = Vec::new();
    for (conditions, action) in &rule.branches {
        let mut body = vec![ret(*action)];
        for condition in conditions.iter().rev() {
            body = guarded(condition, body);
        }
        out.extend(body);
    }
    out.push(ret(rule.otherwise));
    out
}

/// `body` where the condition holds; where not, on behind it. Bodies are a few instructions, so that jumps fit.
fn guarded(condition: &Condition, body: Vec<Instruction>) -> Vec<Instruction> {
    let low = ARGUMENTS + u32::from(condition.index) * 8;
    let high = low + 4;
    let skip = body.len() as u8;
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let mut out = match condition.test {
        Test::Equal(value) => {
            let (h, l) = halves(value);
            vec![op(LOAD, high), branch(IF_EQ, h, 0, skip + 2), op(LOAD, low), branch(IF_EQ, l, 0, skip)]
        }
        Test::NotEqual(value) => {
            let (h, l) = halves(value);
            vec![op(LOAD, high), branch(IF_EQ, h, 0, 2), op(LOAD, low), branch(IF_EQ, l, skip, 0)]
        }
        Test::Masked { mask, value } => {
            let ((mh, ml), (h, l)) = (halves(mask), halves(value));
            vec![
                op(LOAD, high),
                op(AND, mh),
                branch(IF_EQ, h, 0, skip + 3),
                op(LOAD, low),
                op(AND, ml),
                branch(IF_EQ, l, 0, skip),
            ]
        }
        Test::Greater(value) => ordered(high, low, halves(value), IF_GT, skip, true),
        Test::GreaterOrEqual(value) => ordered(high, low, halves(value), IF_GE, skip, true),
        Test::LessOrEqual(value) => ordered(high, low, halves(value), IF_GT, skip, false),
        Test::Less(value) => ordered(high, low, halves(value), IF_GE, skip, false),
    };
    out.extend(body);
    out
}

/// The upper halves decide unless they are equal. `wanted`: holds if the argument is greater; else if it isn't.
fn ordered(high: u32, low: u32, (h, l): (u32, u32), compare: u16, skip: u8, wanted: bool) -> Vec<Instruction> {
    let (above, below) = if wanted { (0, skip) } else { (skip, 0) };
    vec![
        op(LOAD, high),
        branch(IF_GT, h, above + 3, 0),
        branch(IF_EQ, h, 0, below + 2),
        op(LOAD, low),
        branch(compare, l, above, below),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// An interpreter of what the compiler emits.
    fn execute(filter: &Filter, arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let load = |offset: u32| match offset {
            NUMBER => number,
            ARCH_FIELD => arch,
            _ => {
                let word = (offset - ARGUMENTS) / 4;
                (args[(word / 2) as usize] >> (32 * (word % 2))) as u32
            }
        };
        let (mut pc, mut a) = (0, 0);
        loop {
            let Instruction { code, jt, jf, k } = filter.0[pc];
            let jump = |holds: bool| if holds { jt } else { jf } as usize;
            pc += 1;
            match code {
                LOAD => a = load(k),
                AND => a &= k,
                RETURN => return k,
                JUMP => pc += k as usize,
                IF_EQ => pc += jump(a == k),
                IF_GE => pc += jump(a >= k),
                IF_GT => pc += jump(a > k),
                other => panic!("unknown code {other:#x}"),
            }
        }
    }

    fn expected(policy: &Policy, number: u32, args: [u64; 6]) -> u32 {
        let Some(rule) = policy.rules.get(&number) else {
            return if number > policy.last { policy.unknown.0 } else { policy.default.0 };
        };
        let holds = |c: &Condition| {
            let arg = args[c.index as usize];
            match c.test {
                Test::Equal(v) => arg == v,
                Test::NotEqual(v) => arg != v,
                Test::Less(v) => arg < v,
                Test::LessOrEqual(v) => arg <= v,
                Test::Greater(v) => arg > v,
                Test::GreaterOrEqual(v) => arg >= v,
                Test::Masked { mask, value } => arg & mask == value,
            }
        };
        let found = rule.branches.iter().find(|(conditions, _)| conditions.iter().all(holds));
        found.map_or(rule.otherwise, |(_, action)| *action).0
    }

    fn value() -> impl Strategy<Value = u64> {
        prop_oneof![0u64..4, Just(1 << 32), Just((1 << 32) + 1), Just(u64::MAX), any::<u64>()]
    }

    fn test() -> impl Strategy<Value = Test> {
        prop_oneof![
            value().prop_map(Test::Equal),
            value().prop_map(Test::NotEqual),
            value().prop_map(Test::Less),
            value().prop_map(Test::LessOrEqual),
            value().prop_map(Test::Greater),
            value().prop_map(Test::GreaterOrEqual),
            (value(), value()).prop_map(|(mask, value)| Test::Masked { mask, value }),
        ]
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![Just(Action::ALLOW), (1u32..4).prop_map(Action::errno), Just(Action::TRAP)]
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let condition = (0u8..6, test()).prop_map(|(index, test)| Condition { index, test });
        let branch = (prop::collection::vec(condition, 1..4), action());
        (prop::collection::vec(branch, 0..3), action()).prop_map(|(branches, otherwise)| Rule { branches, otherwise })
    }

    proptest! {
        #[test]
        fn the_program_does_what_the_policy_says(
            rules in prop::collection::btree_map(0u32..=450, rule(), 0..150),
            default in action(),
            unknown in action(),
            calls in prop::collection::vec((0u32..600, prop::array::uniform6(value())), 1..50),
        ) {
            let policy = Policy { rules, default, unknown, last: 450 };
            let filter = compile(&policy);
            for (number, args) in calls {
                prop_assert_eq!(execute(&filter, ARCH, number, args), expected(&policy, number, args));
            }
        }
    }

    #[test]
    fn other_architectures_are_killed() {
        let policy = Policy { rules: BTreeMap::new(), default: Action::ALLOW, last: 10, unknown: Action::ALLOW };
        assert_eq!(execute(&compile(&policy), 0x4000_0003, 1, [0; 6]), Action::KILL_PROCESS.0);
    }
}
