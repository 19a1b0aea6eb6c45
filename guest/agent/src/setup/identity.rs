//! What tells this guest from others that go on from the same saved machine.

use rustix::fs::{Mode, OFlags};

use crate::errno::{self, Failed, Step};

/// A file of the guest's that all its containers see, read-only, at the same place.
pub const GENERATION: &str = "/run/pykata/generation";

/// A new machine-id (machine-id(5)): a version 4 UUID, as systemd makes it.
pub fn machine_id() -> Result<String, Failed> {
    let mut id = [0u8; 16];
    // SAFETY: writes at most that many bytes to the array.
    if unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) } != 16 {
        return Err(Failed::new("getrandom", "machine-id", errno::last()));
    }
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes the generation, in place: containers see this very file, and it never becomes shorter.
pub fn set_generation(generation: u64) -> Result<(), Failed> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    let file = rustix::fs::open(GENERATION, flags, Mode::from_raw_mode(0o444)).step("open", GENERATION)?;
    rustix::io::pwrite(&file, format!("{generation}\n").as_bytes(), 0).step("write", GENERATION).map(drop)
}
