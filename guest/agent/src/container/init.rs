//! The container's init process, from its clone to its sleep: it builds the container's view of the world from inside
//! its own namespaces. All mounts belong to it, so that they vanish with it, however far it came.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::config::{Config, ContainerMount, IdMaps, MountKind, Namespaces, VOLUMES};
use super::filesystems::Found;
use super::inside::{self, Kind};
use super::{dev, idle, paths, rootfs, userns};
use crate::errno::{Failed, Step};
use crate::setup::identity;
use crate::stdio::{Report, Reporter};
use crate::sys::{self, Cloned};
use crate::{mounts, setup};

/// What init works on; prepared by the agent before the clone.
pub struct Plan<'a> {
    pub config: &'a Config,
    pub lowers: Vec<Found>,
    /// For each of `config.mounts` that has a device, its device.
    pub mounted: Vec<Option<Found>>,
    pub names: &'a crate::setup::names::Names,
}

/// All that comes from the guest, as detached mounts.
struct Opened {
    lowers: Vec<OwnedFd>,
    /// For each of the configuration's mounts; None for the kernel's own file systems.
    sources: Vec<Option<OwnedFd>>,
    devices: Vec<(String, OwnedFd)>,
}

/// The life of the process that the agent clones: container init itself or, with a user namespace, its elder brother.
pub fn main(plan: &Plan<'_>, reporter: &Reporter) -> ! {
    let built = match &plan.config.namespaces.user {
        None => open(plan, None).and_then(|opened| assemble(plan, opened)),
        Some(maps) => build_in_user_namespace(plan, maps, reporter),
    };
    match built {
        Ok(kept) => {
            reporter.send(&Report::Ok);
            idle::forever(&kept)
        }
        Err(failed) => {
            reporter.send(&Report::from(failed));
            sys::exit_now(1)
        }
    }
}

/// Disks can only be mounted with the guest's own rights, while all else shall belong to the user namespace: one process
/// opens the disks, goes into the namespace and makes there, as a sibling, the process that becomes init.
fn build_in_user_namespace(plan: &Plan<'_>, maps: &IdMaps, reporter: &Reporter) -> Result<Vec<OwnedFd>, Failed> {
    let namespace = userns::make(maps)?;
    let opened = open(plan, Some(namespace.as_fd()))?;
    userns::enter(namespace.as_fd())?;
    let flags = clone_flags(&plan.config.namespaces) | libc::CLONE_PARENT;
    // SAFETY: this process has one thread, and both sides go on to `idle` or `_exit`.
    match unsafe { sys::clone_into(flags as u64, None) }.step("clone", "container init")? {
        Cloned::Parent { pid } => {
            reporter.send(&Report::Init { pid });
            sys::exit_now(0)
        }
        Cloned::Child => assemble(plan, opened),
    }
}

/// The namespaces that init is cloned into.
pub fn clone_flags(own: &Namespaces) -> i32 {
    libc::CLONE_NEWPID | libc::CLONE_NEWNS | own.flags()
}

/// Opens everything, while the guest's own tree and rights are at hand.
fn open(plan: &Plan<'_>, user_namespace: Option<BorrowedFd<'_>>) -> Result<Opened, Failed> {
    let mut lowers = rootfs::open_lowers(&plan.lowers, user_namespace)?;
    if !plan.config.rootfs.data.is_empty() {
        let data = plan.config.rootfs.data.iter().map(|path| volume(path, false)).collect::<Result<Vec<_>, _>>()?;
        lowers = vec![rootfs::with_content(&lowers, &data)?];
    }
    let source = |(mount, found): (&ContainerMount, &Option<Found>)| {
        let source = match (&mount.what, found) {
            (MountKind::Bind(path), _) => volume(path, mount.options.bind == Some(true))?,
            (MountKind::Device(_), Some(found)) => found.mount()?,
            _ => return Ok(None),
        };
        if let Some(namespace) = user_namespace.filter(|_| mount.options.idmap) {
            mounts::map_ids(source.as_fd(), namespace)?;
        }
        Ok(Some(source))
    };
    let sources = plan.config.mounts.iter().zip(&plan.mounted).map(source).collect::<Result<_, Failed>>()?;
    Ok(Opened { lowers, sources, devices: dev::open_sources(&plan.config.devices)? })
}

/// Puts everything together, in the container's namespaces. On return the process has nothing left to do but to keep the
/// layers that it gives.
fn assemble(plan: &Plan<'_>, opened: Opened) -> Result<Vec<OwnedFd>, Failed> {
    let config = plan.config;
    // The cgroup namespace is rooted at the cgroup one is in when it is made, so not in the clone itself.
    unshare_cgroup()?;
    set_names(config)?;
    sysctl(config)?;
    if config.namespaces.net {
        setup::net::loopback_up()?;
    }
    let own = plan.names.files(config.hostname.as_deref());
    let wanted = own.into_iter().filter(|(path, _)| !config.mounts.iter().any(|mount| mount.destination == *path));
    let files = rootfs::Files {
        list: wanted.collect(),
        // What is mounted over /etc would hide them.
        directly: !config.mounts.iter().any(|mount| mount.destination.trim_end_matches('/') == "/etc"),
    };
    let files = rootfs::mount(&config.rootfs, &opened.lowers, config.namespaces.user.is_some(), files)?;
    let kept = rootfs::layers(&config.rootfs, opened.lowers)?;
    // Before the guest's own are out of sight: in a user namespace nobody gets a /proc who didn't have one before.
    let kernel = |(mount, source): (&ContainerMount, Option<OwnedFd>)| match (&mount.what, source) {
        (MountKind::Kernel(kind), _) => kernel(kind, &mount.options, &config.namespaces),
        (_, Some(source)) => Ok(source),
        (_, None) => Err(Failed::new("mount", &mount.destination, Errno::INVAL)),
    };
    let sources: Vec<OwnedFd> = config.mounts.iter().zip(opened.sources).map(kernel).collect::<Result<_, _>>()?;
    let generation = shared(identity::GENERATION)?;
    let boot_id = shared(identity::BOOT_ID)?;
    rootfs::enter()?;

    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .step("open", "container root")?;
    for (mount, source) in config.mounts.iter().zip(&sources) {
        attach(root.as_fd(), mount, source)?;
    }
    dev::populate(root.as_fd(), opened.devices, &config.mounts)?;
    for (path, file) in files {
        rootfs::attach_file(root.as_fd(), path, file)?;
    }
    rootfs::attach_file(root.as_fd(), identity::GENERATION, generation)?;
    // Where all of /proc is to be seen, a user namespace in there can have one of its own, and with this it couldn't.
    if !config.masked_paths.is_empty() {
        paths::replace(root.as_fd(), "/proc/sys/kernel/random/boot_id", boot_id.as_fd())?;
    }
    paths::mask(root.as_fd(), &config.masked_paths)?;
    paths::make_readonly(root.as_fd(), &config.readonly_paths)?;
    rootfs::finish(&config.rootfs)?;
    Ok(kept)
}

/// A file of the guest's that the container may only read.
fn shared(path: &str) -> Result<OwnedFd, Failed> {
    let mount = mounts::bind_path(path, false)?;
    let set = mounts::NODEV | mounts::NOSUID | mounts::NOEXEC | mounts::RDONLY;
    mounts::set_attributes(mount.as_fd(), false, set, 0, 0)?;
    Ok(mount)
}

fn unshare_cgroup() -> Result<(), Failed> {
    // SAFETY: a new cgroup namespace changes nothing that Rust's own rules are about.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWCGROUP) }.step("unshare", "cgroup")
}

fn set_names(config: &Config) -> Result<(), Failed> {
    if !config.namespaces.uts {
        return Ok(());
    }
    if let Some(name) = &config.hostname {
        rustix::system::sethostname(name.as_bytes()).step("sethostname", name)?;
    }
    if let Some(name) = &config.domainname {
        rustix::system::setdomainname(name.as_bytes()).step("setdomainname", name)?;
    }
    Ok(())
}

/// Through the guest's /proc, while it is still in reach; the kernel goes by the namespaces of who writes.
fn sysctl(config: &Config) -> Result<(), Failed> {
    for (key, value) in &config.sysctl {
        let path = format!("/proc/sys/{key}");
        let file = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).step("sysctl", key)?;
        rustix::io::write(file, value.as_bytes()).step("sysctl", key)?;
    }
    Ok(())
}

/// A volume, or something in one. What is in it isn't trusted: no symlink is followed.
fn volume(path: &str, recursive: bool) -> Result<OwnedFd, Failed> {
    let volumes = rustix::fs::open(VOLUMES, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .step("open", VOLUMES)?;
    let source = inside::find_mounted(volumes.as_fd(), path).step("open volume", path)?;
    mounts::bind(source.as_fd(), recursive)
}

fn attach(root: BorrowedFd<'_>, mount: &ContainerMount, source: &OwnedFd) -> Result<(), Failed> {
    let destination = mount.destination.as_str();
    let options = &mount.options;
    if matches!(mount.what, MountKind::Bind(_)) && (options.set | options.clear) != 0 {
        mounts::set_attributes(source.as_fd(), false, options.set, options.clear, 0)?;
    }
    if options.set_below != 0 {
        mounts::set_attributes(source.as_fd(), true, options.set_below, 0, 0)?;
    }
    mounts::attach(source.as_fd(), target(root, destination, source)?.as_fd(), destination)?;
    if let Some((propagation, recursive)) = options.propagation.filter(|&(kind, _)| kind != mounts::PRIVATE) {
        mounts::set_attributes(source.as_fd(), recursive, 0, 0, propagation)?;
    }
    Ok(())
}

/// /proc and /sys must be plain directories: a symlink there would make later steps (masking) go astray.
fn target(root: BorrowedFd<'_>, destination: &str, mount: &OwnedFd) -> Result<OwnedFd, Failed> {
    let kind = kind_of(mount).step("stat", destination)?;
    let made = inside::make(root, destination, kind)?;
    match (kind, kind_of(&made).step("stat", destination)?) {
        (Kind::Dir, Kind::File) => Err(Errno::NOTDIR).step("mount a directory over a file", destination)?,
        (Kind::File, Kind::Dir) => Err(Errno::ISDIR).step("mount a file over a directory", destination)?,
        _ => (),
    }
    if ["/proc", "/sys", "/dev"].iter().any(|top| is_below(destination, top)) {
        return inside::find_exact(root, destination).step("mount target is a link", destination);
    }
    // Nor does an image's link bring what isn't meant for the kernel's files over them.
    match is_kernels(&made).step("stat", destination)? {
        true => Err(Errno::PERM).step("mount over the kernel's files", destination),
        false => Ok(made),
    }
}

fn is_below(path: &str, top: &str) -> bool {
    path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether it is in /proc or /sys, by whatever path.
fn is_kernels(file: &OwnedFd) -> Result<bool, Errno> {
    let kind = rustix::fs::fstatfs(file)?.f_type;
    Ok([libc::PROC_SUPER_MAGIC, libc::SYSFS_MAGIC, libc::CGROUP2_SUPER_MAGIC].contains(&kind))
}

fn kind_of(file: &OwnedFd) -> Result<Kind, Errno> {
    let stat = rustix::fs::fstat(file)?;
    let is_dir = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory;
    Ok(if is_dir { Kind::Dir } else { Kind::File })
}

fn kernel(kind: &str, options: &mounts::Options, own: &Namespaces) -> Result<OwnedFd, Failed> {
    match kind {
        // A second instance would be the guest's own; devpts always is a new one.
        "devpts" => {
            let mut options = options.clone();
            options.data.retain(|(key, _)| key != "newinstance");
            mounts::filesystem(kind, "devpts", &options)
        }
        "cgroup2" => mounts::filesystem(kind, "cgroup", &mounts::Options { data: Vec::new(), ..options.clone() }),
        // It shows the network namespace, and is only given to who owns that.
        "sysfs" if own.user.is_some() && !own.net => {
            let sys = mounts::bind_path("/sys", true)?;
            mounts::set_attributes(sys.as_fd(), true, options.set, 0, 0)?;
            Ok(sys)
        }
        _ => mounts::filesystem(kind, kind, options),
    }
}
