//! Cgroups (v2): one per container, and below it one per process started by the host, so that a process and all its
//! descendants can be killed at once. The lower ones have no controllers: limits hold for the container.

use std::fmt::Display;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use crate::errno::{Failed, Step};

/// Where cgroup2 is mounted in the guest.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The parent of all containers.
pub const PARENT: &str = "/sys/fs/cgroup/pykata";
/// Controllers that every container has; others are switched on when a container asks for them. Each level of the CPU's
/// makes all waiting and waking longer, by 7 % of what a guest executes to make files by virtio-fs; containers don't take
/// the CPU from the agent because it is more important ([`crate::sys::set_important`]).
const ALWAYS: &str = "+memory +pids";
/// What the guest keeps from all containers together, so that the kernel never has to look for memory or a process
/// number outside of them: it would find nothing to kill but itself.
const SPARE_MEMORY: u64 = 12 << 20;
const SPARE_PIDS: u64 = 2048;

/// A cgroup, held by a descriptor of its directory.
#[derive(Debug)]
pub struct Cgroup {
    dir: OwnedFd,
    name: String,
}

/// The parent of all containers.
#[derive(Debug)]
pub struct Parent {
    pub cgroup: Cgroup,
    /// The guest's memory as the parent's limit reflects it.
    memory: AtomicU64,
    /// What of it is not for containers.
    spare: u64,
}

/// Makes the parent of all containers, with what is left for them of `available` bytes of memory and of `pids`. Once, at
/// boot.
pub fn prepare(available: u64, pids: u64) -> Result<Parent, Failed> {
    let root = Cgroup { dir: open_dir(ROOT)?, name: String::new() };
    root.write("cgroup.subtree_control", ALWAYS)?;
    let parent = root.child("pykata")?;
    parent.write("cgroup.subtree_control", ALWAYS)?;
    let limit = available.saturating_sub(SPARE_MEMORY).max(SPARE_MEMORY);
    parent.write("memory.max", limit)?;
    parent.write("pids.max", pids - SPARE_PIDS)?;
    let total = total_memory();
    Ok(Parent { cgroup: parent, memory: AtomicU64::new(total), spare: total.saturating_sub(limit) })
}

fn total_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram as u64 * u64::from(info.mem_unit)
}

impl Parent {
    /// Fits the limit to the guest's memory, which the host may have added to or taken from (hotplug, balloon).
    pub fn follow_memory(&self) -> Result<(), Failed> {
        let total = total_memory();
        if self.memory.swap(total, Ordering::Relaxed) == total {
            return Ok(());
        }
        self.cgroup.write("memory.max", total.saturating_sub(self.spare).max(SPARE_MEMORY))
    }
}

/// Switches a controller on for containers.
pub fn enable(controller: &str) -> Result<(), Failed> {
    for path in [ROOT, PARENT] {
        Cgroup { dir: open_dir(path)?, name: path.to_owned() }
            .write("cgroup.subtree_control", format_args!("+{controller}"))?;
    }
    Ok(())
}

fn open_dir(path: &str) -> Result<OwnedFd, Failed> {
    rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty()).step("open", path)
}

impl Cgroup {
    /// Makes a child. One that was left over with this name is used again.
    pub fn child(&self, name: &str) -> Result<Self, Failed> {
        match rustix::fs::mkdirat(&self.dir, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(Failed::new("make cgroup", name, errno)),
        }
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let dir = rustix::fs::openat(&self.dir, name, flags, Mode::empty()).step("open cgroup", name)?;
        Ok(Self { dir, name: name.to_owned() })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn write(&self, file: &str, value: impl Display) -> Result<(), Failed> {
        let failed = |errno| Failed::new("cgroup", format_args!("{file} of {}", self.name), errno);
        let fd =
            rustix::fs::openat(&self.dir, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
        rustix::io::write(fd, value.to_string().as_bytes()).map_err(failed)?;
        Ok(())
    }

    pub fn read(&self, file: &str) -> Result<String, Failed> {
        let failed = |errno| Failed::new("cgroup", format_args!("{file} of {}", self.name), errno);
        let fd =
            rustix::fs::openat(&self.dir, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
        let mut buffer = [0u8; 4096];
        let n = rustix::io::read(fd, &mut buffer).map_err(failed)?;
        Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
    }

    /// A file with one number; "max" is the largest.
    pub fn number(&self, file: &str) -> Option<u64> {
        number(&self.read(file).ok()?)
    }

    /// A file to be read often.
    pub fn open(&self, file: &str) -> Result<OwnedFd, Failed> {
        rustix::fs::openat(&self.dir, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).step("open cgroup", file)
    }

    /// A value of a file with lines "key value".
    pub fn value(&self, file: &str, key: &str) -> Option<u64> {
        keyed(&self.read(file).ok()?, key)
    }

    /// True when no process is in here or below.
    pub fn is_empty(&self) -> bool {
        self.value("cgroup.events", "populated") == Some(0)
    }

    /// Kills everything in here and below, frozen or not.
    pub fn kill(&self) -> Result<(), Failed> {
        self.write("cgroup.kill", 1)
    }

    /// Removes a child and what is below it. False when a process is still in there.
    pub fn remove_child(&self, name: &str) -> Result<bool, Failed> {
        remove(self.dir.as_fd(), name)
    }

    /// Names of the children.
    pub fn children(&self) -> Vec<String> {
        children(self.dir.as_fd())
    }
}

fn remove(parent: BorrowedFd<'_>, name: &str) -> Result<bool, Failed> {
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(true),
        Err(Errno::BUSY) => {}
        Err(errno) => return Err(Failed::new("remove cgroup", name, errno)),
    }
    // Busy: children of its own (a privileged container may make some), or processes.
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
    let Ok(dir) = rustix::fs::openat(parent, name, flags, Mode::empty()) else { return Ok(true) };
    for child in children(dir.as_fd()) {
        remove(dir.as_fd(), &child)?;
    }
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::BUSY) => Ok(false),
        Err(errno) => Err(Failed::new("remove cgroup", name, errno)),
    }
}

fn children(dir: BorrowedFd<'_>) -> Vec<String> {
    let Ok(entries) = Dir::read_from(dir) else { return Vec::new() };
    let is_child = |entry: &rustix::fs::DirEntry| {
        entry.file_type() == rustix::fs::FileType::Directory && !entry.file_name().to_bytes().starts_with(b".")
    };
    entries.flatten().filter(is_child).map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

/// A value of an open file with lines "key value".
pub fn value_of(file: &OwnedFd, key: &str) -> Option<u64> {
    let mut buffer = [0u8; 1024];
    let n = rustix::io::pread(file, &mut buffer, 0).ok()?;
    keyed(std::str::from_utf8(&buffer[..n]).ok()?, key)
}

/// The number in an open file with one.
pub fn number_of(file: &OwnedFd) -> Option<u64> {
    let mut buffer = [0u8; 32];
    let n = rustix::io::pread(file, &mut buffer, 0).ok()?;
    number(std::str::from_utf8(&buffer[..n]).ok()?)
}

fn number(text: &str) -> Option<u64> {
    match text.trim_end() {
        "max" => Some(u64::MAX),
        text => text.parse().ok(),
    }
}

fn keyed(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_values() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 0\n";
        assert_eq!(keyed(text, "oom_kill"), Some(2));
        assert_eq!(keyed(text, "oom"), Some(3));
        assert_eq!(keyed(text, "max"), None);
    }
}
