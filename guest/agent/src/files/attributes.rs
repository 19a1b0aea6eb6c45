//! What is known of a file, lists of a directory, and changes of what is known.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};
use rustix::io::Errno;

use super::fail::{Answer, At};
use super::paths;
use super::proto::response::Result as Reply;
use super::proto::{self, Attributes, Entries};
use super::wire;
use crate::errno;

/// About how many bytes of names go into one answer: the host, too, does other things between two of them.
const BATCH: usize = 8 * 1024;
/// What an entry takes beside its name.
const ENTRY: usize = 48;
const SECOND: i64 = 1_000_000_000;

pub fn stat(request: &proto::Stat) -> Answer<Attributes> {
    let file = paths::find(&request.path, request.follow).at("stat")?;
    of_open(file.as_fd()).at("stat")
}

/// Of what a handle is on.
pub fn of_open(file: BorrowedFd<'_>) -> Result<Attributes, Errno> {
    let stat = rustix::fs::fstat(file)?;
    Ok(attributes(&stat, target(&stat, file, c"")))
}

/// Where a symlink leads. Empty: not even root may know, as with those of /proc/1, or it has gone meanwhile.
fn target(stat: &Stat, dir: BorrowedFd<'_>, name: &CStr) -> Bytes {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => rustix::fs::readlinkat(dir, name, Vec::new()).map(CString::into_bytes).unwrap_or_default(),
        _ => Vec::new(),
    }
    .into()
}

fn attributes(stat: &Stat, target: Bytes) -> Attributes {
    Attributes {
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: stat.st_size as u64,
        mtime_ns: mtime_ns(stat),
        inode: stat.st_ino,
        links: stat.st_nlink as u32,
        name: Bytes::new(),
        target,
    }
}

pub fn mtime_ns(stat: &Stat) -> i64 {
    stat.st_mtime.saturating_mul(SECOND).saturating_add(stat.st_mtime_nsec as i64)
}

/// Sends all but the last batch of entries.
pub fn list(request: &proto::List) -> Answer<Entries> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let dir = paths::open(&request.path, flags, Mode::empty()).at("list")?;
    let mut entries = Vec::new();
    let mut size = 0;
    each_name(Dir::new(dir).at("list")?, |dir, name| {
        let found = match entry(dir, name) {
            Err(Errno::NOENT) => return Ok(()), // gone meanwhile
            found => found.of("stat", name.to_bytes())?,
        };
        size += ENTRY + found.name.len() + found.target.len();
        entries.push(found);
        if size >= BATCH {
            size = 0;
            wire::send(Reply::Entries(Entries { entries: std::mem::take(&mut entries), last: false }));
        }
        Ok(())
    })?;
    Ok(Entries { entries, last: true })
}

/// Calls `with` for each name in a directory but "." and "..".
pub fn each_name(mut dir: Dir, mut with: impl FnMut(BorrowedFd<'_>, &CStr) -> Answer<()>) -> Answer<()> {
    while let Some(entry) = dir.read() {
        let entry = entry.at("list")?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            with(dir.fd().at("list")?, entry.file_name())?;
        }
    }
    Ok(())
}

fn entry(dir: BorrowedFd<'_>, name: &CStr) -> Result<Attributes, Errno> {
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let known = attributes(&stat, target(&stat, dir, name));
    Ok(Attributes { name: Bytes::copy_from_slice(name.to_bytes()), ..known })
}

pub fn set(request: &proto::SetAttributes) -> Answer<()> {
    if request.create {
        create(request)?;
    }
    if let Some(size) = request.size {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = paths::open(&request.path, flags, Mode::empty()).at("truncate")?;
        rustix::fs::ftruncate(&file, size).at("truncate")?;
    }
    let file = paths::find(&request.path, request.follow).at("open")?;
    if request.uid.is_some() || request.gid.is_some() {
        set_owner(&file, request.uid, request.gid).at("chown")?;
    }
    if let Some(mode) = request.mode.filter(|_| !request.create) {
        set_mode(&file, mode).at("chmod")?;
    }
    if request.now || request.mtime_ns.is_some() {
        set_times(&file, request.mtime_ns).at("set the times")?;
    }
    Ok(())
}

/// Makes an empty file unless there is something.
fn create(request: &proto::SetAttributes) -> Answer<()> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mode = paths::permissions(request.mode.unwrap_or(0o666));
    match paths::open(&request.path, flags, mode) {
        // Through a symlink that leads nowhere a file is made only without EXCL.
        Err(Errno::EXIST) if !request.exclusive => match paths::find(&request.path, true) {
            Err(Errno::NOENT) => paths::open(&request.path, flags - OFlags::EXCL, mode).map(drop),
            found => found.map(drop),
        },
        other => other.map(drop),
    }
    .at("create")
}

/// Numbers that aren't given stay.
pub fn set_owner(file: &OwnedFd, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
    let (uid, gid) = (owner(uid)?.map(Uid::from_raw), owner(gid)?.map(Gid::from_raw));
    rustix::fs::chownat(file, c"", uid, gid, AtFlags::EMPTY_PATH)
}

/// The kernel takes the largest number for none.
fn owner(id: Option<u32>) -> Result<Option<u32>, Errno> {
    if id == Some(u32::MAX) { Err(Errno::INVAL) } else { Ok(id) }
}

pub fn set_mode(file: &OwnedFd, mode: u32) -> Result<(), Errno> {
    // SAFETY: the path is a string that lives through the call, the rest are integers.
    match unsafe {
        libc::syscall(libc::SYS_fchmodat2, file.as_raw_fd(), c"".as_ptr(), mode & 0o7777, libc::AT_EMPTY_PATH)
    } {
        0 => Ok(()),
        _ => Err(errno::last()),
    }
}

/// Both times are set to now, or the modification's to that of a number.
pub fn set_times(file: &OwnedFd, mtime_ns: Option<i64>) -> Result<(), Errno> {
    let special = |nanoseconds| Timespec { tv_sec: 0, tv_nsec: nanoseconds };
    let times = match mtime_ns {
        None => Timestamps { last_access: special(UTIME_NOW), last_modification: special(UTIME_NOW) },
        Some(ns) => {
            let time = Timespec { tv_sec: ns.div_euclid(SECOND), tv_nsec: ns.rem_euclid(SECOND) };
            Timestamps { last_access: special(UTIME_OMIT), last_modification: time }
        }
    };
    rustix::fs::utimensat(file, c"", &times, AtFlags::EMPTY_PATH)
}
