//! A tree of files as a tar on the standard output.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;
use rustix::stdio::stdout;

use super::attributes::mtime_ns;
use super::fail::{Answer, At};
use super::proto::response::Result as Reply;
use super::proto::{self, Done};
use super::tar::{self, Entry, Xattrs};
use super::{paths, transfer, wire};
use crate::sys;

/// Files up to this size go through memory, together with their headers: a system call costs more than a copy.
const SMALL: u64 = 32 * 1024;
const BUFFER: usize = 128 * 1024;

/// Sends the tar, and ends the process.
pub fn pack(request: &proto::Pack) -> Answer<Reply> {
    let top =
        paths::open(&request.path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty()).at("open")?;
    let stat = rustix::fs::fstat(&top).at("open")?;
    let mut archive = Archive::default();
    transfer::widen(stdout().as_fd());
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        let (_, name) = paths::split(&request.path);
        wire::send(Reply::Done(Done {}));
        finish(archive.file(top, name.to_vec(), &stat).and_then(|()| archive.end()))
    }
    let dir = Dir::new(top).at("list")?;
    wire::send(Reply::Done(Done {}));
    finish(tree(&mut archive, dir, &stat).and_then(|()| archive.end()))
}

pub fn finish(result: Answer<()>) -> ! {
    match result {
        Ok(()) => sys::exit_now(0),
        Err(failed) => wire::fail(failed),
    }
}

/// A directory and all below it, each before what is in it.
fn tree(archive: &mut Archive, top: Dir, stat: &Stat) -> Answer<()> {
    archive.head(&entry(tar::DIRECTORY, Vec::new(), stat))?;
    let mut stack = vec![(top, Vec::new())];
    while let Some((dir, above)) = stack.last_mut() {
        let Some(found) = dir.read() else {
            stack.pop();
            continue;
        };
        let name: CString = found.at("list")?.file_name().to_owned();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let path = join(above, name.to_bytes());
        let below = add(archive, dir.fd().at("list")?, &name, path.clone());
        if let Some(below) = below? {
            stack.push((below, path));
        }
    }
    Ok(())
}

pub fn join(above: &[u8], name: &[u8]) -> Vec<u8> {
    if above.is_empty() { name.to_vec() } else { [above, b"/", name].concat() }
}

/// Adds what has that name; a directory is returned, for what is in it. What is gone meanwhile is nothing.
fn add(archive: &mut Archive, dir: BorrowedFd<'_>, name: &CString, path: Vec<u8>) -> Answer<Option<Dir>> {
    let gone = |errno: &Errno| matches!(*errno, Errno::NOENT | Errno::LOOP);
    let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(errno) if gone(&errno) => return Ok(None),
        stat => stat.of("stat", &path)?,
    };
    let open = |flags| {
        paths::open_at(
            dir,
            name.to_bytes(),
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | flags,
            Mode::empty(),
        )
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => match open(OFlags::DIRECTORY) {
            Err(errno) if gone(&errno) || errno == Errno::NOTDIR => Ok(None),
            below => {
                let below = below.and_then(Dir::new).of("list", &path)?;
                archive.head(&entry(tar::DIRECTORY, path, &stat))?;
                Ok(Some(below))
            }
        },
        FileType::RegularFile => match open(OFlags::NOCTTY) {
            Err(errno) if gone(&errno) => Ok(None),
            file => {
                let file = file.of("open", &path)?;
                let stat = rustix::fs::fstat(&file).of("stat", &path)?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
                    archive.file(file, path, &stat)?;
                }
                Ok(None)
            }
        },
        FileType::Symlink => {
            let target = match rustix::fs::readlinkat(dir, name, Vec::new()) {
                Err(errno) if gone(&errno) || errno == Errno::INVAL => return Ok(None),
                target => target.of("read the link", &path)?,
            };
            archive.head(&Entry { link: target.into_bytes(), ..entry(tar::SYMLINK, path, &stat) })?;
            Ok(None)
        }
        kind => {
            if let Some(flag) = node(kind) {
                archive.head(&entry(flag, path, &stat))?;
            }
            Ok(None)
        }
    }
}

/// The flag of what isn't a file, directory or link. Sockets have none.
pub fn node(kind: FileType) -> Option<u8> {
    match kind {
        FileType::Fifo => Some(tar::FIFO),
        FileType::CharacterDevice => Some(tar::CHAR),
        FileType::BlockDevice => Some(tar::BLOCK_DEVICE),
        _ => None,
    }
}

pub fn entry(kind: u8, path: Vec<u8>, stat: &Stat) -> Entry {
    let device = match kind {
        tar::CHAR | tar::BLOCK_DEVICE => (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)),
        _ => (0, 0),
    };
    Entry {
        path,
        kind,
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_ns: mtime_ns(stat),
        device,
        ..Entry::default()
    }
}

/// The archive on its way out.
#[derive(Default)]
pub struct Archive {
    out: Vec<u8>,
    /// Files with several names: the first of them.
    names: HashMap<(u64, u64), Vec<u8>>,
    /// Extended attributes that go along, by a look at the file.
    xattrs: Option<fn(BorrowedFd<'_>) -> Xattrs>,
}

impl Archive {
    pub fn with_xattrs(of: fn(BorrowedFd<'_>) -> Xattrs) -> Self {
        Self { xattrs: Some(of), ..Self::default() }
    }

    pub fn head(&mut self, entry: &Entry) -> Answer<()> {
        self.out.extend_from_slice(&entry.encode());
        if self.out.len() >= BUFFER { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Answer<()> {
        let sent = wire::write_all(stdout().as_fd(), &self.out).at("send");
        self.out.clear();
        sent
    }

    pub fn end(&mut self) -> Answer<()> {
        self.out.extend_from_slice(&tar::END);
        self.flush()
    }

    /// A regular file, with the data it has now; one that shrinks meanwhile is filled up with zeros.
    pub fn file(&mut self, file: OwnedFd, path: Vec<u8>, stat: &Stat) -> Answer<()> {
        if stat.st_nlink > 1 {
            if let Some(first) = self.names.get(&(stat.st_dev, stat.st_ino)) {
                let link = first.clone();
                return self.head(&Entry { link, ..entry(tar::HARDLINK, path, stat) });
            }
            self.names.insert((stat.st_dev, stat.st_ino), path.clone());
        }
        let size = stat.st_size as u64;
        let xattrs = self.xattrs.map(|of| of(file.as_fd())).unwrap_or_default();
        let extents = extents(file.as_fd(), size, stat.st_blocks as u64).of("read", &path)?;
        let entry = Entry { size, extents, xattrs, ..entry(tar::FILE, path, stat) };
        self.head(&entry)?;
        let all = [(0, size)];
        let mut sent = 0;
        for (offset, length) in entry.extents.as_deref().unwrap_or(&all) {
            self.data(file.as_fd(), *offset, *length).of("read", &entry.path)?;
            sent += length;
        }
        self.out.resize(self.out.len() + tar::padding(sent) as usize, 0);
        Ok(())
    }

    fn data(&mut self, file: BorrowedFd<'_>, offset: u64, length: u64) -> Result<(), Errno> {
        if length <= SMALL {
            let start = self.out.len();
            self.out.resize(start + length as usize, 0);
            let mut have = 0;
            while have < length as usize {
                match rustix::io::pread(file, &mut self.out[start + have..], offset + have as u64) {
                    Ok(0) => break,
                    Ok(n) => have += n,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno),
                }
            }
            return Ok(());
        }
        wire::write_all(stdout().as_fd(), &self.out)?;
        self.out.clear();
        rustix::fs::seek(file, SeekFrom::Start(offset))?;
        let moved = transfer::send(file, stdout().as_fd(), length)?;
        send_zeros(length - moved)
    }
}

fn send_zeros(mut count: u64) -> Result<(), Errno> {
    static ZEROS: [u8; 16 * 1024] = [0; 16 * 1024];
    while count > 0 {
        let step = count.min(ZEROS.len() as u64);
        wire::write_all(stdout().as_fd(), &ZEROS[..step as usize])?;
        count -= step;
    }
    Ok(())
}

/// Where a file has data; None where there is no use in telling.
fn extents(file: BorrowedFd<'_>, size: u64, blocks: u64) -> Result<Option<tar::Extents>, Errno> {
    if size <= SMALL || blocks * 512 >= size {
        return Ok(None);
    }
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            // A file of /proc, or of a file system that doesn't know.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
            start => start?,
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(size);
        if start >= end {
            break;
        }
        found.push((start, end - start));
        at = end;
        if found.len() >= tar::MAX_EXTENTS {
            return Ok(None);
        }
    }
    Ok(if found == [(0, size)] { None } else { Some(found) })
}
