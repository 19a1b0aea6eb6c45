//! Data that the host has put into a disk rather than into the port: a port takes 4 KiB at a time, each with an interrupt, a
//! disk hundreds. The disk is a slot with the host's memory in it, and only the agent may open it.
//!
//! What comes by the port is where the data is, in the place that the data itself would have. Until its taker has use for it,
//! it stays in the disk, which is the host's memory and not the guest's: so much may be under way without being held here.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use crate::disk;

/// Pieces begin and end at a multiple of this, in the disk and in memory.
const BLOCK: usize = 4096;
/// The most bytes of a piece.
pub const LONGEST: usize = 512 * 1024;
/// The most bytes that say where one is, or what is asked for.
pub const LONGEST_PAYLOAD: usize = 64;

/// What the host asks for in a frame of no call: the first byte of its payload.
const OPEN: u8 = b'o';
const CLOSE: u8 = b'c';
const SYNC: u8 = b's';
/// It can't be opened.
const REFUSED: u8 = b'!';

/// Bytes of a call's number.
const CALL: usize = 4;

/// Whose data has to be taken from the disk before this is done that the host asks for.
pub enum Due {
    All,
    Calls(Vec<u32>),
}

impl Due {
    pub fn before(payload: &[u8]) -> Self {
        match payload.split_first() {
            Some((&SYNC, calls)) => {
                Due::Calls(calls.as_chunks::<CALL>().0.iter().copied().map(u32::from_be_bytes).collect())
            }
            _ => Due::All,
        }
    }
}

/// Where a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub offset: u64,
    pub size: usize,
}

impl Piece {
    /// None: there can't be such a piece.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let (offset, size) = payload.split_first_chunk::<4>()?;
        let offset = u64::from(u32::from_be_bytes(*offset)) * BLOCK as u64;
        let size = u32::from_be_bytes(size.try_into().ok()?) as usize;
        (size > 0 && size <= LONGEST && size.is_multiple_of(BLOCK)).then_some(Self { offset, size })
    }
}

/// A piece that is there to be taken.
#[derive(Debug)]
pub struct Staged {
    disk: Arc<OwnedFd>,
    left: Piece,
    /// A guest that is short of memory moves less at once than there is room for.
    #[cfg(test)]
    at_once: usize,
}

impl Staged {
    /// Bytes of it that weren't moved yet.
    pub fn left(&self) -> usize {
        self.left.size
    }

    fn new(disk: Arc<OwnedFd>, left: Piece) -> Self {
        Self {
            disk,
            left,
            #[cfg(test)]
            at_once: LONGEST,
        }
    }

    /// Moves what a pipe has room for, without waiting for more, or less, where the guest has few pages for it; how much.
    /// `EAGAIN`: it has no room. The disk writes to the pages that the pipe gets, so nothing is copied.
    pub fn move_to(&mut self, pipe: BorrowedFd<'_>) -> Result<usize, Errno> {
        let Piece { mut offset, size } = self.left;
        #[cfg(not(test))]
        let most = size;
        #[cfg(test)]
        let most = size.min(self.at_once);
        let moved = splice(&self.disk, Some(&mut offset), pipe, None, most, SpliceFlags::NONBLOCK)?;
        if moved == 0 || !moved.is_multiple_of(BLOCK) || moved > size {
            return Err(Errno::IO); // it can't be read from there on, nor again from where it began
        }
        self.left = Piece { offset: self.left.offset + moved as u64, size: size - moved };
        Ok(moved)
    }

    /// All that is left.
    pub fn read(&self) -> Result<Bytes, Errno> {
        let size = self.left.size;
        let mut memory = vec![0; size + BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        let mut have = 0;
        while have < size {
            let space = &mut memory[start + have..start + size];
            match rustix::io::pread(&self.disk, space, self.left.offset + have as u64) {
                Ok(size @ 1..) => have += size,
                Ok(0) => return Err(Errno::IO),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(Bytes::from(memory).slice(start..start + size))
    }
}

/// The disk, if one is open.
#[derive(Default)]
pub struct Staging {
    disk: Option<Arc<OwnedFd>>,
}

impl Staging {
    /// Does what the host asks for; what it is to be told. What is `Due` was taken before.
    pub fn control(&mut self, payload: &[u8]) -> Option<u8> {
        let (&asked, rest) = payload.split_first()?;
        match asked {
            OPEN => {
                self.disk = std::str::from_utf8(rest).ok().and_then(open).map(Arc::new);
                Some(if self.disk.is_some() { OPEN } else { REFUSED })
            }
            CLOSE => {
                self.disk = None;
                Some(CLOSE)
            }
            SYNC if rest.len().is_multiple_of(CALL) => Some(SYNC),
            _ => None,
        }
    }

    /// What the host says is in the disk. None: there is no disk.
    pub fn at(&self, piece: Piece) -> Option<Staged> {
        Some(Staged::new(self.disk.clone()?, piece))
    }
}

/// Without the page cache: it isn't told when the host puts something else there.
fn open(serial: &str) -> Option<OwnedFd> {
    let device = disk::there(serial)?;
    rustix::fs::open(device, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()).ok()
}

#[cfg(test)]
impl Staged {
    /// A piece with this data, of whole blocks, in a disk of its own.
    pub fn of(data: &[u8]) -> Self {
        let disk = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        assert_eq!(rustix::io::pwrite(&disk, data, 0), Ok(data.len()));
        Self::new(Arc::new(disk), Piece { offset: 0, size: data.len() })
    }

    /// No more than so many blocks are moved at once.
    pub fn in_moves_of(self, blocks: usize) -> Self {
        Self { at_once: blocks * BLOCK, ..self }
    }

    /// It can't be read any more.
    pub fn lose(&self) {
        rustix::fs::ftruncate(&self.disk, 0).expect("truncated");
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn filled(size: usize) -> (Staging, Vec<u8>) {
        let disk = memfd_create("disk", MemfdFlags::CLOEXEC).expect("memfd");
        let data: Vec<u8> = (0..size).map(|at| (at / 7) as u8).collect();
        rustix::io::pwrite(&disk, &data, 0).expect("written");
        (Staging { disk: Some(Arc::new(disk)) }, data)
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).expect("pipe")
    }

    #[test]
    fn what_a_pipe_has_no_room_for_is_still_there() {
        let (staging, data) = filled(3 * LONGEST);
        let (read, write) = pipe();
        let mut staged = staging.at(Piece { offset: LONGEST as u64, size: LONGEST }).expect("a disk");
        let mut found = Vec::new();
        let mut buffer = vec![0; LONGEST];
        while found.len() < LONGEST / 2 {
            let moved = staged.move_to(write.as_fd()).expect("moved");
            assert_eq!(staged.move_to(write.as_fd()), Err(Errno::AGAIN), "as much as a pipe takes");
            assert_eq!(rustix::io::read(&read, &mut buffer), Ok(moved));
            found.extend_from_slice(&buffer[..moved]);
        }
        assert_eq!(staged.left(), LONGEST - found.len());
        found.extend_from_slice(&staged.read().expect("read"));
        assert!(found == data[LONGEST..2 * LONGEST]);
    }

    #[test]
    fn what_is_not_there() {
        let (staging, _) = filled(LONGEST);
        let mut beyond = staging.at(Piece { offset: LONGEST as u64, size: BLOCK }).expect("a disk");
        assert_eq!(beyond.move_to(pipe().1.as_fd()), Err(Errno::IO));
        assert_eq!(beyond.read(), Err(Errno::IO));
        assert!(Staging::default().at(Piece { offset: 0, size: BLOCK }).is_none());
    }

    #[test]
    fn a_piece_that_ends_within_a_block_is_an_error() {
        let (staging, _) = filled(BLOCK + 1);
        let mut staged = staging.at(Piece { offset: 0, size: 2 * BLOCK }).expect("a disk");
        assert_eq!(staged.move_to(pipe().1.as_fd()), Err(Errno::IO));
        assert_eq!(staged.read(), Err(Errno::IO));
    }

    #[test]
    fn what_the_host_may_ask_for() {
        let (mut staging, _) = filled(BLOCK);
        assert_eq!(staging.control(b"s"), Some(SYNC));
        assert_eq!((staging.control(b"s\0\0\0\x05"), staging.control(b"s\0")), (Some(SYNC), None));
        assert_eq!(staging.control(b"ono-such-disk"), Some(REFUSED));
        assert!(staging.disk.is_none(), "one at a time");
        assert_eq!(staging.control(b"c"), Some(CLOSE));
        assert_eq!((staging.control(b""), staging.control(b"x")), (None, None));
    }

    proptest! {
        #[test]
        fn only_whole_blocks_are_pieces(payload in prop::collection::vec(any::<u8>(), 0..12)) {
            if let Some(piece) = Piece::decode(&payload) {
                prop_assert_eq!(payload.len(), 8);
                prop_assert!(piece.size > 0 && piece.size <= LONGEST && piece.size % BLOCK == 0);
                prop_assert_eq!(piece.offset % BLOCK as u64, 0);
            }
        }

        #[test]
        fn pieces_are_where_the_host_says(block in any::<u32>(), blocks in 1..=(LONGEST / BLOCK) as u32) {
            let size = blocks * BLOCK as u32;
            let payload = [block.to_be_bytes(), size.to_be_bytes()].concat();
            let piece = Piece { offset: u64::from(block) * BLOCK as u64, size: size as usize };
            prop_assert_eq!(Piece::decode(&payload), Some(piece));
        }
    }
}
