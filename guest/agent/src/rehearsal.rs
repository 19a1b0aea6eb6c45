//! The command of a rehearsal: before a guest that goes on from a template is given to somebody, it goes the way of a first
//! command, in a container that nobody gets (pykata/rehearsal.py). What waits there executes the agent's own file once more.
//!
//! It makes the kernel do what it does for most programs, and executes nothing of the container's.

use std::ffi::CStr;

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, open, openat};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Its name among the agent's arguments.
pub const ROLE: &CStr = c"rehearsal";

/// Programs that most images have one of.
const PROGRAMS: [&CStr; 3] = [c"/bin/sh", c"/bin/busybox", c"/usr/bin/env"];
/// What is looked at of one: its header and some more pages.
const LOOKED_AT: usize = 64 * 1024;
const PAGE: usize = 4096;

/// Does it; the exit code.
pub fn run() -> i32 {
    for program in PROGRAMS {
        look_at(program);
    }
    // As a C library does that buffers its output.
    let _ = fstat(rustix::stdio::stdout());
    let _ = rustix::termios::tcgetattr(rustix::stdio::stdout());
    let _ = openat(CWD, c"/no-such-file", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    match rustix::io::write(rustix::stdio::stdout(), b"rehearsed\n") {
        Ok(_) => 0,
        Err(_) => 1,
    }
}

/// As the kernel and a loader do: read, mapped, touched. Files without content have nothing to map. An image may have anything
/// of that name: a FIFO must not keep this waiting.
fn look_at(program: &CStr) {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = open(program, flags, Mode::empty()) else { return };
    let Ok(stat) = fstat(&file) else { return };
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return;
    }
    let size = usize::try_from(stat.st_size).unwrap_or(0).min(LOOKED_AT) / PAGE * PAGE;
    let _ = rustix::io::read(&file, &mut [0u8; 832]);
    if size == 0 {
        return;
    }
    // SAFETY: a new mapping that nothing else knows of, read within its size (the file of a read-only layer doesn't
    // shrink; in a container that nothing else runs in, nobody could), and unmapped once.
    unsafe {
        let flags = MapFlags::PRIVATE;
        let Ok(at) = mmap(std::ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0) else {
            return;
        };
        for page in (0..size).step_by(PAGE) {
            at.cast::<u8>().add(page).read_volatile();
        }
        at.cast::<u8>().write_volatile(0); // a page of its own
        let _ = munmap(at, size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn it_goes_well() {
        assert_eq!(run(), 0);
        look_at(c"/no/such/file");
        look_at(c"/dev/null");
    }

    #[test]
    fn what_is_no_file_keeps_nobody_waiting() {
        let path = std::env::temp_dir().join(format!("pykata-rehearsal-{}", std::process::id()));
        let name = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
        rustix::fs::mkfifoat(CWD, &name, Mode::RUSR | Mode::WUSR).expect("mkfifo");
        look_at(&name);
        std::fs::remove_file(path).expect("rm");
    }
}
