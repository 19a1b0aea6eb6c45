//! Processes of the host's in containers: cloned straight into the container's namespaces and cgroup, children of the
//! agent, which alone waits for them.

pub mod berth;
pub mod caps;
mod child;
pub mod defaults;
pub mod detached;
mod explore;
mod lookup;
mod orders;
pub mod patience;
pub mod registry;
pub mod rlimits;
pub mod slots;
pub mod stem;
mod streams;
mod terminal;
pub mod user;
pub mod waiting;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tonic::Status;

use crate::agent::Agent;
use crate::container::Container;
use crate::errno::{Failed, Step};
use crate::proto;
use crate::proto::process::Tool;
use crate::reaper::Exit;
use crate::stdio::{self, Report, Reporting};
use crate::sys::{self, Cloned};
use crate::validate::{self, Invalid};
use berth::Berth;
use rlimits::Rlimit;
use slots::Slot;
use stem::{Reply, Stem};
use streams::{Ours, Theirs};
use user::UserRequest;

pub use registry::Running;
pub use streams::{Kind, Spare, Streams};
pub use terminal::Size;

const DEFAULT_TERM: &str = "TERM=xterm";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process to start, checked.
#[derive(Debug)]
pub struct Plan {
    pub id: String,
    pub args: Vec<CString>,
    pub env: Vec<CString>,
    pub path: String,
    pub cwd: String,
    pub user: UserRequest,
    pub rlimits: Vec<Rlimit>,
    pub tool: Tool,
    pub terminal: Option<Size>,
    /// How long the news that it has started may wait for those of its end.
    pub patience: Duration,
    /// Before it waits for its command it looks up what that may be.
    pub explores: bool,
}

/// A process that runs, or is about to.
pub struct Spawned {
    way: Way,
    /// 0: not known yet.
    pub pid: i32,
    pub exit: oneshot::Receiver<Exit>,
    /// None once they were taken.
    streams: Option<Ours>,
    pub berth: Arc<Berth>,
    /// The pipe by which it was told its command. To take it away would cost a cold guest more than to keep it.
    orders: Option<OwnedFd>,
}

/// How it comes to be, and how one hears of that.
enum Way {
    /// The agent has cloned it. Its PID in its own PID namespace is in the slot once the report has ended without one.
    Cloned {
        report: Reporting,
        started: Slot,
    },
    /// The stem was asked for it.
    Asked {
        stem: Arc<Stem>,
        theirs: Theirs,
    },
    Runs,
}

/// A process whose command runs.
pub struct Started {
    /// Its PID in the container.
    pub here: i32,
    /// How it has ended, where it has.
    pub exit: Option<Exit>,
}

impl Plan {
    pub fn new(from: proto::Process, defaults: &defaults::Defaults) -> Result<Self, Invalid> {
        validate::id("process.id", &from.id)?;
        validate::list("process.args", &from.args, validate::MAX_WORDS)?;
        validate::list("process.env", &from.env, validate::MAX_WORDS)?;
        validate::list("process.rlimits", &from.rlimits, 64)?;
        let tool = Tool::try_from(from.tool)
            .map_err(|_| Invalid::new("process.tool", format!("{} is none this agent has", from.tool)))?;
        match (tool, from.args.is_empty()) {
            (Tool::None, true) => return Err(Invalid::new("process.args", "is empty")),
            (Tool::Files | Tool::Changes, false) => return Err(Invalid::new("process.args", "a tool takes none")),
            _ => {}
        }
        let args = from.args.iter().map(|arg| validate::c_string("process.args", arg)).collect::<Result<_, _>>()?;
        let (mut env, path) = environment(&defaults.env, &from.env)?;
        let terminal = from.terminal.as_ref().map(Size::new).transpose()?;
        if terminal.is_some() && !env.iter().any(|entry| entry.to_bytes().starts_with(b"TERM=")) {
            env.push(validate::c_string("process.env", DEFAULT_TERM)?);
        }
        let cwd = if from.cwd.is_empty() { defaults.cwd.clone() } else { from.cwd };
        validate::path("process.cwd", &cwd)?;
        let rlimits = rlimits::merge(&defaults.rlimits, &from.rlimits)?;
        let user = UserRequest::parse(&from.user)?;
        let patience = Duration::ZERO;
        Ok(Self { id: from.id, args, env, path, cwd, user, rlimits, tool, terminal, patience, explores: false })
    }
}

/// The container's variables with the process's own added or in their place, and the PATH among them.
fn environment(base: &[String], own: &[String]) -> Result<(Vec<CString>, String), Invalid> {
    let mut list: Vec<Option<&str>> = Vec::with_capacity(base.len() + own.len());
    let mut places = BTreeMap::new();
    for entry in base.iter().chain(own) {
        match entry.split_once('=') {
            Some((name, _)) if !name.is_empty() => {
                if let Some(before) = places.insert(name, list.len()) {
                    list[before] = None;
                }
            }
            _ => return Err(Invalid::new("process.env", format!("{} is not NAME=value", validate::shown(entry)))),
        }
        list.push(Some(entry));
    }
    let path = places.get("PATH").and_then(|&at| list[at]?.strip_prefix("PATH=")).map(str::to_owned);
    let mut env: Vec<CString> =
        list.into_iter().flatten().map(|entry| validate::c_string("process.env", entry)).collect::<Result<_, _>>()?;
    if path.is_none() {
        env.push(validate::c_string("process.env", &format!("PATH={DEFAULT_PATH}"))?);
    }
    Ok((env, path.unwrap_or_else(|| DEFAULT_PATH.to_owned())))
}

/// Starts a process in a container. With `orders`, a pipe, it waits there for what to execute.
pub fn spawn(
    agent: &Agent,
    container: &Arc<Container>,
    plan: &Plan,
    stdio: Kind,
    orders: Option<OwnedFd>,
) -> Result<Spawned, Status> {
    if !container.is_alive() {
        return Err(Status::failed_precondition(format!("container {}: its init is gone", container.id)));
    }
    agent.guest.cgroups.follow_memory()?;
    let (ours, theirs) = agent.pipes.take(stdio)?;
    let berth = container.next_berth()?;
    if orders.is_none()
        && let Some(stem) = berth.ask(plan, &theirs)
    {
        let exit = agent.reaper.expect(stem.told.pid.clone());
        return Ok(Spawned {
            way: Way::Asked { stem, theirs },
            pid: 0,
            exit,
            streams: Some(ours),
            berth,
            orders: None,
        });
    }
    let cloned = clone(agent, container, plan, &theirs, orders, &berth);
    let (pid, way, exit) = cloned.inspect_err(|_| container.return_berth(berth.clone()))?;
    Ok(Spawned { way, pid, exit, streams: Some(ours), berth, orders: None })
}

/// Makes it as a child of the agent.
fn clone(
    agent: &Agent,
    container: &Arc<Container>,
    plan: &Plan,
    theirs: &Theirs,
    orders: Option<OwnedFd>,
    berth: &Berth,
) -> Result<(i32, Way, oneshot::Receiver<Exit>), Failed> {
    let (report, reporter) = stdio::report_pipe()?;
    let started = agent.slots.take().step("start", "process")?;
    match clone_into(agent, container, berth)? {
        Cloned::Parent { pid } => Ok((pid, Way::Cloned { report, started }, agent.reaper.watch(pid))),
        Cloned::Child => child::run(container, plan, theirs, &reporter, &started, orders.as_ref()),
    }
}

impl Spawned {
    /// Waits until the command runs, and for its end if that comes within `plan.patience`. May be dropped at any time.
    pub async fn started(&mut self, agent: &Agent, container: &Arc<Container>, plan: &Plan) -> Result<Started, Status> {
        if matches!(self.way, Way::Asked { .. }) {
            if let Some(started) = self.made(agent, plan.patience).await {
                container.stem_works();
                return Ok(started);
            }
            self.clone_after_all(agent, container, plan)?;
        }
        let Way::Cloned { report, started } = &self.way else { return Err(Status::internal("start: lost")) };
        let (reported, here) = (report.read().await?.report, started.get());
        match reported == Report::Silent && here != 0 {
            true => Ok(Started { here, exit: end_within(agent, &mut self.exit, plan.patience).await }),
            false => Err(reported.status()),
        }
    }

    /// By the stem. None: it couldn't.
    async fn made(&mut self, agent: &Agent, patience: Duration) -> Option<Started> {
        let Way::Asked { stem, .. } = &self.way else { return None };
        let (stem, mut exit) = (stem.clone(), None);
        let reply = tokio::select! {
            biased;
            exited = end_within(agent, &mut self.exit, patience) => {
                exit = exited;
                match exit {
                    Some(_) if stem.told.here.get() != 0 => Reply::Done,
                    // It has said by then what it had to say; who was killed says nothing.
                    Some(_) => stem.said().unwrap_or(Reply::No),
                    None if !stem.told.ask() => Reply::Done,
                    None if patience.is_zero() => stem.reply().await,
                    // It says so itself, unless it is killed before.
                    None => tokio::select! {
                        biased;
                        reply = stem.reply() => reply,
                        exited = &mut self.exit => {
                            exit = exited.ok();
                            stem.said().unwrap_or(Reply::No)
                        }
                    },
                }
            }
            reply = stem.reply() => reply,
        };
        let (pid, here) = (stem.told.pid.get(), stem.told.here.get());
        match reply {
            Reply::Done => {}
            Reply::No => return None,
            Reply::Gone => {
                self.berth.take_stem();
                exit = exit.or(put_down(pid, &mut self.exit).await);
            }
        }
        (here != 0).then(|| {
            (self.pid, self.way) = (pid, Way::Runs);
            Started { here, exit }
        })
    }

    fn clone_after_all(&mut self, agent: &Agent, container: &Arc<Container>, plan: &Plan) -> Result<(), Failed> {
        if let Way::Asked { theirs, .. } = &self.way {
            let (pid, way, exit) = clone(agent, container, plan, theirs, None, &self.berth)?;
            (self.pid, self.way, self.exit) = (pid, way, exit);
        }
        Ok(())
    }

    /// Waits for its end, after its cgroup was killed or it was seen to end; not again where that was heard: its news come
    /// once, and to wait for more is a panic.
    pub async fn gone(&mut self) {
        if let Way::Asked { stem, .. } = &self.way {
            while stem.reply().await != Reply::Gone {}
            if stem.told.pid.get() == 0 {
                return; // it was never made
            }
        }
        if !self.exit.is_terminated() {
            let _ = (&mut self.exit).await;
        }
    }

    /// What it wrote before its end, if that is all there is: nobody else can write to its pipes any more.
    pub fn last_words(&self) -> Option<[Bytes; 2]> {
        match &self.streams {
            Some(Ours::Pipes(pipes)) => pipes.last_words(),
            _ => None,
        }
    }

    /// It was told its command by this pipe.
    pub fn keep_orders(&mut self, orders: OwnedFd) {
        self.orders = Some(orders);
    }

    /// Its stdin is at its end.
    pub fn close_stdin(&mut self) {
        if let Some(Ours::Pipes(pipes)) = &mut self.streams {
            pipes.stdin = None;
        }
    }

    /// Its streams, once the command runs.
    pub fn streams(&mut self) -> Result<Streams, Failed> {
        self.streams.take().map_or(Ok(Streams::default()), Ours::streams)
    }
}

/// How a process ends, if it does so within that time.
async fn end_within(agent: &Agent, exit: &mut oneshot::Receiver<Exit>, patience: Duration) -> Option<Exit> {
    if patience.is_zero() {
        return None;
    }
    tokio::select! {
        biased;
        exit = exit => exit.ok(),
        () = agent.patience.wait(patience) => None,
    }
}

/// The end of a process that is alone on its way to its command, the stem having died. 0: there is none.
async fn put_down(pid: i32, exit: &mut oneshot::Receiver<Exit>) -> Option<Exit> {
    if pid == 0 || exit.is_terminated() {
        return None;
    }
    let _ = sys::kill(pid, libc::SIGKILL);
    exit.await.ok()
}

/// A clone in the container's PID namespace. Only children can be put there, so the agent changes that for its children,
/// clones, and changes it back.
fn clone_into(agent: &Agent, container: &Container, berth: &Berth) -> Result<Cloned, Failed> {
    sys::setns(container.pidfd(), libc::CLONE_NEWPID).step("setns", "pid namespace")?;
    // ENOMEM: the namespace is dying, its init having ended.
    let cloned = agent.guest.oom_score.clone_with(container.defaults.oom_score_adj, || {
        // SAFETY: the agent has one thread, and the child goes to `child::run`, which never returns.
        unsafe { sys::clone_into(0, Some(berth.as_fd())) }
    });
    if !matches!(cloned, Ok(Cloned::Child)) {
        sys::setns(agent.guest.pid_namespace.as_fd(), libc::CLONE_NEWPID)
            .step("setns", "pid namespace of the guest")?;
    }
    cloned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|&s| s.to_owned()).collect()
    }

    #[test]
    fn the_process_overrides_the_container() {
        let (env, path) = environment(&strings(&["A=1", "PATH=/x", "B=2"]), &strings(&["A=3"])).expect("good");
        let env: Vec<_> = env.iter().map(|e| e.to_str().expect("utf-8")).collect();
        assert_eq!(env, ["PATH=/x", "B=2", "A=3"]);
        assert_eq!(path, "/x");
    }

    #[test]
    fn as_many_variables_as_there_may_be_are_merged() {
        let base: Vec<String> = (0..validate::MAX_WORDS).map(|n| format!("V{n}=1")).collect();
        let own: Vec<String> = (0..validate::MAX_WORDS).map(|n| format!("V{n}=2")).collect();
        let (env, _) = environment(&base, &own).expect("good");
        assert_eq!(env.len(), validate::MAX_WORDS + 1);
        assert!(env[..validate::MAX_WORDS].iter().all(|entry| entry.to_bytes().ends_with(b"=2")));
    }

    #[test]
    fn there_is_always_a_path() {
        let (env, path) = environment(&[], &[]).expect("good");
        assert_eq!(env[0].to_str(), Ok(format!("PATH={DEFAULT_PATH}").as_str()));
        assert_eq!(path, DEFAULT_PATH);
    }

    #[test]
    fn variables_have_names() {
        for bad in ["", "A", "=x", "A=\0"] {
            assert!(environment(&[], &strings(&[bad])).is_err(), "{bad:?}");
        }
    }
}
