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

use super::preface::Frames;
use crate::errno::{Failed, Step};
use crate::sys;

/// A virtio-serial write takes at most this much, and costs an exit to the host: a frame's header and payload go together.
const GATHER: usize = 32 * 1024;

pub struct Channel {
    fd: AsyncFd<OwnedFd>,
    /// Follows incoming frames on a transport that has no connections of its own.
    frames: Option<Frames>,
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
        let mut channel = Self { fd, frames, carry: Vec::new(), over: false, out: Vec::new(), out_done: 0 };
        if !carry.is_empty() {
            channel.incoming(&carry.clone());
            channel.carry = carry;
        }
        Ok(channel)
    }

    /// The bytes of the connection after this one that were read already.
    pub fn into_carry(self) -> Vec<u8> {
        if self.over { self.carry } else { Vec::new() }
    }

    /// How many of these bytes belong to this connection.
    fn incoming(&mut self, data: &[u8]) -> usize {
        let Some(restart) = self.frames.as_mut().and_then(|frames| frames.feed(data)) else { return data.len() };
        self.over = true;
        self.out.clear();
        self.out_done = 0;
        self.carry = restart.before;
        self.carry.extend_from_slice(&data[restart.at..]);
        restart.at
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
        let this = &mut *self;
        if this.over {
            return Poll::Ready(Ok(()));
        }
        if !this.carry.is_empty() {
            let take = this.carry.len().min(buf.remaining());
            buf.put_slice(&this.carry[..take]);
            this.carry.drain(..take);
            return Poll::Ready(Ok(()));
        }
        let mut space = [MaybeUninit::<u8>::uninit(); 16 * 1024];
        let want = buf.remaining().min(space.len());
        loop {
            let mut guard = ready!(this.fd.poll_read_ready(cx))?;
            match rustix::io::read(this.fd.as_fd(), &mut space[..want]) {
                Ok((data, _)) => {
                    let own = this.incoming(data);
                    buf.put_slice(&data[..own]);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
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
