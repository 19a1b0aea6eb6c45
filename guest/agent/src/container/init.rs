//! The container's init process, from its clone to its sleep: it builds the container's view of the world from inside
//! its own namespaces. All mounts belong to it, so that they vanish with it, however far it came.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::config::{Config, ContainerMount, MountKind, VOLUMES};
use super::filesystems::Found;
use super::inside::{self, Kind};
use super::{dev, paths, rootfs};
use crate::errno::{Failed, Step};
use crate::mounts;

/// What init works on; prepared by the agent before the clone.
pub struct Plan<'a> {
    pub config: &'a Config,
    pub lowers: Vec<Found>,
    /// For each of `config.mounts` that has a device, its device.
    pub mounted: Vec<Option<Found>>,
    pub names: &'a crate::setup::names::Names,
}

/// Builds everything. On return the process has nothing left to do.
pub fn build(plan: &Plan<'_>) -> Result<(), Failed> {
    let config = plan.config;
    // The cgroup namespace is rooted at the cgroup one is in when it is made, so not in the clone itself.
    unshare_cgroup()?;
    set_names(config)?;
    sysctl(config)?;

    rootfs::mount(&config.rootfs, &plan.lowers)?;
    let files = rootfs::write_files(&config.rootfs, plan.names, config.hostname.as_deref())?;
    let sources = open_sources(config, &plan.mounted)?;
    let devices = dev::open_sources(&config.devices)?;
    rootfs::enter()?;

    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .step("open", "container root")?;
    for (mount, source) in config.mounts.iter().zip(sources) {
        attach(root.as_fd(), mount, source)?;
    }
    dev::populate(root.as_fd(), devices, &config.mounts)?;
    for (path, file) in files {
        if !config.mounts.iter().any(|mount| mount.destination == path) {
            rootfs::attach_file(root.as_fd(), path, file)?;
        }
    }
    paths::mask(root.as_fd(), &config.masked_paths)?;
    paths::make_readonly(root.as_fd(), &config.readonly_paths)?;
    rootfs::finish(&config.rootfs)
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

/// Detached mounts of all that comes from the guest, opened while the guest's own tree is in reach.
fn open_sources(config: &Config, mounted: &[Option<Found>]) -> Result<Vec<Option<OwnedFd>>, Failed> {
    let open = |(mount, found): (&ContainerMount, &Option<Found>)| match (&mount.what, found) {
        (MountKind::Bind(path), _) => volume(path, mount.options.bind == Some(true)).map(Some),
        (MountKind::Device(_), Some(found)) => found.mount().map(Some),
        _ => Ok(None),
    };
    config.mounts.iter().zip(mounted).map(open).collect()
}

/// A volume, or something in one. What is in it isn't trusted: no symlink is followed.
fn volume(path: &str, recursive: bool) -> Result<OwnedFd, Failed> {
    let volumes = rustix::fs::open(VOLUMES, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .step("open", VOLUMES)?;
    let source = inside::find_exact(volumes.as_fd(), path).step("open volume", path)?;
    mounts::bind(source.as_fd(), recursive)
}

fn attach(root: BorrowedFd<'_>, mount: &ContainerMount, source: Option<OwnedFd>) -> Result<(), Failed> {
    let destination = mount.destination.as_str();
    let options = &mount.options;
    let (fd, is_bind) = match (source, &mount.what) {
        (Some(fd), what) => (fd, matches!(what, MountKind::Bind(_))),
        (None, MountKind::Kernel(kind)) => (kernel(kind, options)?, false),
        (None, _) => return Err(Failed::new("mount", destination, rustix::io::Errno::INVAL)),
    };
    if is_bind && (options.set | options.clear) != 0 {
        mounts::set_attributes(fd.as_fd(), false, options.set, options.clear, 0)?;
    }
    if options.set_below != 0 {
        mounts::set_attributes(fd.as_fd(), true, options.set_below, 0, 0)?;
    }
    mounts::attach(fd.as_fd(), target(root, destination, &fd)?.as_fd(), destination)?;
    if let Some((propagation, recursive)) = options.propagation.filter(|&(kind, _)| kind != mounts::PRIVATE) {
        mounts::set_attributes(fd.as_fd(), recursive, 0, 0, propagation)?;
    }
    Ok(())
}

/// /proc and /sys must be plain directories: a symlink there would make later steps (masking) go astray.
fn target(root: BorrowedFd<'_>, destination: &str, mount: &OwnedFd) -> Result<OwnedFd, Failed> {
    let stat = rustix::fs::fstat(mount).step("stat", destination)?;
    let kind = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        rustix::fs::FileType::Directory => Kind::Dir,
        _ => Kind::File,
    };
    let made = inside::make(root, destination, kind)?;
    let exact = ["/proc", "/sys", "/dev"].iter().any(|top| destination.starts_with(top));
    if exact { inside::find_exact(root, destination).step("mount target is a link", destination) } else { Ok(made) }
}

fn kernel(kind: &str, options: &mounts::Options) -> Result<OwnedFd, Failed> {
    match kind {
        // A second instance would be the guest's own; devpts always is a new one.
        "devpts" => {
            let mut options = options.clone();
            options.data.retain(|(key, _)| key != "newinstance");
            mounts::filesystem(kind, "devpts", &options)
        }
        "cgroup2" => mounts::filesystem(kind, "cgroup", &mounts::Options { data: Vec::new(), ..options.clone() }),
        _ => mounts::filesystem(kind, kind, options),
    }
}
