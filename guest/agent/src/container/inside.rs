//! Paths inside a container's root, whose contents nobody trusts. All are resolved by the kernel within that root:
//! neither "..", absolute symlinks nor the magic links of /proc lead out of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use crate::errno::{Failed, Step};

const IN_ROOT: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);
/// As the kernel's own limit.
const MAX_LINKS: usize = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    Dir,
}

/// A handle (`O_PATH`) on what is at `path`.
pub fn find(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), IN_ROOT)
}

/// The same without following any symlink: for paths that must be what they look like, such as /proc.
pub fn find_exact(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), IN_ROOT | ResolveFlags::NO_SYMLINKS)
}

/// The same, and a directory on which a file system is mounted on demand, as virtio-fs does it where one begins on the
/// host, has it by then.
pub fn find_mounted(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat2(root, path, flags, Mode::empty(), IN_ROOT | ResolveFlags::NO_SYMLINKS) {
        Err(Errno::NOTDIR) => find_exact(root, path),
        other => other,
    }
}

/// Opens a regular file for reading; never blocks on a FIFO or a device. None if it is missing or something else.
pub fn open_regular(root: BorrowedFd<'_>, path: &str) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat2(root, path, flags, Mode::empty(), IN_ROOT).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    (rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile).then_some(file)
}

/// Opens a regular file for reading and writing, following no symlink.
pub fn open_regular_for_writing(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat2(root, path, flags, Mode::empty(), IN_ROOT | ResolveFlags::NO_SYMLINKS)?;
    match rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
        rustix::fs::FileType::RegularFile => Ok(file),
        _ => Err(Errno::INVAL),
    }
}

/// A handle on `path`; what is missing of it is made: directories, and at its end `kind`.
pub fn make(root: BorrowedFd<'_>, path: &str, kind: Kind) -> Result<OwnedFd, Failed> {
    match find(root, path) {
        Err(Errno::NOENT) => Walk::new(root, path, kind).and_then(Walk::run).step("make", path),
        other => other.step("open", path),
    }
}

/// Goes down a path step by step, making what is missing. The kernel can't: a dangling symlink's target may have to be
/// made, too.
struct Walk {
    /// Directories from the root to where we are; ".." goes back one and ends at the root.
    stack: Vec<OwnedFd>,
    /// What is left of the path, last part first.
    rest: Vec<String>,
    kind: Kind,
    links: usize,
}

impl Walk {
    fn new(root: BorrowedFd<'_>, path: &str, kind: Kind) -> Result<Self, Errno> {
        let mut walk =
            Self { stack: vec![rustix::io::fcntl_dupfd_cloexec(root, 3)?], rest: Vec::new(), kind, links: 0 };
        walk.push(path);
        Ok(walk)
    }

    fn push(&mut self, path: &str) {
        self.rest.extend(path.split('/').rev().filter(|part| !part.is_empty() && *part != ".").map(str::to_owned));
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.stack[self.stack.len() - 1].as_fd()
    }

    fn run(mut self) -> Result<OwnedFd, Errno> {
        while let Some(part) = self.rest.pop() {
            if part == ".." {
                if self.stack.len() > 1 {
                    self.stack.pop();
                }
                continue;
            }
            let next = self.enter(&part)?;
            let stat = rustix::fs::fstat(&next)?;
            if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Symlink {
                self.follow(&next)?;
            } else {
                self.stack.push(next);
            }
        }
        self.stack.pop().ok_or(Errno::NOENT)
    }

    fn enter(&self, part: &str) -> Result<OwnedFd, Errno> {
        let open =
            || rustix::fs::openat(self.here(), part, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        match open() {
            Err(Errno::NOENT) => {}
            other => return other,
        }
        if self.rest.is_empty() && self.kind == Kind::File {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(self.here(), part, flags, Mode::from_raw_mode(0o644))?;
        } else {
            rustix::fs::mkdirat(self.here(), part, Mode::from_raw_mode(0o755))?;
        }
        open()
    }

    fn follow(&mut self, link: &OwnedFd) -> Result<(), Errno> {
        self.links += 1;
        if self.links > MAX_LINKS || self.rest.len() > 4096 {
            return Err(Errno::LOOP);
        }
        let target = rustix::fs::readlinkat(link, c"", Vec::new())?;
        let target = target.to_str().map_err(|_| Errno::ILSEQ)?;
        if target.starts_with('/') {
            self.stack.truncate(1);
        }
        self.push(target);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    struct Root(PathBuf, OwnedFd);

    impl Root {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("pykata-inside-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(path.join("root")).expect("mkdir");
            let fd =
                rustix::fs::open(path.join("root"), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("open");
            Self(path, fd)
        }

        fn at(&self, path: &str) -> PathBuf {
            self.0.join("root").join(path)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn links_stay_in_the_root() {
        let root = Root::new("links");
        fs::write(root.0.join("secret"), "x").expect("write");
        symlink("../secret", root.at("up")).expect("link");
        symlink(root.0.join("secret"), root.at("absolute")).expect("link");
        symlink("/proc/self/root/etc/passwd", root.at("magic")).expect("link");
        for path in ["/up", "/absolute", "/magic"] {
            assert!(open_regular(root.1.as_fd(), path).is_none(), "{path}");
        }
    }

    #[test]
    fn a_fifo_is_no_file() {
        let root = Root::new("fifo");
        let mode = Mode::from_raw_mode(0o644);
        rustix::fs::mknodat(rustix::fs::CWD, root.at("passwd"), rustix::fs::FileType::Fifo, mode, 0).expect("mknod");
        assert!(open_regular(root.1.as_fd(), "/passwd").is_none());
    }

    #[test]
    fn makes_what_is_missing_even_behind_a_dangling_link() {
        let root = Root::new("make");
        fs::create_dir(root.at("etc")).expect("mkdir");
        symlink("../../../run/stub/resolv.conf", root.at("etc/resolv.conf")).expect("link");
        make(root.1.as_fd(), "/etc/resolv.conf", Kind::File).expect("made");
        assert!(root.at("run/stub/resolv.conf").is_file());
        make(root.1.as_fd(), "/a/b/c", Kind::Dir).expect("made");
        assert!(root.at("a/b/c").is_dir());
        assert!(!root.0.join("run").exists());
    }

    #[test]
    fn a_link_to_itself_ends() {
        let root = Root::new("loop");
        symlink("loop", root.at("loop")).expect("link");
        assert_eq!(make(root.1.as_fd(), "/loop/x", Kind::Dir).unwrap_err().errno, Errno::LOOP);
    }

    #[test]
    fn a_link_is_not_exact() {
        let root = Root::new("exact");
        fs::create_dir(root.at("real")).expect("mkdir");
        symlink("real", root.at("proc")).expect("link");
        assert!(find_exact(root.1.as_fd(), "/proc").is_err());
        assert!(find_exact(root.1.as_fd(), "/real").is_ok());
    }
}
