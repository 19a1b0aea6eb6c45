//! The files with names in them of a container in which nothing has run yet, held open: a guest that goes on from a saved
//! one writes them anew, and to look them up would take it as long as all the rest of becoming another guest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::{Container, inside};
use crate::errno::Failed;
use crate::setup::names::PATHS;

pub struct NameFiles(Vec<(&'static str, OwnedFd)>);

impl NameFiles {
    /// Those that are there and can be written.
    pub fn open(container: &Container) -> Result<Self, Failed> {
        let root = container.root()?;
        let open = |path| Some((path, inside::open_regular_for_writing(root.as_fd(), path).ok()?));
        Ok(Self(PATHS.into_iter().filter_map(open).collect()))
    }

    pub fn get(&self, path: &str) -> Option<BorrowedFd<'_>> {
        self.0.iter().find(|(known, _)| *known == path).map(|(_, file)| file.as_fd())
    }
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
