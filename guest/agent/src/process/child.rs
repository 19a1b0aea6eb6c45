//! The child between clone and exec. It joins the container's namespaces and becomes who it shall be; nothing in it
//! runs on once that failed.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::caps::CapSets;
use super::orders::{self, Orders};
use super::slots::Slot;
use super::streams::Theirs;
use super::user::{self, Identity};
use super::{Plan, explore, lookup, rlimits};
use crate::container::Container;
use crate::container::inside::{self, Kind};
use crate::container::userns;
use crate::errno::{self, Failed, Step};
use crate::files::{self, Layers};
use crate::proto::process::Tool;
use crate::stdio::{Report, Reporter};
use crate::sys;
use crate::validate::{Invalid, shown};

pub enum Refused {
    Failed(Failed),
    Invalid(Invalid),
}

impl From<Failed> for Refused {
    fn from(failed: Failed) -> Self {
        Refused::Failed(failed)
    }
}

impl From<Invalid> for Refused {
    fn from(invalid: Invalid) -> Self {
        Refused::Invalid(invalid)
    }
}

/// Becomes the process. `stdio` is its side of its streams; `started` takes its PID just before it executes the command.
/// With `orders` it only then learns which.
pub fn run(
    container: &Container,
    plan: &Plan,
    stdio: &Theirs,
    reporter: &Reporter,
    started: &Slot,
    orders: Option<&OwnedFd>,
) -> ! {
    let refused = match plan.tool {
        Tool::None => match prepare(container, plan, Some(stdio)) {
            Ok(home) => execute(plan, home, orders.map(|orders| wait_for(plan, orders, reporter)), started),
            Err(refused) => refused,
        },
        Tool::Files => match prepare(container, plan, Some(stdio)).and_then(|_| as_after_exec(container)) {
            Ok(()) => become_tool(started, None),
            Err(refused) => refused,
        },
        Tool::Changes => match prepare_changes(container, stdio) {
            Ok(layers) => become_tool(started, Some(layers)),
            Err(refused) => refused,
        },
    };
    match refused {
        Refused::Failed(failed) => reporter.send(&Report::from(failed)),
        Refused::Invalid(invalid) => reporter.send(&Report::Invalid(invalid.to_string())),
    }
    sys::exit_now(1)
}

fn execute(plan: &Plan, home: Option<CString>, told: Option<Orders<'_>>, started: &Slot) -> ! {
    let (args, mut env, path) = match told {
        Some(told) => (told.args, told.env, told.path),
        None => (strings(&plan.args), strings(&plan.env), plan.path.as_str()),
    };
    if !env.iter().any(|entry| entry.to_bytes().starts_with(b"HOME=")) {
        env.extend(home.as_deref());
    }
    started.set(rustix::process::getpid().as_raw_nonzero().get());
    let failed = lookup::Command::new(&args, &env, path).execute();
    let _ = rustix::io::write(rustix::stdio::stderr(), failed.line.as_bytes());
    sys::exit_now(failed.code);
}

fn strings(list: &[CString]) -> Vec<&CStr> {
    list.iter().map(CString::as_c_str).collect()
}

/// What exec leaves a user who isn't root.
fn as_after_exec(container: &Container) -> Result<(), Refused> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Ok(container.defaults.caps.keep_ambient()?)
}

/// Runs a part of the agent in place of a command.
fn become_tool(started: &Slot, layers: Option<Layers>) -> ! {
    // Its memory is a copy of the agent's, and its executable file the agent's own: neither is for the container to see.
    if sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).is_err() {
        sys::exit_now(1);
    }
    started.set(rustix::process::getpid().as_raw_nonzero().get());
    // What exec would close; the agent waits for the end of the report among it.
    // SAFETY: nothing of this process uses another descriptor any more than the standard ones and these.
    unsafe { sys::close_all_but(3, layers.as_ref().map_or(&[], Layers::all)) };
    files::serve(layers)
}

/// Only the container's layers, and the rights to read all of them: what is deleted is told by attributes that nobody
/// else may read. Nothing in here follows a link, and no user of the container is involved.
fn prepare_changes(container: &Container, stdio: &Theirs) -> Result<Layers, Refused> {
    sys::reset_signals();
    rustix::process::setsid().step("setsid", "process")?;
    let layers = Layers::open(container)?;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .step("open", "root")?;
    stdio.take(root.as_fd())?;
    if let Some(upper) = layers.upper() {
        rustix::process::fchdir(upper).step("chdir", "layer")?;
        rustix::process::chroot(".").step("chroot", "layer")?;
    }
    CapSets::READER.apply()?;
    sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).step("prctl", "no_new_privs")?;
    Ok(layers)
}

/// Waits to be told what to execute. It may be long: descriptors of the agent's, such as the other ends of pipes of others,
/// must not stay open for that.
fn wait_for(plan: &Plan, orders: &OwnedFd, reporter: &Reporter) -> Orders<'static> {
    if plan.explores {
        explore::explore(&plan.path);
    }
    let kept = [orders.as_raw_fd(), reporter.fd().as_raw_fd()];
    let mut first = 3;
    for fd in [kept[0].min(kept[1]), kept[0].max(kept[1])] {
        close_range(first, fd - 1);
        first = fd + 1;
    }
    close_range(first, i32::MAX);
    orders::wait(orders.as_fd()).unwrap_or_else(|| sys::exit_now(1))
}

fn close_range(first: i32, last: i32) {
    if first <= last {
        // SAFETY: closes descriptors that nothing in this process uses any more: it goes on to exec or to its end.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// All between clone and exec but the PID namespace; without streams those of now are kept. Gives the HOME to be added.
pub fn prepare(container: &Container, plan: &Plan, stdio: Option<&Theirs>) -> Result<Option<CString>, Refused> {
    let defaults = &container.defaults;
    sys::reset_signals();
    rustix::process::setsid().step("setsid", "process")?;
    let in_user_namespace = container.namespaces.user.is_some();
    if in_user_namespace {
        rlimits::apply(&plan.rlimits)?; // nobody in there may raise one
    }
    join(container)?;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .step("open", "container root")?;
    stdio.map_or(Ok(()), |stdio| stdio.take(root.as_fd()))?;
    let identity = plan.user.resolve(root.as_fd(), &defaults.user)?;
    stdio.map_or(Ok(()), |stdio| stdio.give_to(identity.uid))?;
    enter_cwd(root.as_fd(), &plan.cwd)?;
    if !in_user_namespace {
        rlimits::apply(&plan.rlimits)?; // a low one may be in the way of the steps above
    }
    rustix::process::umask(Mode::from_raw_mode(defaults.user.umask.unwrap_or(0o022) & 0o777));

    // Without no_new_privs a filter takes CAP_SYS_ADMIN to install: before that is given up. Else as late as can be.
    let (early, late) = match defaults.no_new_privileges {
        true => (None, container.seccomp.as_ref()),
        false => (container.seccomp.as_ref(), None),
    };
    defaults.caps.apply_bounding()?;
    early.map_or(Ok(()), |filter| filter.install())?;
    become_user(&identity)?;
    defaults.caps.apply()?;
    if defaults.no_new_privileges {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).step("prctl", "no_new_privs")?;
    }
    late.map_or(Ok(()), |filter| filter.install())?;
    Ok(user::home_variable(&plan.env, &identity))
}

/// The container's namespaces, but for the PID namespace, in which the child began, and the cgroup namespace: one rooted
/// at the process's own cgroup shows it "/" in /proc/self/cgroup, while /sys/fs/cgroup shows the container's limits.
fn join(container: &Container) -> Result<(), Failed> {
    let user = if container.namespaces.user.is_some() { libc::CLONE_NEWUSER } else { 0 };
    let flags = libc::CLONE_NEWNS | container.namespaces.flags() | user;
    // SAFETY: a new cgroup namespace changes nothing that Rust's own rules are about.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWCGROUP) }.step("unshare", "cgroup")?;
    sys::setns(container.pidfd(), flags).step("setns", "container")?;
    if user != 0 { userns::become_root() } else { Ok(()) }
}

/// One that isn't there is made.
fn enter_cwd(root: BorrowedFd<'_>, cwd: &str) -> Result<(), Refused> {
    if rustix::process::chdir(cwd).is_ok() {
        return Ok(());
    }
    let entered = inside::make(root, cwd, Kind::Dir).and_then(|dir| rustix::process::fchdir(dir).step("chdir", cwd));
    entered.map_err(|failed| match failed.errno {
        Errno::NOTDIR => refused_cwd(cwd, "is no directory"),
        Errno::LOOP => refused_cwd(cwd, "is a link to itself"),
        _ => Refused::Failed(failed),
    })
}

fn refused_cwd(cwd: &str, why: &str) -> Refused {
    Refused::Invalid(Invalid::new("process.cwd", format!("{} {why}", shown(cwd))))
}

fn become_user(identity: &Identity) -> Result<(), Failed> {
    sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).step("prctl", "keepcaps")?;
    let groups = &identity.groups;
    // SAFETY: raw calls with integers and a list that lives through the call; the C library's versions would signal
    // its other threads, of which there are none.
    unsafe {
        let gid = identity.gid;
        if libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) != 0 {
            return Err(Failed::new("setgroups", groups.len(), errno::last()));
        }
        if libc::syscall(libc::SYS_setresgid, gid, gid, gid) != 0 {
            return Err(Failed::new("setgid", gid, errno::last()));
        }
        let uid = identity.uid;
        if libc::syscall(libc::SYS_setresuid, uid, uid, uid) != 0 {
            return Err(Failed::new("setuid", uid, errno::last()));
        }
    }
    sys::prctl(libc::PR_SET_KEEPCAPS, 0, 0).step("prctl", "keepcaps")?;
    Ok(())
}
