//! One connection to the host as hyper wants it: readable and writable, gathering small writes.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper::rt::{Read, ReadBufCursor, Write};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::preface::{self, Frames};
use crate::errno::{Failed, Step};
use crate::sys;

/// A virtio-serial write takes at most this much, and costs an exit to the host: a frame's header and payload go together.
const GATHER: usize = 32 * 1024;

pub struct Channel {
    fd: AsyncFd<OwnedFd>,
    /// Follows incoming frames on a transport that has no connections of its own.
    frames: Option<Frames>,
    /// No preface has come yet.
    seeking: bool,
    /// Incoming bytes to deliver before any from `fd`; after `over`, the start of the next connection.
    carry: Vec<u8>,
    over: bool,
    out: Vec<u8>,
    out_done: usize,
}

impl Channel {
    /// `carry` is what was already read of this connection. `restartable`: the transport may go over from one
    /// connection to the next without an end between them.
    pub fn new(fd: OwnedFd, carry: Vec<u8>, restartable: bool) -> Result<Self, Failed> {
        let fd = sys::watch(fd, Interest::READABLE | Interest::WRITABLE).step("epoll", "channel")?;
        let frames = restartable.then(Frames::new);
        Ok(Self { fd, frames, seeking: restartable, carry, over: false, out: Vec::new(), out_done: 0 })
    }

    /// What the next connection goes on with: the stream, and the bytes of it that were read already.
    pub fn into_parts(self) -> (OwnedFd, Vec<u8>) {
        (self.fd.into_inner(), if self.over { self.carry } else { Vec::new() })
    }

    /// How many of these bytes belong to this connection.
    fn incoming(&mut self, data: &[u8]) -> usize {
        let Some(restart) = self.frames.as_mut().and_then(|frames| frames.feed(data)) else { return data.len() };
        let mut carry = restart.before;
        carry.extend_from_slice(&data[restart.at..]);
        carry.append(&mut self.carry);
        (self.over, self.carry) = (true, carry);
        self.out.clear();
        self.out_done = 0;
        restart.at
    }

    /// Hands on bytes that were read before. False: there are none.
    fn from_carry(&mut self, buf: &mut ReadBufCursor<'_>) -> bool {
        let mut now = std::mem::take(&mut self.carry);
        self.carry = now.split_off(now.len().min(buf.remaining()));
        let own = self.incoming(&now);
        buf.put_slice(&now[..own]);
        own > 0
    }

    /// Reads until a preface is there, which is then carried.
    fn poll_seek(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        while !preface::seek(&mut self.carry) {
            let mut space = [MaybeUninit::uninit(); 4096];
            let data = ready!(read(&self.fd, cx, &mut space))?;
            if data.is_empty() {
                return Poll::Ready(Ok(false));
            }
            self.carry.extend_from_slice(data);
        }
        Poll::Ready(Ok(true))
    }

    fn flush_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.out_done < self.out.len() {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            match rustix::io::write(self.fd.as_fd(), &self.out[self.out_done..]) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(n) => self.out_done += n,
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
        self.out.clear();
        self.out_done = 0;
        Poll::Ready(Ok(()))
    }
}

impl Read for Channel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        if self.seeking {
            self.seeking = !ready!(self.poll_seek(cx))?;
            if self.seeking {
                return Poll::Ready(Ok(())); // the end, before it began
            }
        }
        if self.over || self.from_carry(&mut buf) || self.over {
            return Poll::Ready(Ok(()));
        }
        let mut space = [MaybeUninit::uninit(); 16 * 1024];
        let most = buf.remaining().min(space.len());
        let this = &mut *self;
        let data = ready!(read(&this.fd, cx, &mut space[..most]))?;
        let own = this.incoming(data);
        buf.put_slice(&data[..own]);
        Poll::Ready(Ok(()))
    }
}

/// Reads into `space` once there is something; nothing is the end.
fn read<'a>(
    fd: &AsyncFd<OwnedFd>,
    cx: &mut Context<'_>,
    space: &'a mut [MaybeUninit<u8>],
) -> Poll<io::Result<&'a [u8]>> {
    loop {
        let mut guard = ready!(fd.poll_read_ready(cx))?;
        match rustix::io::read(fd.as_fd(), &mut *space) {
            Ok((data, _)) => {
                let len = data.len();
                // SAFETY: the first `len` bytes were just written by the kernel.
                return Poll::Ready(Ok(unsafe { std::slice::from_raw_parts(space.as_ptr().cast(), len) }));
            }
            Err(Errno::AGAIN) => guard.clear_ready(),
            Err(Errno::INTR) => {}
            Err(errno) => return Poll::Ready(Err(errno.into())),
        }
    }
}

impl Write for Channel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.over {
            return Poll::Ready(Ok(data.len())); // who would read it is gone
        }
        if self.out.len() >= GATHER {
            ready!(self.flush_out(cx))?;
        }
        let take = data.len().min(GATHER - self.out.len());
        self.out.extend_from_slice(&data[..take]);
        Poll::Ready(Ok(take))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.flush_out(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.flush_out(cx)
    }
}
