//! Policies from `linux.seccomp` of an OCI specification.

use std::collections::BTreeMap;

use super::{Action, Condition, Policy, Rule, Test, last_number, number};
use crate::oci::{Seccomp, SeccompArg};
use crate::validate::{Invalid, shown};

const FIELD: &str = "oci_spec.linux.seccomp";

/// Only calls by the machine's native entry are judged by it; those of other architectures end the process.
pub fn policy(spec: &Seccomp) -> Result<Policy, Invalid> {
    let default = action(&spec.default_action, spec.default_errno_ret)?;
    let mut rules: BTreeMap<u32, Rule> = BTreeMap::new();
    for rule in &spec.syscalls {
        let action = action(&rule.action, rule.errno_ret)?;
        let branches = branches(&rule.args)?;
        for number in rule.names.iter().filter_map(|name| number(name)) {
            let known = rules.entry(number).or_insert_with(|| Rule::always(default));
            if branches.is_empty() {
                known.otherwise = action;
            }
            known.branches.extend(branches.iter().map(|conditions| (conditions.clone(), action)));
        }
    }
    Ok(Policy { rules, default, last: last_number(), unknown: default })
}

fn action(name: &str, errno: Option<u32>) -> Result<Action, Invalid> {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    match name {
        "SCMP_ACT_ALLOW" => Ok(Action::ALLOW),
        "SCMP_ACT_ERRNO" => Ok(Action::errno(errno)),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Ok(Action::KILL_THREAD),
        "SCMP_ACT_KILL_PROCESS" => Ok(Action::KILL_PROCESS),
        "SCMP_ACT_TRAP" => Ok(Action::TRAP),
        "SCMP_ACT_TRACE" => Ok(Action::trace(errno)),
        "SCMP_ACT_LOG" => Ok(Action::LOG),
        other => Err(Invalid::new(FIELD, format!("action {} isn't supported", shown(other)))),
    }
}

/// One branch with all conditions; or, where an argument is named twice, one branch for each, as libseccomp's users
/// mean it.
fn branches(args: &[SeccompArg]) -> Result<Vec<Vec<Condition>>, Invalid> {
    if args.len() > 24 {
        return Err(Invalid::new(FIELD, format!("{} conditions on one call", args.len())));
    }
    let conditions: Vec<Condition> = args.iter().map(condition).collect::<Result<_, _>>()?;
    let twice = |c: &Condition| conditions.iter().filter(|other| other.index == c.index).count() > 1;
    Ok(match conditions.len() {
        0 => Vec::new(),
        _ if conditions.iter().any(twice) => conditions.into_iter().map(|c| vec![c]).collect(),
        _ => vec![conditions],
    })
}

fn condition(arg: &SeccompArg) -> Result<Condition, Invalid> {
    let test = match arg.op.as_str() {
        "SCMP_CMP_NE" => Test::NotEqual(arg.value),
        "SCMP_CMP_LT" => Test::Less(arg.value),
        "SCMP_CMP_LE" => Test::LessOrEqual(arg.value),
        "SCMP_CMP_EQ" => Test::Equal(arg.value),
        "SCMP_CMP_GE" => Test::GreaterOrEqual(arg.value),
        "SCMP_CMP_GT" => Test::Greater(arg.value),
        "SCMP_CMP_MASKED_EQ" => Test::Masked { mask: arg.value, value: arg.value_two },
        other => return Err(Invalid::new(FIELD, format!("operator {} isn't supported", shown(other)))),
    };
    match u8::try_from(arg.index) {
        Ok(index @ 0..=5) => Ok(Condition { index, test }),
        _ => Err(Invalid::new(FIELD, format!("argument {} doesn't exist", arg.index))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Spec;

    fn parse(json: &str) -> Result<Policy, Invalid> {
        let spec = Spec::parse(format!(r#"{{"linux":{{"seccomp":{json}}}}}"#).as_bytes()).expect("parses");
        policy(&spec.linux.seccomp.expect("is there"))
    }

    #[test]
    fn an_allow_list() {
        let policy = parse(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86_64"],
                "syscalls":[{"names":["read","no_such_call"],"action":"SCMP_ACT_ALLOW"},
                            {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":40,"op":"SCMP_CMP_NE"}]}]}"#,
        )
        .expect("good");
        assert_eq!(policy.default, Action::errno(38));
        assert_eq!(policy.rules.len(), 2);
        assert_eq!(policy.rules[&number("socket").expect("known")].otherwise, Action::errno(38));
    }

    #[test]
    fn an_argument_named_twice_means_either() {
        let policy = parse(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[
                {"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#,
        )
        .expect("good");
        assert_eq!(policy.rules[&number("personality").expect("known")].branches.len(), 2);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        assert!(parse(r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#).is_err());
        let with_arg = |arg: &str| {
            format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["read"],"action":"SCMP_ACT_KILL","args":[{arg}]}}]}}"#
            )
        };
        assert!(parse(&with_arg(r#"{"index":6,"value":0,"op":"SCMP_CMP_EQ"}"#)).is_err());
        assert!(parse(&with_arg(r#"{"index":0,"value":0,"op":"SCMP_CMP_XX"}"#)).is_err());
    }
}
