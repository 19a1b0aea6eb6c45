//! Much output, beside HTTP/2 on the same connection: in frames of a kind of their own, between HTTP/2's frames.
//!
//! A byte that goes through gRPC is copied some five times in the agent, which under emulation is what takes the time. Here
//! it is read from the pipe into the one buffer from which it is written. As the frames share the connection, there is
//! no other port to be opened, authenticated, saved and found again, and whatever is sent after them comes after them.

use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use tokio::sync::Notify;

use super::conduit::{self, Conduit};
use crate::stdio::Fill;

/// The type of these frames (RFC 9113, section 5.5: extensions).
pub const KIND: u8 = 0xb0;
pub const HEADER_LEN: usize = 9;
/// Largest payload. With its header, a frame is so many whole writes to a port.
pub const MOST: usize = 8 * super::channel::GATHER - HEADER_LEN;

/// The most that is moved at once, in frames of this size.
pub const MOST_MOVED: usize = conduit::ROOM;
pub const MOVED: usize = 256 * 1024;

/// Which stream a frame belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flag {
    Stdout = 0,
    Stderr = 1,
    /// A message of a call that came ahead of HTTP/2.
    Message = 2,
    /// The answer to a short command: it is over, goes on, or has failed.
    Over = 3,
    GoesOn = 4,
    Failed = 5,
    /// What was asked of the disk beside the port is done.
    Staged = 6,
}

/// A frame.
pub fn frame(stream: u32, flag: Flag, payload: &[u8]) -> Vec<u8> {
    [&header(stream, flag, payload.len())[..], payload].concat()
}

fn header(stream: u32, flag: Flag, size: usize) -> [u8; HEADER_LEN] {
    let ([_, high, middle, low], [a, b, c, d]) = ((size as u32).to_be_bytes(), stream.to_be_bytes());
    [high, middle, low, KIND, flag as u8, a, b, c, d]
}

/// Bytes before a message of gRPC.
pub const PREFIX: usize = 5;

/// These: how it is to be taken, 0 for one as it is, and its size.
pub fn prefix(mark: u8, size: usize) -> [u8; PREFIX] {
    let [a, b, c, d] = (size as u32).to_be_bytes();
    [mark, a, b, c, d]
}

/// Takes one frame at a time, from whoever waits for his turn, until the connection ends.
#[derive(Default)]
pub struct Outlet {
    state: Mutex<State>,
    free: Notify,
}

#[derive(Default)]
pub struct State {
    frame: Vec<u8>,
    done: usize,
    /// Where the data of frames is that was moved rather than read, and what these are of.
    conduit: Option<Conduit>,
    moved: Option<(u32, Flag)>,
    movable: bool,
    closed: bool,
    /// Of the task that has the connection.
    waker: Option<Waker>,
}

impl State {
    pub fn remember(&mut self, waker: &Waker) {
        if !self.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            self.waker = Some(waker.clone());
        }
    }

    /// What of the frame has still to be written.
    pub fn rest(&self) -> &[u8] {
        &self.frame[self.done..]
    }

    /// Data can be moved to the connection.
    pub fn allow_moving(&mut self) {
        self.movable = true;
    }

    /// What has to be moved once `rest` is written: from where, and how much.
    pub fn moving(&self) -> Option<(BorrowedFd<'_>, usize)> {
        self.conduit.as_ref()?.end()
    }

    /// It can't be moved, so it is written. False: some of it was lost.
    pub fn stop_moving(&mut self) -> bool {
        let due = self.conduit.as_ref().map_or(0, Conduit::due);
        let rest = self.conduit.as_mut().and_then(Conduit::copy);
        self.conduit = None;
        let (Some(rest), Some((stream, flag))) = (rest, self.moved) else { return false };
        let (this, others) = rest.split_at(due);
        self.frame.extend_from_slice(this);
        for data in others.chunks(MOVED) {
            self.frame.extend(frame(stream, flag, data));
        }
        true
    }

    /// The frame is cut in two by whatever is written now.
    pub fn is_begun(&self) -> bool {
        self.done > 0
    }

    /// All is written.
    pub fn is_free(&self) -> bool {
        self.frame.is_empty()
    }

    /// Begins with the next frame of what is moved. False: there is nothing more.
    fn begin_moved(&mut self) -> bool {
        let (Some(conduit), Some((stream, flag))) = (&mut self.conduit, self.moved) else { return false };
        let size = conduit.begin(MOVED);
        if size > 0 {
            self.frame.extend_from_slice(&header(stream, flag, size));
        }
        size > 0
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }

    fn look(&mut self, free: &Notify) {
        if self.done == self.frame.len() && self.moving().is_none() {
            self.frame.clear();
            self.done = 0;
            if !self.begin_moved() {
                free.notify_waiters();
            }
        }
    }
}

impl Outlet {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all is written that was given before. False: nobody is there any more who would read it.
    ///
    /// All who wait are woken: who is first may have nothing to send, or only have waited for the others' end.
    pub async fn turn(&self) -> bool {
        loop {
            let free = self.free.notified(); // hears of what happens from here on
            {
                let state = self.state();
                if state.closed || state.is_free() {
                    return !state.closed;
                }
            }
            free.await;
        }
    }

    /// In one's turn: sends what `fill` puts behind the header. Nothing is sent if it leaves it at that.
    pub fn put<T>(&self, stream: u32, flag: Flag, fill: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let mut state = self.state();
        let frame = &mut state.frame;
        frame.reserve(HEADER_LEN + MOST);
        frame.resize(HEADER_LEN, 0);
        let filled = fill(frame);
        let size = frame.len() - HEADER_LEN;
        if size == 0 {
            frame.clear();
            return filled;
        }
        frame[..HEADER_LEN].copy_from_slice(&header(stream, flag, size));
        state.wake();
        filled
    }

    /// In one's turn: sends what `fill` moves into a pipe, at most `MOST_MOVED`. None: that isn't possible.
    pub fn put_moved(&self, stream: u32, flag: Flag, fill: impl FnOnce(BorrowedFd<'_>) -> Fill) -> Option<Fill> {
        let mut state = self.state();
        if state.movable && state.conduit.is_none() {
            state.conduit = Conduit::new();
        }
        let conduit = state.conduit.as_mut()?;
        let filled = fill(conduit.beginning());
        match filled {
            Fill::Data(size) => {
                conduit.put(size);
                state.moved = Some((stream, flag));
                state.begin_moved();
                state.wake();
            }
            // Either pipe may be full of empty buffers, which writes that fault leave there. What there is has to be
            // read then, and the next pipe is a new one.
            Fill::Nothing | Fill::End => {
                state.conduit = None;
                return None;
            }
        }
        Some(filled)
    }

    /// In one's turn: sends whole frames as they are.
    pub fn give(&self, frames: Vec<u8>) {
        let mut state = self.state();
        state.frame = frames;
        state.wake();
    }

    /// Waits for the end of the connection.
    pub async fn closed(&self) {
        loop {
            let free = self.free.notified();
            if self.state().closed {
                return;
            }
            free.await;
        }
    }

    /// So much of the frame was written.
    pub fn wrote(&self, state: &mut State, size: usize) {
        state.done += size;
        state.look(&self.free);
    }

    /// So much of what comes after it was moved.
    pub fn moved(&self, state: &mut State, size: usize) {
        if let Some(conduit) = &mut state.conduit {
            conduit.took(size);
        }
        state.look(&self.free);
    }

    /// The connection has ended.
    pub fn close(&self) {
        let mut state = self.state();
        *state = State { closed: true, ..State::default() };
        self.free.notify_waiters();
    }
}

/// Follows what is written of HTTP/2, to find the places between two frames.
#[derive(Default)]
pub struct Boundary {
    header: Vec<u8>,
    payload: usize,
}

impl Boundary {
    /// A frame may begin here.
    pub fn is_clean(&self) -> bool {
        self.payload == 0 && self.header.is_empty()
    }

    pub fn pass(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.payload > 0 {
                let step = self.payload.min(data.len());
                self.payload -= step;
                data = &data[step..];
                continue;
            }
            let step = (HEADER_LEN - self.header.len()).min(data.len());
            self.header.extend_from_slice(&data[..step]);
            data = &data[step..];
            if let [high, middle, low, ..] = self.header[..]
                && self.header.len() == HEADER_LEN
            {
                self.payload = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
                self.header.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test]
    async fn one_frame_after_the_other() {
        let outlet = Outlet::default();
        assert!(outlet.turn().await);
        outlet.put(7, Flag::Stderr, |frame| frame.extend_from_slice(b"data"));
        let waiting = async {
            assert!(outlet.turn().await);
            outlet.put(9, Flag::Stdout, |_| ());
            assert!(outlet.turn().await); // nothing was put
        };
        let writing = async {
            let mut state = outlet.state();
            assert_eq!(state.rest(), b"\0\0\x04\xb0\x01\0\0\0\x07data");
            outlet.wrote(&mut state, 5);
            assert!(state.is_begun());
            outlet.wrote(&mut state, 8);
            assert!(state.rest().is_empty() && !state.is_begun());
        };
        tokio::join!(waiting, writing);
    }

    #[tokio::test]
    async fn who_lets_the_turn_pass_holds_up_nobody() {
        let outlet = Outlet::default();
        outlet.put(1, Flag::Stdout, |frame| frame.push(0));
        let writing = async {
            let mut state = outlet.state();
            let size = state.rest().len();
            outlet.wrote(&mut state, size);
        };
        assert_eq!(tokio::join!(outlet.turn(), outlet.turn(), writing), (true, true, ()));
    }

    #[test]
    fn what_cannot_be_moved_is_to_be_read() {
        let outlet = Outlet::default();
        outlet.state().allow_moving();
        for filled in [Fill::Nothing, Fill::End] {
            let moved = outlet.put_moved(1, Flag::Stdout, |_| filled);
            assert_eq!(moved, None);
            assert!(outlet.state().conduit.is_none() && outlet.state().is_free(), "a pipe that may be full of nothing");
        }
        let moved =
            outlet.put_moved(1, Flag::Stdout, |pipe| Fill::Data(rustix::io::write(pipe, b"data").expect("has room")));
        assert_eq!(moved, Some(Fill::Data(4)));
    }

    #[tokio::test]
    async fn who_waits_hears_of_the_end() {
        let outlet = Outlet::default();
        outlet.put(1, Flag::Stdout, |frame| frame.push(0));
        let (more, ()) = tokio::join!(outlet.turn(), async { outlet.close() });
        assert!(!more && !outlet.turn().await);
    }

    proptest! {
        #[test]
        fn the_places_between_frames_are_found(sizes in prop::collection::vec(0usize..300, 1..8), cut in 1usize..40) {
            let (mut all, mut ends) = (Vec::new(), vec![0]);
            for size in sizes {
                all.extend_from_slice(&(size as u32).to_be_bytes()[1..]);
                all.resize(all.len() + 6 + size, 0xff);
                ends.push(all.len());
            }
            let (mut boundary, mut at) = (Boundary::default(), 0);
            for piece in all.chunks(cut) {
                boundary.pass(piece);
                at += piece.len();
                prop_assert_eq!(boundary.is_clean(), ends.contains(&at));
            }
        }
    }
}
