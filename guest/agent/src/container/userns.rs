//! User namespaces: where a container's ids, root's among them, are not the guest's.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};

use super::config::IdMaps;
use crate::errno::{self, Failed, Step};
use crate::oci::IdMapping;
use crate::sys::{self, Cloned};

/// A new user namespace with these maps. A namespace comes with a process in it, which here only lives until somebody
/// with the rights for it has written the maps.
pub fn make(maps: &IdMaps) -> Result<OwnedFd, Failed> {
    let (wait, go) = pipe_with(PipeFlags::CLOEXEC).step("pipe", "user namespace")?;
    // SAFETY: this process has one thread, and the child only waits for the pipe's end and exits.
    let pid = match unsafe { sys::clone_into(libc::CLONE_NEWUSER as u64, None) }.step("clone", "user namespace")? {
        Cloned::Child => {
            drop(go);
            let _ = rustix::io::read(wait, &mut [0u8; 1]);
            sys::exit_now(0)
        }
        Cloned::Parent { pid } => pid,
    };
    let made = write_maps(pid, maps).and_then(|()| {
        let path = format!("/proc/{pid}/ns/user");
        rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).step("open", path)
    });
    drop(go);
    let _ = waitpid(Pid::from_raw(pid), WaitOptions::empty());
    made
}

fn write_maps(pid: i32, maps: &IdMaps) -> Result<(), Failed> {
    for (file, map) in [("uid_map", &maps.uids), ("gid_map", &maps.gids)] {
        let path = format!("/proc/{pid}/{file}");
        let fd = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).step("open", file)?;
        rustix::io::write(fd, lines(map).as_bytes()).step("write", file)?;
    }
    Ok(())
}

fn lines(map: &[IdMapping]) -> String {
    map.iter().map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size)).collect()
}

/// Goes into a user namespace, and becomes root there.
pub fn enter(namespace: BorrowedFd<'_>) -> Result<(), Failed> {
    sys::setns(namespace, libc::CLONE_NEWUSER).step("setns", "user namespace")?;
    become_root()
}

/// In a user namespace just entered: until then one is nobody there, if an almighty one.
pub fn become_root() -> Result<(), Failed> {
    // SAFETY: raw calls with integers; the C library's versions would signal its other threads, of which there are none.
    unsafe {
        if libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()) != 0
            || libc::syscall(libc::SYS_setresgid, 0, 0, 0) != 0
            || libc::syscall(libc::SYS_setresuid, 0, 0, 0) != 0
        {
            return Err(Failed::new("setuid", "root of the user namespace", errno::last()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn the_maps_are_in_force() {
        let map = || vec![IdMapping { container_id: 0, host_id: 100_000, size: 65_536 }];
        let namespace = make(&IdMaps { uids: map(), gids: map() }).expect("user namespaces work here");
        // SAFETY: the child makes plain system calls and ends in _exit.
        match unsafe { sys::clone_into(0, None) }.expect("clone") {
            Cloned::Child => sys::exit_now(match enter(namespace.as_fd()) {
                Ok(()) if rustix::process::getuid().is_root() => 0,
                _ => 1,
            }),
            Cloned::Parent { pid } => {
                let (_, status) = waitpid(Pid::from_raw(pid), WaitOptions::empty()).expect("wait").expect("ended");
                assert_eq!(status.exit_status(), Some(0));
            }
        }
    }
}
