//! What a process does that waits for the first command of a guest that will be saved: it looks up all that the search for
//! a command may come across. The kernel then has in memory what it would have to find out in each guest that goes on from
//! there, by code that is run for the first time.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Names that are looked up at most; more would take much memory and time.
const MOST: usize = 2000;

/// Each name in the directories of a PATH, in the order in which a search for it looks there. Nothing is executed.
pub fn explore(path: &str) {
    let dirs: Vec<&Path> = path.split(':').map(Path::new).filter(|dir| dir.is_absolute()).collect();
    for name in names(&dirs) {
        let _ = dirs.iter().find(|dir| dir.join(OsStr::from_bytes(&name)).exists());
    }
    // The C library of many a program begins with that, and /proc remembers it for this process.
    let _ = std::fs::read_link("/proc/self/exe");
}

fn names(dirs: &[&Path]) -> BTreeSet<Vec<u8>> {
    let entries = dirs.iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flat_map(Iterator::flatten);
    entries.map(|entry| entry.file_name().as_bytes().to_vec()).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_directories_are_found_once() {
        let dir = std::env::temp_dir().join(format!("pykata-explore-{}", std::process::id()));
        let (one, other) = (dir.join("one"), dir.join("other"));
        for file in [one.join("a"), one.join("b"), other.join("b"), other.join("c")] {
            std::fs::create_dir_all(file.parent().expect("has one")).expect("mkdir");
            std::fs::write(file, "").expect("write");
        }
        let found = names(&[&one, &dir.join("none"), &other]);
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [b"a", b"b", b"c"]);
        explore(&format!("{}:relative:{}", one.display(), other.display()));
        std::fs::remove_dir_all(dir).expect("rm");
    }
}
