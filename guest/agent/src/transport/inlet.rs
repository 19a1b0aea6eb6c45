//! Much input, beside HTTP/2 on the same connection: bulk frames from the host, on their way to the calls they are for.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use rustix::io::Errno;

use super::outlet::{Flag, Outlet};
use super::staging::{self, Due, Piece, Staged, Staging};

/// Moves data that is there to a pipe, without waiting; how much.
pub type Move<'a> = dyn FnMut(BorrowedFd<'_>) -> Result<usize, Errno> + 'a;

/// Who takes the data of a call.
pub trait Taker: Send + Sync {
    fn take(&self, data: Bytes);

    /// Has data moved to where it is wanted, if there is nothing before it on its way there. None: nothing was moved.
    fn take_from(&self, _data: &mut Move<'_>) -> Option<usize> {
        None
    }

    /// Data that is in the disk, and may stay there until `fetch`.
    fn take_staged(&self, staged: Staged) -> Result<(), Errno> {
        self.take(staged.read()?);
        Ok(())
    }

    /// What is still in the disk is about to go: it has to be read.
    fn fetch(&self) {}
}

impl<F: Fn(Bytes) + Send + Sync> Taker for F {
    fn take(&self, data: Bytes) {
        self(data);
    }
}

/// Who takes what comes with these flags, or higher ones: the number of the call, the flags, the data.
pub type Commander = Box<dyn Fn(u32, u8, Bytes) + Send + Sync>;
pub const COMMAND: u8 = 3;
/// What comes with these says where the data is.
const STAGED: u8 = 1;

/// Data is handed on in pieces of at most this size.
const PIECE: usize = 64 * 1024;

/// The calls of a connection that take bulk frames, by number.
#[derive(Default)]
pub struct Inlet {
    calls: Mutex<HashMap<u32, Arc<dyn Taker>>>,
    commander: OnceLock<Commander>,
}

/// A call in it, as long as this lives.
pub struct Taking {
    inlet: Arc<Inlet>,
    call: u32,
}

impl Inlet {
    fn calls(&self) -> MutexGuard<'_, HashMap<u32, Arc<dyn Taker>>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has what comes for a call taken.
    pub fn register(self: &Arc<Self>, call: u32, taker: Arc<dyn Taker>) -> Taking {
        self.calls().insert(call, taker);
        Taking { inlet: self.clone(), call }
    }

    /// Has commands taken, from the connection's beginning on.
    pub fn command(&self, commander: Commander) {
        let _ = self.commander.set(commander);
    }

    fn taker(&self, call: u32) -> Option<Arc<dyn Taker>> {
        self.calls().get(&call).cloned()
    }

    /// Nothing is left in the disk of these after this.
    fn fetch(&self, due: &Due) {
        let takers: Vec<_> = match due {
            Due::All => self.calls().values().cloned().collect(),
            Due::Calls(calls) => calls.iter().filter_map(|call| self.taker(*call)).collect(),
        };
        takers.iter().for_each(|taker| taker.fetch());
    }

    /// Data of a call that has ended is dropped.
    fn give(&self, call: u32, flag: u8, data: Bytes) {
        if flag >= COMMAND {
            if let Some(commander) = self.commander.get() {
                commander(call, flag, data);
            }
            return;
        }
        if let Some(taker) = self.taker(call) {
            taker.take(data);
        }
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        self.inlet.calls().remove(&self.call);
    }
}

/// A bulk frame that is coming in.
#[derive(Default)]
pub struct Incoming {
    inlet: Arc<Inlet>,
    call: u32,
    flag: u8,
    left: usize,
    data: Vec<u8>,
    /// The last frame ended with data that was moved.
    moved: bool,
    staging: Staging,
    outlet: Arc<Outlet>,
    /// Data was lost that comes by the disk.
    broken: bool,
}

impl Incoming {
    /// What is asked of the disk beside the port is answered by `outlet`.
    pub fn new(outlet: Arc<Outlet>) -> Self {
        Self { outlet, ..Self::default() }
    }

    /// Nothing more can be taken from this connection.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    pub fn inlet(&self) -> Arc<Inlet> {
        self.inlet.clone()
    }

    /// A frame begins; the one before is complete.
    pub fn begin(&mut self, call: u32, flag: u8, size: usize) {
        (self.call, self.flag, self.left, self.moved) = (call, flag, size, false);
        self.broken |= flag == STAGED && size > staging::LONGEST_PAYLOAD;
    }

    /// Bytes of it that are still to come.
    pub fn left(&self) -> usize {
        self.left
    }

    /// The next frame's data may be moved as well: it must not be read along with the header.
    pub fn was_moved(&self) -> bool {
        self.moved
    }

    pub fn forget_moved(&mut self) {
        self.moved = false;
    }

    /// Has what comes next of it moved. False: it has to be read.
    pub fn take_from(&mut self, mut data: impl FnMut(BorrowedFd<'_>, usize) -> Result<usize, Errno>) -> bool {
        if self.flag >= COMMAND || self.flag == STAGED || !self.data.is_empty() {
            return false;
        }
        let left = self.left;
        let taker = self.inlet.taker(self.call);
        let Some(size) = taker.and_then(|taker| taker.take_from(&mut |pipe| data(pipe, left))) else { return false };
        self.left -= size.min(left);
        self.moved = self.left == 0;
        size > 0
    }

    /// Takes what comes next of it from the beginning of `data`; how much that was.
    pub fn take(&mut self, data: &[u8]) -> usize {
        let size = data.len().min(self.left);
        self.data.extend_from_slice(&data[..size]);
        self.took(size);
        size
    }

    /// Where what comes next can be read to.
    pub fn space(&mut self) -> &mut [std::mem::MaybeUninit<u8>] {
        self.data.reserve(PIECE - self.data.len().min(PIECE - 1));
        let most = self.left.min(PIECE);
        let space = self.data.spare_capacity_mut();
        let most = most.min(space.len());
        &mut space[..most]
    }

    /// # Safety
    /// The first `size` bytes of `space` were written.
    pub unsafe fn advance(&mut self, size: usize) {
        // SAFETY: as the caller promises; they are within the capacity, as `space` is.
        unsafe { self.data.set_len(self.data.len() + size) };
        self.took(size);
    }

    fn took(&mut self, size: usize) {
        self.left -= size;
        if self.left == 0 || self.data.len() >= PIECE {
            self.hand_on();
        }
    }

    /// What has come so far is used at once.
    pub fn hand_on(&mut self) {
        if self.data.is_empty() || (self.flag == STAGED && self.left > 0) {
            return; // where data is isn't known before all of that has come
        }
        let data = std::mem::take(&mut self.data);
        match (self.flag, self.call) {
            (STAGED, 0) => self.ask(&data),
            (STAGED, call) => self.hand_on_staged(call, &data),
            (flag, call) => self.inlet.give(call, flag, data.into()),
        }
    }

    fn ask(&mut self, payload: &[u8]) {
        self.inlet.fetch(&Due::before(payload));
        let Some(said) = self.staging.control(payload) else {
            self.broken = true;
            return;
        };
        let outlet = self.outlet.clone();
        tokio::spawn(async move {
            if outlet.turn().await {
                outlet.put(0, Flag::Staged, |frame| frame.push(said));
            }
        });
    }

    fn hand_on_staged(&mut self, call: u32, payload: &[u8]) {
        let Some(taker) = self.inlet.taker(call) else { return };
        let staged = Piece::decode(payload).and_then(|piece| self.staging.at(piece));
        self.broken |= staged.is_none_or(|staged| taker.take_staged(staged).is_err());
    }
}
