//! Paths that a container may not see, or not change.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::FileType;
use rustix::io::Errno;

use super::inside;
use crate::errno::{Failed, Step};
use crate::mounts::{self, Options, RDONLY};

/// Covers each path: a directory by an empty one, a file by /dev/null. A path that isn't there needs no cover.
pub fn mask(root: BorrowedFd<'_>, paths: &[String]) -> Result<(), Failed> {
    let mut empty = None;
    for path in paths {
        let Some(target) = find(root, path)? else { continue };
        let stat = rustix::fs::fstat(&target).step("stat", path)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            let null = inside::find_exact(root, "/dev/null").step("open", "/dev/null")?;
            mounts::attach(mounts::bind(null.as_fd(), false)?.as_fd(), target.as_fd(), path)?;
            continue;
        }
        let fd = match &empty {
            None => mounts::filesystem("tmpfs", "tmpfs", &Options::parse(&["ro", "size=0"]))?,
            Some(first) => mounts::bind(std::os::fd::AsFd::as_fd(first), false)?,
        };
        mounts::attach(fd.as_fd(), target.as_fd(), path)?;
        empty = empty.or(Some(fd));
    }
    Ok(())
}

/// Puts a mount in the place of a file, if there is one.
pub fn replace(root: BorrowedFd<'_>, path: &str, mount: BorrowedFd<'_>) -> Result<(), Failed> {
    find(root, path)?.map_or(Ok(()), |target| mounts::attach(mount, target.as_fd(), path))
}

/// Makes each path read-only, with what is mounted below it.
pub fn make_readonly(root: BorrowedFd<'_>, paths: &[String]) -> Result<(), Failed> {
    for path in paths {
        let Some(target) = find(root, path)? else { continue };
        let mount = mounts::bind(target.as_fd(), true)?;
        mounts::set_attributes(mount.as_fd(), true, RDONLY, 0, 0)?;
        mounts::attach(mount.as_fd(), target.as_fd(), path)?;
    }
    Ok(())
}

fn find(root: BorrowedFd<'_>, path: &str) -> Result<Option<std::os::fd::OwnedFd>, Failed> {
    match inside::find_exact(root, path) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(Failed::new("open", path, errno)),
    }
}
