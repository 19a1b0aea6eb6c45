//! virtio-blk disks by their serial, and those of virtio-pmem, which have none, by their names.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::Status;

use crate::errno::Failed;
use crate::uevent;
use crate::validate::shown;

/// How long a disk may take to appear after the host has named it.
pub const PATIENCE: Duration = Duration::from_secs(10);
const BLOCK: &str = "/sys/block";

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("disk_serial: no disk {serial} appeared within {seconds} s")]
    Missing { serial: String, seconds: u64 },
    #[error(transparent)]
    Syscall(#[from] Failed),
}

impl From<DiskError> for Status {
    fn from(err: DiskError) -> Self {
        match err {
            DiskError::Missing { .. } => Status::failed_precondition(err.to_string()),
            DiskError::Syscall(failed) => failed.into(),
        }
    }
}

/// The device of the disk with this serial; waits for it.
pub async fn find(serial: &str) -> Result<PathBuf, DiskError> {
    let found = uevent::wait_for::<_, DiskError>(Some(PATIENCE), || Ok(look(Path::new(BLOCK), serial))).await?;
    found.ok_or_else(|| DiskError::Missing { serial: shown(serial), seconds: PATIENCE.as_secs() })
}

/// The device of the disk with this serial, if there is one; doesn't wait.
pub fn there(serial: &str) -> Option<PathBuf> {
    look(Path::new(BLOCK), serial)
}

/// Goes through the names that most guests have, in order: each look at a serial is a request to the device, and the
/// first disks are those in use.
fn look(block: &Path, serial: &str) -> Option<PathBuf> {
    if serial.starts_with("pmem") {
        return block.join(serial).exists().then(|| Path::new("/dev").join(serial));
    }
    let usual = ('a'..='z').map(|letter| format!("vd{letter}")).take_while(|name| block.join(name).exists());
    let found = usual.into_iter().find(|name| has_serial(block, name, serial));
    let name = found.or_else(|| {
        let all = fs::read_dir(block).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        all.into_iter().find(|name| name.starts_with("vd") && has_serial(block, name, serial))
    })?;
    Some(Path::new("/dev").join(name))
}

/// Not trimmed but for the newline: the kernel adds one, the serial is the host's.
fn has_serial(block: &Path, name: &str, serial: &str) -> bool {
    let found = fs::read_to_string(block.join(name).join("serial")).unwrap_or_default();
    found.strip_suffix('\n').unwrap_or(&found) == serial
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_virtio_disks_with_the_very_serial() {
        let dir = std::env::temp_dir().join(format!("pykata-block-{}", std::process::id()));
        for (name, serial) in [("vda", "img-1\n"), ("vdb", "img-10"), ("sda", "img-2\n")] {
            fs::create_dir_all(dir.join(name)).expect("mkdir");
            fs::write(dir.join(name).join("serial"), serial).expect("write");
        }
        assert_eq!(look(&dir, "img-1"), Some(PathBuf::from("/dev/vda")));
        assert_eq!(look(&dir, "img-10"), Some(PathBuf::from("/dev/vdb")));
        assert_eq!(look(&dir, "img-2"), None);
        assert_eq!(look(&dir, ""), None);
        fs::create_dir(dir.join("pmem0")).expect("mkdir");
        assert_eq!(look(&dir, "pmem0"), Some(PathBuf::from("/dev/pmem0")));
        assert_eq!(look(&dir, "pmem1"), None);
        fs::remove_dir_all(dir).expect("rm");
    }
}
