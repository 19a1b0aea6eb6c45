//! A tar from the host, unpacked into a directory of the container. The tar is the host's own; the directory isn't:
//! nothing in it is followed or written through.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, SeekFrom, openat2};
use rustix::io::Errno;
use rustix::stdio::stdin;

use super::attributes::{set_mode, set_owner, set_times};
use super::fail::{Answer, At, failure};
use super::proto::response::Result as Reply;
use super::proto::{self, Done};
use super::tar::{self, BLOCK, Entry, Records};
use super::transfer::{self, Moved};
use super::{paths, wire};
use crate::sys;

const SETUID: u32 = 0o6000;

pub fn unpack(request: &proto::Unpack) -> Answer<()> {
    let made = match paths::find(&request.path, true) {
        Err(Errno::NOENT) => paths::make_all(&request.path).map(|()| true).at("mkdir")?,
        found => found.map(|_| false).at("open")?,
    };
    let top = paths::open(&request.path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).at("open")?;
    wire::send(Reply::Done(Done {}));
    transfer::widen(stdin().as_fd());
    let mut tree = Tree { top, made, last: None, directories: Vec::new(), request };
    let mut source = Source { left: 0, ended: false, buffer: Vec::new() };
    while let Some((entry, mut data)) = source.next_entry()? {
        tree.add(entry, &mut source, &mut data)?;
        source.skip(data)?;
    }
    source.drain();
    tree.finish()
}

/// The tree as it grows.
struct Tree<'a> {
    top: OwnedFd,
    /// It wasn't there before, and gets attributes, too.
    made: bool,
    /// The directory that something was put into last: the next thing is likely to go there, too.
    last: Option<(Vec<u8>, OwnedFd)>,
    /// Their attributes come when nothing more is put into them.
    directories: Vec<Entry>,
    request: &'a proto::Unpack,
}

impl Tree<'_> {
    fn add(&mut self, entry: Entry, source: &mut Source, left: &mut u64) -> Answer<()> {
        if entry.path.is_empty() {
            if self.made {
                self.directories.push(entry);
            }
            return Ok(());
        }
        let path = entry.path.clone();
        self.try_add(entry, source, left).map_err(|failed| match failed.path.is_empty() {
            true => proto::Failure { path: self.absolute(&path).into(), ..failed },
            false => failed,
        })
    }

    fn absolute(&self, path: &[u8]) -> Vec<u8> {
        [&self.request.path, b"/".as_slice(), path].concat()
    }

    fn try_add(&mut self, entry: Entry, source: &mut Source, left: &mut u64) -> Answer<()> {
        let (above, name) = match entry.path.iter().rposition(|&c| c == b'/') {
            Some(slash) => (&entry.path[..slash], &entry.path[slash + 1..]),
            None => (&entry.path[..0], &entry.path[..]),
        };
        self.enter(above)?;
        let dir = match &self.last {
            Some((_, dir)) if !above.is_empty() => dir.as_fd(),
            _ => self.top.as_fd(),
        };
        if entry.kind == tar::DIRECTORY {
            match rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700)) {
                Err(Errno::EXIST) => {
                    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).at("stat")?;
                    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                        return Err(failure(Errno::NOTDIR, "make a directory in place of", b""));
                    }
                }
                made => made.at("mkdir")?,
            }
            self.directories.push(entry);
            return Ok(());
        }
        match entry.kind {
            tar::FILE => {
                let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
                match rustix::fs::openat(dir, c".", flags, Mode::from_raw_mode(0o600)) {
                    // virtio-fs and 9p have no files without a name, with the servers that there are.
                    Err(Errno::OPNOTSUPP) => {
                        unlink(dir, name)?;
                        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                        let file = rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600)).at("create")?;
                        source.fill(&file, &entry, left)?;
                        self.set(&file, &entry)
                    }
                    made => {
                        let file = made.at("create")?;
                        source.fill(&file, &entry, left)?;
                        self.set(&file, &entry)?;
                        unlink(dir, name)?;
                        rustix::fs::linkat(&file, c"", dir, name, AtFlags::EMPTY_PATH).at("create")
                    }
                }
            }
            tar::HARDLINK => {
                let (above, first) = paths::split(&entry.link);
                let from = beneath(&self.top, above).of("link", &entry.link)?;
                unlink(dir, name)?;
                rustix::fs::linkat(&from, first, dir, name, AtFlags::empty()).at("link")
            }
            tar::SYMLINK => {
                unlink(dir, name)?;
                rustix::fs::symlinkat(entry.link.as_slice(), dir, name).at("symlink")?;
                let link = paths::open_at(dir, name, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).at("symlink")?;
                self.set(&link, &entry)
            }
            _ => Err(failure(Errno::INVAL, "unpack", b"")),
        }
    }

    /// Makes the directory `path` the last one. The tar has each before what is in it.
    fn enter(&mut self, path: &[u8]) -> Answer<()> {
        if path.is_empty() || self.last.as_ref().is_some_and(|(last, _)| last == path) {
            return Ok(());
        }
        let dir = beneath(&self.top, path).of("open", &self.absolute(path))?;
        self.last = Some((path.to_vec(), dir));
        Ok(())
    }

    fn set(&self, file: &OwnedFd, entry: &Entry) -> Answer<()> {
        let request = self.request;
        let (uid, gid) = match request.keep_owners {
            true => (Some(entry.uid), Some(entry.gid)),
            false => (request.uid, request.gid),
        };
        if uid.is_some() || gid.is_some() {
            set_owner(file, uid, gid).at("chown")?;
        }
        if entry.kind != tar::SYMLINK {
            let dropped = if request.keep_setuid { 0 } else { SETUID };
            set_mode(file, entry.mode & !dropped).at("chmod")?;
        }
        set_times(file, Some(entry.mtime_ns)).at("set the times")
    }

    fn finish(mut self) -> Answer<()> {
        for entry in std::mem::take(&mut self.directories).iter().rev() {
            let dir = beneath(&self.top, if entry.path.is_empty() { b"." } else { &entry.path });
            let dir = dir.of("open", &self.absolute(&entry.path))?;
            self.set(&dir, entry)?;
        }
        Ok(())
    }
}

/// Makes room for something new.
fn unlink(dir: BorrowedFd<'_>, name: &[u8]) -> Answer<()> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno).at("replace"),
    }
}

/// A directory below the top that no symlink leads to.
fn beneath(top: &OwnedFd, path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(top, path, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

/// The bytes of the tar, out of the frames that they come in. What isn't as the host makes it ends the process.
struct Source {
    /// Of the frame that has begun.
    left: usize,
    ended: bool,
    /// Content goes through it.
    buffer: Vec<u8>,
}

impl Source {
    /// The next header, and how many bytes of data follow it.
    fn next_entry(&mut self) -> Answer<Option<(Entry, u64)>> {
        let mut records = Records::new();
        loop {
            let mut block = [0; BLOCK];
            self.read(&mut block);
            if block.iter().all(|&byte| byte == 0) {
                return Ok(None);
            }
            let Some(mut entry) = Entry::decode(&block, &mut records) else { broken() };
            let size = entry.size;
            if entry.is_extended() {
                if size as usize > tar::MAX_RECORDS {
                    broken();
                }
                let mut raw = vec![0; size as usize];
                self.read(&mut raw);
                self.skip(tar::padding(size))?;
                let Some(found) = tar::parse_records(&raw) else { broken() };
                records = found;
                continue;
            }
            if entry.kind != tar::FILE {
                return Ok(Some((entry, 0)));
            }
            let mut left = size + tar::padding(size);
            if records.contains_key(b"GNU.sparse.major".as_slice()) {
                self.sparse(&mut entry, &records, &mut left);
            }
            return Ok(Some((entry, left)));
        }
    }

    /// Where the data goes: lines of numbers before it.
    fn sparse(&mut self, entry: &mut Entry, records: &Records, left: &mut u64) {
        let size = records.get(b"GNU.sparse.realsize".as_slice());
        let Some(size) = size.and_then(|size| std::str::from_utf8(size).ok()?.parse().ok()) else { broken() };
        let mut text = Vec::new();
        let mut numbers = Vec::new();
        while numbers.first().is_none_or(|&count: &u64| (numbers.len() as u64) < 1 + 2 * count) {
            if *left < BLOCK as u64 || text.len() > 48 * tar::MAX_EXTENTS {
                broken();
            }
            let mut block = [0; BLOCK];
            self.read(&mut block);
            *left -= BLOCK as u64;
            text.extend_from_slice(&block);
            let complete = text.iter().rposition(|&c| c == b'\n').map_or(0, |end| end + 1);
            let lines = text[..complete].split(|&c| c == b'\n').filter(|line| !line.is_empty());
            let parsed = lines.map(|line| std::str::from_utf8(line).ok()?.parse().ok()).collect();
            let Some(parsed) = parsed else { broken() };
            numbers = parsed;
        }
        entry.size = size;
        entry.extents = Some(numbers[1..].chunks_exact(2).map(|pair| (pair[0], pair[1])).collect());
    }

    /// Writes an entry's data to its file.
    fn fill(&mut self, file: &OwnedFd, entry: &Entry, left: &mut u64) -> Answer<()> {
        let all = [(0, entry.size)];
        for &(offset, length) in entry.extents.as_deref().unwrap_or(&all) {
            if length == 0 {
                continue;
            }
            if length > *left {
                broken();
            }
            if offset > 0 {
                rustix::fs::seek(file, SeekFrom::Start(offset)).at("seek")?;
            }
            self.copy(file, length)?;
            *left -= length;
        }
        if entry.extents.is_some() {
            rustix::fs::ftruncate(file, entry.size).at("truncate")?;
        }
        Ok(())
    }

    fn copy(&mut self, file: &OwnedFd, mut count: u64) -> Answer<()> {
        while count > 0 {
            let step = self.frame().min(usize::try_from(count).unwrap_or(usize::MAX));
            match transfer::receive(stdin().as_fd(), file.as_fd(), step, &mut self.buffer) {
                Ok(()) => {}
                Err(Moved::Failed(errno)) => return Err(errno).at("write"),
                Err(Moved::Broken) => broken(),
            }
            self.left -= step;
            count -= step as u64;
        }
        Ok(())
    }

    fn read(&mut self, mut buffer: &mut [u8]) {
        while !buffer.is_empty() {
            let step = self.frame().min(buffer.len());
            let (now, later) = buffer.split_at_mut(step);
            if wire::read_exact(stdin().as_fd(), now) != Ok(true) {
                broken();
            }
            self.left -= step;
            buffer = later;
        }
    }

    fn skip(&mut self, mut count: u64) -> Answer<()> {
        let mut buffer = [0; BLOCK];
        while count > 0 {
            let step = count.min(BLOCK as u64);
            self.read(&mut buffer[..step as usize]);
            count -= step;
        }
        Ok(())
    }

    /// What the frame still has; never 0.
    fn frame(&mut self) -> usize {
        if self.left == 0 {
            match wire::next_chunk(stdin().as_fd()) {
                Ok(size) if size > 0 => self.left = size,
                _ => broken(),
            }
        }
        self.left
    }

    /// Takes the rest, up to the frame that says that it is complete.
    fn drain(&mut self) {
        while !self.ended {
            if self.left > 0 {
                let mut rest = vec![0; self.left];
                self.read(&mut rest);
            }
            match wire::next_chunk(stdin().as_fd()) {
                Ok(0) => self.ended = true,
                Ok(size) => self.left = size,
                Err(_) => broken(),
            }
        }
    }
}

fn broken() -> ! {
    sys::exit_now(wire::BROKEN)
}
