//! A process beside a container's own that makes their like: it is in the container's namespaces and root, has the
//! container's user, capabilities and filter, and waits. Its children, which share its memory until they execute
//! something, have all that from it; to give it to a child of the agent's takes several times as long as to execute a
//! small program. They are the agent's children, not its own.
//!
//! It is not in the container's PID namespace (its children are), so nothing in there can see, signal or trace it. It
//! lives in the cgroup of the processes that it makes, one after the other, and dies with them when that is killed; whoever
//! finds none makes the process without.

mod life;
mod told;

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recvmsg, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::rlimits::Rlimit;
use super::streams::Theirs;
use super::user::UserRequest;
use super::{Plan, orders};
use crate::agent::Agent;
use crate::cgroup::Cgroup;
use crate::container::Container;
use crate::errno::{Failed, Step};
use crate::proto::process::Tool;
use crate::sys::{self, Cloned};
use told::Told;

/// What goes back: one byte.
const NO: u8 = 0;
const DONE: u8 = 1;

/// The agent's end.
pub struct Stem {
    pid: i32,
    socket: AsyncFd<OwnedFd>,
    pub told: Told,
    kind: Kind,
    /// Closed when it has ended.
    exit: oneshot::Receiver<()>,
    /// cgroup.procs: who lives where it does.
    members: OwnedFd,
}

/// What its processes have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    user: UserRequest,
    rlimits: Vec<Rlimit>,
}

/// What is said to an order, where there is something to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The command is executed, or couldn't be, which the process says itself. Only said to who waits for it.
    Done,
    /// It can't be done; the stem stays.
    No,
    /// There is no stem any more.
    Gone,
}

impl Kind {
    /// That of a process. None: a stem can't make the like.
    pub fn of(plan: &Plan) -> Option<Self> {
        let plain = plan.tool == Tool::None && plan.terminal.is_none();
        plain.then(|| Self { user: plan.user.clone(), rlimits: plan.rlimits.clone() })
    }
}

impl Stem {
    /// Makes one in an empty cgroup. It isn't ready yet when this returns, but takes orders.
    pub fn new(agent: &Agent, container: &Arc<Container>, cgroup: &Cgroup, kind: Kind) -> Result<Self, Failed> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .step("socketpair", "stem")?;
        rustix::io::ioctl_fionbio(&ours, true).step("ioctl", "stem")?;
        let members = cgroup.open("cgroup.procs")?;
        let told = Told::new(&agent.slots).step("start", "stem")?;
        let cloned = agent.guest.oom_score.clone_with(container.defaults.oom_score_adj, || {
            // SAFETY: the agent has one thread, and the child goes to `life::run`, which never returns.
            unsafe { sys::clone_into(0, Some(cgroup.as_fd())) }
        })?;
        let pid = match cloned {
            Cloned::Parent { pid } => pid,
            Cloned::Child => life::run(container, &kind, theirs, &told),
        };
        let ended = agent.reaper.watch(pid);
        let (lives, exit) = oneshot::channel();
        let counted = container.stems.clone(); // one of the container's, as long as it lives
        tokio::spawn(async move {
            let _ = ended.await;
            drop((counted, lives));
        });
        let socket = sys::watch(ours, Interest::READABLE).step("epoll", "stem")?;
        Ok(Self { pid, socket, told, kind, exit, members })
    }

    /// No other process lives in its cgroup. (Only who has more rights than the usual container can make one below.)
    pub fn is_alone(&self) -> bool {
        let mut text = [0; 32];
        let len = rustix::io::pread(&self.members, &mut text, 0).unwrap_or(text.len());
        match std::str::from_utf8(&text[..len]).map(str::trim_end) {
            Ok("") => true,
            Ok(only) => only.parse() == Ok(self.pid),
            Err(_) => false,
        }
    }

    pub fn is_of(&self, kind: &Kind) -> bool {
        self.kind == *kind
    }

    /// Has it make a process with these streams. False: it isn't one for that. An error: it is gone.
    pub fn ask(&self, plan: &Plan, streams: &Theirs) -> Result<bool, Errno> {
        let fits = plan.tool == Tool::None && plan.user == self.kind.user && plan.rlimits == self.kind.rlimits;
        let (true, Some(orders), Theirs::Fds(fds)) = (fits, orders::encode(plan), streams) else { return Ok(false) };
        let fds = fds.each_ref().map(AsFd::as_fd);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        self.told.begin();
        sendmsg(&self.socket, &[IoSlice::new(&orders)], &mut control, SendFlags::NOSIGNAL).map(|_| true)
    }

    /// Waits for what is said to the order. May be dropped at any time.
    pub async fn reply(&self) -> Reply {
        loop {
            let Ok(mut ready) = self.socket.readable().await else { return Reply::Gone };
            match self.said() {
                Some(reply) => return reply,
                None => ready.clear_ready(),
            }
        }
    }

    /// What was said, without waiting.
    pub fn said(&self) -> Option<Reply> {
        let mut byte = [0];
        let mut control = RecvAncillaryBuffer::default();
        match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::empty()) {
            Ok(message) if message.bytes == byte.len() => Some(if byte[0] == DONE { Reply::Done } else { Reply::No }),
            Err(Errno::AGAIN | Errno::INTR) => None,
            _ => Some(Reply::Gone),
        }
    }

    /// Waits until it is gone, which it soon is when nobody has its other end any more.
    pub async fn gone(self) {
        let Self { exit, socket, .. } = self;
        drop(socket);
        let _ = exit.await;
    }
}
