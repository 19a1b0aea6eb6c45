//! From the kernel's `exec` to serving: what PID 1 has to do itself in a guest that holds nothing else.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, mkdir};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::agent::Agent;
use crate::cgroup;
use crate::container;
use crate::errno::{Failed, Step};
use crate::log;
use crate::mounts::{self, RDONLY, mount_at};
use crate::process::patience::Patience;
use crate::process::slots::Slots;
use crate::reaper;
use crate::server;
use crate::stats::Memory;
use crate::sys::{self, Cloned};
use crate::transport::{Endpoint, TransportError};

/// The kernel's own limit.
const MAX_FILES: u64 = 1 << 20;
/// Processes and threads of the whole guest. The kernel's own limit follows from the memory, and 256 MiB give less than
/// what one container may have; what they take of the memory counts for the container anyway.
const MAX_TASKS: u64 = 32768;

/// What is known of the guest from its start on.
pub struct Guest {
    /// CLOCK_BOOTTIME when PID 1 began, and when it began to serve.
    pub kernel_ns: i64,
    pub agent_ns: i64,
    pub memory_total: u64,
    /// The parent of all containers' cgroups.
    pub cgroups: cgroup::Parent,
    /// The guest's own PID namespace, to come back to.
    pub pid_namespace: OwnedFd,
    pub oom_score: OomScore,
}

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(transparent)]
    Syscall(#[from] Failed),
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// The whole life of PID 1. It ends only in failure; the kernel then panics, and the VM with it.
pub fn pid1() -> i32 {
    let kernel_ns = sys::now_ns(libc::CLOCK_BOOTTIME);
    if rustix::process::getpid() != rustix::process::Pid::INIT {
        let _ = rustix::io::write(rustix::stdio::stderr(), b"pykata-agent runs as PID 1 of a pykata guest only\n");
        return 2;
    }
    let Err(err) = boot(kernel_ns);
    log!("fatal: {err}");
    1
}

fn boot(kernel_ns: i64) -> Result<std::convert::Infallible, BootError> {
    mount_all()?;
    log::open();
    std::panic::set_hook(Box::new(|info| log::alarm(format_args!("{info}"))));
    take_null_stdio()?;
    protect()?;
    sys::set_important().step("schedule", "agent")?;
    let memory = Memory::read()?;
    let guest = Guest {
        oom_score: OomScore::open()?,
        kernel_ns,
        agent_ns: 0,
        memory_total: memory.total,
        cgroups: cgroup::prepare(memory.available, MAX_TASKS)?,
        pid_namespace: rustix::fs::open("/proc/self/ns/pid", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .step("open", "pid namespace")?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    // As a task: what only the event loop itself is to be woken for waits until it has looked for events once more.
    let serving = async { tokio::spawn(serve(guest)).await };
    runtime.step("start", "event loop")?.block_on(serving).unwrap_or_else(|_| sys::exit_now(1))
}

async fn serve(mut guest: Guest) -> Result<std::convert::Infallible, BootError> {
    let cmdline = std::fs::read_to_string("/proc/cmdline").step("read", "/proc/cmdline")?;
    let signals = reaper::child_signals()?;
    let endpoint = Endpoint::open(&cmdline).await?;
    guest.agent_ns = sys::now_ns(libc::CLOCK_BOOTTIME);
    log!("serving after {} us", (guest.agent_ns - guest.kernel_ns) / 1000);
    let patience = Patience::new().step("make", "timer")?;
    let agent = Arc::new(Agent::new(guest, Slots::new().step("map", "slots")?, patience));
    let (reaping, waking) = (agent.clone(), agent.clone());
    tokio::spawn(async move { attend(reaping.reaper.run(signals)).await });
    tokio::spawn(async move { attend(waking.patience.run()).await });
    let mut last = None;
    loop {
        let mut channel = endpoint.connect(last).await?;
        if let Err(err) = server::serve(&mut channel, agent.clone()).await {
            log!("connection: {err}");
        }
        last = Some(channel);
    }
}

/// What has to go on for as long as the guest lives.
async fn attend(work: impl Future<Output = Result<(), Failed>>) {
    if let Err(failed) = work.await {
        log!("fatal: {failed}");
        sys::exit_now(1);
    }
}

/// The agent's place in the OOM killer's eyes: last. A child inherits it, and to change its own takes a child long; so the
/// agent takes the child's for the moment of the clone.
pub struct OomScore(OwnedFd);

impl OomScore {
    const AGENT: i32 = -1000;

    fn open() -> Result<Self, Failed> {
        let file = rustix::fs::open("/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        let score = Self(file.step("open", "oom_score_adj")?);
        score.set(Self::AGENT)?;
        Ok(score)
    }

    fn set(&self, value: i32) -> Result<(), Failed> {
        rustix::io::pwrite(&self.0, value.to_string().as_bytes(), 0).step("write", "oom_score_adj").map(drop)
    }

    /// Clones with another score, which the child keeps.
    pub fn clone_with(&self, value: i32, clone: impl FnOnce() -> Result<Cloned, Errno>) -> Result<Cloned, Failed> {
        self.set(value)?;
        let cloned = clone();
        if !matches!(cloned, Ok(Cloned::Child)) {
            self.set(Self::AGENT)?;
        }
        cloned.step("clone", "process")
    }
}

/// The initramfs can't be left by pivot_root, as nothing lies under it: containers need a root that has a parent. A
/// bind mount of it on top of itself is one; and being read-only, nobody who gets hold of the agent's file can change it.
fn mount_root() -> Result<(), Failed> {
    for dir in ["/proc", "/sys", "/dev", "/run", "/mnt"] {
        let _ = mkdir(dir, Mode::from_raw_mode(0o755));
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = open_tree(rustix::fs::CWD, "/", flags).step("open_tree", "/")?;
    mounts::set_attributes(root.as_fd(), false, RDONLY, 0, 0)?;
    move_mount(&root, c"", rustix::fs::CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).step("move_mount", "/")?;
    rustix::process::fchdir(&root).step("chdir", "/")?;
    rustix::process::chroot(".").step("chroot", "/")
}

fn mount_all() -> Result<(), Failed> {
    mount_root()?;
    let usual = ["nosuid", "noexec", "nodev"];
    mount_at("proc", "proc", "/proc", &usual)?;
    mount_at("sysfs", "sysfs", "/sys", &usual)?;
    // Switching cgroup controllers on waits for RCU's grace periods, which are cheap to hurry up in a small guest.
    if let Ok(file) = rustix::fs::open("/sys/kernel/rcu_expedited", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        let _ = rustix::io::write(file, b"1");
    }
    mount_at("devtmpfs", "devtmpfs", "/dev", &["nosuid", "noexec", "mode=755"])?;
    mount_at("tmpfs", "tmpfs", "/run", &["nosuid", "nodev", "mode=755"])?;
    mount_at("cgroup2", "cgroup", cgroup::ROOT, &["nosuid", "noexec", "nodev", "nsdelegate", "memory_recursiveprot"])?;
    for dir in container::DIRS.iter().chain(&[container::VOLUMES, "/dev/pts", "/dev/shm"]) {
        mkdir(*dir, Mode::from_raw_mode(0o755)).step("mkdir", dir)?;
    }
    mount_at("devpts", "devpts", "/dev/pts", &["nosuid", "noexec", "mode=620", "ptmxmode=666"])?;
    mount_at("tmpfs", "shm", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777"])
}

/// 0, 1 and 2 have to be taken, so that no other descriptor gets these numbers. The console, which is there at first,
/// stays open elsewhere: its last close would wait for the serial line, and under emulation takes 7 ms.
fn take_null_stdio() -> Result<(), Failed> {
    if let Ok(console) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) {
        std::mem::forget(console);
    }
    replace_stdio()
}

fn replace_stdio() -> Result<(), Failed> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()).step("open", "/dev/null")?;
    if null.as_raw_fd() <= 2 {
        std::mem::forget(null);
        return replace_stdio();
    }
    rustix::stdio::dup2_stdin(&null).step("dup2", "stdin")?;
    rustix::stdio::dup2_stdout(&null).step("dup2", "stdout")?;
    rustix::stdio::dup2_stderr(&null).step("dup2", "stderr")
}

/// Against the containers: nobody may trace the agent or read its memory, its forked children included. And many streams
/// need many descriptors.
fn protect() -> Result<(), Failed> {
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).step("prctl", "dumpable")?;
    sys::ignore_signal(libc::SIGPIPE);
    sys::keep_heap();
    let files = Rlimit { current: Some(MAX_FILES), maximum: Some(MAX_FILES) };
    setrlimit(Resource::Nofile, files).step("setrlimit", "files")?;
    // Half of what threads-max was at the kernel's start, by user: containers are limited by their cgroups instead.
    setrlimit(Resource::Nproc, Rlimit { current: None, maximum: None }).step("setrlimit", "processes")
}

/// What the kernel shall keep to once there are containers.
pub fn set_sysctls() -> Result<(), Failed> {
    sysctl("kernel/threads-max", &MAX_TASKS.to_string())?;
    // Else the kernel looks twice a second whether memory is fragmented, and each second whether its counters can be summed
    // up. An idle guest should sleep, and one that goes on from a saved one has something else to do first.
    sysctl("vm/compaction_proactiveness", "0")?;
    sysctl("vm/stat_interval", "60")?;
    // As every distribution has it: nobody is led astray by another user's links in /tmp.
    sysctl("fs/protected_symlinks", "1")?;
    sysctl("fs/protected_hardlinks", "1")
}

fn sysctl(name: &str, value: &str) -> Result<(), Failed> {
    let file = rustix::fs::open(format!("/proc/sys/{name}"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    rustix::io::write(file.step("open", name)?, value.as_bytes()).step("write", name).map(drop)
}
