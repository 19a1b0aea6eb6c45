//! What tells this guest from others that go on from the same saved machine.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};

use crate::errno::{self, Failed, Step};

/// A file of the guest's that all its containers see, read-only, at the same place.
pub const GENERATION: &str = "/run/pykata/generation";

/// Bytes of randomness that make a machine-id.
pub const MACHINE_ID: usize = 16;

/// A new machine-id (machine-id(5)), from the guest's own randomness.
pub fn machine_id() -> Result<String, Failed> {
    let mut id = [0u8; MACHINE_ID];
    // SAFETY: writes at most that many bytes to the array.
    if unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) } != MACHINE_ID as isize {
        return Err(Failed::new("getrandom", "machine-id", errno::last()));
    }
    Ok(text_of(id))
}

/// One of the host's randomness.
pub fn machine_id_of(random: &[u8]) -> Result<String, Failed> {
    random.try_into().map(text_of).map_err(|_| Failed::new("make", "machine-id", rustix::io::Errno::INVAL))
}

/// A version 4 UUID, as systemd makes it.
fn text_of(mut id: [u8; MACHINE_ID]) -> String {
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    let digit = |four: u8| char::from(b"0123456789abcdef"[usize::from(four)]);
    id.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Writes the generation, in place: containers see this very file, and it never becomes shorter. It stays open for the next.
pub fn set_generation(generation: u64) -> Result<(), Failed> {
    static FILE: OnceLock<OwnedFd> = OnceLock::new();
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    let file = match FILE.get() {
        Some(open) => open,
        None => {
            let file = rustix::fs::open(GENERATION, flags, Mode::from_raw_mode(0o444)).step("open", GENERATION)?;
            FILE.get_or_init(|| file)
        }
    };
    rustix::io::pwrite(file, format!("{generation}\n").as_bytes(), 0).step("write", GENERATION).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_id_is_a_version_4_uuid() {
        assert_eq!(machine_id_of(&[0xff; MACHINE_ID]).expect("good"), "ffffffffffff4fffbfffffffffffffff");
        assert_eq!(machine_id_of(&[0; MACHINE_ID]).expect("good"), "00000000000040008000000000000000");
        assert!(machine_id_of(&[0; 15]).is_err());
    }
}
