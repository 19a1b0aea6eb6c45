//! Frames on the standard streams: a length of 4 bytes, then a message or data.

use std::os::fd::{AsFd, BorrowedFd};

use prost::Message;
use rustix::io::Errno;
use rustix::stdio::{stderr, stdin, stdout};

use super::proto::request::Operation;
use super::proto::response::Result as Reply;
use super::proto::{Failure, Request, Response};
use crate::sys;

/// Largest message in either direction.
pub const MAX_MESSAGE: usize = 4 << 20;
/// Largest frame of data.
pub const MAX_CHUNK: usize = 1 << 20;
/// Exit code after what is no protocol.
pub const BROKEN: i32 = 3;
/// Exit code after a failure in the middle of data.
pub const FAILED: i32 = 4;

/// The host isn't there any more, or doesn't keep to the protocol.
#[derive(Debug, PartialEq, Eq)]
pub struct Broken;

/// The next request; none at the end of the input.
pub fn receive() -> Result<Option<Operation>, Broken> {
    receive_from(stdin().as_fd())
}

fn receive_from(fd: BorrowedFd<'_>) -> Result<Option<Operation>, Broken> {
    let Some(size) = frame_size(fd)? else { return Ok(None) };
    if size > MAX_MESSAGE {
        return Err(Broken);
    }
    let mut message = vec![0; size];
    if !read_exact(fd, &mut message)? {
        return Err(Broken);
    }
    Request::decode(message.as_slice()).map_err(|_| Broken)?.operation.ok_or(Broken).map(Some)
}

/// The size of the next frame of data; 0: the data is complete.
pub fn next_chunk(fd: BorrowedFd<'_>) -> Result<usize, Broken> {
    frame_size(fd)?.filter(|size| *size <= MAX_CHUNK).ok_or(Broken)
}

fn frame_size(fd: BorrowedFd<'_>) -> Result<Option<usize>, Broken> {
    let mut head = [0; 4];
    Ok(read_exact(fd, &mut head)?.then(|| u32::from_be_bytes(head) as usize))
}

/// Fills the buffer; false if the input has ended before it.
pub fn read_exact(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<bool, Broken> {
    let mut have = 0;
    while have < buffer.len() {
        match rustix::io::read(fd, &mut buffer[have..]) {
            Ok(0) if have == 0 => return Ok(false),
            Ok(0) => return Err(Broken),
            Ok(n) => have += n,
            Err(Errno::INTR) => {}
            Err(_) => return Err(Broken),
        }
    }
    Ok(true)
}

/// Sends an answer. A host that is gone ends the process.
pub fn send(reply: Reply) {
    send_to(stdout().as_fd(), reply);
}

/// Ends a process that was sending data: what came so far isn't all.
pub fn fail(failure: Failure) -> ! {
    send_to(stderr().as_fd(), Reply::Failure(failure));
    sys::exit_now(FAILED)
}

fn send_to(fd: BorrowedFd<'_>, reply: Reply) {
    let response = Response { result: Some(reply) };
    let mut frame = vec![0; 4];
    if response.encode(&mut frame).is_err() || frame.len() - 4 > MAX_MESSAGE {
        sys::exit_now(BROKEN);
    }
    let size = (frame.len() - 4) as u32;
    frame[..4].copy_from_slice(&size.to_be_bytes());
    if write_all(fd, &frame).is_err() {
        sys::exit_now(BROKEN);
    }
}

pub fn write_all(fd: BorrowedFd<'_>, mut data: &[u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        match rustix::io::write(fd, data) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => data = &data[n..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::proto::Stat;

    fn received(bytes: &[u8]) -> Result<Option<Operation>, Broken> {
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        write_all(write.as_fd(), bytes).expect("fits");
        drop(write);
        receive_from(read.as_fd())
    }

    #[test]
    fn a_request_arrives() {
        let operation = Operation::Stat(Stat { path: "/x".into(), follow: true });
        let body = Request { operation: Some(operation.clone()) }.encode_to_vec();
        let frame = [&(body.len() as u32).to_be_bytes(), body.as_slice()].concat();
        assert_eq!(received(&frame), Ok(Some(operation)));
        assert_eq!(received(b""), Ok(None));
    }

    #[test]
    fn what_is_no_protocol_is_refused() {
        for bytes in [&b"\0"[..], b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\x05abc", b"\0\0\0\x03abc"] {
            assert_eq!(received(bytes), Err(Broken), "{bytes:?}");
        }
    }
}
