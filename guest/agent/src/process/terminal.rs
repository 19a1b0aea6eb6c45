//! The terminal of a process: a pseudo-terminal of its container's own /dev/pts. The child opens it, for only there do
//! its path and its ids mean the right thing, and hands the master to the agent.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::container::inside::{self, Kind};
use crate::errno::{Failed, Step};
use crate::mounts;
use crate::proto;
use crate::validate::Invalid;

/// `f_type` of devpts (linux/magic.h).
const DEVPTS: i64 = 0x1cd1;
const ROWS: u16 = 24;
const COLS: u16 = 80;

/// Rows and columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    rows: u16,
    cols: u16,
}

impl Size {
    pub fn new(from: &proto::Terminal) -> Result<Self, Invalid> {
        let parse = |field, value: u32, default| match u16::try_from(value) {
            Ok(0) => Ok(default),
            Ok(value) => Ok(value),
            Err(_) => Err(Invalid::new(field, format!("{value} is above 65535"))),
        };
        Ok(Self { rows: parse("terminal.rows", from.rows, ROWS)?, cols: parse("terminal.cols", from.cols, COLS)? })
    }

    /// Gives it to a terminal.
    pub fn apply(self, master: impl AsFd) -> Result<(), Failed> {
        let size = Winsize { ws_row: self.rows, ws_col: self.cols, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(master, size).step("resize", "terminal")
    }
}

/// The agent's end of the way that the master takes.
pub struct Expected(OwnedFd);

/// The child's end, and what it needs to know.
pub struct Wanted {
    hand_over: OwnedFd,
    size: Size,
    /// It is the container's console, too.
    console: bool,
}

/// Before the clone.
pub fn expect(size: Size, console: bool) -> Result<(Expected, Wanted), Failed> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
            .step("socketpair", "terminal")?;
    Ok((Expected(ours), Wanted { hand_over: theirs, size, console }))
}

impl Expected {
    /// The master, once the child has executed its command.
    pub fn master(&self) -> Result<OwnedFd, Failed> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0u8; 1];
        recvmsg(&self.0, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
            .step("receive", "terminal")?;
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        fds.flatten().next().ok_or_else(|| Failed::new("receive", "terminal", Errno::NODATA))
    }
}

impl Wanted {
    /// In the child, in its container: opens a terminal and hands its master over. Returns the child's side of it.
    pub fn open(&self, root: BorrowedFd<'_>) -> Result<OwnedFd, Failed> {
        let master = open_master(root)?;
        unlockpt(&master).step("unlock", "terminal")?;
        self.size.apply(&master)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags).step("open", "terminal")?;
        if self.console {
            attach_console(root, &slave)?;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [master.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(&self.hand_over, &[IoSlice::new(b"m")], &mut control, SendFlags::empty()).step("send", "terminal")?;
        Ok(slave)
    }
}

/// What is in the container may have been tampered with: only a devpts will do, of which there is but its own.
fn open_master(root: BorrowedFd<'_>) -> Result<OwnedFd, Failed> {
    const PATH: &str = "/dev/pts/ptmx";
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    let master = openat2(root, PATH, flags, Mode::empty(), resolve).step("open", PATH)?;
    match rustix::fs::fstatfs(&master).step("stat", PATH)?.f_type {
        DEVPTS => Ok(master),
        _ => Err(Failed::new("open", PATH, Errno::NOTTY)),
    }
}

/// OCI runtime specification, config-linux.md, "Default Devices": /dev/console is the terminal.
fn attach_console(root: BorrowedFd<'_>, slave: &OwnedFd) -> Result<(), Failed> {
    const PATH: &str = "/dev/console";
    match inside::make(root, PATH, Kind::File) {
        Err(failed) if failed.errno == Errno::ROFS => return Ok(()),
        made => drop(made?),
    }
    let target = inside::find_exact(root, PATH).step("open", PATH)?;
    mounts::attach(mounts::bind(slave.as_fd(), false)?.as_fd(), target.as_fd(), PATH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(rows: u32, cols: u32) -> Result<Size, Invalid> {
        Size::new(&proto::Terminal { rows, cols })
    }

    #[test]
    fn sizes() {
        assert_eq!(size(0, 0), Ok(Size { rows: 24, cols: 80 }));
        assert_eq!(size(1, 65535), Ok(Size { rows: 1, cols: 65535 }));
        assert!(size(65536, 1).is_err());
        assert!(size(1, u32::MAX).is_err());
    }

    #[test]
    fn a_master_is_handed_over() {
        let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).expect("open");
        let (expected, wanted) = expect(size(30, 100).expect("good"), false).expect("made");
        let slave = wanted.open(root.as_fd()).expect("a terminal");
        let master = expected.master().expect("came");
        rustix::io::write(&master, b"hello\n").expect("write");
        let mut line = [0u8; 10];
        assert_eq!(rustix::io::read(&slave, &mut line), Ok(6));
        let seen = rustix::termios::tcgetwinsize(&slave).expect("a terminal");
        assert_eq!((seen.ws_row, seen.ws_col), (30, 100));
        assert!(expected.master().is_err(), "there is one only");
    }
}
