//! The files with names in them of a container in which nothing runs, held open: a guest that goes on from a saved one
//! writes them anew, and to look them up would take it as long as all the rest of becoming another guest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::{Container, inside};
use crate::errno::Failed;
use crate::setup::names::PATHS;

pub struct NameFiles {
    open: Vec<(&'static str, OwnedFd)>,
    /// How many processes had been started in the container by then. Since, nothing has run in it but what was started.
    started: u64,
}

impl NameFiles {
    /// Those that are there and can be written.
    pub fn open(container: &Container) -> Result<Self, Failed> {
        let root = container.root()?;
        let open = |path| Some((path, inside::open_regular_for_writing(root.as_fd(), path).ok()?));
        Ok(Self { open: PATHS.into_iter().filter_map(open).collect(), started: container.processes.started() })
    }

    /// Whether nothing can have put others in their places.
    pub fn are_current(&self, container: &Container) -> bool {
        container.processes.started() == self.started
    }

    /// Whether something had run in the container before they were opened, and may have written to them.
    pub fn may_differ(&self) -> bool {
        self.started > 0
    }

    pub fn get(&self, path: &str) -> Option<BorrowedFd<'_>> {
        self.open.iter().find(|(known, _)| *known == path).map(|(_, file)| file.as_fd())
    }
}

/// Whether a file still begins with what it `was`.
pub fn still_is(file: BorrowedFd<'_>, was: &str) -> Result<bool, Errno> {
    let mut found = vec![0u8; was.len()];
    Ok(rustix::io::pread(file, &mut found[..], 0)? == was.len() && found == was.as_bytes())
}

/// Gives a file this content in the place of what it `was`: who holds it open sees it.
pub fn write(file: BorrowedFd<'_>, was: &str, text: &str) -> Result<(), Errno> {
    rustix::io::pwrite(file, text.as_bytes(), 0)?;
    match text.len() < was.len() {
        true => rustix::fs::ftruncate(file, text.len() as u64),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shorter_text_leaves_nothing_of_the_longer_one() {
        let path = std::env::temp_dir().join(format!("pykata-names-{}", std::process::id()));
        std::fs::write(&path, "a long name\n").expect("write");
        let file = std::fs::File::options().write(true).open(&path).expect("open");
        write(file.as_fd(), "a long name\n", "short\n").expect("written");
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "short\n");
        write(file.as_fd(), "short\n", "long again\n").expect("written");
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "long again\n");
        std::fs::remove_file(path).expect("rm");
    }
}
