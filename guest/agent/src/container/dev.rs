//! The container's /dev. Its device files are mounts of the guest's own: the rest of the container need not have any
//! devices, and its root file system hasn't.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, makedev, mknodat};

use super::config::ContainerMount;
use super::inside::{self, Kind};
use crate::errno::{Failed, Step};
use crate::mounts;
use crate::oci;

const DEFAULT: [&str; 6] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];
const LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];
/// Where nodes for the devices of an OCI specification are made, in init's own mount namespace.
const NODES: &str = "/mnt";

/// Detached mounts of all devices, with their paths in the container.
pub fn open_sources(devices: &[oci::Device]) -> Result<Vec<(String, OwnedFd)>, Failed> {
    let mut out = Vec::with_capacity(DEFAULT.len() + devices.len());
    for path in DEFAULT {
        if !devices.iter().any(|device| device.path == path) {
            out.push((path.to_owned(), mounts::bind_path(path, false)?));
        }
    }
    if !devices.is_empty() {
        mounts::mount_at("tmpfs", "devices", NODES, &["mode=755", "size=64k"])?;
        for (index, device) in devices.iter().enumerate() {
            out.push((device.path.clone(), node(&format!("{NODES}/{index}"), device)?));
        }
    }
    Ok(out)
}

fn node(path: &str, device: &oci::Device) -> Result<OwnedFd, Failed> {
    let kind = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        _ => return Err(Failed::new("device type", &device.path, rustix::io::Errno::INVAL)),
    };
    let mode = Mode::from_raw_mode(device.file_mode.unwrap_or(0o666) & 0o7777);
    let number = makedev(device.major as u32, device.minor as u32);
    mknodat(rustix::fs::CWD, path, kind, mode, number).step("mknod", &device.path)?;
    rustix::fs::chmod(path, mode).step("chmod", &device.path)?;
    let owner = (device.uid.unwrap_or(0), device.gid.unwrap_or(0));
    if owner != (0, 0) {
        let owner = (rustix::fs::Uid::from_raw(owner.0), rustix::fs::Gid::from_raw(owner.1));
        rustix::fs::chown(path, Some(owner.0), Some(owner.1)).step("chown", &device.path)?;
    }
    mounts::bind_path(path, false)
}

/// Puts the devices and the usual links in place.
pub fn populate(
    root: BorrowedFd<'_>,
    devices: Vec<(String, OwnedFd)>,
    mounts: &[ContainerMount],
) -> Result<(), Failed> {
    for (path, device) in devices {
        match inside::make(root, &path, Kind::File) {
            Ok(target) => crate::mounts::attach(device.as_fd(), target.as_fd(), &path)?,
            // A read-only image without its own /dev mount can't have what it doesn't bring along.
            Err(failed) if failed.errno == rustix::io::Errno::ROFS => {}
            Err(failed) => return Err(failed),
        }
    }
    let mounted = |path: &str| mounts.iter().any(|mount| mount.destination == path);
    if !mounted("/dev") {
        return Ok(());
    }
    let dev = inside::find_exact(root, "/dev").step("open", "/dev")?;
    for (name, target) in LINKS {
        let _ = rustix::fs::symlinkat(target, &dev, name);
    }
    if mounted("/dev/pts") {
        let _ = rustix::fs::symlinkat("pts/ptmx", &dev, "ptmx");
    }
    Ok(())
}
