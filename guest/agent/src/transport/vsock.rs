//! A vsock connection that the guest dials to the host.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::Interest;

use super::channel::Channel;
use super::stream::Stream;
use crate::errno::{self, Failed, Step};
use crate::sys;

/// The host's context id.
const HOST_CID: u32 = 2;
/// Nobody tells the guest when the host begins to listen: dial again, at first quickly.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(320);

/// Dials until the host answers.
pub async fn dial(port: u32) -> Result<Channel, Failed> {
    let mut pause = FIRST_PAUSE;
    loop {
        match dial_once(port).await {
            Ok(fd) => return Ok(Channel::new(Stream::socket(fd)?, Vec::new())),
            Err(failed) if matches!(failed.errno, Errno::AFNOSUPPORT | Errno::MFILE | Errno::NOMEM) => {
                return Err(failed);
            }
            Err(_) => tokio::time::sleep(pause).await,
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

async fn dial_once(port: u32) -> Result<OwnedFd, Failed> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes integers only.
    let fd = match unsafe { libc::socket(libc::AF_VSOCK, kind, 0) } {
        -1 => return Err(Failed::new("socket", "vsock", errno::last())),
        // SAFETY: a fresh descriptor that nobody else owns.
        fd => unsafe { OwnedFd::from_raw_fd(fd) },
    };
    match connect(&fd, port) {
        Ok(()) => return Ok(fd),
        Err(Errno::INPROGRESS) => {}
        Err(errno) => return Err(Failed::new("connect", format_args!("vsock port {port}"), errno)),
    }
    let fd = sys::watch(fd, Interest::WRITABLE).step("epoll", "vsock")?;
    fd.writable().await.step("wait", "vsock")?.retain_ready();
    match rustix::net::sockopt::socket_error(fd.as_fd()).step("getsockopt", "vsock")? {
        Ok(()) => Ok(fd.into_inner()),
        Err(errno) => Err(Failed::new("connect", format_args!("vsock port {port}"), errno)),
    }
}

fn connect(fd: &OwnedFd, port: u32) -> Result<(), Errno> {
    // SAFETY: a plain record of integers.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = HOST_CID;
    address.svm_port = port;
    // SAFETY: the address lives through the call and its length is that of its type.
    let ret = unsafe {
        libc::connect(fd.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_vm>() as libc::socklen_t)
    };
    if ret == 0 { Ok(()) } else { Err(errno::last()) }
}
