//! A process that was made beforehand and waits just before its exec to be told what to execute.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::pipe::{PipeFlags, pipe_with};
use tonic::Status;

use super::rlimits::Rlimit;
use super::user::UserRequest;
use super::{Kind, Plan, Spawned, orders};
use crate::agent::Agent;
use crate::container::Container;
use crate::errno::{Failed, Step};
use crate::proto::{self, process::Tool};
use crate::stdio::{self, Reporting};

/// The agent's end.
pub struct Waiting {
    spawned: Spawned,
    orders: OwnedFd,
    user: UserRequest,
    cwd: String,
    rlimits: Vec<Rlimit>,
    /// While it explores.
    exploring: Option<Reporting>,
}

impl Waiting {
    /// Makes one that differs from what it will be in nothing but id, args and env. It may look up beforehand what its
    /// command may be.
    pub fn new(
        agent: &Agent,
        container: &Arc<Container>,
        mut process: proto::Process,
        explores: bool,
    ) -> Result<Self, Status> {
        process.args = vec!["/".to_owned()];
        process.env = Vec::new();
        let plan = Plan { explores, ..Plan::new(process, &container.defaults)? };
        let (exploring, explorer) = if explores { Some(stdio::report_pipe()?) } else { None }.unzip();
        let (read, orders) = pipe_with(PipeFlags::CLOEXEC).step("pipe", "orders")?;
        let spawned = super::spawn(agent, container, &plan, Kind::Pipes { stdin: true }, Some(read))?;
        drop(explorer); // the child has it until it waits
        Ok(Self { spawned, orders, user: plan.user, cwd: plan.cwd, rlimits: plan.rlimits, exploring })
    }

    /// Waits until it has explored, or ended.
    pub async fn explored(&mut self) -> Result<(), Failed> {
        match self.exploring.take() {
            Some(exploring) => exploring.read().await.map(drop),
            None => Ok(()),
        }
    }

    /// Has it become the process of this plan, if it can.
    pub fn become_process(self, agent: &Agent, plan: &Plan, stdin: bool) -> Option<Spawned> {
        let fits =
            plan.tool == Tool::None && plan.user == self.user && plan.cwd == self.cwd && plan.rlimits == self.rlimits;
        let orders = orders::encode(plan)?;
        if !fits || !agent.reaper.is_unreaped(self.spawned.pid) {
            return None;
        }
        // The pipe is empty: all of it fits.
        rustix::io::write(&self.orders, &orders).ok()?;
        let mut spawned = self.spawned;
        spawned.keep_orders(self.orders);
        if !stdin {
            spawned.close_stdin();
        }
        Some(spawned)
    }
}
