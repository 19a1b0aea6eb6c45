//! What to execute, on its way to a process that was made before that was known.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

use super::Plan;

/// What a pipe takes at once; a longer command gets a process of its own.
pub const LONGEST: usize = 60 * 1024;

/// All of it lies in the message that it came in.
#[derive(Debug, PartialEq, Eq)]
pub struct Orders<'a> {
    /// Somebody waits for the moment in which the command runs.
    pub urgent: bool,
    pub args: Vec<&'a CStr>,
    pub env: Vec<&'a CStr>,
    pub path: &'a str,
    pub cwd: &'a CStr,
}

/// Whether it is urgent, the numbers of args and of variables, all of them, the path and the working directory, each with a NUL at its end. None: it
/// is longer than a message may be.
pub fn encode(plan: &Plan) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(1024);
    out.push(u8::from(plan.patience.is_zero()));
    out.extend((plan.args.len() as u32).to_le_bytes());
    out.extend((plan.env.len() as u32).to_le_bytes());
    for text in plan.args.iter().chain(&plan.env) {
        out.extend(text.as_bytes_with_nul());
    }
    for text in [&plan.path, &plan.cwd] {
        out.extend(text.as_bytes());
        out.push(0);
    }
    (out.len() <= LONGEST).then_some(out)
}

/// Waits for them at a pipe. None: nobody will give any.
pub fn wait(pipe: BorrowedFd<'_>) -> Option<Orders<'static>> {
    // Until exec, which takes all memory away.
    let buffer = vec![0u8; LONGEST].leak();
    let len = rustix::io::retry_on_intr(|| rustix::io::read(pipe, &mut *buffer)).ok()?;
    decode(&buffer[..len])
}

/// None: the message isn't whole.
pub fn decode(bytes: &[u8]) -> Option<Orders<'_>> {
    let (urgent, rest) = bytes.split_first()?;
    let (args, rest) = rest.split_first_chunk()?;
    let (env, mut rest) = rest.split_first_chunk()?;
    let mut next = || {
        let text = CStr::from_bytes_until_nul(rest).ok()?;
        rest = &rest[text.count_bytes() + 1..];
        Some(text)
    };
    Some(Orders {
        urgent: *urgent != 0,
        args: (0..u32::from_le_bytes(*args)).map(|_| next()).collect::<Option<_>>()?,
        env: (0..u32::from_le_bytes(*env)).map(|_| next()).collect::<Option<_>>()?,
        path: next()?.to_str().ok()?,
        cwd: next()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::defaults::Defaults;
    use crate::proto;

    fn plan(args: Vec<String>) -> Plan {
        let env = vec!["A=".into(), "PATH=/x:/y".into()];
        let process = proto::Process { id: "p".into(), args, env, cwd: "/work".into(), ..Default::default() };
        Plan::new(process, &Defaults::new(None).expect("good")).expect("good")
    }

    #[test]
    fn orders_survive_the_way() {
        let plan = plan(vec!["echo".into(), String::new(), "x y".into()]);
        let bytes = encode(&plan).expect("short");
        let orders = decode(&bytes).expect("whole");
        assert_eq!(orders.args, plan.args.iter().map(|arg| arg.as_c_str()).collect::<Vec<_>>());
        assert_eq!(orders.env, plan.env.iter().map(|entry| entry.as_c_str()).collect::<Vec<_>>());
        assert_eq!((orders.urgent, orders.path, orders.cwd), (true, "/x:/y", c"/work"));
    }

    #[test]
    fn half_a_message_is_none() {
        let bytes = encode(&plan(vec!["echo".into()])).expect("short");
        assert!((0..bytes.len()).all(|len| decode(&bytes[..len]).is_none()));
    }

    #[test]
    fn a_long_command_is_not_sent() {
        assert!(encode(&plan(vec!["x".repeat(LONGEST)])).is_none());
    }
}
