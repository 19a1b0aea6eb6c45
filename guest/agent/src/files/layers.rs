//! The layers of a container's root, as its init keeps them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use crate::container::Container;
use crate::errno::{Failed, Step};
use crate::sys;

const OPEN: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

pub struct Layers {
    /// The writable one first, then those below it, topmost first; empty if nothing can be written.
    open: Vec<OwnedFd>,
    /// Where something is mounted in the container: places that may have been made for that.
    pub mounted: Vec<Vec<u8>>,
}

impl Layers {
    /// With the agent's own view of /proc. The numbers of its descriptors ascend.
    pub fn open(container: &Container) -> Result<Self, Failed> {
        let text = std::fs::read_to_string(container.mountinfo()).step("read", "mountinfo")?;
        let kept = container.kept_layers();
        let mut numbers: Vec<u32> = std::fs::read_dir(&kept)
            .step("open", "layers")?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let open = |number: u32| rustix::fs::open(format!("{kept}/{number}"), OPEN, Mode::empty());
        let layers: Vec<OwnedFd> = numbers.into_iter().map(open).collect::<Result<_, _>>().step("open", "layer")?;
        Ok(Self { open: sys::ascending(&layers).step("dup", "layers")?, mounted: mount_points(&text) })
    }

    pub fn all(&self) -> &[OwnedFd] {
        &self.open
    }

    pub fn upper(&self) -> Option<BorrowedFd<'_>> {
        self.open.first().map(AsFd::as_fd)
    }

    /// Those below it.
    pub fn lowers(&self) -> &[OwnedFd] {
        self.open.get(1..).unwrap_or_default()
    }
}

/// The fifth field of each line: proc_pid_mountinfo(5). Spaces and the like in it are escaped.
fn mount_points(text: &str) -> Vec<Vec<u8>> {
    let point = |line: &str| Some(unescaped(line.split(' ').nth(4)?.as_bytes()));
    text.lines().filter_map(point).collect()
}

fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let code = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| byte == b'\\') {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_the_fifth_field() {
        let text = "36 35 98:0 / /mnt\\040a rw - ext3 /dev/root rw\n37 36 0:5 / /proc rw shared:1 - proc proc rw\n";
        assert_eq!(mount_points(text), [b"/mnt a".to_vec(), b"/proc".to_vec()]);
    }
}
