//! A process that was made beforehand and waits just before its exec to be told what to execute.

use std::ffi::{CStr, CString};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::pipe::{PipeFlags, pipe_with};
use tonic::Status;

use super::rlimits::Rlimit;
use super::user::UserRequest;
use super::{Kind, Plan, Spawned};
use crate::agent::Agent;
use crate::container::Container;
use crate::errno::Step;
use crate::proto::{self, process::Tool};

/// What a pipe takes at once; a longer command gets a process of its own.
const LONGEST: usize = 60 * 1024;

/// The agent's end.
pub struct Waiting {
    spawned: Spawned,
    orders: OwnedFd,
    user: UserRequest,
    cwd: String,
    rlimits: Vec<Rlimit>,
}

/// What it is told.
pub struct Orders {
    pub args: Vec<CString>,
    pub env: Vec<CString>,
    pub path: String,
}

impl Waiting {
    /// Makes one that differs from what it will be in nothing but id, args and env.
    pub fn new(agent: &Agent, container: &Arc<Container>, mut process: proto::Process) -> Result<Self, Status> {
        process.args = vec!["/".to_owned()];
        process.env = Vec::new();
        let plan = Plan::new(process, &container.defaults)?;
        let (read, orders) = pipe_with(PipeFlags::CLOEXEC).step("pipe", "orders")?;
        let spawned = super::spawn(agent, container, &plan, Kind::Pipes { stdin: true }, Some(read))?;
        Ok(Self { spawned, orders, user: plan.user, cwd: plan.cwd, rlimits: plan.rlimits })
    }

    /// Has it become the process of this plan, if it can.
    pub fn become_process(self, agent: &Agent, plan: &Plan, stdin: bool) -> Option<Spawned> {
        let fits =
            plan.tool == Tool::None && plan.user == self.user && plan.cwd == self.cwd && plan.rlimits == self.rlimits;
        let orders = Orders::encode(plan);
        if !fits || orders.len() > LONGEST || !agent.reaper.is_unreaped(self.spawned.pid) {
            return None;
        }
        // The pipe is empty: all of it fits.
        rustix::io::write(&self.orders, &orders).ok()?;
        let mut spawned = self.spawned;
        if !stdin {
            spawned.close_stdin();
        }
        Some(spawned)
    }
}

impl Orders {
    /// Numbers of args and of variables, all of them and the path, each with a NUL at its end.
    fn encode(plan: &Plan) -> Vec<u8> {
        let mut out = Vec::with_capacity(1024);
        out.extend((plan.args.len() as u32).to_le_bytes());
        out.extend((plan.env.len() as u32).to_le_bytes());
        for text in plan.args.iter().chain(&plan.env) {
            out.extend(text.as_bytes_with_nul());
        }
        out.extend(plan.path.as_bytes());
        out.push(0);
        out
    }

    /// Waits for them. None: nobody will give any.
    pub fn wait(pipe: BorrowedFd<'_>) -> Option<Self> {
        let mut buffer = vec![0u8; LONGEST];
        let len = rustix::io::retry_on_intr(|| rustix::io::read(pipe, &mut buffer[..])).ok()?;
        Self::decode(&buffer[..len])
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (args, rest) = bytes.split_first_chunk()?;
        let (env, mut rest) = rest.split_first_chunk()?;
        let mut take = |count: u32| -> Option<Vec<CString>> {
            (0..count)
                .map(|_| {
                    let text = CStr::from_bytes_until_nul(rest).ok()?;
                    rest = &rest[text.count_bytes() + 1..];
                    Some(text.to_owned())
                })
                .collect()
        };
        let (args, env) = (take(u32::from_le_bytes(*args))?, take(u32::from_le_bytes(*env))?);
        let path = take(1)?.pop()?.into_string().ok()?;
        Some(Self { args, env, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::defaults::Defaults;

    #[test]
    fn orders_survive_the_pipe() {
        let process = proto::Process {
            id: "p".into(),
            args: vec!["echo".into(), String::new(), "x y".into()],
            env: vec!["A=".into(), "PATH=/x:/y".into()],
            ..Default::default()
        };
        let plan = Plan::new(process, &Defaults::new(None).expect("good")).expect("good");
        let orders = Orders::decode(&Orders::encode(&plan)).expect("whole");
        assert_eq!((orders.args, orders.env, orders.path), (plan.args.clone(), plan.env.clone(), "/x:/y".to_owned()));
        assert!(Orders::decode(&[]).is_none());
        let bytes = Orders::encode(&plan);
        assert!(Orders::decode(&bytes[..bytes.len() - 1]).is_none());
    }
}
