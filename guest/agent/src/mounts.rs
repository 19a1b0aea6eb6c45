//! Mounts, made with the file-descriptor API: a mount is made detached, gets its attributes, and is then attached to a
//! directory that is a descriptor, too, so that no path is looked up twice.

use std::fmt::Display;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use crate::errno::{self, Failed, Step};

pub const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
pub const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
pub const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
pub const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
pub const PRIVATE: u64 = libc::MS_PRIVATE;

/// What mount options ask for.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Options {
    /// Attributes of the mount, set and cleared.
    pub set: u64,
    pub clear: u64,
    /// The same for everything below ("rro", ...).
    pub set_below: u64,
    /// Some for a bind mount; true: with everything below.
    pub bind: Option<bool>,
    /// The container's ids are those of the files ("idmap").
    pub idmap: bool,
    /// `MS_SHARED` and the like; true: for everything below, too.
    pub propagation: Option<(u64, bool)>,
    /// For the file system itself: "key" or "key=value".
    pub data: Vec<(String, Option<String>)>,
}

impl Options {
    /// Reads options as mount(8) and the OCI spec know them; what isn't known is for the file system.
    pub fn parse<S: AsRef<str>>(options: &[S]) -> Self {
        let mut out = Self::default();
        for option in options {
            out.add(option.as_ref());
        }
        out
    }

    fn add(&mut self, option: &str) {
        match option {
            "" | "defaults" | "async" | "rw" | "suid" | "dev" | "exec" | "relatime" | "atime" | "diratime" => {
                self.clear(option)
            }
            "ro" => self.set |= RDONLY,
            "nosuid" => self.set |= NOSUID,
            "nodev" => self.set |= NODEV,
            "noexec" => self.set |= NOEXEC,
            "noatime" => self.set_atime(libc::MOUNT_ATTR_NOATIME),
            "strictatime" => self.set_atime(libc::MOUNT_ATTR_STRICTATIME),
            "nostrictatime" | "norelatime" => self.set_atime(0),
            "nodiratime" => self.set |= libc::MOUNT_ATTR_NODIRATIME,
            "nosymfollow" => self.set |= libc::MOUNT_ATTR_NOSYMFOLLOW,
            "rro" => self.set_below |= RDONLY,
            "rnosuid" => self.set_below |= NOSUID,
            "rnodev" => self.set_below |= NODEV,
            "rnoexec" => self.set_below |= NOEXEC,
            "idmap" | "ridmap" => self.idmap = true,
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "private" => self.propagation = Some((libc::MS_PRIVATE, false)),
            "rprivate" => self.propagation = Some((libc::MS_PRIVATE, true)),
            "shared" => self.propagation = Some((libc::MS_SHARED, false)),
            "rshared" => self.propagation = Some((libc::MS_SHARED, true)),
            "slave" => self.propagation = Some((libc::MS_SLAVE, false)),
            "rslave" => self.propagation = Some((libc::MS_SLAVE, true)),
            "unbindable" => self.propagation = Some((libc::MS_UNBINDABLE, false)),
            "runbindable" => self.propagation = Some((libc::MS_UNBINDABLE, true)),
            other => {
                let (key, value) = match other.split_once('=') {
                    Some((key, value)) => (key, Some(value.to_owned())),
                    None => (other, None),
                };
                self.data.push((key.to_owned(), value));
            }
        }
    }

    fn clear(&mut self, option: &str) {
        let flag = match option {
            "rw" => RDONLY,
            "suid" => NOSUID,
            "dev" => NODEV,
            "exec" => NOEXEC,
            "diratime" => libc::MOUNT_ATTR_NODIRATIME,
            _ => 0,
        };
        self.set &= !flag;
        self.clear |= flag;
    }

    fn set_atime(&mut self, atime: u64) {
        self.set = (self.set & !ATIME) | atime;
        self.clear |= ATIME;
    }
}

/// A detached mount of a file system. `source` is a device, a tag, or empty.
pub fn filesystem(kind: &str, source: &str, options: &Options) -> Result<OwnedFd, Failed> {
    let what = || format!("{kind} {source}");
    let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).step("fsopen", kind)?;
    if !source.is_empty() {
        fsconfig_set_string(&fs, "source", source).step("mount", what())?;
    }
    if options.set & RDONLY != 0 {
        fsconfig_set_flag(&fs, "ro").step("mount", what())?;
    }
    for (key, value) in &options.data {
        match value {
            Some(value) => fsconfig_set_string(&fs, key.as_str(), value.as_str()),
            None => fsconfig_set_flag(&fs, key.as_str()),
        }
        .map_err(|errno| explain(&fs, format_args!("{} option {key}", what()), errno))?;
    }
    fsconfig_create(&fs).map_err(|errno| explain(&fs, what(), errno))?;
    let attrs = MountAttrFlags::from_bits_retain(options.set as u32);
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs).step("fsmount", what())
}

/// Adds what the kernel itself says about a failure.
fn explain(fs: &OwnedFd, what: impl Display, errno: rustix::io::Errno) -> Failed {
    let mut text = [0u8; 160];
    match rustix::io::read(fs, &mut text) {
        Ok(n) if n > 2 => {
            let said = String::from_utf8_lossy(&text[2..n]);
            Failed::new("mount", format_args!("{what} ({})", said.trim_end()), errno)
        }
        _ => Failed::new("mount", what, errno),
    }
}

/// A detached copy of what is mounted at an open file or directory.
pub fn bind(source: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Failed> {
    open_tree(source, c"", OpenTreeFlags::AT_EMPTY_PATH | copy_flags(recursive)).step("open_tree", "bind source")
}

/// The same for a path of the guest.
pub fn bind_path(source: &str, recursive: bool) -> Result<OwnedFd, Failed> {
    open_tree(CWD, source, copy_flags(recursive)).step("open_tree", source)
}

fn copy_flags(recursive: bool) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive { flags | OpenTreeFlags::AT_RECURSIVE } else { flags }
}

/// Changes attributes of a mount; `propagation` 0 leaves that as it is.
pub fn set_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    set: u64,
    clear: u64,
    propagation: u64,
) -> Result<(), Failed> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: clear, propagation, userns_fd: 0 };
    mount_setattr(mount, recursive, &attributes)
}

/// Has a detached mount show its files with the ids they have in a user namespace.
pub fn map_ids(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> Result<(), Failed> {
    let userns_fd = user_namespace.as_raw_fd() as u64;
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd };
    mount_setattr(mount, false, &attributes)
}

fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attributes: &libc::mount_attr) -> Result<(), Failed> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the kernel reads the attributes during the call only, and is told their size.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    match ret {
        0 => Ok(()),
        _ => Err(Failed::new("mount_setattr", "mount", errno::last())),
    }
}

/// Attaches a detached mount on top of an open file or directory.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>, what: impl Display) -> Result<(), Failed> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, c"", target, c"", flags).step("move_mount", what)
}

/// Attaches a detached mount at a path of the guest.
pub fn attach_at(mount: BorrowedFd<'_>, target: &str) -> Result<(), Failed> {
    move_mount(mount, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).step("move_mount", target)
}

/// Mounts a file system at a path of the guest.
pub fn mount_at(kind: &str, source: &str, target: &str, options: &[&str]) -> Result<(), Failed> {
    let mount = filesystem(kind, source, &Options::parse(options))?;
    attach_at(mount.as_fd(), target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_and_data() {
        let options = Options::parse(&["nosuid", "noexec", "size=64k", "mode=1777", "newinstance"]);
        assert_eq!(options.set, NOSUID | NOEXEC);
        assert_eq!(options.data.len(), 3);
        assert_eq!(options.data[0], ("size".into(), Some("64k".into())));
        assert_eq!(options.data[2], ("newinstance".into(), None));
    }

    #[test]
    fn the_last_word_counts() {
        assert_eq!(Options::parse(&["ro", "rw"]).set & RDONLY, 0);
        assert_eq!(Options::parse(&["rw", "ro"]).set & RDONLY, RDONLY);
    }

    #[test]
    fn binds_and_propagation() {
        let options = Options::parse(&["rbind", "rslave", "rro"]);
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.propagation, Some((libc::MS_SLAVE, true)));
        assert_eq!(options.set_below, RDONLY);
        assert_eq!(Options::parse(&["bind", "ro"]).bind, Some(false));
    }
}
