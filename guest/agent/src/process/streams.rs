//! What a process has as stdin, stdout and stderr, from both sides.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::terminal::{self, Expected, Size, Wanted};
use crate::errno::{Failed, Step};
use crate::stdio::{self, Input, Output};
use crate::sys;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A pipe each; stdin is at its end when it isn't `stdin`.
    Pipes {
        stdin: bool,
    },
    Terminal {
        size: Size,
        console: bool,
    },
    /// An empty stdin, and one pipe for both outputs.
    Log,
    /// Nothing goes in or out.
    Null,
}

/// The agent's side.
pub enum Ours {
    /// Pipes that aren't watched yet: a small program is over before that is worth its while.
    Pipes(Pipes),
    Terminal(Expected),
}

/// Those that there are.
#[derive(Default)]
pub struct Pipes {
    pub stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// The child's side.
pub enum Theirs {
    Fds([OwnedFd; 3]),
    Terminal(Wanted),
}

impl Pipes {
    /// What is left in both outputs, where nobody can write to them any more. None: somebody can, or it is much.
    pub fn last_words(&self) -> Option<[Bytes; 2]> {
        let fds = [self.stdout.as_ref()?, self.stderr.as_ref()?];
        let mut polled = fds.map(|fd| PollFd::new(fd, PollFlags::IN));
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).ok()?;
        let events = [polled[0].revents(), polled[1].revents()];
        if !events.iter().all(|event| event.contains(PollFlags::HUP)) {
            return None;
        }
        let size =
            |at: usize| if events[at].contains(PollFlags::IN) { sys::readable_bytes(fds[at].as_fd()) } else { 0 };
        let sizes = [size(0), size(1)];
        if sizes.iter().any(|size| *size > stdio::PIECE) {
            return None;
        }
        Some([read(fds[0], sizes[0]), read(fds[1], sizes[1])])
    }
}

/// So many bytes that are there.
fn read(fd: &OwnedFd, size: usize) -> Bytes {
    let mut out = vec![0; size];
    let mut have = 0;
    while have < size {
        match rustix::io::read(fd, &mut out[have..]) {
            Ok(0) => break,
            Ok(more) => have += more,
            Err(Errno::INTR) => {}
            Err(_) => break,
        }
    }
    out.truncate(have);
    out.into()
}

/// The agent's ends. A terminal has one output, and can be resized by its master.
#[derive(Default)]
pub struct Streams {
    pub stdin: Option<Input>,
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    pub terminal: Option<Arc<OwnedFd>>,
}

/// Pipes for the next command, made when nobody waits for that: most commands get the same.
#[derive(Default)]
pub struct Spare(Mutex<Option<(Ours, Theirs)>>);

impl Spare {
    const KIND: Kind = Kind::Pipes { stdin: false };

    fn lock(&self) -> MutexGuard<'_, Option<(Ours, Theirs)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Streams of this kind.
    pub fn take(&self, kind: Kind) -> Result<(Ours, Theirs), Failed> {
        let spare = if kind == Self::KIND { self.lock().take() } else { None };
        spare.map_or_else(|| make(kind), Ok)
    }

    pub fn refill(&self) {
        let mut spare = self.lock();
        if spare.is_none() {
            *spare = make(Self::KIND).ok(); // who needs them will say why there are none
        }
    }
}

/// Both sides, before the clone.
fn make(kind: Kind) -> Result<(Ours, Theirs), Failed> {
    match kind {
        Kind::Pipes { stdin } => pipes(stdin),
        Kind::Terminal { size, console } => {
            let (expected, wanted) = terminal::expect(size, console)?;
            Ok((Ours::Terminal(expected), Theirs::Terminal(wanted)))
        }
        Kind::Log => {
            let (output, written) = for_all(stdio::pipe()?)?;
            let again = copy(&written)?;
            let pipes = Pipes { stdout: Some(output), ..Pipes::default() };
            Ok((Ours::Pipes(pipes), Theirs::Fds([null()?, written, again])))
        }
        Kind::Null => {
            let null = null()?;
            let (stdout, stderr) = (copy(&null)?, copy(&null)?);
            Ok((Ours::Pipes(Pipes::default()), Theirs::Fds([null, stdout, stderr])))
        }
    }
}

/// Without stdin nothing is ever written, and the child reads the end.
fn pipes(with_stdin: bool) -> Result<(Ours, Theirs), Failed> {
    let (child_stdin, stdin) = for_all(stdio::pipe()?)?;
    let (stdout, child_stdout) = for_all(stdio::pipe()?)?;
    let (stderr, child_stderr) = for_all(stdio::pipe()?)?;
    let pipes = Pipes { stdin: with_stdin.then_some(stdin), stdout: Some(stdout), stderr: Some(stderr) };
    Ok((Ours::Pipes(pipes), Theirs::Fds([child_stdin, child_stdout, child_stderr])))
}

/// A pipe that whoever has it may open again, as /dev/stdout: of any user, in any user namespace, also one that the command
/// becomes later, which an owner couldn't give. Nobody else has a way to it: those of /proc are for who may trace the process.
fn for_all(pipe: (OwnedFd, OwnedFd)) -> Result<(OwnedFd, OwnedFd), Failed> {
    rustix::fs::fchmod(&pipe.0, Mode::from_raw_mode(0o666)).step("chmod", "stdio")?;
    Ok(pipe)
}

fn null() -> Result<OwnedFd, Failed> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).step("open", "/dev/null")
}

fn copy(fd: &OwnedFd) -> Result<OwnedFd, Failed> {
    rustix::io::fcntl_dupfd_cloexec(fd, 3).step("dup", "stdio")
}

impl Ours {
    /// Once the child has executed its command.
    pub fn streams(self) -> Result<Streams, Failed> {
        match self {
            Ours::Pipes(Pipes { stdin, stdout, stderr }) => Ok(Streams {
                stdin: stdin.map(Input::pipe).transpose()?,
                stdout: stdout.map(Output::pipe).transpose()?,
                stderr: stderr.map(Output::pipe).transpose()?,
                terminal: None,
            }),
            Ours::Terminal(expected) => {
                let master = expected.master()?;
                Ok(Streams {
                    stdin: Some(Input::terminal(copy(&master)?)?),
                    stdout: Some(Output::terminal(copy(&master)?)?),
                    stderr: None,
                    terminal: Some(Arc::new(master)),
                })
            }
        }
    }
}

impl Theirs {
    /// In the child: 0, 1 and 2 are what they shall be. Everything else is closed by exec.
    pub fn take(&self, root: BorrowedFd<'_>) -> Result<(), Failed> {
        match self {
            Theirs::Fds([stdin, stdout, stderr]) => dup([stdin, stdout, stderr].map(AsFd::as_fd)),
            Theirs::Terminal(wanted) => {
                let slave = wanted.open(root)?;
                dup([slave.as_fd(); 3])?;
                rustix::process::ioctl_tiocsctty(&slave).step("control", "terminal")
            }
        }
    }

    /// In the child: a terminal is its user's, as grantpt(3) does it; its group is that of all terminals.
    pub fn give_to(&self, uid: u32) -> Result<(), Failed> {
        match self {
            Theirs::Terminal(_) if uid != 0 => {
                rustix::fs::fchown(rustix::stdio::stdin(), Some(rustix::fs::Uid::from_raw(uid)), None)
                    .step("chown", "terminal")
            }
            _ => Ok(()),
        }
    }
}

fn dup(fds: [BorrowedFd<'_>; 3]) -> Result<(), Failed> {
    rustix::stdio::dup2_stdin(fds[0]).step("dup2", "stdin")?;
    rustix::stdio::dup2_stdout(fds[1]).step("dup2", "stdout")?;
    rustix::stdio::dup2_stderr(fds[2]).step("dup2", "stderr")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(fd: &OwnedFd, data: &[u8]) {
        assert_eq!(rustix::io::write(fd, data), Ok(data.len()));
    }

    fn made() -> (Pipes, [OwnedFd; 3]) {
        match pipes(false).expect("pipes") {
            (Ours::Pipes(ours), Theirs::Fds(theirs)) => (ours, theirs),
            _ => panic!("no pipes"),
        }
    }

    #[test]
    fn spare_pipes_are_given_to_one() {
        let spare = Spare::default();
        spare.refill();
        let is_kept = || spare.lock().is_some();
        assert!(spare.take(Kind::Pipes { stdin: true }).is_ok() && is_kept(), "of another kind");
        assert!(spare.take(Spare::KIND).is_ok() && !is_kept());
        assert!(spare.take(Spare::KIND).is_ok(), "new ones");
    }

    #[test]
    fn whoever_has_them_may_open_them_again() {
        let mode = |fd: &OwnedFd| rustix::fs::fstat(fd).expect("stat").st_mode & 0o777;
        let Ok((_, Theirs::Fds(log))) = make(Kind::Log) else { panic!("no pipes") };
        assert!(made().1.iter().chain(&log[1..]).all(|fd| mode(fd) == 0o666));
    }

    #[test]
    fn last_words_are_whole() {
        let (ours, [_, stdout, stderr]) = made();
        write(&stdout, b"out");
        write(&stderr, b"e");
        write(&stderr, b"rr");
        assert_eq!(ours.last_words(), None, "more may come");
        drop(stdout);
        assert_eq!(ours.last_words(), None, "more may come");
        drop(stderr);
        assert_eq!(ours.last_words(), Some([Bytes::from("out"), Bytes::from("err")]));
        assert_eq!(ours.last_words(), Some([Bytes::new(), Bytes::new()]));
    }

    #[test]
    fn much_is_left_to_others() {
        let (ours, [_, stdout, stderr]) = made();
        write(&stdout, &[7; 60_000]);
        write(&stdout, &[7; 5_536]);
        write(&stderr, b"x");
        drop((stdout, stderr));
        assert_eq!(ours.last_words(), None);
        assert_eq!(ours.last_words(), None, "and nothing was taken");
    }
}
