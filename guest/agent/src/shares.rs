//! Shared directories whose server on the host is gone: the kernel is told, since nobody else would end what waits for it.

use std::fs;
use std::path::{Path, PathBuf};

use tonic::{Code, Status};

use crate::errno::{Failed, Step};
use crate::validate::shown;

/// Each virtio-fs device has a directory here, with the files `tag` and, by our patch to the kernel, `abort`.
const DEVICES: &str = "/sys/fs/virtiofs";

#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error("tag: no shared directory {0}")]
    Missing(String),
    #[error(transparent)]
    Syscall(#[from] Failed),
}

impl From<ShareError> for Status {
    fn from(err: ShareError) -> Self {
        match err {
            ShareError::Missing(_) => Status::new(Code::NotFound, err.to_string()),
            ShareError::Syscall(failed) => failed.into(),
        }
    }
}

/// Ends with ENOTCONN what waits for the device's server, and whatever is asked of it from now on. Takes no longer than the
/// host needs to stop the device: nothing in the guest is waited for.
pub fn abort(tag: &str) -> Result<(), ShareError> {
    abort_in(Path::new(DEVICES), tag)
}

fn abort_in(devices: &Path, tag: &str) -> Result<(), ShareError> {
    let device = find(devices, tag).ok_or_else(|| ShareError::Missing(shown(tag)))?;
    // Not created: a kernel without the file can't do it.
    let file = fs::OpenOptions::new().write(true).open(device.join("abort")).step("open", shown(tag))?;
    rustix::io::write(&file, b"1").step("abort", shown(tag))?;
    Ok(())
}

fn find(devices: &Path, tag: &str) -> Option<PathBuf> {
    let all = fs::read_dir(devices).ok()?.flatten().map(|entry| entry.path());
    all.into_iter().find(|device| {
        let found = fs::read_to_string(device.join("tag")).unwrap_or_default();
        found.strip_suffix('\n') == Some(tag)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_device_with_the_very_tag() {
        let dir = std::env::temp_dir().join(format!("pykata-shares-{}", std::process::id()));
        for (device, tag) in [("0", "fs-auto\n"), ("1", "fs-always\n"), ("2", "images\n")] {
            fs::create_dir_all(dir.join(device)).expect("mkdir");
            fs::write(dir.join(device).join("tag"), tag).expect("write");
        }
        for device in ["0", "1"] {
            fs::write(dir.join(device).join("abort"), "").expect("write");
        }
        abort_in(&dir, "fs-always").expect("abort");
        assert_eq!(fs::read_to_string(dir.join("0/abort")).expect("read"), "");
        assert_eq!(fs::read_to_string(dir.join("1/abort")).expect("read"), "1");
        assert!(matches!(abort_in(&dir, "fs-none"), Err(ShareError::Missing(_))));
        assert!(matches!(abort_in(&dir, ""), Err(ShareError::Missing(_))));
        assert!(matches!(abort_in(&dir, "images"), Err(ShareError::Syscall(_))), "a kernel that can't");
        fs::remove_dir_all(&dir).expect("rm");
        assert!(matches!(abort_in(&dir, "fs-auto"), Err(ShareError::Missing(_))), "a guest without any");
    }
}
