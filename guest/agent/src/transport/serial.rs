//! A virtio-serial port, found by its name.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::Interest;

use super::channel::Channel;
use super::stream::Stream;
use crate::errno::{Failed, Step};
use crate::{sys, uevent};

const NAME: &str = "pykata.agent.0";
const PORTS: &str = "/sys/class/virtio-ports";
/// A port is numbered like its virtio device.
const USUAL: usize = 9;

pub struct Port {
    device: PathBuf,
}

impl Port {
    /// Waits for as long as it takes: without the port nobody could be told about a failure.
    pub async fn find() -> Result<Self, Failed> {
        loop {
            if let Some(device) = uevent::wait_for::<_, Failed>(None, || Ok(look(Path::new(PORTS)))).await? {
                return Ok(Self { device });
            }
        }
    }

    /// Waits until the host has opened its side. The port is opened once: closing it would throw away what the next
    /// connection has sent already.
    pub async fn connect(&self, last: Option<Channel>) -> Result<Channel, Failed> {
        let (fd, carry) = last.map_or((None, None), Channel::into_parts);
        let fd = match fd {
            Some(fd) => fd,
            None => {
                let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
                rustix::fs::open(&self.device, flags, Mode::empty()).step("open", self.device.display())?
            }
        };
        if carry.is_none() {
            wait_for_host(&fd).await?;
        }
        Ok(Channel::new(Stream::port(fd, carry.is_some())?, carry.unwrap_or_default()))
    }
}

/// The device of the port with our name. Those that most guests have are asked first, by their names: to read a directory
/// takes code that a guest needs for nothing else on its way to the first container.
fn look(ports: &Path) -> Option<PathBuf> {
    let usual = (0..USUAL).map(|number| format!("vport{number}p1"));
    let found = usual.into_iter().find(|port| is_ours(ports, port)).or_else(|| {
        let all = fs::read_dir(ports).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        all.into_iter().find(|port| is_ours(ports, port))
    })?;
    let device = Path::new("/dev").join(found);
    device.exists().then_some(device)
}

/// The name comes in a message after the port itself, and is announced by an event of its own.
fn is_ours(ports: &Path, port: &str) -> bool {
    fs::read_to_string(ports.join(port).join("name")).is_ok_and(|name| name.trim_end() == NAME)
}

/// A port says HUP for as long as the host has not opened its side. tokio takes a HUP as final, so the port is watched
/// by an epoll of its own, and tokio watches that.
pub async fn wait_for_host(port: &OwnedFd) -> Result<(), Failed> {
    if host_is_there(port)? {
        return Ok(());
    }
    let inner =
        sys::watch(edges(port).step("epoll", "serial port")?, Interest::READABLE).step("epoll", "serial port")?;
    while !host_is_there(port)? {
        let mut ready = inner.readable().await.step("wait", "serial port")?;
        consume(inner.as_fd()).step("epoll", "serial port")?;
        ready.clear_ready();
    }
    Ok(())
}

/// An epoll that becomes readable at each change of the port's state.
fn edges(port: &OwnedFd) -> Result<OwnedFd, Errno> {
    let inner = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
    epoll::add(&inner, port, epoll::EventData::new_u64(0), flags)?;
    Ok(inner)
}

fn consume(epoll: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 4];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    epoll::wait(epoll, &mut events[..], Some(&now)).map(drop)
}

fn host_is_there(port: &OwnedFd) -> Result<bool, Failed> {
    let mut fds = [PollFd::new(port, PollFlags::OUT)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).step("poll", "serial port")?;
    Ok(!fds[0].revents().contains(PollFlags::HUP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_without_a_name_yet_is_passed_over() {
        let dir = std::env::temp_dir().join(format!("pykata-ports-{}", std::process::id()));
        fs::create_dir_all(dir.join("vport0p1")).expect("mkdir");
        assert_eq!(look(&dir), None);
        fs::create_dir_all(dir.join("null")).expect("mkdir");
        fs::write(dir.join("null/name"), "pykata.agent.0\n").expect("write");
        assert_eq!(look(&dir), Some(PathBuf::from("/dev/null")));
        fs::remove_dir_all(dir).expect("rm");
    }
}
