//! Watches a file, a directory or a tree for changes: inotify(7).
//!
//! A tree has a watch for each of its directories. What is made in a new directory before that has its own is found by
//! looking into it; it may be told twice, and is never missed.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::attributes::each_name;
use super::fail::{Answer, At};
use super::pack::join;
use super::paths;
use super::proto::event::Kind;
use super::proto::response::Result as Reply;
use super::proto::{self, Done, Event};
use super::wire;
use crate::sys;

/// How long the second half of a move may take to come; the kernel queues both in one go.
const HALF_A_MOVE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
const BUFFER: usize = 16 * 1024;

/// Sends events until the process is killed, or there is nothing left to watch.
pub fn watch(request: &proto::Watch) -> Answer<Reply> {
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).at("watch")?;
    let mut tree = Tree { inotify, top: request.path.to_vec(), recursive: request.recursive, paths: HashMap::new() };
    let all = WatchFlags::from_bits_retain(MASK.bits());
    let top = inotify::add_watch(&tree.inotify, request.path.as_ref(), all).at("watch")?;
    tree.paths.insert(top, Vec::new());
    if request.recursive {
        tree.descend(b"", false)?;
    }
    wire::send(Reply::Done(Done {}));
    match tree.run(top) {
        Ok(()) => sys::exit_now(0),
        Err(failed) => Err(failed),
    }
}

const MASK: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::EXCL_UNLINK);

struct Tree {
    inotify: OwnedFd,
    top: Vec<u8>,
    recursive: bool,
    /// Relative to the top.
    paths: HashMap<i32, Vec<u8>>,
}

/// What the kernel says, with the path.
struct Said {
    watch: i32,
    flags: ReadFlags,
    cookie: u32,
    name: Option<Vec<u8>>,
}

/// The first half of a move.
struct Leaving {
    cookie: u32,
    path: Vec<u8>,
    directory: bool,
}

impl Tree {
    fn run(&mut self, top: i32) -> Answer<()> {
        let mut leaving: Option<Leaving> = None;
        loop {
            if !self.wait(leaving.as_ref().map(|_| &HALF_A_MOVE)).at("watch")? {
                self.left(leaving.take());
                continue;
            }
            for said in self.read().at("watch")? {
                leaving = self.take(said, leaving, top)?;
            }
        }
    }

    /// False: nothing has come in that time.
    fn wait(&self, time: Option<&Timespec>) -> Result<bool, Errno> {
        let mut fds = [PollFd::new(&self.inotify, PollFlags::IN)];
        match poll(&mut fds, time) {
            Err(Errno::INTR) => Ok(true),
            count => Ok(count? > 0),
        }
    }

    fn read(&self) -> Result<Vec<Said>, Errno> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = inotify::Reader::new(self.inotify.as_fd(), &mut buffer);
        let mut all = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => all.push(Said {
                    watch: event.wd(),
                    flags: event.events(),
                    cookie: event.cookie(),
                    name: event.file_name().map(|name| name.to_bytes().to_vec()),
                }),
                Err(Errno::AGAIN) => return Ok(all),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
            if reader.is_buffer_empty() {
                return Ok(all);
            }
        }
    }

    /// Tells of one event. Returns the first half of a move that still lacks its second.
    fn take(&mut self, said: Said, leaving: Option<Leaving>, top: i32) -> Answer<Option<Leaving>> {
        let Said { watch, flags, cookie, name } = said;
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            self.left(leaving);
            tell(Kind::Overflow, b"", b"", false);
            return if self.recursive { self.descend(b"", false).map(|()| None) } else { Ok(None) };
        }
        let directory = flags.contains(ReadFlags::ISDIR);
        let Some(above) = self.paths.get(&watch) else { return Ok(leaving) };
        let path = name.as_ref().map_or_else(|| above.clone(), |name| join(above, name));
        if flags.contains(ReadFlags::MOVED_TO) {
            match leaving {
                Some(first) if first.cookie == cookie => {
                    self.renamed(&first.path, &path);
                    tell(Kind::Moved, &first.path, &path, directory);
                }
                other => {
                    self.left(other);
                    self.came(&path, directory)?;
                }
            }
            return Ok(None);
        }
        self.left(leaving);
        if flags.contains(ReadFlags::MOVED_FROM) {
            return Ok(Some(Leaving { cookie, path, directory }));
        }
        if flags.contains(ReadFlags::CREATE) {
            self.came(&path, directory)?;
        } else if flags.contains(ReadFlags::DELETE) {
            tell(Kind::Deleted, &path, b"", directory);
        } else if flags.contains(ReadFlags::IGNORED) {
            self.paths.remove(&watch);
            if watch == top {
                tell(Kind::Deleted, b"", b"", directory);
                sys::exit_now(0);
            }
        } else if flags.intersects(ReadFlags::MODIFY | ReadFlags::ATTRIB)
            && !(directory && name.is_none() && watch != top)
        {
            // A directory's own attributes are told by the watch above it, too.
            tell(Kind::Modified, &path, b"", directory);
        }
        Ok(None)
    }

    fn came(&mut self, path: &[u8], directory: bool) -> Answer<()> {
        tell(Kind::Created, path, b"", directory);
        if directory && self.recursive { self.descend(path, true) } else { Ok(()) }
    }

    /// The second half of a move didn't come: it went out of what is watched.
    fn left(&mut self, leaving: Option<Leaving>) {
        let Some(leaving) = leaving else { return };
        tell(Kind::Deleted, &leaving.path, b"", leaving.directory);
        let below = join(&leaving.path, b"");
        let gone = |path: &[u8]| path == leaving.path || path.starts_with(&below);
        let watches: Vec<i32> = self.paths.iter().filter(|(_, path)| gone(path)).map(|(watch, _)| *watch).collect();
        for watch in watches.into_iter().filter(|_| leaving.directory) {
            self.paths.remove(&watch);
            let _ = inotify::remove_watch(&self.inotify, watch);
        }
    }

    fn renamed(&mut self, from: &[u8], to: &[u8]) {
        let below = join(from, b"");
        for path in self.paths.values_mut() {
            if path == from {
                *path = to.to_vec();
            } else if let Some(rest) = path.strip_prefix(below.as_slice()) {
                *path = join(to, rest);
            }
        }
    }

    /// Watches a directory and all below it. `tell_of`: what is in there is new.
    fn descend(&mut self, path: &[u8], tell_of: bool) -> Answer<()> {
        let mut stack = vec![path.to_vec()];
        while let Some(path) = stack.pop() {
            let absolute = if path.is_empty() { self.top.clone() } else { join(&self.top, &path) };
            if !path.is_empty() {
                let flags = MASK | WatchFlags::ONLYDIR | WatchFlags::DONT_FOLLOW;
                match inotify::add_watch(&self.inotify, absolute.as_slice(), flags) {
                    Ok(watch) => drop(self.paths.insert(watch, path.clone())),
                    Err(errno) if is_gone(errno) => continue,
                    Err(errno) => return Err(errno).of("watch", &absolute),
                }
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
            let dir = match paths::open(&absolute, flags, Mode::empty()).and_then(Dir::new) {
                Err(errno) if is_gone(errno) => continue,
                dir => dir.of("list", &absolute)?,
            };
            each_name(dir, |dir, name| {
                let Ok(stat) = rustix::fs::statat(dir, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) else {
                    return Ok(());
                };
                let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
                let inner = join(&path, name.to_bytes());
                if tell_of {
                    tell(Kind::Created, &inner, b"", directory);
                }
                if directory {
                    stack.push(inner);
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

fn is_gone(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
}

fn tell(kind: Kind, path: &[u8], target: &[u8], directory: bool) {
    let (path, target) = (Bytes::copy_from_slice(path), Bytes::copy_from_slice(target));
    wire::send(Reply::Event(Event { kind: kind as i32, path, target, directory }));
}
