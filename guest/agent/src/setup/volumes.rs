//! Volumes: file systems mounted once, below one directory, for all containers.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{UnmountFlags, unmount};
use tonic::Status;

use crate::container::VOLUMES;
use crate::container::filesystems::{self, GuestMount};
use crate::container::inside::{self, Kind};
use crate::errno::Step;
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
            if let Err(errno) = rustix::fs::syncfs(disk) {
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
        validate::path("mounts.target", &from.target)?;
        let below = from.target.strip_prefix(VOLUMES).and_then(|rest| rest.strip_prefix('/'));
        let Some(target) = below.filter(|below| !below.is_empty()).map(str::to_owned) else {
            return Err(Invalid::new("mounts.target", format!("{} is not below {VOLUMES}", shown(&from.target))));
        };
        Ok(Self { target, mount: filesystems::check("mounts", from)? })
    }

    async fn mount(self) -> Result<(Mounted, Option<OwnedFd>), Status> {
        let on_disk = self.mount.is_writable_disk();
        let found = self.mount.find().await?;
        let mount = found.mount()?;
        // The place may lie in a volume mounted before, whose links lead nowhere.
        let volumes = rustix::fs::open(VOLUMES, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .step("open", VOLUMES)?;
        inside::make(volumes.as_fd(), &self.target, Kind::Dir)?;
        let place = inside::find_exact(volumes.as_fd(), &self.target).step("open", &self.target)?;
        mounts::attach(mount.as_fd(), place.as_fd(), &self.target)?;
        let mounted = Mounted(format!("{VOLUMES}/{}", self.target));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = || rustix::fs::open(mounted.0.as_str(), flags, Mode::empty()).step("open", &self.target);
        let disk = if on_disk { Some(root()?) } else { None };
        Ok((mounted, disk))
    }
}

/// A volume that is unmounted again unless it is kept.
struct Mounted(String);

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
