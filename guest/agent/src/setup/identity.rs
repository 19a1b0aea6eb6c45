//! What tells this guest from others that go on from the same saved machine.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};

use crate::errno::{self, Failed, Step};

/// A file of the guest's that all its containers see, read-only, at the same place.
pub const GENERATION: &str = "/run/pykata/generation";

/// The same, which containers see in the place of the kernel's boot id: that is chosen when it is read for the first time,
/// and can't be changed any more, so all that go on from a guest in which it was read would have the same.
pub const BOOT_ID: &str = "/run/pykata/boot_id";

/// Bytes of randomness that make a machine-id, and a boot id.
pub const ID: usize = 16;

/// What such an id is made of.
pub type Random = [u8; ID];

/// A new one, from the guest's own randomness.
pub fn random() -> Result<Random, Failed> {
    let mut id = [0u8; ID];
    // SAFETY: writes at most that many bytes to the array.
    if unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) } != ID as isize {
        return Err(Failed::new("getrandom", "id", errno::last()));
    }
    Ok(id)
}

/// A machine-id (machine-id(5)): a version 4 UUID, as systemd makes it.
pub fn machine_id(mut id: Random) -> String {
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    let digit = |four: u8| char::from(b"0123456789abcdef"[usize::from(four)]);
    id.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Writes the generation.
pub fn set_generation(generation: u64) -> Result<(), Failed> {
    static FILE: OnceLock<OwnedFd> = OnceLock::new();
    write(&FILE, GENERATION, &format!("{generation}\n"))
}

/// Writes the boot id, which is made like a machine-id, as the kernel does.
pub fn set_boot_id(id: Random) -> Result<(), Failed> {
    static FILE: OnceLock<OwnedFd> = OnceLock::new();
    write(&FILE, BOOT_ID, &with_hyphens(&machine_id(id)))
}

/// RFC 9562, section 4.
fn with_hyphens(id: &str) -> String {
    format!("{}-{}-{}-{}-{}\n", &id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..])
}

/// Writes a file in place: containers see this very one, and it never becomes shorter. It stays open for the next time.
fn write(file: &OnceLock<OwnedFd>, path: &'static str, text: &str) -> Result<(), Failed> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    let file = match file.get() {
        Some(open) => open,
        None => {
            let made = rustix::fs::open(path, flags, Mode::from_raw_mode(0o444)).step("open", path)?;
            file.get_or_init(|| made)
        }
    };
    rustix::io::pwrite(file, text.as_bytes(), 0).step("write", path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_id_is_a_version_4_uuid() {
        assert_eq!(machine_id([0xff; ID]), "ffffffffffff4fffbfffffffffffffff");
        assert_eq!(machine_id([0; ID]), "00000000000040008000000000000000");
    }
    #[test]
    fn a_boot_id_is_that_with_hyphens() {
        assert_eq!(with_hyphens(&machine_id([0xff; ID])), "ffffffff-ffff-4fff-bfff-ffffffffffff\n");
    }
}
