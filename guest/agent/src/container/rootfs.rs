//! The container's root file system: read-only layers, a writable tmpfs of limited size on top, and the way into it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{UnmountFlags, unmount};

use super::config::Rootfs;
use super::etc;
use super::filesystems::Found;
use super::inside::{self, Kind};
use crate::errno::{Failed, Step};
use crate::mounts::{self, NODEV, Options, RDONLY};
use crate::sys;

/// Mount points that each init uses in its own mount namespace.
pub const LOWERS: &str = "/run/pykata/lower";
pub const UPPER: &str = "/run/pykata/upper";
const ROOT: &str = "/run/pykata/rootfs";
/// The path of one of the container's own files, and its text.
pub type TextFile = (&'static str, String);

/// The container's own files.
pub struct Files {
    pub list: Vec<TextFile>,
    /// They may be made in the upper layer; else they are mounts.
    pub directly: bool,
}

/// The directories the agent makes at boot.
pub const DIRS: [&str; 4] = ["/run/pykata", LOWERS, UPPER, ROOT];

pub fn lower_dir(index: usize) -> String {
    format!("{LOWERS}/{index}")
}

/// Mount points for that many lowers; made by the agent, as they are for all containers.
pub fn make_lower_dirs(count: usize) -> Result<(), Failed> {
    for index in (0..count).rev() {
        match rustix::fs::mkdir(lower_dir(index), Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => break,
            Err(errno) => return Err(Failed::new("mkdir", lower_dir(index), errno)),
        }
    }
    Ok(())
}

/// Detached mounts of the layers, topmost first; with a user namespace, its ids are those of their files.
pub fn open_lowers(lowers: &[Found], user_namespace: Option<BorrowedFd<'_>>) -> Result<Vec<OwnedFd>, Failed> {
    let open = |lower: &Found| {
        let mount = lower.mount()?;
        user_namespace.map_or(Ok(()), |namespace| mounts::map_ids(mount.as_fd(), namespace))?;
        Ok(mount)
    };
    lowers.iter().map(open).collect()
}

/// A detached mount of the layers together with the content of their files, which lies elsewhere.
///
/// It is a layer of its own below the container's root, and not a part of that: there a file whose mode is changed would
/// come into the writable layer without its content, where whoever reads the changes looks for it.
pub fn with_content(lowers: &[OwnedFd], data: &[OwnedFd]) -> Result<OwnedFd, Failed> {
    let mut options = Options::parse(&["ro", "nodev", "metacopy=on", "redirect_dir=on"]);
    let keys = lowers.iter().map(|_| "lowerdir+").chain(data.iter().map(|_| "datadir+"));
    for (index, (mount, key)) in lowers.iter().chain(data).zip(keys).enumerate() {
        let dir = lower_dir(index);
        mounts::attach_at(mount.as_fd(), &dir)?;
        options.data.push((key.to_owned(), Some(dir)));
    }
    mounts::filesystem("overlay", "content", &options)
}

/// Mounts the root at its place in the guest's tree. Gives detached mounts of those of `files` that still have to be put
/// into it.
pub fn mount(
    rootfs: &Rootfs,
    lowers: &[OwnedFd],
    in_user_namespace: bool,
    files: Files,
) -> Result<Vec<(&'static str, OwnedFd)>, Failed> {
    if let ([only], 0) = (lowers, rootfs.writable_bytes) {
        mounts::set_attributes(only.as_fd(), false, NODEV | RDONLY, 0, 0)?;
        mounts::attach_at(only.as_fd(), ROOT)?;
        return shared_files(files.list);
    }
    let mut options = Options { set: NODEV, ..Options::default() };
    for (index, lower) in lowers.iter().enumerate() {
        let dir = lower_dir(index);
        mounts::attach_at(lower.as_fd(), &dir)?;
        options.data.push(("lowerdir+".to_owned(), Some(dir)));
    }
    let mut left = Vec::new();
    if rootfs.writable_bytes > 0 {
        make_upper(rootfs)?;
        if !files.directly || !etc::write(lowers.len(), &files.list)? {
            left = write_all(&format!("{UPPER}/files"), files.list, false)?;
        }
        options.data.push(("upperdir".to_owned(), Some(format!("{UPPER}/upper"))));
        options.data.push(("workdir".to_owned(), Some(format!("{UPPER}/work"))));
    } else {
        options.set |= RDONLY;
        left = shared_files(files.list)?;
    }
    if in_user_namespace {
        options.data.push(("userxattr".to_owned(), None));
    }
    mounts::attach_at(mounts::filesystem("overlay", "overlay", &options)?.as_fd(), ROOT)?;
    Ok(left)
}

/// The writable layer, and those below it, topmost first, by ascending numbers; none if nothing can be written.
pub fn layers(rootfs: &Rootfs, lowers: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, Failed> {
    if rootfs.writable_bytes == 0 {
        return Ok(Vec::new());
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let upper = rustix::fs::open(format!("{UPPER}/upper"), flags, Mode::empty()).step("open", "upper")?;
    let all: Vec<OwnedFd> = std::iter::once(upper).chain(lowers).collect();
    sys::ascending(&all).step("dup", "layers")
}

fn make_upper(rootfs: &Rootfs) -> Result<(), Failed> {
    let mut options = Options::parse(&["mode=755", &format!("size={}", rootfs.writable_bytes)]);
    if rootfs.writable_inodes > 0 {
        options.data.push(("nr_inodes".to_owned(), Some(rootfs.writable_inodes.to_string())));
    }
    mounts::attach_at(mounts::filesystem("tmpfs", "rootfs", &options)?.as_fd(), UPPER)?;
    for name in ["upper", "work", "files"] {
        rustix::fs::mkdir(format!("{UPPER}/{name}"), Mode::from_raw_mode(0o755)).step("mkdir", name)?;
    }
    // The root directory's owner and mode are those of the upper layer's.
    let (lower, upper) = (lower_dir(0), format!("{UPPER}/upper"));
    let stat = rustix::fs::stat(&lower).step("stat", &lower)?;
    etc::imitate(&upper, &stat)
}

/// Of a container that may not write: read-only files beside its root.
fn shared_files(files: Vec<TextFile>) -> Result<Vec<(&'static str, OwnedFd)>, Failed> {
    // In this mount namespace alone, over the mount point of the upper layer that isn't needed.
    mounts::mount_at("tmpfs", "files", UPPER, &["mode=755", "size=256k"])?;
    write_all(UPPER, files, true)
}

/// Writes files and gives detached mounts of them.
fn write_all(dir: &str, files: Vec<TextFile>, readonly: bool) -> Result<Vec<(&'static str, OwnedFd)>, Failed> {
    let mut out = Vec::with_capacity(files.len());
    for (target, text) in files {
        let path = format!("{dir}/{}", target.trim_start_matches("/etc/"));
        write_text(&path, &text)?;
        let mount = mounts::bind_path(&path, false)?;
        let set = NODEV | mounts::NOSUID | mounts::NOEXEC | if readonly { RDONLY } else { 0 };
        mounts::set_attributes(mount.as_fd(), false, set, 0, 0)?;
        out.push((target, mount));
    }
    Ok(out)
}

pub fn write_text(path: &str, text: &str) -> Result<(), Failed> {
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).step("write", path)?;
    rustix::io::write(&file, text.as_bytes()).step("write", path).map(drop)
}

/// Puts one of these files in its place. A read-only image without a place for it goes without.
pub fn attach_file(root: BorrowedFd<'_>, path: &str, file: OwnedFd) -> Result<(), Failed> {
    match inside::make(root, path, Kind::File) {
        Ok(target) => mounts::attach(file.as_fd(), target.as_fd(), path),
        Err(failed) if failed.errno == rustix::io::Errno::ROFS => Ok(()),
        Err(failed) => Err(failed),
    }
}

/// Makes the container's root the root of this process; the guest's tree is gone from its sight.
pub fn enter() -> Result<(), Failed> {
    rustix::process::chdir(ROOT).step("chdir", ROOT)?;
    rustix::process::pivot_root(".", ".").step("pivot_root", ROOT)?;
    unmount(".", UnmountFlags::DETACH).step("unmount", "guest root")?;
    rustix::process::chdir("/").step("chdir", "/")
}

/// Last: read-only and propagation, once nothing has to be made in it any more.
pub fn finish(rootfs: &Rootfs) -> Result<(), Failed> {
    let root = rustix::fs::openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .step("open", "container root")?;
    if rootfs.readonly || rootfs.propagation != 0 {
        let set = if rootfs.readonly { RDONLY } else { 0 };
        mounts::set_attributes(root.as_fd(), false, set, 0, rootfs.propagation)?;
    }
    Ok(())
}
