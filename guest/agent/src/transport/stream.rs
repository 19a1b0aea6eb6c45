//! The descriptor under a connection: a socket, or a virtio-serial port with its ways.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::serial;
use crate::errno::{Failed, Step};
use crate::sys;

/// How long the host may take to come back after an end that the connection before this one is to blame for.
const GRACE: Duration = Duration::from_millis(100);

pub struct Stream {
    /// Taken out for a moment only.
    fd: Option<AsyncFd<OwnedFd>>,
    port: Option<Port>,
}

/// What there is to know of a port.
struct Port {
    /// The guest's kernel hears of the host's coming and going later than it hears its data: a connection that was
    /// found by its preface may still have the end of the one before it to come. That is not its own.
    ends_owed: bool,
    returning: Option<Pin<Box<dyn Future<Output = bool> + Send>>>,
}

impl Stream {
    pub fn socket(fd: OwnedFd) -> Result<Self, Failed> {
        Ok(Self { fd: Some(watch(fd)?), port: None })
    }

    pub fn port(fd: OwnedFd, ends_owed: bool) -> Result<Self, Failed> {
        Ok(Self { fd: Some(watch(fd)?), port: Some(Port { ends_owed, returning: None }) })
    }

    pub fn is_port(&self) -> bool {
        self.port.is_some()
    }

    pub fn into_inner(self) -> Option<OwnedFd> {
        self.fd.map(AsyncFd::into_inner)
    }

    fn fd(&self) -> io::Result<&AsyncFd<OwnedFd>> {
        self.fd.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// The event loop takes a HUP as final, but a port's goes away again: register it anew.
    fn renew(&mut self) -> io::Result<()> {
        if let Some(fd) = self.fd.take() {
            let fd = watch(fd.into_inner()).map_err(|failed| io::Error::from(failed.errno))?;
            self.fd = Some(fd);
        }
        Ok(())
    }

    /// Reads into `space` once there is something; 0 is the end.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, space: &mut [MaybeUninit<u8>]) -> Poll<io::Result<usize>> {
        loop {
            if let Some(returning) = self.port.as_mut().and_then(|port| port.returning.as_mut()) {
                let is_back = ready!(returning.as_mut().poll(cx));
                self.port.iter_mut().for_each(|port| port.returning = None);
                if !is_back {
                    return Poll::Ready(Ok(0));
                }
                self.renew()?;
            }
            let fd = self.fd()?;
            let mut guard = ready!(fd.poll_read_ready(cx))?;
            match rustix::io::read(fd.as_fd(), &mut *space) {
                Ok((data, _)) if !data.is_empty() => return Poll::Ready(Ok(data.len())),
                Ok(_) => {
                    let fd = fd.as_fd().try_clone_to_owned();
                    match &mut self.port {
                        Some(port) if port.ends_owed => {
                            port.ends_owed = false;
                            port.returning = Some(Box::pin(is_back(fd?)));
                        }
                        _ => return Poll::Ready(Ok(0)),
                    }
                }
                Err(Errno::AGAIN) if guard.ready().is_read_closed() && self.port.is_some() => self.renew()?,
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }

    /// Reads what is there, without waiting.
    pub fn read_now(&self, space: &mut [MaybeUninit<u8>]) -> Result<usize, Errno> {
        let fd = self.fd().map_err(|_| Errno::NOTCONN)?;
        rustix::io::read(fd.as_fd(), space).map(|(data, _)| data.len())
    }

    /// Moves up to `size` bytes of what is there to a pipe, without waiting. Ends are left to [`Self::poll_read`].
    pub fn splice_to(&self, pipe: BorrowedFd<'_>, size: usize) -> Result<usize, Errno> {
        let fd = self.fd().map_err(|_| Errno::NOTCONN)?;
        splice(fd.as_fd(), None, pipe, None, size, SpliceFlags::NONBLOCK)
    }

    pub fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, |fd| rustix::io::write(fd, data))
    }

    /// Writes up to `size` bytes of what is in `pipe`, which is so much at least.
    pub fn poll_splice(&mut self, cx: &mut Context<'_>, pipe: BorrowedFd<'_>, size: usize) -> Poll<io::Result<usize>> {
        self.poll_send(cx, |fd| splice(pipe, None, fd, None, size, SpliceFlags::NONBLOCK))
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        send: impl Fn(BorrowedFd<'_>) -> Result<usize, Errno>,
    ) -> Poll<io::Result<usize>> {
        loop {
            let fd = self.fd()?;
            let mut guard = ready!(fd.poll_write_ready(cx))?;
            match send(fd.as_fd()) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(n) => return Poll::Ready(Ok(n)),
                // A port without a host takes nothing; reading will find the end.
                Err(Errno::AGAIN) if guard.ready().is_write_closed() => return Poll::Pending,
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }
}

fn watch(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, Failed> {
    sys::watch(fd, Interest::READABLE | Interest::WRITABLE).step("epoll", "channel")
}

async fn is_back(port: OwnedFd) -> bool {
    matches!(tokio::time::timeout(GRACE, serial::wait_for_host(&port)).await, Ok(Ok(())))
}
