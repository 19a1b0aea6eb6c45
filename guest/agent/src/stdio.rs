//! Pipes between the agent and its children: stdio, and the report of how a child's start went.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use bytes::Bytes;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tonic::Status;

use crate::errno::{Failed, Step};
use crate::sys;

/// Largest piece of output in one message. With what is around it, it just fits into two writes to a virtio-serial port,
/// which takes 32 KiB at a time.
pub const PIECE: usize = 64 * 1024 - 64;

/// Room of a pipe that turned out to carry much, and how many pieces are read of it at once: each time the process and
/// the agent take turns costs as much as a piece does.
pub const WIDE: usize = 1024 * 1024;
const AT_ONCE: usize = 4;

/// A pipe, from its end to its beginning; our end won't block once it is watched.
pub fn pipe() -> Result<(OwnedFd, OwnedFd), Failed> {
    pipe_with(PipeFlags::CLOEXEC).step("pipe", "stdio")
}

fn nonblocking(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, Failed> {
    rustix::io::ioctl_fionbio(&fd, true).step("ioctl", "pipe")?;
    sys::watch(fd, interest).step("epoll", "pipe")
}

/// A stream that a process writes.
pub struct Output {
    fd: AsyncFd<OwnedFd>,
    terminal: bool,
    wide: AtomicBool,
}

/// What a read gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    Data(Bytes),
    /// Nothing there, but somebody holds the other end.
    Nothing,
    End,
}

/// What filling a frame gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Fill {
    Data(usize),
    Nothing,
    End,
}

impl Output {
    /// What is written to the pipe of which this is our end.
    pub fn pipe(read: OwnedFd) -> Result<Self, Failed> {
        Ok(Self { fd: nonblocking(read, Interest::READABLE)?, terminal: false, wide: AtomicBool::new(false) })
    }

    /// What is written to the terminal whose master this is. It ends when nobody has the terminal open any more.
    pub fn terminal(master: OwnedFd) -> Result<Self, Failed> {
        Ok(Self { fd: nonblocking(master, Interest::READABLE)?, terminal: true, wide: AtomicBool::new(false) })
    }

    /// Waits until there is something to read, or the end. Takes nothing out.
    pub async fn readable(&self) {
        if let Ok(mut ready) = self.fd.readable().await {
            ready.retain_ready();
        }
    }

    /// Reads without waiting, at most `most` bytes.
    pub fn try_read(&self, most: usize) -> Piece {
        thread_local! {
            // One for all: a piece is copied out at its true size, and few are large.
            static BUFFER: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        BUFFER.with_borrow_mut(|buffer| {
            buffer.resize(PIECE, 0);
            loop {
                match rustix::io::read(self.fd.as_fd(), &mut buffer[..most.min(PIECE)]) {
                    Ok(0) => return Piece::End,
                    Ok(n) => return Piece::Data(Bytes::copy_from_slice(&buffer[..n])),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return Piece::Nothing,
                    Err(_) => return Piece::End, // EIO: a terminal that nobody has open
                }
            }
        })
    }

    /// Reads several pieces where much is expected, into memory of their own. False: there was nothing, or an end.
    pub fn try_read_much(&self, into: &mut VecDeque<Bytes>) -> bool {
        if !self.wide.load(Ordering::Relaxed) || self.waiting() <= PIECE {
            return false;
        }
        let mut buffers = [const { Vec::new() }; AT_ONCE];
        buffers.iter_mut().for_each(|buffer| buffer.reserve_exact(PIECE));
        if sys::read_into(self.fd.as_fd(), &mut buffers).is_err() {
            return false;
        }
        into.extend(buffers.into_iter().filter(|buffer| !buffer.is_empty()).map(Bytes::from));
        !into.is_empty()
    }

    /// After an event: reads at most `most` bytes. Nothing: there was none after all.
    pub fn take(&self, most: usize) -> Piece {
        let piece = self.try_read(most);
        if piece == Piece::Nothing {
            self.clear();
        }
        piece
    }

    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Reads without waiting at most `most` bytes, behind what is in the buffer, for which there must be room.
    pub fn fill(&self, buffer: &mut Vec<u8>, most: usize) -> Fill {
        let start = buffer.len();
        let mut space = buffer.spare_capacity_mut();
        space = &mut space[..most];
        loop {
            match rustix::io::read(self.fd.as_fd(), &mut *space) {
                Ok(([], _)) => return Fill::End,
                Ok((data, _)) => {
                    let size = data.len();
                    // SAFETY: so much has just been written behind `start`, within the capacity.
                    unsafe { buffer.set_len(start + size) };
                    return Fill::Data(size);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Fill::Nothing,
                Err(_) => return Fill::End,
            }
        }
    }

    /// Moves what is there into a pipe, at most `most` bytes, without waiting.
    pub fn splice_to(&self, pipe: BorrowedFd<'_>, most: usize) -> Fill {
        loop {
            match splice(self.fd.as_fd(), None, pipe, None, most, SpliceFlags::NONBLOCK) {
                Ok(0) => return Fill::End,
                Ok(size) => return Fill::Data(size),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Fill::Nothing,
                Err(_) => return Fill::End,
            }
        }
    }

    /// There was nothing: only what comes from now on is news.
    pub fn clear(&self) {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if let std::task::Poll::Ready(Ok(mut ready)) = self.fd.poll_read_ready(&mut context) {
            ready.clear_ready();
        }
    }

    /// Gives the pipe more room, for a process that fills it: it then runs on while its output is on its way.
    pub fn widen(&self) {
        if !self.terminal && !self.wide.swap(true, Ordering::Relaxed) {
            let _ = rustix::pipe::fcntl_setpipe_size(self.fd.as_fd(), WIDE);
        }
    }

    /// How much waits to be read; of a terminal, which doesn't know, the most that can.
    pub fn waiting(&self) -> usize {
        if !self.terminal {
            return sys::readable_bytes(self.fd.as_fd());
        }
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = poll(&mut fds, Some(&now));
        if fds[0].revents().contains(PollFlags::IN) { WIDE } else { 0 }
    }
}

/// A stream that a process reads.
pub struct Input {
    fd: AsyncFd<OwnedFd>,
    terminal: bool,
    /// What was written last was no end of a line.
    inside_line: AtomicBool,
}

impl Input {
    /// What is read from the pipe of which this is our end.
    pub fn pipe(write: OwnedFd) -> Result<Self, Failed> {
        let fd = nonblocking(write, Interest::WRITABLE)?;
        Ok(Self { fd, terminal: false, inside_line: AtomicBool::new(false) })
    }

    /// What is typed into the terminal whose master this is.
    pub fn terminal(master: OwnedFd) -> Result<Self, Failed> {
        let fd = nonblocking(master, Interest::WRITABLE)?;
        Ok(Self { fd, terminal: true, inside_line: AtomicBool::new(false) })
    }

    /// A pipe that carries much, with more room: another descriptor of it, to which data can be moved. It has no end
    /// before both are closed.
    pub fn share(&self) -> Option<OwnedFd> {
        if self.terminal {
            return None;
        }
        let _ = rustix::pipe::fcntl_setpipe_size(self.fd.as_fd(), WIDE);
        rustix::io::fcntl_dupfd_cloexec(self.fd.as_fd(), 3).ok()
    }

    /// Waits until there may be room, and has `write` use it, which says whether there is still some. False: it can't be
    /// waited for.
    pub async fn when_writable(&self, write: impl FnOnce() -> bool) -> bool {
        let Ok(mut ready) = self.fd.writable().await else { return false };
        if !write() {
            ready.clear_ready();
        }
        true
    }

    /// Writes everything; false when nobody reads any more.
    pub async fn write_all(&self, mut data: &[u8]) -> bool {
        if let Some(&last) = data.last() {
            self.inside_line.store(last != b'\n' && last != b'\r', Ordering::Relaxed);
        }
        while !data.is_empty() {
            let Ok(mut ready) = self.fd.writable().await else { return false };
            match rustix::io::write(self.fd.as_fd(), data) {
                Ok(n) => data = &data[n..],
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// The end of the input. A terminal goes on, and so gets its end-of-file character, which at the end of a line is the
    /// end of the file and within a line only ends that.
    pub async fn close(self) {
        if !self.terminal {
            return;
        }
        let Ok(modes) = rustix::termios::tcgetattr(self.fd.as_fd()) else { return };
        let eof = modes.special_codes[rustix::termios::SpecialCodeIndex::VEOF];
        let times = if self.inside_line.load(Ordering::Relaxed) { 2 } else { 1 };
        self.write_all(&[eof; 2][..times]).await;
    }
}

/// How a child's start went, where it had something to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// It is done.
    Ok,
    /// Somebody else will be: container init, by this PID.
    Init {
        pid: i32,
    },
    /// The request can't be right.
    Invalid(String),
    /// The guest ran out of something.
    Exhausted(String),
    Internal(String),
    /// It executed something, or died.
    Silent,
}

impl Report {
    /// The error of a start that failed.
    pub fn status(self) -> Status {
        match self {
            Report::Ok | Report::Init { .. } => Status::internal("start: not finished"),
            Report::Invalid(text) => Status::invalid_argument(text),
            Report::Exhausted(text) => Status::resource_exhausted(text),
            Report::Internal(text) => Status::internal(text),
            Report::Silent => Status::resource_exhausted("start: killed before it was done"),
        }
    }

    /// A tag, the length of the text, the text.
    fn encode(&self) -> Vec<u8> {
        let (tag, text) = match self {
            Report::Ok => (b'o', String::new()),
            Report::Init { pid } => (b'p', pid.to_string()),
            Report::Invalid(text) => (b'i', text.clone()),
            Report::Exhausted(text) => (b'x', text.clone()),
            Report::Internal(text) => (b'e', text.clone()),
            Report::Silent => return Vec::new(),
        };
        let text = &text.as_bytes()[..text.len().min(MAX_REPORT)];
        let [low, high] = (text.len() as u16).to_le_bytes();
        [&[tag, low, high], text].concat()
    }

    /// The first of several, and the rest.
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (head, rest) = bytes.split_at_checked(3)?;
        let (text, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes([head[1], head[2]])))?;
        let text = String::from_utf8_lossy(text).into_owned();
        let report = match head[0] {
            b'o' => Report::Ok,
            b'p' => Report::Init { pid: text.parse().ok()? },
            b'i' => Report::Invalid(text),
            b'x' => Report::Exhausted(text),
            _ => Report::Internal(text),
        };
        Some((report, rest))
    }
}

/// All that was reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The PID of a container init that somebody else has cloned.
    pub init: Option<i32>,
    /// The last word.
    pub report: Report,
}

impl From<Failed> for Report {
    fn from(failed: Failed) -> Self {
        if failed.is_exhaustion() {
            Report::Exhausted(failed.to_string())
        } else {
            Report::Internal(failed.to_string())
        }
    }
}

/// Longest report, well below what a pipe takes at once.
const MAX_REPORT: usize = 1024;

/// The child's end of a report. It closes by itself when the child executes something or ends.
pub struct Reporter(OwnedFd);

/// The agent's end of a report.
pub struct Reporting(AsyncFd<OwnedFd>);

pub fn report_pipe() -> Result<(Reporting, Reporter), Failed> {
    let (read, write) = pipe()?;
    Ok((Reporting(nonblocking(read, Interest::READABLE)?), Reporter(write)))
}

impl Reporter {
    pub fn send(&self, report: &Report) {
        let _ = rustix::io::write(&self.0, &report.encode());
    }

    /// A duplicate would keep the pipe open: only to close it, or to keep it out of the way.
    pub fn fd(&self) -> &OwnedFd {
        &self.0
    }
}

impl Reporting {
    /// Waits until the child's end is closed.
    pub async fn read(&self) -> Result<Told, Failed> {
        let mut all = Vec::new();
        let mut buffer = [0u8; 1024];
        loop {
            let mut ready = self.0.readable().await.step("wait", "report")?;
            match rustix::io::read(self.0.as_fd(), &mut buffer) {
                Ok(0) => break,
                Ok(n) => all.extend_from_slice(&buffer[..n.min(8 * MAX_REPORT - all.len().min(8 * MAX_REPORT))]),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Failed::new("read", "report", errno)),
            }
        }
        let mut told = Told { init: None, report: Report::Silent };
        let mut rest = all.as_slice();
        while let Some((report, next)) = Report::decode(rest) {
            match report {
                Report::Init { pid } => told.init = Some(pid),
                report => told.report = report,
            }
            rest = next;
        }
        Ok(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_report_survives_the_pipe() {
        let (reporting, reporter) = report_pipe().expect("pipe");
        let sent = Report::Invalid("user: \"x\": unknown".into());
        reporter.send(&Report::Init { pid: 17 });
        reporter.send(&sent);
        drop(reporter);
        assert_eq!(reporting.read().await.expect("read"), Told { init: Some(17), report: sent });
    }

    #[tokio::test]
    async fn silence_is_a_report() {
        let (reporting, reporter) = report_pipe().expect("pipe");
        drop(reporter);
        assert_eq!(reporting.read().await.expect("read").report, Report::Silent);
    }

    #[tokio::test]
    async fn output_is_read_in_pieces_to_the_end() {
        let (read, write) = pipe().expect("pipe");
        let output = Output::pipe(read).expect("output");
        rustix::io::write(&write, &[7; 60_000]).expect("write");
        assert_eq!(output.waiting(), 60_000);
        output.readable().await;
        assert!(matches!(output.take(PIECE), Piece::Data(data) if data.len() == 60_000));
        assert_eq!(output.take(PIECE), Piece::Nothing);
        drop(write);
        output.readable().await;
        assert_eq!(output.take(PIECE), Piece::End);
    }

    #[tokio::test]
    async fn writing_to_nobody_ends() {
        sys::ignore_signal(libc::SIGPIPE);
        let (read, write) = pipe().expect("pipe");
        let input = Input::pipe(write).expect("input");
        assert!(input.write_all(b"x").await);
        drop(read);
        assert!(!input.write_all(b"x").await);
    }
}
