//! Volumes: file systems mounted once, below one directory, for all containers.

use std::os::fd::AsFd;

use tonic::Status;

use crate::container::VOLUMES;
use crate::container::filesystems::{self, GuestMount};
use crate::errno::{Failed, Step};
use crate::mounts;
use crate::proto;
use crate::validate::{self, Invalid, shown};

pub struct Volume {
    target: String,
    mount: GuestMount,
}

impl Volume {
    pub fn new(from: proto::Mount) -> Result<Self, Invalid> {
        validate::path("mounts.target", &from.target)?;
        let below = from.target.strip_prefix(VOLUMES).and_then(|rest| rest.strip_prefix('/'));
        if below.is_none_or(str::is_empty) {
            return Err(Invalid::new("mounts.target", format!("{} is not below {VOLUMES}", shown(&from.target))));
        }
        Ok(Self { target: from.target.clone(), mount: filesystems::check("mounts", from)? })
    }

    pub async fn mount(self) -> Result<(), Status> {
        let found = self.mount.find().await?;
        std::fs::create_dir_all(&self.target).step("mkdir", &self.target)?;
        let mount = found.mount()?;
        mounts::attach_at(mount.as_fd(), &self.target).map_err(|failed: Failed| failed.into())
    }
}
