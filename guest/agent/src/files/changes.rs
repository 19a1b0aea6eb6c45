//! What a container has changed against its image: the writable layer of an overlay, read beside the layers below it.
//!
//! linux/Documentation/filesystems/overlayfs.rst: a character device 0:0 is a whiteout, a directory with the attribute
//! "overlay.opaque" hides what is below. In a layer of an image (image-spec, layer.md) these are files by names that begin
//! with ".wh.".

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::fail::{Answer, At, failure};
use super::layers::Layers;
use super::pack::{self, Archive, join};
use super::proto::change::Kind;
use super::proto::response::Result as Reply;
use super::proto::{self, Change, Done};
use super::tar::{self, Entry, Xattrs};
use super::{paths, wire};

const OPAQUE: [&CStr; 2] = [c"trusted.overlay.opaque", c"user.overlay.opaque"];
const OVERLAY: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];
/// Made by the agent for each container.
const OWN: [&[u8]; 4] = [b"etc/hosts", b"etc/hostname", b"etc/resolv.conf", b"etc/machine-id"];
/// Most bytes of one file's extended attributes.
const MAX_XATTRS: usize = 256 * 1024;

pub fn changes(request: &proto::Changes, layers: &Layers) -> Answer<Reply> {
    let mut out = match request.bulk {
        false => Out::Changes,
        true => Out::Archive(Archive::with_xattrs(xattrs)),
    };
    let Some(upper) = layers.upper() else {
        return finish(out, Ok(()));
    };
    let below = layers.lowers().iter().map(|layer| open(layer.as_fd(), b".")).collect::<Result<_, _>>().at("open")?;
    let top =
        Level { dir: Dir::new(open(upper, b".").at("open")?).at("open")?, below, path: Vec::new(), opaque: false };
    if request.bulk {
        wire::send(Reply::Done(Done {}));
    }
    let walked = walk(&mut out, top, layers);
    finish(out, walked)
}

fn finish(out: Out, result: Answer<()>) -> Answer<Reply> {
    match out {
        Out::Changes => result.map(|()| Reply::Done(Done {})),
        Out::Archive(mut archive) => pack::finish(result.and_then(|()| archive.end())),
    }
}

/// A directory of the writable layer, and those that it lies over.
struct Level {
    dir: Dir,
    below: Vec<OwnedFd>,
    path: Vec<u8>,
    /// It hides what is in those.
    opaque: bool,
}

fn walk(out: &mut Out, top: Level, layers: &Layers) -> Answer<()> {
    let own = rustix::fs::fstat(top.dir.fd().at("stat")?).at("stat")?;
    let lower = top.below.first().map(rustix::fs::fstat).transpose().at("stat")?;
    out.directory(&top.path, &own, lower.as_ref(), false)?;
    let mut stack = vec![top];
    while let Some(level) = stack.last_mut() {
        let Some(entry) = level.dir.read() else {
            if let Some(level) = stack.pop().filter(|level| level.opaque) {
                out.hidden(&level)?;
            }
            continue;
        };
        let name = entry.at("list")?.file_name().to_owned();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let path = join(&level.path, name.to_bytes());
        if let Some(deeper) = visit(out, level, &name, path, layers)? {
            stack.push(deeper);
        }
    }
    Ok(())
}

/// Tells of one name. A directory is returned, for what is in it.
fn visit(out: &mut Out, level: &Level, name: &CStr, path: Vec<u8>, layers: &Layers) -> Answer<Option<Level>> {
    let dir = level.dir.fd().at("list")?;
    let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(None),
        stat => stat.of("stat", &path)?,
    };
    let lower = look(&level.below, name).of("stat", &path)?;
    if OWN.contains(&path.as_slice()) {
        return Ok(None);
    }
    if is_whiteout(&stat) {
        if lower.stat.is_some() {
            out.deleted(path)?;
        }
        return Ok(None);
    }
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        if lower.stat.is_none() && stat.st_size == 0 && is_mounted(layers, &path) {
            return Ok(None);
        }
        out.file(dir, name, path, &stat, lower.stat.is_some())?;
        return Ok(None);
    }
    let inner = open(dir, name.to_bytes()).of("open", &path)?;
    if lower.stat.is_none() && only_for_mounts(&inner, &path, layers).of("list", &path)? {
        return Ok(None);
    }
    let opaque = is_opaque(inner.as_fd());
    out.directory(&path, &stat, lower.stat.as_ref(), opaque)?;
    Ok(Some(Level { dir: Dir::new(inner).of("list", &path)?, below: lower.dirs, path, opaque }))
}

/// What the layers below have by a name.
#[derive(Default)]
struct Lower {
    /// Of the topmost.
    stat: Option<Stat>,
    /// Those that are merged, if it is a directory.
    dirs: Vec<OwnedFd>,
}

fn look(below: &[OwnedFd], name: &CStr) -> Result<Lower, Errno> {
    let mut found = Lower::default();
    for layer in below {
        let stat = match rustix::fs::statat(layer, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat?,
        };
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if is_whiteout(&stat) || (found.stat.is_some() && !is_dir) {
            break;
        }
        found.stat.get_or_insert(stat);
        if !is_dir {
            break;
        }
        let dir = open(layer.as_fd(), name.to_bytes())?;
        let opaque = is_opaque(dir.as_fd());
        found.dirs.push(dir);
        if opaque {
            break;
        }
    }
    Ok(found)
}

fn open(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    paths::open_at(dir, name, flags, Mode::empty())
}

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

fn is_opaque(dir: BorrowedFd<'_>) -> bool {
    let mut value = [0u8; 4];
    OPAQUE.iter().any(|name| rustix::fs::fgetxattr(dir, *name, &mut value[..]) == Ok(1) && value[0] == b'y')
}

fn is_mounted(layers: &Layers, path: &[u8]) -> bool {
    layers.mounted.iter().any(|point| point.strip_prefix(b"/") == Some(path))
}

/// A directory that was only made for something to be mounted there, or below.
fn only_for_mounts(dir: &OwnedFd, path: &[u8], layers: &Layers) -> Result<bool, Errno> {
    let above = |point: &Vec<u8>| point.strip_prefix(b"/").is_some_and(|point| point.starts_with(&join(path, b"")));
    let own = |own: &&[u8]| own.starts_with(&join(path, b""));
    if !is_mounted(layers, path) && !layers.mounted.iter().any(above) && !OWN.iter().any(own) {
        return Ok(false);
    }
    let mut entries = Dir::read_from(dir)?;
    while let Some(entry) = entries.read() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        let inside = join(path, name);
        if !matches!(name, b"." | b"..") && !is_mounted(layers, &inside) && !OWN.contains(&inside.as_slice()) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Extended attributes that belong to a file and not to the overlay.
fn xattrs(file: BorrowedFd<'_>) -> Xattrs {
    let mut names = vec![0u8; 64 * 1024];
    let Ok(size) = rustix::fs::flistxattr(file, &mut names[..]) else { return Vec::new() };
    let mut left = MAX_XATTRS;
    let value = |name: &[u8]| {
        let mut value = vec![0u8; 64 * 1024];
        let size = rustix::fs::fgetxattr(file, name, &mut value[..]).ok()?;
        value.truncate(size);
        left = left.checked_sub(size)?;
        Some((name.to_vec(), value))
    };
    let own = |name: &&[u8]| !name.is_empty() && !OVERLAY.iter().any(|prefix| name.starts_with(prefix));
    names[..size].split(|&c| c == 0).filter(own).filter_map(value).collect()
}

/// Where it goes: messages, or a layer.
enum Out {
    Changes,
    Archive(Archive),
}

impl Out {
    fn tell(kind: Kind, path: &[u8]) {
        let path = Bytes::from([b"/", path].concat());
        wire::send(Reply::Change(Change { kind: kind as i32, path }));
    }

    fn deleted(&mut self, path: Vec<u8>) -> Answer<()> {
        match self {
            Out::Changes => Self::tell(Kind::Deleted, &path),
            Out::Archive(archive) => {
                let (above, name) = match path.iter().rposition(|&c| c == b'/') {
                    Some(slash) => (&path[..slash], &path[slash + 1..]),
                    None => (&path[..0], &path[..]),
                };
                let path = join(above, &[b".wh.", name].concat());
                archive.head(&Entry { path, kind: tar::FILE, ..Entry::default() })?;
            }
        }
        Ok(())
    }

    fn directory(&mut self, path: &[u8], own: &Stat, lower: Option<&Stat>, opaque: bool) -> Answer<()> {
        match self {
            Out::Changes => match lower {
                None => Self::tell(Kind::Added, path),
                Some(lower) if attributes(own) != attributes(lower) => Self::tell(Kind::Modified, path),
                Some(_) => {}
            },
            Out::Archive(archive) => {
                archive.head(&pack::entry(tar::DIRECTORY, path.to_vec(), own))?;
                if opaque && lower.is_some() {
                    let path = join(path, b".wh..wh..opq");
                    archive.head(&Entry { path, kind: tar::FILE, ..Entry::default() })?;
                }
            }
        }
        Ok(())
    }

    fn file(&mut self, dir: BorrowedFd<'_>, name: &CStr, path: Vec<u8>, stat: &Stat, replaces: bool) -> Answer<()> {
        let Out::Archive(archive) = self else {
            Self::tell(if replaces { Kind::Modified } else { Kind::Added }, &path);
            return Ok(());
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
                let file = paths::open_at(dir, name.to_bytes(), flags, Mode::empty()).of("open", &path)?;
                let stat = rustix::fs::fstat(&file).of("stat", &path)?;
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::RegularFile => archive.file(file, path, &stat),
                    _ => Err(failure(Errno::STALE, "open", &path)),
                }
            }
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(dir, name, Vec::new()).of("read the link", &path)?.into_bytes();
                archive.head(&Entry { link, ..pack::entry(tar::SYMLINK, path, stat) })
            }
            kind => match pack::node(kind) {
                Some(flag) => archive.head(&pack::entry(flag, path, stat)),
                None => Ok(()),
            },
        }
    }

    /// What an opaque directory hides: what is below and not in it.
    fn hidden(&mut self, level: &Level) -> Answer<()> {
        let Out::Changes = self else { return Ok(()) };
        let here = level.dir.fd().at("list")?;
        for layer in &level.below {
            let mut names = Dir::read_from(layer).at("list")?;
            while let Some(entry) = names.read() {
                let entry = entry.at("list")?;
                let name = entry.file_name();
                if matches!(name.to_bytes(), b"." | b"..") {
                    continue;
                }
                if matches!(rustix::fs::statat(here, name, AtFlags::SYMLINK_NOFOLLOW), Err(Errno::NOENT)) {
                    Self::tell(Kind::Deleted, &join(&level.path, name.to_bytes()));
                }
            }
        }
        Ok(())
    }
}

fn attributes(stat: &Stat) -> (u32, u32, u32) {
    (stat.st_mode, stat.st_uid, stat.st_gid)
}
