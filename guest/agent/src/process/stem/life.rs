//! The other side: the stem's own life, and that of its children up to their exec.

use std::ffi::CStr;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg,
};
use rustix::time::Timespec;

use super::super::lookup::{Command, NotExecuted};
use super::super::orders::{self, Orders};
use super::super::{Plan, child};
use super::told::Told;
use super::{DONE, Kind, NO};
use crate::container::Container;
use crate::proto::process::Tool;
use crate::sys::{self, Stack};

/// For what a child calls before its exec.
const STACK: usize = 64 * 1024;

/// What the user's ids and home directory were read from.
const FILES: [&CStr; 2] = [c"/etc/passwd", c"/etc/group"];

/// Becomes a stem: what each process of this kind becomes, up to its streams.
pub fn run(container: &Container, kind: &Kind, socket: OwnedFd, told: &Told) -> ! {
    let began = sys::time_of(libc::CLOCK_REALTIME_COARSE);
    if sys::setns(container.pidfd(), libc::CLONE_NEWPID).is_err() {
        sys::exit_now(1);
    }
    let Ok(Some(home)) = child::prepare(container, &first(kind), None) else { sys::exit_now(1) };
    // Its memory is a copy of the agent's.
    if sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).is_err() {
        sys::exit_now(1);
    }
    // The agent has more to do when it has given an order: in between it would have to begin anew.
    if sys::set_patient(true).is_err() {
        sys::exit_now(1);
    }
    let kept = [socket];
    // SAFETY: nothing of this process uses another descriptor any more than the standard ones and this.
    unsafe { sys::close_all_but(3, &kept) };
    let known = Known::now();
    if !known.is_older_than(began) {
        sys::exit_now(0);
    }
    serve(&kept[0], &home, &known, told)
}

/// A process of this kind.
fn first(kind: &Kind) -> Plan {
    Plan {
        id: String::new(),
        args: Vec::new(),
        env: Vec::new(),
        path: String::new(),
        cwd: "/".to_owned(),
        user: kind.user.clone(),
        rlimits: kind.rlimits.clone(),
        tool: Tool::None,
        terminal: None,
        patience: Duration::ZERO,
        explores: false,
    }
}

fn serve(socket: &OwnedFd, home: &CStr, known: &Known, told: &Told) -> ! {
    let mut buffer = vec![0; orders::LONGEST];
    let mut stack = Stack::new(STACK);
    loop {
        let Some((len, fds)) = receive(socket, &mut buffer) else { sys::exit_now(0) };
        told.take();
        if Known::now() != *known {
            sys::exit_now(0);
        }
        let orders = orders::decode(&buffer[..len]).filter(|orders| !orders.args.is_empty());
        let (Some(mut orders), Some(fds)) = (orders, fds) else {
            say(socket, NO);
            continue;
        };
        if !orders.env.iter().any(|entry| entry.to_bytes().starts_with(b"HOME=")) {
            orders.env.push(home);
        }
        let mut start = Start::new(&orders, &fds, told, socket);
        start.make(&mut stack);
        drop(fds);
        wait(socket);
        if stack.is_used() {
            sys::exit_now(0); // the child still works with all of this
        }
    }
}

fn say(socket: &OwnedFd, what: u8) {
    let _ = sendmsg(socket, &[IoSlice::new(&[what])], &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL);
}

/// Waits for an order, or for the end of all orders. The agent gives none before the last process has ended.
fn wait(socket: &OwnedFd) {
    while let Err(Errno::INTR) = poll(&mut [PollFd::new(socket, PollFlags::IN)], None) {}
}

/// The next order and what comes with it. None: there are no more.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Option<(usize, Option<[OwnedFd; 3]>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other.ok()?,
        }
    };
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds: Vec<OwnedFd> = fds.next().map(Iterator::collect).unwrap_or_default();
    (message.bytes > 0).then(|| (message.bytes, fds.try_into().ok()))
}

/// A child on its way to its exec. It shares this with the stem.
struct Start<'a> {
    fds: [RawFd; 3],
    cwd: &'a CStr,
    command: Command<'a>,
    urgent: bool,
    told: &'a Told,
    socket: &'a OwnedFd,
    failed: Option<NotExecuted>,
}

impl<'a> Start<'a> {
    fn new(orders: &'a Orders<'a>, fds: &[OwnedFd; 3], told: &'a Told, socket: &'a OwnedFd) -> Self {
        Self {
            fds: fds.each_ref().map(AsRawFd::as_raw_fd),
            cwd: orders.cwd,
            command: Command::new(&orders.args, &orders.env, orders.path),
            urgent: orders.urgent,
            told,
            socket,
            failed: None,
        }
    }

    /// Makes the process. Who waits for its command is told when that is executed; else it is spared to wait for that.
    fn make(&mut self, stack: &mut Stack) {
        let (told, socket, urgent) = (self.told, self.socket, self.urgent);
        let flags = libc::CLONE_PARENT | if urgent { libc::CLONE_VFORK } else { 0 };
        // SAFETY: both have one thread; `execute` ends in exec or `_exit` and leaves what it allocates in `self`; and the
        // stem makes nothing but system calls that succeed, in which the C library changes nothing, until `wait` returns.
        let made = unsafe { stack.clone(flags, execute, self, told.pid.as_ptr()) };
        if made.is_err() || urgent && told.here.get() == 0 {
            say(socket, NO);
        } else if urgent && told.done() {
            say(socket, DONE);
        }
    }
}

extern "C" fn execute(start: &mut Start<'_>) -> ! {
    // SAFETY: plain calls with integers, and a string that lives through the call.
    let ready = sys::set_patient(false).is_ok()
        && unsafe {
            libc::setsid() != -1
                && (0..).zip(start.fds).all(|(to, from)| libc::dup2(from, to) == to)
                && libc::chdir(start.cwd.as_ptr()) == 0
        };
    if !ready {
        if !start.urgent {
            say(start.socket, NO);
        }
        sys::exit_now(1);
    }
    start.told.here.set(rustix::process::getpid().as_raw_pid());
    if !start.urgent && start.told.done() {
        say(start.socket, DONE);
    }
    let failed = start.failed.insert(start.command.execute());
    let _ = rustix::io::write(rustix::stdio::stderr(), failed.line.as_bytes());
    sys::exit_now(failed.code)
}

/// What tells a file from another, or from itself before it was changed.
type Version = (u64, u64, i64, i64, i64);

/// The files as they were at one time.
#[derive(PartialEq, Eq)]
struct Known([Option<Version>; 2]);

impl Known {
    fn now() -> Self {
        Self(FILES.map(|path| {
            let stat = rustix::fs::stat(path).ok()?;
            Some((stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime, stat.st_ctime_nsec as i64))
        }))
    }

    /// They weren't changed after that time. The kernel's own clock for files goes by ticks: one that was changed within
    /// the same tick might be changed again without that being seen.
    fn is_older_than(&self, time: Timespec) -> bool {
        self.0.iter().flatten().all(|version| (version.3, version.4) < (time.tv_sec, time.tv_nsec))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::slots::Slots;
    use crate::sys::Cloned;

    /// What a command writes that is made with these orders, by a stem of its own; and whether it was.
    fn made_when(urgent: bool, args: &[&CStr], cwd: &CStr) -> (bool, String) {
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        let told = Told::new(&Slots::new().expect("a page")).expect("slots");
        // SAFETY: the child makes one more and ends in _exit.
        let pid = match unsafe { sys::clone_into(0, None) }.expect("clone") {
            Cloned::Child => {
                let env = vec![c"A=b", c"HOME=/h"];
                let orders = Orders { urgent, args: args.to_vec(), env, path: "/nowhere:/bin:/usr/bin", cwd };
                let fds = [(); 3].map(|()| rustix::io::fcntl_dupfd_cloexec(&write, 3).expect("dup"));
                let mut stack = Stack::new(STACK);
                let mut start = Start::new(&orders, &fds, &told, &write);
                start.make(&mut stack);
                while stack.is_used() {}
                drop(start);
                sys::exit_now(i32::from(told.here.get() != 0))
            }
            Cloned::Parent { pid } => pid,
        };
        drop(write);
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::fs::File::from(read), &mut text).expect("text");
        let pid = rustix::process::Pid::from_raw(pid);
        let waited = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
        let (_, status) = waited.expect("wait").expect("ended");
        (status.exit_status() == Some(1), text)
    }

    fn made(args: &[&CStr], cwd: &CStr) -> (bool, String) {
        let made = made_when(true, args, cwd);
        assert_eq!(made_when(false, args, cwd), made);
        made
    }

    #[test]
    fn commands_are_made() {
        let script = [c"sh", c"-c", c"echo $A $HOME $PWD $0", c"x"];
        assert_eq!(made(&script, c"/proc"), (true, "b /h /proc x\n".to_owned()));
    }

    #[test]
    fn what_cannot_be_executed_says_so_itself() {
        assert_eq!(made(&[c"no-such"], c"/"), (true, "pykata: no-such: command not found\n".to_owned()));
        assert_eq!(made(&[c"/etc"], c"/"), (true, "pykata: /etc: is a directory\n".to_owned()));
    }

    #[test]
    fn a_missing_directory_is_left_to_others() {
        assert_eq!(made(&[c"true"], c"/no/such"), (false, String::new()));
    }
}
