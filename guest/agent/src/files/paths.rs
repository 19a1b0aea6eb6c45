//! Paths as the host gives them, resolved by the kernel within the container's root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat, openat2};
use rustix::io::Errno;

/// As the kernel's own limit.
const MAX_LINKS: usize = 40;

/// The permissions in a mode.
pub fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

pub fn open(path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    open_at(CWD, path, flags, mode)
}

pub fn open_at(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    // The kernel refuses a mode where nothing can be made.
    let mode = if flags.intersects(OFlags::CREATE) { mode } else { Mode::empty() };
    openat2(dir, path, flags | OFlags::CLOEXEC, mode, ResolveFlags::NO_MAGICLINKS)
}

/// A handle on what is there. `follow`: on what a symlink leads to.
pub fn find(path: &[u8], follow: bool) -> Result<OwnedFd, Errno> {
    let flags = if follow { OFlags::PATH } else { OFlags::PATH | OFlags::NOFOLLOW };
    open(path, flags, Mode::empty())
}

/// The directory above, and the last part. The root's is ".", in itself.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let end = path.iter().rposition(|&c| c != b'/').map_or(0, |last| last + 1);
    if end == 0 {
        return (path, b".");
    }
    match path[..end].iter().rposition(|&c| c == b'/') {
        Some(0) => (b"/", &path[1..end]),
        Some(slash) => (&path[..slash], &path[slash + 1..end]),
        None => (b".", &path[..end]),
    }
}

/// A name in a directory that is open.
pub struct Place {
    pub dir: OwnedFd,
    pub name: Vec<u8>,
}

impl Place {
    /// Where a path leads without following a symlink at its end.
    pub fn of(path: &[u8]) -> Result<Self, Errno> {
        Self::below(CWD, path)
    }

    fn below(base: BorrowedFd<'_>, path: &[u8]) -> Result<Self, Errno> {
        if path.is_empty() {
            return Err(Errno::NOENT);
        }
        let (dir, name) = split(path);
        let dir = open_at(base, dir, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        Ok(Self { dir, name: name.to_vec() })
    }

    /// Where a path leads with all symlinks followed, also to something that isn't there yet.
    pub fn final_of(path: &[u8]) -> Result<(Self, Option<Stat>), Errno> {
        let mut place = Self::of(path)?;
        for _ in 0..MAX_LINKS {
            match place.stat() {
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => {
                    let target = rustix::fs::readlinkat(&place.dir, place.name(), Vec::new())?;
                    place = Self::below(place.dir.as_fd(), target.as_bytes())?;
                }
                Ok(stat) => return Ok((place, Some(stat))),
                Err(Errno::NOENT) => return Ok((place, None)),
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::LOOP)
    }

    pub fn name(&self) -> &[u8] {
        &self.name
    }

    pub fn stat(&self) -> Result<Stat, Errno> {
        rustix::fs::statat(&self.dir, self.name(), AtFlags::SYMLINK_NOFOLLOW)
    }
}

/// Makes a directory and those above it, where they are missing.
pub fn make_all(path: &[u8]) -> Result<(), Errno> {
    let is_dir = |path: &[u8]| open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).map(drop);
    let mut missing = Vec::new();
    let mut at = path;
    while let Err(errno) = is_dir(at) {
        let (above, _) = split(at);
        if errno != Errno::NOENT || above.len() >= at.len() {
            return Err(errno);
        }
        missing.push(at);
        at = above;
    }
    for path in missing.into_iter().rev() {
        let place = Place::of(path)?;
        match rustix::fs::mkdirat(&place.dir, place.name(), permissions(0o777)) {
            Err(Errno::EXIST) => is_dir(path)?,
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_a_directory_and_a_name() {
        let cases: [(&[u8], &[u8], &[u8]); 7] = [
            (b"/a/b", b"/a", b"b"),
            (b"/a", b"/", b"a"),
            (b"a", b".", b"a"),
            (b"a/b//", b"a", b"b"),
            (b"/", b"/", b"."),
            (b"a/..", b"a", b".."),
            (b"\xff/\xfe", b"\xff", b"\xfe"),
        ];
        for (path, dir, name) in cases {
            assert_eq!(split(path), (dir, name), "{path:?}");
        }
    }
}
