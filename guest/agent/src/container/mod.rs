//! Containers: made, found dead, and removed again without a trace.

pub mod config;
mod dev;
mod device_filter;
mod etc;
pub mod filesystems;
mod idle;
mod init;
pub mod inside;
pub mod names;
mod paths;
mod resources;
mod rootfs;
pub mod stems;
pub mod userns;
mod usual;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags};
use tokio::sync::watch;
use tonic::Status;

use crate::agent::Agent;
use crate::cgroup::{self, Cgroup};
use crate::errno::{Failed, Step};
use crate::log;
use crate::process::berth::Berth;
use crate::process::defaults::Defaults;
use crate::process::registry::Registry;
use crate::process::stem::Kind;
use crate::process::waiting::Waiting;
use crate::proto;
use crate::reaper::Exit;
use crate::seccomp::Filter;
use crate::setup::Ready;
use crate::stdio::{self, Report};
use crate::sys::{self, Cloned};
use config::{Config, MountKind, Namespaces};
use filesystems::Found;
use names::NameFiles;

pub use config::VOLUMES;
pub use rootfs::DIRS;

pub struct Container {
    pub id: String,
    pub cgroup: Cgroup,
    memory_events: OwnedFd,
    pids: OwnedFd,
    pub namespaces: Namespaces,
    pub defaults: Defaults,
    pub seccomp: Option<Filter>,
    /// None: the guest's.
    hostname: Mutex<Option<String>>,
    init: i32,
    pidfd: OwnedFd,
    /// How init ended, once it is gone, and with it the namespaces, mounts and processes.
    gone: watch::Receiver<Option<Exit>>,
    pub processes: Registry,
    /// Cgroups of ended processes that have left descendants behind.
    leftovers: Mutex<Vec<Arc<Berth>>>,
    /// A free one for the next process: to make one takes a while.
    spare: Mutex<Option<Arc<Berth>>>,
    /// How often the OOM killer had struck when nothing ran in here any more, until something does.
    kills_before: Mutex<Option<u64>>,
    /// What the last process was like that a stem could have made.
    last: Mutex<Option<Kind>>,
    /// Stems that were made since one was of use.
    useless: AtomicU64,
    /// One more of it than there are stems. None where there shall be none: what goes for the usual container (whose
    /// filter lets a stem do its work, whose capabilities don't let others disturb it) may not go here.
    pub stems: Option<Arc<()>>,
    serial: AtomicU64,
    /// A process that waits for the first command.
    waiting: Mutex<Option<Waiting>>,
    /// What is rewritten when the guest becomes another one.
    name_files: Mutex<Option<NameFiles>>,
    /// What its files say the guest is, where that was another one.
    former: Mutex<Option<Arc<Ready>>>,
}

/// A request whose devices are all there: the rest takes no waiting for the host.
pub struct Prepared {
    config: Config,
    lowers: Vec<Found>,
    mounted: Vec<Option<Found>>,
    waiting: Option<(proto::Process, bool)>,
}

impl Prepared {
    /// A process that shall be made beforehand, and whether it explores the container.
    pub fn waiting(&self) -> Option<(proto::Process, bool)> {
        self.waiting.clone()
    }
}

/// Checks a request and waits for its disks. Holds nothing: may be dropped at any time.
pub async fn prepare(mut request: proto::CreateContainerRequest) -> Result<Prepared, Status> {
    let explored = request.explored;
    let waiting = request.waiting.take().map(|process| (process, explored));
    let mut config = Config::new(request)?;
    let lowers = filesystems::find_all(std::mem::take(&mut config.rootfs.lowers)).await?;
    let mut mounted = Vec::with_capacity(config.mounts.len());
    for mount in &mut config.mounts {
        mounted.push(match &mut mount.what {
            MountKind::Device(device) => Some(device.take().find().await?),
            _ => None,
        });
    }
    Ok(Prepared { config, lowers, mounted, waiting })
}

/// Makes the container; its id must be claimed. Not to be dropped half-way.
pub async fn build(agent: &Agent, prepared: Prepared) -> Result<Arc<Container>, Status> {
    let ready = agent.ready()?;
    let Prepared { config, lowers, mounted, .. } = prepared;
    ready.complete()?;
    agent.guest.cgroups.follow_memory()?;
    rootfs::make_lower_dirs(lowers.len() + config.rootfs.data.len())?;
    let cgroup = agent.guest.cgroups.cgroup.child(&config.id)?;
    let held = config.namespaces.user.as_ref().map(|_| agent.reaper.hold());
    let started = start_init(agent, &cgroup, init::Plan { config: &config, lowers, mounted, names: &ready.names });
    let (init, report) = match started {
        Ok(started) => started,
        Err(failed) => {
            let _ = agent.guest.cgroups.cgroup.remove_child(&config.id);
            return Err(failed.into());
        }
    };
    let exit = agent.reaper.watch(init);
    let told = report.read().await;
    let (init, exit) = match told.as_ref().map(|told| told.init) {
        Ok(Some(brother)) => {
            let _ = exit.await;
            (brother, agent.reaper.watch(brother))
        }
        _ => (init, exit),
    };
    let (tx, gone) = watch::channel(None);
    tokio::spawn(async move {
        let _ = tx.send(exit.await.ok());
    });
    let pidfd = Pid::from_raw(init).ok_or(rustix::io::Errno::SRCH);
    let pidfd = pidfd.and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty())).step("pidfd", "init");
    let counters = cgroup.open("memory.events").and_then(|events| Ok((events, cgroup.open("pids.current")?)));
    drop(held);
    let result = match told.map(|told| told.report) {
        // Only now: init itself had to open the disks.
        Ok(Report::Ok) => config
            .device_filter
            .as_ref()
            .map_or(Ok(()), |filter| filter.attach(cgroup.as_fd()))
            .and_then(|()| Ok((pidfd?, counters?)))
            .map_err(Status::from),
        Ok(report) => Err(report.status()),
        Err(failed) => Err(failed.into()),
    };
    let Config { id, namespaces, process, seccomp, hostname, usual, .. } = config;
    match result {
        Ok((pidfd, (memory_events, pids))) => Ok(Arc::new(Container {
            id,
            cgroup,
            memory_events,
            pids,
            namespaces,
            defaults: process,
            seccomp,
            hostname: Mutex::new(hostname),
            init,
            pidfd,
            gone,
            processes: Registry::default(),
            leftovers: Mutex::default(),
            spare: Mutex::default(),
            kills_before: Mutex::default(),
            last: Mutex::default(),
            useless: AtomicU64::new(0),
            stems: usual.then(Arc::default),
            serial: AtomicU64::new(0),
            waiting: Mutex::default(),
            name_files: Mutex::default(),
            former: Mutex::default(),
        })),
        Err(status) => {
            let _ = sys::kill(init, libc::SIGKILL);
            let exit = wait_gone(gone).await;
            log!("container {id}: init ended early: {exit:?}");
            remove_cgroup(&agent.guest.cgroups.cgroup, &id).await?;
            Err(status)
        }
    }
}

fn start_init(agent: &Agent, cgroup: &Cgroup, plan: init::Plan<'_>) -> Result<(i32, stdio::Reporting), Failed> {
    resources::apply(cgroup, &plan.config.resources, resources::default_pids(agent.guest.memory_total))?;
    if plan.config.may_make_cgroups() {
        cgroup::enable("cpu")?;
    }
    let (report, reporter) = stdio::report_pipe()?;
    let namespaces = &plan.config.namespaces;
    // With a user namespace it is only init's elder brother, which needs a mount namespace to work in.
    let flags = if namespaces.user.is_some() { libc::CLONE_NEWNS } else { init::clone_flags(namespaces) };
    // SAFETY: the agent has one thread, and the child goes to `init::main`, which never returns.
    match unsafe { sys::clone_into(flags as u64, Some(cgroup.as_fd())) }.step("clone", "container init")? {
        Cloned::Parent { pid } => Ok((pid, report)),
        Cloned::Child => init::main(&plan, &reporter),
    }
}

async fn wait_gone(mut gone: watch::Receiver<Option<Exit>>) -> Option<Exit> {
    gone.wait_for(Option::is_some).await.ok().and_then(|exit| *exit)
}

/// Removes a container by its id and returns when nothing of it is left. An unknown id is fine.
pub async fn remove(agent: &Agent, id: &str) -> Result<(), Status> {
    let Some(container) = agent.settled(id).await else { return Ok(()) };
    drop(lock(&container.name_files).take()); // they would keep its file system
    let _ = container.cgroup.kill();
    let _ = sys::kill(container.init_if_alive(), libc::SIGKILL);
    wait_gone(container.gone.clone()).await;
    container.uproot().await;
    agent.ready()?.disks.sync();
    if !agent.is_current(&container) {
        return Ok(()); // another call was faster
    }
    remove_cgroup(&agent.guest.cgroups.cgroup, id).await?;
    agent.forget(id);
    Ok(())
}

/// Init's end took every process with it; the last of them may still be on its way out of the cgroup.
async fn remove_cgroup(parent: &Cgroup, id: &str) -> Result<(), Failed> {
    for attempt in 0..10 {
        if parent.remove_child(id)? {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(1 << attempt)).await;
    }
    log!("container {id}: its cgroup stays busy");
    Err(Failed::new("remove cgroup", id, rustix::io::Errno::BUSY))
}

impl Container {
    /// For `setns`: all of init's namespaces.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub fn is_alive(&self) -> bool {
        self.gone.borrow().is_none()
    }

    /// Where the agent finds the layers that init keeps, by number.
    pub fn kept_layers(&self) -> String {
        format!("/proc/{}/fd", self.init)
    }

    /// Where the agent finds what is mounted in it.
    pub fn mountinfo(&self) -> String {
        format!("/proc/{}/mountinfo", self.init)
    }

    fn init_if_alive(&self) -> i32 {
        // 0 would be our own group: a pid that can't exist makes kill fail instead.
        if self.is_alive() { self.init } else { i32::MAX }
    }

    /// For one more process.
    pub fn next_berth(&self) -> Result<Arc<Berth>, Failed> {
        if let Some(spare) = lock(&self.spare).take() {
            return Ok(spare);
        }
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        self.cgroup.child(&format!("p{serial}")).map(|cgroup| Arc::new(Berth::new(cgroup)))
    }

    /// Takes that of an ended process back: for the next one, or to be removed when its last descendant is gone.
    pub fn return_berth(&self, berth: Arc<Berth>) {
        let mut spare = lock(&self.spare);
        if spare.is_none() && berth.is_free() {
            *spare = Some(berth);
            let is_quiet = lock(&self.leftovers).is_empty() && self.processes.is_quiet();
            *lock(&self.kills_before) = is_quiet.then(|| self.oom_kills());
            return;
        }
        berth.take_stem();
        let mut leftovers = lock(&self.leftovers);
        leftovers.push(berth);
        leftovers.retain(|berth| !self.cgroup.remove_child(berth.name()).unwrap_or(true));
    }

    pub fn hostname(&self) -> Option<String> {
        lock(&self.hostname).clone()
    }

    pub fn set_hostname(&self, name: &str) {
        *lock(&self.hostname) = Some(name.to_owned());
    }

    /// A handle on its root directory.
    pub fn root(&self) -> Result<OwnedFd, Failed> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = format!("/proc/{}/root", self.init_if_alive());
        rustix::fs::open(&path, flags, Mode::empty()).step("open", path)
    }

    /// A process that waits for the first command: until it has one nothing has run in here.
    pub fn set_waiting(&self, waiting: Waiting) -> Result<(), Failed> {
        *lock(&self.name_files) = Some(NameFiles::open(self)?);
        *lock(&self.waiting) = Some(waiting);
        Ok(())
    }

    /// The guest is about to be saved: finds the files that whoever goes on from it writes anew, if nothing runs in here.
    pub fn hold_names(&self) {
        if self.name_files().is_none() {
            let found = self.is_idle().then(|| NameFiles::open(self).ok()).flatten();
            *lock(&self.name_files) = found;
        }
    }

    /// Init alone is in here.
    pub fn is_deserted(&self) -> bool {
        cgroup::number_of(&self.pids) == Some(1)
    }

    /// Init alone runs in here, and what is to become the next processes.
    fn is_idle(&self) -> bool {
        let most = 1 + self.count_stems() as u64;
        self.processes.is_quiet() && self.cgroup.number("pids.current").is_some_and(|pids| pids <= most)
    }

    /// Nothing has run in here since the guest was saved, and nothing ran then: who would see what it finds, isn't there.
    pub fn is_known_idle(&self) -> bool {
        self.name_files().is_some_and(|files| files.is_some())
    }

    /// Its files stay as they are until something is started in here, while the guest isn't what it `was` any more.
    pub fn set_former(&self, was: &Arc<Ready>) {
        lock(&self.former).get_or_insert_with(|| was.clone());
    }

    pub fn take_former(&self) -> Option<Arc<Ready>> {
        lock(&self.former).take()
    }

    fn name_files(&self) -> Option<MutexGuard<'_, Option<NameFiles>>> {
        Some(lock(&self.name_files)).filter(|files| files.as_ref().is_some_and(|files| files.are_current(self)))
    }

    /// Writes a file with a name in it, `was` so far, without looking for it. False: it has to be looked for.
    ///
    /// What isn't among those that were found, or has another content, is the container's own affair.
    pub fn write_known(&self, path: &str, was: &str, text: &str) -> Result<bool, Failed> {
        let Some(files) = self.name_files() else { return Ok(false) };
        if let Some(files) = &*files
            && let Some(file) = files.get(path)
            && (!files.may_differ() || names::still_is(file, was).step("read", path)?)
        {
            names::write(file, was, text).step("write", path)?;
        }
        Ok(true)
    }

    pub fn take_waiting(&self) -> Option<Waiting> {
        lock(&self.waiting).take()
    }

    /// How often the OOM killer had struck when nothing ran in here any more: until now, when something is about to.
    pub fn take_kills_before(&self) -> Option<u64> {
        lock(&self.kills_before).take()
    }

    /// How often the OOM killer has struck in here.
    pub fn oom_kills(&self) -> u64 {
        cgroup::value_of(&self.memory_events, "oom_kill").unwrap_or(0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
