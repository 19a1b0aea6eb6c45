//! The container's own /etc/hosts, hostname and resolv.conf, written straight into the upper layer before it becomes
//! part of an overlay. Making them through the overlay (mount points, to bind the files to) would first copy /etc up,
//! which takes as long as all the rest of the root.

use std::path::Path;

use rustix::fs::{CWD, FileType, Gid, Mode, Stat, Uid};
use rustix::io::Errno;

use super::rootfs::{TextFile, UPPER, lower_dir, write_text};
use crate::errno::{Failed, Step};

/// Writes the files over `lowers` read-only layers. False: here /etc isn't a plain directory, and nothing was done.
pub fn write(lowers: usize, files: &[TextFile]) -> Result<bool, Failed> {
    let etc = match topmost(lowers)? {
        Found::Plain(etc) => Some(etc),
        Found::Nowhere => None,
        Found::Special => return Ok(false),
    };
    let dir = format!("{UPPER}/upper/etc");
    rustix::fs::mkdir(&dir, Mode::from_raw_mode(0o755)).step("mkdir", &dir)?;
    for (path, text) in files {
        write_text(&format!("{UPPER}/upper{path}"), text)?;
    }
    if let Some(etc) = etc {
        imitate(&dir, &etc)?;
    }
    Ok(true)
}

enum Found {
    Plain(Stat),
    /// A link, a file, a directory with attributes that a new one wouldn't have.
    Special,
    Nowhere,
}

/// /etc of the topmost layer that has one: its owner and mode are those of the merged directory.
fn topmost(lowers: usize) -> Result<Found, Failed> {
    for index in 0..lowers {
        let path = format!("{}/etc", lower_dir(index));
        let stat = match rustix::fs::lstat(&path) {
            Err(Errno::NOENT) => continue,
            stat => stat.step("stat", &path)?,
        };
        let plain = FileType::from_raw_mode(stat.st_mode) == FileType::Directory && !has_attributes(Path::new(&path));
        return Ok(if plain { Found::Plain(stat) } else { Found::Special });
    }
    Ok(Found::Nowhere)
}

fn has_attributes(path: &Path) -> bool {
    !matches!(rustix::fs::llistxattr(path, &mut [0u8; 0][..]), Ok(0) | Err(Errno::NOTSUP))
}

/// Gives a directory that was made with mode 755, by root, the owner and the mode of another.
pub fn imitate(dir: &str, like: &Stat) -> Result<(), Failed> {
    if like.st_uid != 0 || like.st_gid != 0 {
        let owner = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
        rustix::fs::chownat(CWD, dir, Some(owner.0), Some(owner.1), rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
            .step("chown", dir)?;
    }
    if like.st_mode & 0o7777 != 0o755 {
        rustix::fs::chmod(dir, Mode::from_raw_mode(like.st_mode & 0o7777)).step("chmod", dir)?;
    }
    Ok(())
}
