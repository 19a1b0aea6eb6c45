//! One connection to the host as hyper wants it: readable and writable, gathering small writes.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper::rt::{Read, ReadBufCursor, Write};

use super::preface::{self, Frames};
use super::stream::Stream;

/// A virtio-serial write takes at most this much, and costs an exit to the host: a frame's header and payload go together.
const GATHER: usize = 32 * 1024;
/// Data of this size goes without being copied, when nothing waits before it.
const DIRECT: usize = 16 * 1024;

/// Read at once: one large frame.
const MOST: usize = 64 * 1024;

pub struct Channel {
    stream: Stream,
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
    /// `carry` is what was already read of this connection.
    pub fn new(stream: Stream, carry: Vec<u8>) -> Self {
        let frames = stream.is_port().then(Frames::new);
        Self { seeking: frames.is_some(), stream, frames, carry, over: false, out: Vec::new(), out_done: 0 }
    }

    /// What the connection after this one goes on with, where it came without an end of this one: the stream, and the
    /// bytes of it that were read already.
    pub fn into_parts(self) -> (Option<OwnedFd>, Option<Vec<u8>>) {
        (self.stream.into_inner(), self.over.then_some(self.carry))
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
    fn take_carried(&mut self, buf: &mut ReadBufCursor<'_>) -> bool {
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
            let n = ready!(self.stream.poll_read(cx, &mut space))?;
            if n == 0 {
                return Poll::Ready(Ok(false));
            }
            self.carry.extend_from_slice(written(&space, n));
        }
        Poll::Ready(Ok(true))
    }

    fn flush_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.out_done < self.out.len() {
            self.out_done += ready!(self.stream.poll_write(cx, &self.out[self.out_done..]))?;
        }
        self.out.clear();
        self.out_done = 0;
        Poll::Ready(Ok(()))
    }
}

/// The part of a buffer that a read has just written.
fn written(space: &[MaybeUninit<u8>], n: usize) -> &[u8] {
    let space = &space[..n];
    // SAFETY: `n` is what the stream has read into it.
    unsafe { std::slice::from_raw_parts(space.as_ptr().cast(), space.len()) }
}

impl Read for Channel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        if self.seeking {
            self.seeking = !ready!(self.poll_seek(cx))?;
            if self.seeking {
                return Poll::Ready(Ok(())); // the end, before it began
            }
        }
        if self.over {
            return Poll::Ready(Ok(()));
        }
        // What was carried may hold the end.
        if self.take_carried(&mut buf) || self.over {
            return Poll::Ready(Ok(()));
        }
        // SAFETY: only what a read has written is counted below.
        let space = unsafe { buf.as_mut() };
        let most = space.len().min(MOST);
        let mut n = ready!(self.stream.poll_read(cx, &mut space[..most]))?;
        // A port gives a page at a time. What comes after it may only be known to be there once it was asked for.
        while n > 0 && n < most && self.stream.is_port() {
            match self.stream.poll_more(&mut space[n..most]) {
                0 => break,
                more => n += more,
            }
        }
        let own = self.incoming(written(&space[..most], n));
        // SAFETY: so much has been read into it.
        unsafe { buf.advance(own) };
        Poll::Ready(Ok(()))
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
        if self.out.is_empty() && data.len() >= DIRECT {
            return self.stream.poll_write(cx, &data[..data.len().min(GATHER)]); // nothing to gather it with
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
