//! Seeds the kernel's random number generator: snapshots of one guest must not go on with the same numbers.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};

use crate::errno::{self, Failed, Step};

/// How many bytes a request may bring.
pub const LEAST: usize = 32;
pub const MOST: usize = 4096;

const RNDADDENTROPY: libc::Ioctl = 0x4008_5203_u32 as libc::Ioctl;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// `struct rand_pool_info` with room for the largest seed.
#[repr(C)]
struct Pool {
    entropy_bits: libc::c_int,
    size: libc::c_int,
    data: [u8; MOST],
}

/// The device, opened once: a guest that goes on from a saved one is spared that.
fn device() -> Result<&'static OwnedFd, Failed> {
    static DEVICE: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(open) = DEVICE.get() {
        return Ok(open);
    }
    let open =
        rustix::fs::open("/dev/urandom", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).step("open", "urandom")?;
    Ok(DEVICE.get_or_init(|| open))
}

/// Adds and credits the bytes, then makes the generator take its next key from the pool at once.
pub fn add(seed: &[u8]) -> Result<(), Failed> {
    let mut pool = Pool { entropy_bits: (seed.len() * 8) as i32, size: seed.len() as i32, data: [0; MOST] };
    pool.data[..seed.len()].copy_from_slice(seed);
    let random = device()?;
    // SAFETY: the pool has the layout the call reads, `size` bytes of data included.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) } != 0 {
        return Err(Failed::new("ioctl", "RNDADDENTROPY", errno::last()));
    }
    // SAFETY: takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) } != 0 {
        return Err(Failed::new("ioctl", "RNDRESEEDCRNG", errno::last()));
    }
    Ok(())
}
