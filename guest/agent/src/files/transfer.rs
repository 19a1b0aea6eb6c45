//! Moves data between a file and a standard stream.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::wire;

/// How much is moved at a time.
const STEP: usize = 256 * 1024;
/// How much is received at a time: as much as the host sends at once.
const RECEIVED: usize = 512 * 1024;
/// The room of a pipe: what the agent gives its own end (stdio.rs). With less it would lose what it has gained there.
const ROOM: usize = 1024 * 1024;

/// Gives a pipe more room, so that both of its ends can work at the same time. It is no error if it stays as it is.
pub fn widen(pipe: BorrowedFd<'_>) {
    let _ = rustix::pipe::fcntl_setpipe_size(pipe, ROOM);
}

/// Moves up to `left` bytes from `from`, where it is, to `to`, a pipe, without a copy in this process where the kernel can.
/// How many there were.
pub fn send(from: BorrowedFd<'_>, to: BorrowedFd<'_>, left: u64) -> Result<u64, Errno> {
    let mut moved = 0;
    while moved < left {
        let step = (left - moved).min(STEP as u64) as usize;
        match splice(from, None, to, None, step, SpliceFlags::MOVE) {
            Ok(0) => break,
            Ok(n) => moved += n as u64,
            Err(Errno::INTR) => {}
            // Not every file can: those of /proc, a terminal.
            Err(Errno::INVAL) => return Ok(moved + copy(from, to, left - moved, &mut vec![0; 64 * 1024])?),
            Err(errno) => return Err(errno),
        }
    }
    Ok(moved)
}

/// Moves exactly `size` bytes from `from`, a pipe, to `to`, where it is. The pipe must not end before.
///
/// Through `buffer`, which grows to what it needs: a splice would have the kernel write a file page by page, which takes
/// longer under emulation than to copy twice.
pub fn receive(from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: usize, buffer: &mut Vec<u8>) -> Result<(), Moved> {
    let most = size.min(RECEIVED);
    if buffer.len() < most {
        buffer.resize(most, 0);
    }
    match copy(from, to, size as u64, buffer) {
        Ok(moved) if moved == size as u64 => Ok(()),
        Ok(_) => Err(Moved::Broken),
        Err(errno) => Err(Moved::Failed(errno)),
    }
}

/// Why not all was received.
pub enum Moved {
    /// The host's data has ended early.
    Broken,
    Failed(Errno),
}

fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: u64, buffer: &mut [u8]) -> Result<u64, Errno> {
    let mut moved = 0;
    while moved < size {
        let step = (size - moved).min(buffer.len() as u64) as usize;
        match rustix::io::read(from, &mut buffer[..step]) {
            Ok(0) => break,
            Ok(n) => {
                wire::write_all(to, &buffer[..n])?;
                moved += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    use rustix::fs::{MemfdFlags, memfd_create};

    #[test]
    fn data_goes_through_a_pipe_and_back() {
        let file = memfd_create("from", MemfdFlags::CLOEXEC).expect("memfd");
        let data: Vec<u8> = (0..50_000u32).map(|i| i as u8).collect();
        wire::write_all(file.as_fd(), &data).expect("written");
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).expect("seek");
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        assert_eq!(send(file.as_fd(), write.as_fd(), u64::MAX), Ok(50_000));
        drop(write);
        let back = memfd_create("to", MemfdFlags::CLOEXEC).expect("memfd");
        assert!(receive(read.as_fd(), back.as_fd(), 40_000, &mut Vec::new()).is_ok());
        assert!(matches!(receive(read.as_fd(), back.as_fd(), 20_000, &mut Vec::new()), Err(Moved::Broken)));
        let mut found = vec![0; 60_000];
        assert_eq!(rustix::io::pread(&back, &mut found, 0), Ok(50_000));
        assert_eq!(found[..50_000], data);
    }
}
