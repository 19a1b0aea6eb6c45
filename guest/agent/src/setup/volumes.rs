//! Volumes: file systems mounted once, below one directory, for all containers.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{UnmountFlags, unmount};
use tonic::Status;

use crate::container::VOLUMES;
use crate::container::filesystems::{self, GuestMount};
use crate::container::inside::{self, Kind};
use crate::errno::{Failed, Step};
use crate::log;
use crate::mounts;
use crate::proto;
use crate::validate::{self, Invalid, shown};

/// The volumes on disks of their own that can be written.
pub struct Disks(Vec<OwnedFd>);

impl Disks {
    /// Writes what is only in memory: nobody unmounts them before the machine ends.
    pub fn sync(&self) {
        for disk in &self.0 {
            // The first makes the journal whole, and then writes what is in it to its place. Only the second has the
            // disk keep that: who mounts it without the journal sees nothing else.
            if let Err(errno) = rustix::fs::syncfs(disk).and_then(|()| rustix::fs::syncfs(disk)) {
                log!("a volume isn't written: {errno}");
            }
        }
    }
}

pub struct Volume {
    /// Below [`VOLUMES`].
    target: String,
    mount: GuestMount,
}

impl Volume {
    pub fn new(from: proto::Mount) -> Result<Self, Invalid> {
        Ok(Self { target: below("mounts.target", &from.target)?, mount: filesystems::check("mounts", from)? })
    }

    async fn mount(self) -> Result<(Mounted, Option<OwnedFd>), Status> {
        let on_disk = self.mount.is_writable_disk();
        let found = self.mount.find().await?;
        let mount = found.mount()?;
        mounts::attach(mount.as_fd(), place(&self.target)?.as_fd(), &self.target)?;
        let mounted = Mounted::at(&self.target);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = || rustix::fs::open(mounted.0.as_str(), flags, Mode::empty()).step("open", &self.target);
        let disk = if on_disk { Some(root()?) } else { None };
        Ok((mounted, disk))
    }
}

/// The part of a path below [`VOLUMES`].
pub fn below(field: &'static str, target: &str) -> Result<String, Invalid> {
    validate::path(field, target)?;
    let below = target.strip_prefix(VOLUMES).and_then(|rest| rest.strip_prefix('/'));
    let below = below.filter(|below| !below.is_empty()).map(str::to_owned);
    below.ok_or_else(|| Invalid::new(field, format!("{} is not below {VOLUMES}", shown(target))))
}

/// The directory at a path below [`VOLUMES`], made if it is missing.
pub fn place(target: &str) -> Result<OwnedFd, Failed> {
    // It may lie in a volume mounted before, whose links lead nowhere.
    let volumes = rustix::fs::open(VOLUMES, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .step("open", VOLUMES)?;
    inside::make(volumes.as_fd(), target, Kind::Dir)?;
    inside::find_exact(volumes.as_fd(), target).step("open", target)
}

/// A volume that is unmounted again unless it is kept.
pub struct Mounted(String);

impl Mounted {
    pub fn at(target: &str) -> Self {
        Self(format!("{VOLUMES}/{target}"))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.0.as_str(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    }
}

/// Mounts all of them, or none.
pub async fn mount_all(volumes: Vec<Volume>) -> Result<Disks, Status> {
    let mut mounted = Vec::with_capacity(volumes.len());
    let mut disks = Vec::new();
    for volume in volumes {
        let (volume, disk) = volume.mount().await?;
        mounted.insert(0, volume);
        disks.extend(disk);
    }
    mounted.into_iter().for_each(std::mem::forget);
    Ok(Disks(disks))
}
