//! Output that goes from a process's pipe to the port without passing through the agent: one copy, instead of two and a
//! buffer between them.
//!
//! What is to be sent is first moved into a pipe that nobody else has. So it is known how much it is before the frame
//! begins, and it stays so: who has the process's end open can open the other end too, and read from it. And the process
//! can go on writing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::sys;

/// What it has room for, in whole pages. It is several frames: each time the process and the agent take turns costs as
/// much as some 100 KiB do, under emulation.
pub const ROOM: usize = 1024 * 1024;

pub struct Conduit {
    beginning: OwnedFd,
    end: OwnedFd,
    /// Bytes in it, and how many of them are of the frame that has begun.
    left: usize,
    due: usize,
}

impl Conduit {
    /// None: there can't be one.
    pub fn new() -> Option<Self> {
        let (end, beginning) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        fcntl_setpipe_size(&beginning, ROOM).ok()?;
        Some(Self { beginning, end, left: 0, due: 0 })
    }

    /// Where it is filled, when it is empty.
    pub fn beginning(&self) -> BorrowedFd<'_> {
        self.beginning.as_fd()
    }

    /// So much was put in.
    pub fn put(&mut self, size: usize) {
        self.left = size;
    }

    /// A frame begins, with what there is and at most so much of it; how much.
    pub fn begin(&mut self, most: usize) -> usize {
        self.due = self.left.min(most);
        self.due
    }

    /// So much was taken out.
    pub fn took(&mut self, size: usize) {
        self.left = self.left.saturating_sub(size);
        self.due = self.due.saturating_sub(size);
    }

    /// Where it is emptied; and of how many bytes, for this frame.
    pub fn end(&self) -> Option<(BorrowedFd<'_>, usize)> {
        (self.due > 0).then(|| (self.end.as_fd(), self.due))
    }

    /// How many bytes of this frame are still to come.
    pub fn due(&self) -> usize {
        self.due
    }

    /// Takes out by copying what couldn't be moved. A page that can't be read any more, as it may be of a file that a
    /// process has spliced to its output, leaves zeros: the host was told how much comes. None: some of it was lost.
    pub fn copy(&mut self) -> Option<Vec<u8>> {
        if sys::readable_bytes(self.end.as_fd()) != self.left {
            return None;
        }
        self.due = 0;
        let mut data = vec![0; std::mem::take(&mut self.left)];
        let mut have = 0;
        while have < data.len() {
            match rustix::io::read(&self.end, &mut data[have..]) {
                Ok(0) => break,
                Ok(size) => have += size,
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        Some(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(told: usize) -> Conduit {
        let mut conduit = Conduit::new().expect("pipe");
        rustix::io::write(conduit.beginning(), b"some data").expect("fits");
        conduit.put(told);
        conduit.begin(told);
        conduit
    }

    #[test]
    fn what_is_in_it_can_be_copied() {
        let mut conduit = filled(9);
        let mut first = [0; 5];
        rustix::io::read(conduit.end().expect("filled").0, &mut first).expect("read");
        conduit.took(5);
        assert_eq!(conduit.copy().as_deref(), Some(&b"data"[..]));
        assert!(conduit.end().is_none());
    }

    #[test]
    fn it_goes_in_several_frames() {
        let mut conduit = filled(9);
        assert_eq!(conduit.begin(5), 5);
        conduit.took(5);
        assert!(conduit.end().is_none());
        assert_eq!((conduit.begin(5), conduit.due()), (4, 4));
    }

    #[test]
    fn what_was_lost_is_noticed() {
        assert_eq!(filled(10).copy(), None);
    }
}
