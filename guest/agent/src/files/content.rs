//! What is in a file: read and written, at once or as a stream.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;
use rustix::stdio::{stdin, stdout};

use super::attributes::{self, set_mode, set_owner};
use super::fail::{Answer, At, failure};
use super::paths::{self, Place};
use super::proto::response::Result as Reply;
use super::proto::{self, Content, write::How};
use super::transfer::{self, Moved};
use super::wire;
use crate::sys;

/// The most that is read into one answer.
const INLINE: usize = 1 << 20;

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub fn read(request: &proto::Read) -> Answer<Content> {
    // Nobody waits here for a FIFO's other end, or for a terminal.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = paths::open(&request.path, flags, Mode::empty()).at("open")?;
    let stat = rustix::fs::fstat(&file).at("open")?;
    match kind(&stat) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(failure(Errno::ISDIR, "read", b"")),
        _ => return Err(failure(Errno::INVAL, "read at once what isn't a regular file", b"")),
    }
    let large = Content { data: Bytes::new(), large: true };
    let wanted = if request.size == 0 { u64::MAX } else { request.size };
    if wanted.min((stat.st_size as u64).saturating_sub(request.offset)) > INLINE as u64 {
        return Ok(large);
    }
    // A file of /proc has more than it says.
    let most = wanted.min(INLINE as u64 + 1) as usize;
    let data = read_at(file.as_fd(), request.offset, most).at("read")?;
    Ok(if data.len() > INLINE { large } else { Content { data: data.into(), large: false } })
}

fn read_at(file: BorrowedFd<'_>, offset: u64, most: usize) -> Result<Vec<u8>, Errno> {
    let mut data = Vec::new();
    while data.len() < most {
        let have = data.len();
        data.resize(most.min(have + (have / 2).max(4096)), 0);
        let read = rustix::io::pread(file, &mut data[have..], offset.saturating_add(have as u64));
        data.truncate(have + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(data)
}

/// Sends the file, and ends the process.
pub fn read_bulk(request: &proto::Read) -> Answer<Reply> {
    let file = paths::open(&request.path, OFlags::RDONLY | OFlags::NOCTTY, Mode::empty()).at("open")?;
    let stat = rustix::fs::fstat(&file).at("open")?;
    if kind(&stat) == FileType::Directory {
        return Err(failure(Errno::ISDIR, "read", b""));
    }
    if request.offset > 0 {
        rustix::fs::seek(&file, SeekFrom::Start(request.offset)).at("seek")?;
    }
    wire::send(Reply::Attributes(attributes::of_open(file.as_fd()).at("stat")?));
    let size = if request.size == 0 { u64::MAX } else { request.size };
    transfer::widen(stdout().as_fd());
    match transfer::send(file.as_fd(), stdout().as_fd(), size).at("read") {
        Ok(_) => sys::exit_now(0),
        Err(failed) => wire::fail(failed),
    }
}

pub fn write(request: &proto::Write) -> Answer<()> {
    if request.parents {
        let (above, _) = paths::split(&request.path);
        paths::make_all(above).of("mkdir", above)?;
    }
    let target = match request.how() {
        How::Replace | How::Create => Target::anew(request)?,
        How::Overwrite => Target::there(request, OFlags::CREATE | OFlags::TRUNC)?,
        How::Append => Target::there(request, OFlags::CREATE | OFlags::APPEND)?,
        How::At => Target::there(request, OFlags::empty())?,
    };
    if request.bulk {
        wire::send(Reply::Attributes(attributes::of_open(target.file.as_fd()).at("stat")?));
        receive(target.file.as_fd())?;
    } else {
        wire::write_all(target.file.as_fd(), &request.data).at("write")?;
    }
    target.finish(request)
}

/// Takes the host's data. If that ends early, so does the process: a new file then never gets a name.
fn receive(file: BorrowedFd<'_>) -> Answer<()> {
    let stdin = stdin();
    transfer::widen(stdin.as_fd());
    let mut buffer = Vec::new();
    loop {
        match wire::next_chunk(stdin.as_fd()) {
            Ok(0) => return Ok(()),
            Ok(size) => match transfer::receive(stdin.as_fd(), file, size, &mut buffer) {
                Ok(()) => {}
                Err(Moved::Failed(errno)) => return Err(failure(errno, "write", b"")),
                Err(Moved::Broken) => sys::exit_now(wire::BROKEN),
            },
            Err(_) => sys::exit_now(wire::BROKEN),
        }
    }
}

/// An open file to write, and where it goes if it has no name yet.
struct Target {
    file: OwnedFd,
    anew: Option<(Place, Option<Stat>)>,
    /// The name that it has meanwhile, where the file system has no files without one.
    passing: Option<String>,
}

impl Target {
    /// A file that is there, or is made.
    fn there(request: &proto::Write, flags: OFlags) -> Answer<Self> {
        // A process of its own may wait for whoever reads a FIFO.
        let wait = if request.bulk { OFlags::empty() } else { OFlags::NONBLOCK };
        let mode = paths::permissions(0o666);
        let file = paths::open(&request.path, OFlags::WRONLY | OFlags::NOCTTY | wait | flags, mode).at("open")?;
        if !request.bulk && kind(&rustix::fs::fstat(&file).at("open")?) == FileType::Fifo {
            return Err(failure(Errno::INVAL, "write at once to what isn't a regular file", b""));
        }
        if request.how() == How::At {
            rustix::fs::seek(&file, SeekFrom::Start(request.offset)).at("seek")?;
        }
        Ok(Self { file, anew: None, passing: None })
    }

    /// A new file without a name, in the directory where it will have one.
    fn anew(request: &proto::Write) -> Answer<Self> {
        let (place, existing) = match request.how() {
            How::Create => {
                let place = Place::of(&request.path).at("open")?;
                match place.stat() {
                    Ok(_) => return Err(failure(Errno::EXIST, "create", b"")),
                    Err(Errno::NOENT) => (place, None),
                    Err(errno) => return Err(failure(errno, "create", b"")),
                }
            }
            _ => Place::final_of(&request.path).at("open")?,
        };
        if let Some(stat) = &existing {
            match kind(stat) {
                FileType::RegularFile => {}
                FileType::Directory => return Err(failure(Errno::ISDIR, "write", b"")),
                _ => return Err(failure(Errno::INVAL, "replace what isn't a regular file", b"")),
            }
            // Who may not write to it may not replace it either, though the directory would allow that.
            rustix::fs::accessat(&place.dir, place.name(), Access::WRITE_OK, AtFlags::EACCESS).at("open")?;
        }
        let flags = OFlags::TMPFILE | OFlags::WRONLY;
        // openat2 takes a mode with O_TMPFILE, as a file is made.
        let mode = paths::permissions(0o666);
        let (file, passing) = match rustix::fs::openat(&place.dir, c".", flags | OFlags::CLOEXEC, mode) {
            // virtio-fs and 9p, with the servers that there are.
            Err(Errno::OPNOTSUPP) => {
                let (name, flags) = (passing_name().at("create")?, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY);
                (rustix::fs::openat(&place.dir, name.as_str(), flags | OFlags::CLOEXEC, mode), Some(name))
            }
            made => (made, None),
        };
        Ok(Self { file: file.at("create")?, anew: Some((place, existing)), passing })
    }

    /// The file is complete.
    fn finish(mut self, request: &proto::Write) -> Answer<()> {
        if let Some((_, Some(existing))) = &self.anew {
            let own = rustix::fs::fstat(&self.file).at("stat")?;
            if (own.st_uid, own.st_gid) != (existing.st_uid, existing.st_gid) {
                set_owner(&self.file, Some(existing.st_uid), Some(existing.st_gid)).at("keep the owner")?;
            }
            set_mode(&self.file, existing.st_mode).at("chmod")?;
        }
        if request.set_mode {
            set_mode(&self.file, request.mode).at("chmod")?;
        }
        let Some((place, existing)) = &self.anew else { return Ok(()) };
        if existing.is_none() {
            let linked = match &self.passing {
                Some(name) => rustix::fs::linkat(&place.dir, name.as_str(), &place.dir, place.name(), AtFlags::empty()),
                None => link(&self.file, place, place.name()),
            };
            match linked {
                Err(Errno::EXIST) if request.how() != How::Create => {}
                other => return other.at("create"),
            }
        }
        let name = match self.passing.take() {
            Some(name) => name,
            None => named(&self.file, place).at("replace")?,
        };
        replace(&name, place).at("replace")
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let (Some(name), Some((place, _))) = (&self.passing, &self.anew) {
            let _ = rustix::fs::unlinkat(&place.dir, name.as_str(), AtFlags::empty());
        }
    }
}

fn link(file: &OwnedFd, place: &Place, name: &[u8]) -> Result<(), Errno> {
    rustix::fs::linkat(file, c"", &place.dir, name, AtFlags::EMPTY_PATH)
}

/// A name that nobody uses.
fn passing_name() -> Result<String, Errno> {
    let mut random = [0u8; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    Ok(format!(".pykata-{:016x}", u64::from_ne_bytes(random)))
}

/// Gives the file such a name.
fn named(file: &OwnedFd, place: &Place) -> Result<String, Errno> {
    let name = passing_name()?;
    link(file, place, name.as_bytes()).map(|()| name)
}

/// Then the file takes over the one that it shall have.
fn replace(passing: &str, place: &Place) -> Result<(), Errno> {
    let renamed = rustix::fs::renameat(&place.dir, passing, &place.dir, place.name());
    if renamed.is_err() {
        let _ = rustix::fs::unlinkat(&place.dir, passing, AtFlags::empty());
    }
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn fresh(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("pykata-content-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).expect("mkdir");
        path
    }

    fn to(path: &std::path::Path, data: &[u8], how: How) -> proto::Write {
        proto::Write {
            path: Bytes::copy_from_slice(path.as_os_str().as_encoded_bytes()),
            data: Bytes::copy_from_slice(data),
            how: how as i32,
            ..Default::default()
        }
    }

    #[test]
    fn a_file_is_replaced_through_a_link_and_keeps_its_mode() {
        let top = fresh("replace");
        let file = top.join("file");
        std::fs::write(&file, "old").expect("write");
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o604)).expect("chmod");
        std::os::unix::fs::symlink("file", top.join("link")).expect("link");
        write(&to(&top.join("link"), b"new", How::Replace)).expect("written");
        assert_eq!(std::fs::read(&file).expect("read"), b"new");
        let mode = std::os::unix::fs::MetadataExt::mode(&file.metadata().expect("stat"));
        assert_eq!(mode & 0o7777, 0o604);
        assert_eq!(std::fs::read_dir(&top).expect("list").count(), 2);
        std::fs::remove_dir_all(top).expect("clean");
    }

    #[test]
    fn a_dangling_link_gets_its_file() {
        let top = fresh("dangling");
        std::os::unix::fs::symlink("not/yet", top.join("link")).expect("link");
        assert_eq!(write(&to(&top.join("link"), b"x", How::Replace)).unwrap_err().errno, libc::ENOENT);
        std::fs::create_dir(top.join("not")).expect("mkdir");
        write(&to(&top.join("link"), b"x", How::Replace)).expect("written");
        assert_eq!(std::fs::read(top.join("not/yet")).expect("read"), b"x");
        std::fs::remove_dir_all(top).expect("clean");
    }

    #[test]
    fn ways_to_write() {
        let top = fresh("ways");
        let file = top.join("file");
        write(&to(&file, b"one", How::Create)).expect("made");
        assert_eq!(write(&to(&file, b"two", How::Create)).unwrap_err().errno, libc::EEXIST);
        write(&to(&file, b" two", How::Append)).expect("appended");
        write(&proto::Write { offset: 1, ..to(&file, b"N", How::At) }).expect("in the middle");
        assert_eq!(std::fs::read(&file).expect("read"), b"oNe two");
        write(&to(&file, b"x", How::Overwrite)).expect("emptied");
        assert_eq!(std::fs::read(&file).expect("read"), b"x");
        std::fs::remove_dir_all(top).expect("clean");
    }

    #[test]
    fn reading_never_waits() {
        let top = fresh("fifo");
        let fifo = top.join("fifo");
        let mode = Mode::from_raw_mode(0o644);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, mode, 0).expect("mknod");
        let path = Bytes::copy_from_slice(fifo.as_os_str().as_encoded_bytes());
        let request = proto::Read { path, ..Default::default() };
        assert_eq!(read(&request).unwrap_err().errno, libc::EINVAL);
        assert_eq!(read(&proto::Read { path: "/proc/self/exe".into(), ..request }).unwrap_err().errno, libc::ELOOP);
        std::fs::remove_dir_all(top).expect("clean");
    }
}
