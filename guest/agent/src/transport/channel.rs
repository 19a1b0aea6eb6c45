//! One connection to the host as hyper wants it: readable and writable, gathering small writes.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper::rt::{Read, ReadBufCursor, Write};

use super::Beside;
use super::ahead::{self, Answerer, Begin};
use super::inlet::Incoming;
use super::outlet::{Boundary, HEADER_LEN, Outlet};
use super::preface::{self, Frames, Other};
use super::stream::Stream;
use super::vigil::Vigil;

/// A virtio-serial write takes at most this much, and costs an exit to the host: a frame's header and payload go together.
pub const GATHER: usize = 32 * 1024;
/// Data of this size goes without being copied, when nothing waits before it.
const DIRECT: usize = 16 * 1024;

/// Read at once: one large frame.
const MOST: usize = 64 * 1024;

pub struct Channel {
    stream: Stream,
    /// Follows incoming frames.
    frames: Frames,
    /// The beginning of a frame's header, which nobody knows yet what it is one of.
    begun: Vec<u8>,
    /// The bulk frame that is coming in.
    bulk: Incoming,
    /// No preface has come yet.
    seeking: bool,
    /// Waits for more of it than a host has left that is gone.
    vigil: Vigil,
    /// Answers the calls that come before one.
    answerer: Option<Answerer>,
    /// Incoming bytes that come before any from `stream`; after `over`, the start of the next connection.
    carry: Vec<u8>,
    /// HTTP/2 of this connection for which there was no room yet.
    ready: Vec<u8>,
    over: bool,
    out: Vec<u8>,
    out_done: usize,
    /// What else is written, between two frames of HTTP/2.
    outlet: Arc<Outlet>,
    boundary: Boundary,
}

impl Channel {
    /// `carry` is what was already read of this connection.
    pub fn new(stream: Stream, carry: Vec<u8>) -> Self {
        let outlet = Arc::<Outlet>::default();
        if stream.is_port() {
            outlet.state().allow_moving();
        }
        Self {
            seeking: stream.is_port(),
            vigil: Vigil::Begins,
            answerer: None,
            stream,
            frames: Frames::new(),
            begun: Vec::new(),
            bulk: Incoming::new(outlet.clone()),
            carry,
            ready: Vec::new(),
            over: false,
            out: Vec::new(),
            out_done: 0,
            outlet,
            boundary: Boundary::default(),
        }
    }

    /// Has calls answered that come ahead of HTTP/2.
    pub fn answer_ahead(&mut self, answerer: Answerer) {
        self.answerer = Some(answerer);
    }

    /// What the connection after this one goes on with, where it came without an end of this one: the stream, and the
    /// bytes of it that were read already.
    pub fn into_parts(self) -> (Option<OwnedFd>, Option<Vec<u8>>) {
        (self.stream.into_inner(), self.over.then_some(self.carry))
    }

    /// Where more is written and read than HTTP/2.
    pub fn beside(&self) -> Beside {
        Beside { outlet: self.outlet.clone(), inlet: self.bulk.inlet() }
    }

    /// Puts together what of these bytes is HTTP/2 of this connection; how many that are.
    fn incoming(&mut self, data: &mut [u8]) -> usize {
        let (mut at, mut own) = (0, 0);
        while at < data.len() {
            at += self.bulk.take(&data[at..]);
            let (end, next) = match self.frames.feed(&data[at..]) {
                Some(Other::Bulk(bulk)) => {
                    self.bulk.begin(bulk.call, bulk.flag, bulk.size);
                    (at + bulk.at - HEADER_LEN, at + bulk.at)
                }
                Some(Other::Restart(restart)) => {
                    self.restart(restart.before, &data[at + restart.at..]);
                    (at + restart.at, data.len())
                }
                None => {
                    let end = data.len() - self.frames.unread();
                    self.begun = data[end..].to_vec();
                    (end, data.len())
                }
            };
            data.copy_within(at..end, own);
            own += end - at;
            at = next;
        }
        own
    }

    /// The next connection begins with these bytes.
    fn restart(&mut self, mut carry: Vec<u8>, data: &[u8]) {
        carry.extend_from_slice(data);
        carry.append(&mut self.carry);
        (self.over, self.carry) = (true, carry);
        self.out.clear();
        self.out_done = 0;
        self.outlet.close();
    }

    /// Looks at the bytes that were carried.
    fn sort_carried(&mut self) {
        let mut all = std::mem::take(&mut self.begun);
        all.append(&mut self.carry);
        let own = self.incoming(&mut all);
        all.truncate(own);
        self.ready = all;
    }

    /// Hands on what is known to be HTTP/2. False: there is nothing.
    fn take_ready(&mut self, buf: &mut ReadBufCursor<'_>) -> bool {
        let rest = self.ready.split_off(self.ready.len().min(buf.remaining()));
        buf.put_slice(&self.ready);
        let some = !self.ready.is_empty();
        self.ready = rest;
        some
    }

    /// Reads until a preface is there, which is then carried, and answers what comes before it.
    fn poll_seek(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            match ahead::take(&mut self.carry) {
                Begin::Call(kind, request) => {
                    let made = self.answerer.as_ref().map(|answer| answer(kind, &request));
                    self.out.extend(made.unwrap_or_default());
                    continue;
                }
                Begin::Other if preface::seek(&mut self.carry) => return Poll::Ready(Ok(true)),
                Begin::Other | Begin::PartOfCall => {}
            }
            // What there is no room for now goes when there is: that comes back to here.
            if let Poll::Ready(Err(err)) = self.flush_out(cx) {
                return Poll::Ready(Err(err));
            }
            let mut space = [MaybeUninit::uninit(); 4096];
            let n = ready!(self.poll_begin(cx, &mut space))?;
            if n == 0 {
                return Poll::Ready(Ok(false));
            }
            self.carry.extend_from_slice(written(&mut space, n));
        }
    }

    /// Reads what a connection begins with.
    fn poll_begin(&mut self, cx: &mut Context<'_>, space: &mut [MaybeUninit<u8>]) -> Poll<io::Result<usize>> {
        // First of all, so that the event loop is told of what comes, if nothing has.
        if let Poll::Ready(read) = self.stream.poll_read(cx, space) {
            return Poll::Ready(read);
        }
        if self.carry != preface::MARK {
            return Poll::Pending;
        }
        match ready!(self.vigil.poll(cx, || self.stream.read_now(space))) {
            Some(Ok(n)) if n > 0 => Poll::Ready(Ok(n)),
            _ => self.stream.poll_read(cx, space),
        }
    }

    fn flush_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.out_done < self.out.len() {
            self.out_done += ready!(self.stream.poll_write(cx, &self.out[self.out_done..]))?;
        }
        self.out.clear();
        self.out_done = 0;
        Poll::Ready(Ok(()))
    }

    /// Writes what waits beside HTTP/2, where a frame of that has ended.
    fn poll_outlet(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outlet = self.outlet.clone();
        let mut state = outlet.state();
        state.remember(cx.waker());
        while !state.is_free() && (state.is_begun() || self.boundary.is_clean()) {
            if !self.out.is_empty() {
                ready!(self.flush_out(cx))?;
            }
            let rest = state.rest();
            if let (true, Some((pipe, size))) = (rest.is_empty(), state.moving()) {
                match ready!(self.stream.poll_splice(cx, pipe, size)) {
                    Ok(moved) => outlet.moved(&mut state, moved),
                    Err(_) if state.stop_moving() => {}
                    Err(err) => return Poll::Ready(Err(err)),
                }
                continue;
            }
            let wrote = ready!(self.stream.poll_write(cx, &rest[..rest.len().min(GATHER)]))?;
            outlet.wrote(&mut state, wrote);
        }
        Poll::Ready(Ok(()))
    }
}

impl Channel {
    /// Reads the rest of a bulk frame that has begun. False: the connection has ended.
    fn poll_bulk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        while self.bulk.left() > 0 {
            if self.stream.is_port() && self.bulk.take_from(|pipe, size| self.stream.splice_to(pipe, size)) {
                continue;
            }
            let n = ready!(self.stream.poll_read(cx, self.bulk.space()))?;
            if n == 0 {
                return Poll::Ready(Ok(false));
            }
            // SAFETY: so much has been read into the space.
            unsafe { self.bulk.advance(n) };
        }
        Poll::Ready(Ok(true))
    }

    /// Reads what has come; how much of it is HTTP/2. None: the connection has ended.
    ///
    /// The beginning of a header goes in front of it, and there may be no more room than for that.
    fn poll_frames(&mut self, cx: &mut Context<'_>, space: &mut [MaybeUninit<u8>]) -> Poll<io::Result<Option<usize>>> {
        let first = self.begun.len();
        let most = if self.bulk.was_moved() { HEADER_LEN } else { MOST }.min(space.len());
        if space.len() < 2 * HEADER_LEN {
            let mut space = [MaybeUninit::uninit(); 8 * HEADER_LEN];
            let n = ready!(self.stream.poll_read(cx, &mut space))?;
            self.carry.extend_from_slice(written(&mut space, n));
            return Poll::Ready(Ok((n > 0).then_some(0)));
        }
        let mut n = ready!(self.stream.poll_read(cx, &mut space[first..most]))?;
        self.bulk.forget_moved();
        if n == 0 {
            return Poll::Ready(Ok(None));
        }
        for (to, from) in space.iter_mut().zip(std::mem::take(&mut self.begun)) {
            to.write(from);
        }
        n += first;
        Poll::Ready(Ok(Some(self.incoming(written(space, n)))))
    }
}

/// The part of a buffer that a read has just written.
fn written(space: &mut [MaybeUninit<u8>], n: usize) -> &mut [u8] {
    let space = &mut space[..n];
    // SAFETY: `n` is what the stream has read into it.
    unsafe { std::slice::from_raw_parts_mut(space.as_mut_ptr().cast(), space.len()) }
}

impl Read for Channel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        if self.seeking {
            if let Poll::Ready(Err(err)) = self.poll_outlet(cx) {
                return Poll::Ready(Err(err));
            }
            self.seeking = !ready!(self.poll_seek(cx))?;
            if self.seeking {
                return Poll::Ready(Ok(())); // the end, before it began
            }
        }
        if self.over && self.ready.is_empty() {
            return Poll::Ready(Ok(()));
        }
        if let Poll::Ready(Err(err)) = self.poll_outlet(cx) {
            return Poll::Ready(Err(err));
        }
        loop {
            if !self.over && !self.carry.is_empty() {
                self.sort_carried(); // it may hold the end
            }
            if self.bulk.is_broken() {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            if self.take_ready(&mut buf) || self.over || !ready!(self.poll_bulk(cx))? {
                return Poll::Ready(Ok(()));
            }
            // SAFETY: only what a read has written is counted below.
            let space = unsafe { buf.as_mut() };
            let Some(own) = ready!(self.poll_frames(cx, space))? else { return Poll::Ready(Ok(())) };
            // SAFETY: so much has been read into it.
            unsafe { buf.advance(own) };
            if own > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl Write for Channel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.over {
            return Poll::Ready(Ok(data.len())); // who would read it is gone
        }
        if self.outlet.state().is_begun() {
            ready!(self.poll_outlet(cx))?;
        }
        if self.out.len() >= GATHER {
            ready!(self.flush_out(cx))?;
        }
        if self.out.is_empty() && data.len() >= DIRECT {
            let wrote = ready!(self.stream.poll_write(cx, &data[..data.len().min(GATHER)]))?; // nothing to gather it with
            self.boundary.pass(&data[..wrote]);
            return Poll::Ready(Ok(wrote));
        }
        let take = data.len().min(GATHER - self.out.len());
        self.out.extend_from_slice(&data[..take]);
        self.boundary.pass(&data[..take]);
        Poll::Ready(Ok(take))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_outlet(cx))?; // what waited for the end of a frame, which was only now written
        self.flush_out(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.flush_out(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{outlet, preface};
    use super::*;
    use crate::stdio::Fill;
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::sync::Mutex;

    fn frame(kind: u8, call: u32, payload: &[u8]) -> Vec<u8> {
        let size = payload.len() as u32;
        [&size.to_be_bytes()[1..], &[kind, 2], &call.to_be_bytes(), payload].concat()
    }

    /// Reads into what is left of a buffer, as hyper does: at times that is less than a header.
    async fn read_all(channel: &mut Channel) -> Vec<u8> {
        let (mut all, mut room) = (Vec::new(), 0);
        loop {
            room = if room == 0 { 97 } else { room };
            let mut space = [MaybeUninit::uninit(); 97];
            let mut buf = hyper::rt::ReadBuf::uninit(&mut space[..room]);
            std::future::poll_fn(|cx| Pin::new(&mut *channel).poll_read(cx, buf.unfilled())).await.expect("read");
            if buf.filled().is_empty() {
                return all;
            }
            all.extend_from_slice(buf.filled());
            room -= buf.filled().len();
        }
    }

    /// What is read as HTTP/2, and what as bulk data of the call 5.
    async fn told_apart(all: &[u8], cut: usize) -> (Vec<u8>, Vec<u8>) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("sockets");
        let mut channel = Channel::new(Stream::socket(ours).expect("watched"), Vec::new());
        let taken = Arc::new(Mutex::new(Vec::new()));
        let taker = taken.clone();
        let _taking = channel.beside().inlet.register(
            5,
            Arc::new(move |data: bytes::Bytes| taker.lock().expect("not poisoned").extend_from_slice(&data)),
        );
        let write = async {
            for piece in all.chunks(cut) {
                rustix::io::write(&theirs, piece).expect("fits");
                tokio::task::yield_now().await;
            }
            drop(theirs);
        };
        let (http2, ()) = tokio::join!(read_all(&mut channel), write);
        let taken = taken.lock().expect("not poisoned").clone();
        (http2, taken)
    }

    #[tokio::test]
    async fn what_says_nothing_of_a_disk_ends_the_connection() {
        let asked = |call: u32, payload: &[u8]| {
            let mut frame = frame(outlet::KIND, call, payload);
            frame[4] = 1;
            frame
        };
        let refused = [
            asked(0, b"x"),
            asked(5, b"12345678"),
            asked(5, &[0, 0, 0, 0, 0, 0, 0x10, 0]), // there is none
            asked(5, &[0; 65]),
        ];
        for (number, bad) in refused.iter().enumerate() {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("sockets");
            let mut channel = Channel::new(Stream::socket(ours).expect("watched"), Vec::new());
            let _taking = channel.beside().inlet.register(5, Arc::new(|_: bytes::Bytes| {}));
            let all = [preface::PREFACE, bad.as_slice(), &frame(0, 1, b"more")].concat();
            rustix::io::write(&theirs, &all).expect("fits");
            let mut ended = false;
            for _ in 0..3 {
                let mut space = [MaybeUninit::uninit(); 97];
                let mut buf = hyper::rt::ReadBuf::uninit(&mut space);
                let read = std::future::poll_fn(|cx| Pin::new(&mut channel).poll_read(cx, buf.unfilled()));
                ended |= tokio::select! {
                    biased;
                    read = read => read.is_err(),
                    () = tokio::task::yield_now() => false,
                };
            }
            assert!(ended, "number {number}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn bulk_frames_are_taken_out(frames in prop::collection::vec((0u8..3, 1usize..300), 0..10), cut in 1usize..200) {
            let (mut all, mut bulk) = (preface::PREFACE.to_vec(), Vec::new());
            let mut http2 = all.clone();
            for (kind, size) in frames {
                let payload = vec![size as u8; size];
                match kind {
                    0 => http2.extend(frame(0, 1, &payload)),
                    1 => bulk.extend_from_slice(&payload),
                    _ => {} // of a call that nobody knows
                }
                all.extend(frame(if kind == 0 { 0 } else { outlet::KIND }, if kind == 0 { 1 } else { 4 + u32::from(kind) }, &payload));
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("runtime");
            let (found, taken) = runtime.block_on(told_apart(&all, cut));
            prop_assert_eq!(found, http2);
            prop_assert_eq!(taken, bulk);
        }
    }

    /// Frames of two kinds, written to a socket that takes little at a time; what comes out of it.
    async fn written_to(frames: &[(bool, Vec<u8>)]) -> Vec<u8> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("sockets");
        rustix::net::sockopt::set_socket_send_buffer_size(&ours, 4096).expect("smaller");
        let mut channel = Channel::new(Stream::socket(ours).expect("watched"), Vec::new());
        let outlet = channel.outlet.clone();
        outlet.state().allow_moving();
        let put = async {
            for (moved, data) in frames {
                outlet.turn().await;
                if !moved {
                    outlet.put(7, outlet::Flag::Stdout, |frame| frame.extend_from_slice(data));
                    continue;
                }
                let fill =
                    |pipe: std::os::fd::BorrowedFd<'_>| rustix::io::write(pipe, data).map_or(Fill::Nothing, Fill::Data);
                assert_eq!(outlet.put_moved(7, outlet::Flag::Stderr, fill), Some(Fill::Data(data.len())));
            }
            outlet.turn().await;
        };
        let write = std::future::poll_fn(|cx| channel.poll_outlet(cx).map(|done| done.expect("written")).map(|()| ()));
        let mut all = Vec::new();
        let write = async {
            let mut write = write;
            loop {
                (&mut write).await;
                tokio::task::yield_now().await;
            }
        };
        let read = async {
            let mut space = [0; 3000];
            loop {
                if let Ok(size) = rustix::io::read(&theirs, &mut space) {
                    all.extend_from_slice(&space[..size]);
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = put => {}
            () = write => {}
            () = read => {}
        }
        let mut rest = vec![0; 1 << 20];
        while let Ok(size) = rustix::io::read(&theirs, &mut rest) {
            all.extend_from_slice(&rest[..size]);
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn frames_are_whole_whichever_way_their_data_goes(
            sizes in prop::collection::vec((any::<bool>(), 1usize..60_000), 0..6),
        ) {
            let size_of = |moved: bool, size: usize| if moved { 12 * size } else { size };
            let frames: Vec<_> =
                sizes.iter().map(|(moved, size)| (*moved, vec![*size as u8; size_of(*moved, *size)])).collect();
            let expected = frames.iter().flat_map(|(moved, data)| {
                let flag = if *moved { outlet::Flag::Stderr } else { outlet::Flag::Stdout };
                data.chunks(outlet::MOVED).flat_map(move |data| outlet::frame(7, flag, data))
            });
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("runtime");
            prop_assert_eq!(runtime.block_on(written_to(&frames)), expected.collect::<Vec<_>>());
        }
    }
}
