//! Directories and names: made, removed, renamed, linked.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::fail::{Answer, At, failure};
use super::paths::{self, Place};
use super::proto;

pub fn make_directory(request: &proto::MakeDirectory) -> Answer<()> {
    let make = || {
        let place = Place::of(&request.path)?;
        rustix::fs::mkdirat(&place.dir, place.name(), paths::permissions(request.mode))
    };
    let mut made = make();
    if made == Err(Errno::NOENT) && request.parents {
        let (above, _) = paths::split(&request.path);
        paths::make_all(above).of("mkdir", above)?;
        made = make();
    }
    if made == Err(Errno::EXIST) && request.exist_ok {
        // Anything else there than a directory stays an error.
        return match paths::open(&request.path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Ok(_) => Ok(()),
            Err(_) => made.at("mkdir"),
        };
    }
    made.at("mkdir")
}

pub fn remove(request: &proto::Remove) -> Answer<()> {
    let removed = Place::of(&request.path).at("remove").and_then(|place| match request.tree {
        true => remove_tree(place.dir.as_fd(), place.name()),
        false => remove_one(&place),
    });
    match removed {
        Err(failed) if request.missing_ok && failed.errno == Errno::NOENT.raw_os_error() => Ok(()),
        other => other,
    }
}

fn remove_one(place: &Place) -> Answer<()> {
    match rustix::fs::unlinkat(&place.dir, place.name(), AtFlags::empty()) {
        Err(Errno::ISDIR) => rustix::fs::unlinkat(&place.dir, place.name(), AtFlags::REMOVEDIR).at("remove"),
        other => other.at("remove"),
    }
}

/// Removes whatever has that name. Depth costs a descriptor for each level, never stack.
fn remove_tree(dir: BorrowedFd<'_>, name: &[u8]) -> Answer<()> {
    let unlink = |dir: BorrowedFd<'_>, name: &[u8]| rustix::fs::unlinkat(dir, name, AtFlags::empty());
    match unlink(dir, name) {
        Err(Errno::ISDIR) => {}
        other => return other.at("remove"),
    }
    let mut stack: Vec<(Dir, CString)> = vec![(enter(dir, name).at("remove")?, to_c(name)?)];
    while let Some((inner, _)) = stack.last_mut() {
        let Some(entry) = inner.read() else {
            let Some((_, name)) = stack.pop() else { break };
            let above = match stack.last() {
                Some((above, _)) => above.fd().at("remove")?,
                None => dir,
            };
            rustix::fs::unlinkat(above, &name, AtFlags::REMOVEDIR).of("rmdir", name.to_bytes())?;
            continue;
        };
        let entry = entry.at("list")?;
        let name = entry.file_name().to_owned();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let here = inner.fd().at("remove")?;
        match unlink(here, name.to_bytes()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => {
                let below = enter(here, name.to_bytes()).of("remove", name.to_bytes())?;
                stack.push((below, name));
            }
            Err(errno) => return Err(failure(errno, "remove", name.to_bytes())),
        }
    }
    Ok(())
}

fn enter(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Dir, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    Dir::new(paths::open_at(dir, name, flags, Mode::empty())?)
}

fn to_c(name: &[u8]) -> Answer<CString> {
    CString::new(name).map_err(|_| Errno::INVAL).at("remove")
}

pub fn rename(request: &proto::Rename) -> Answer<()> {
    let from = Place::of(&request.path).at("rename")?;
    let to = Place::of(&request.target).of("rename", &request.target)?;
    let flags = if request.replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
    rustix::fs::renameat_with(&from.dir, from.name(), &to.dir, to.name(), flags).at("rename")
}

pub fn make_link(request: &proto::MakeSymlink) -> Answer<()> {
    let place = Place::of(&request.path).at("link")?;
    if !request.hard {
        return rustix::fs::symlinkat(&request.target[..], &place.dir, place.name()).at("symlink");
    }
    let target = Place::of(&request.target).of("link", &request.target)?;
    rustix::fs::linkat(&target.dir, target.name(), &place.dir, place.name(), AtFlags::empty()).at("link")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn fresh(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("pykata-tree-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).expect("mkdir");
        path
    }

    fn bytes(path: &std::path::Path) -> bytes::Bytes {
        bytes::Bytes::copy_from_slice(path.as_os_str().as_encoded_bytes())
    }

    #[test]
    fn a_tree_goes_and_what_its_links_lead_to_stays() {
        let top = fresh("remove");
        std::fs::create_dir_all(top.join("gone/a/b")).expect("mkdir");
        std::fs::write(top.join("gone/a/file"), "x").expect("write");
        std::fs::write(top.join("kept"), "x").expect("write");
        std::os::unix::fs::symlink(&top, top.join("gone/a/b/up")).expect("link");
        let request = |missing_ok| proto::Remove { path: bytes(&top.join("gone")), tree: true, missing_ok };
        remove(&request(false)).expect("removed");
        assert!(top.join("kept").exists() && !top.join("gone").exists());
        assert_eq!(remove(&request(false)).unwrap_err().errno, libc::ENOENT);
        remove(&request(true)).expect("missing is fine");
        std::fs::remove_dir_all(top).expect("clean");
    }

    #[test]
    fn directories_as_pathlib_makes_them() {
        let top = fresh("mkdir");
        let make = |path: &str, parents, exist_ok| {
            make_directory(&proto::MakeDirectory { path: bytes(&top.join(path)), mode: 0o755, parents, exist_ok })
        };
        assert_eq!(make("a/b/c", false, false).unwrap_err().errno, libc::ENOENT);
        make("a/b/c", true, false).expect("made");
        assert_eq!(make("a/b/c", true, false).unwrap_err().errno, libc::EEXIST);
        make("a/b/c", true, true).expect("is there");
        std::fs::write(top.join("file"), "x").expect("write");
        assert_eq!(make("file", true, true).unwrap_err().errno, libc::EEXIST);
        std::fs::remove_dir_all(top).expect("clean");
    }
}
