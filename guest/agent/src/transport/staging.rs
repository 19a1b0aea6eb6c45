//! Data that the host has put into a disk rather than into the port: a port takes 4 KiB at a time, each with an interrupt, a
//! disk hundreds. The disk is a slot with the host's memory in it, and only the agent may open it.
//!
//! What comes by the port is where the data is. It is read at once, as if it had come in the frame itself: so the order of
//! frames is that of the data, and what the host asks for after a frame is answered when its data has been read.

use std::os::fd::{BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::inlet::Taker;
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

/// The disk, if one is open.
#[derive(Default)]
pub struct Staging {
    disk: Option<OwnedFd>,
}

impl Staging {
    /// Does what the host asks for; what it is to be told.
    pub fn control(&mut self, payload: &[u8]) -> Option<u8> {
        let (&asked, rest) = payload.split_first()?;
        match asked {
            OPEN => {
                self.disk = std::str::from_utf8(rest).ok().and_then(open);
                Some(if self.disk.is_some() { OPEN } else { REFUSED })
            }
            CLOSE => {
                self.disk = None;
                Some(CLOSE)
            }
            SYNC => Some(SYNC),
            _ => None,
        }
    }

    /// Hands a piece on. It is moved as far as its taker can have it moved, and read else.
    pub fn hand_on(&self, mut piece: Piece, taker: &dyn Taker) -> Result<(), Errno> {
        let disk = self.disk.as_ref().ok_or(Errno::NXIO)?;
        while piece.size > 0 {
            let moved = taker.take_from(&mut |pipe| move_to(disk, piece, pipe));
            let Some(size @ 1..) = moved else { break };
            if !size.is_multiple_of(BLOCK) || size > piece.size {
                return Err(Errno::IO); // it can't be read from there on, nor again from where it began
            }
            piece = Piece { offset: piece.offset + size as u64, size: piece.size - size };
        }
        if piece.size > 0 {
            taker.take(read(disk, piece)?);
        }
        Ok(())
    }
}

/// Without the page cache: it isn't told when the host puts something else there.
fn open(serial: &str) -> Option<OwnedFd> {
    let device = disk::there(serial)?;
    rustix::fs::open(device, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// The disk writes to the pages that the pipe gets, so nothing is copied.
fn move_to(disk: &OwnedFd, piece: Piece, pipe: BorrowedFd<'_>) -> Result<usize, Errno> {
    let mut offset = piece.offset;
    splice(disk, Some(&mut offset), pipe, None, piece.size, SpliceFlags::NONBLOCK)
}

fn read(disk: &OwnedFd, piece: Piece) -> Result<Bytes, Errno> {
    let mut memory = vec![0; piece.size + BLOCK];
    let start = memory.as_ptr().align_offset(BLOCK);
    let mut have = 0;
    while have < piece.size {
        let space = &mut memory[start + have..start + piece.size];
        match rustix::io::pread(disk, space, piece.offset + have as u64) {
            Ok(size @ 1..) => have += size,
            Ok(0) => return Err(Errno::IO),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(Bytes::from(memory).slice(start..start + piece.size))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Mutex;

    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    /// Has as much moved as its pipe has room for, and takes the rest.
    struct Reader {
        pipe: (OwnedFd, OwnedFd),
        taken: Mutex<Vec<u8>>,
    }

    impl Taker for Reader {
        fn take(&self, data: Bytes) {
            self.taken.lock().expect("not poisoned").extend_from_slice(&data);
        }

        fn take_from(&self, data: &mut super::super::inlet::Move<'_>) -> Option<usize> {
            data(self.pipe.1.as_fd()).ok()
        }
    }

    fn reader() -> Reader {
        let flags = rustix::pipe::PipeFlags::NONBLOCK;
        Reader { pipe: rustix::pipe::pipe_with(flags).expect("pipe"), taken: Mutex::default() }
    }

    fn filled(size: usize) -> (Staging, Vec<u8>) {
        let disk = memfd_create("disk", MemfdFlags::CLOEXEC).expect("memfd");
        let data: Vec<u8> = (0..size).map(|at| (at / 7) as u8).collect();
        rustix::io::pwrite(&disk, &data, 0).expect("written");
        (Staging { disk: Some(disk) }, data)
    }

    #[test]
    fn what_is_moved_comes_before_what_is_read() {
        let (staging, data) = filled(3 * LONGEST);
        let reader = reader();
        let piece = Piece { offset: LONGEST as u64, size: LONGEST };
        assert_eq!(staging.hand_on(piece, &reader), Ok(()));
        let mut found = vec![0; LONGEST];
        let moved = rustix::io::read(&reader.pipe.0, &mut found).expect("moved");
        assert!(moved >= BLOCK, "as much as a pipe takes");
        found.truncate(moved);
        found.extend_from_slice(&reader.taken.lock().expect("not poisoned"));
        assert!(found == data[LONGEST..2 * LONGEST]);
    }

    #[test]
    fn what_is_not_there() {
        let (staging, _) = filled(LONGEST);
        let beyond = Piece { offset: LONGEST as u64, size: BLOCK };
        assert_eq!(staging.hand_on(beyond, &reader()), Err(Errno::IO));
        assert_eq!(Staging::default().hand_on(Piece { offset: 0, size: BLOCK }, &reader()), Err(Errno::NXIO));
    }

    #[test]
    fn a_piece_that_ends_within_a_block_is_handed_on_once_at_most() {
        let (staging, data) = filled(BLOCK + 1);
        let reader = reader();
        assert_eq!(staging.hand_on(Piece { offset: 0, size: 2 * BLOCK }, &reader), Err(Errno::IO));
        let mut found = vec![0; 4 * BLOCK];
        let moved = rustix::io::read(&reader.pipe.0, &mut found).expect("moved");
        assert!(found[..moved] == data);
        assert!(reader.taken.lock().expect("not poisoned").is_empty());
    }

    #[test]
    fn what_the_host_may_ask_for() {
        let (mut staging, _) = filled(BLOCK);
        assert_eq!(staging.control(b"s"), Some(SYNC));
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
