//! The wall clock, as the host says.

use rustix::time::{ClockId, Timespec};
use tonic::Status;

use crate::errno::Step;
use crate::validate::Invalid;

/// Sets CLOCK_REALTIME. 0 leaves it as it is.
pub fn set(unix_time_ns: i64) -> Result<(), Status> {
    match unix_time_ns {
        0 => return Ok(()),
        ns if ns < 0 => return Err(Invalid::new("unix_time_ns", format!("{ns} is before 1970")).into()),
        _ => {}
    }
    let time = Timespec { tv_sec: unix_time_ns / 1_000_000_000, tv_nsec: unix_time_ns % 1_000_000_000 };
    Ok(rustix::time::clock_settime(ClockId::Realtime, time).step("clock_settime", "realtime")?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn negative_time_is_refused() {
        assert_eq!(super::set(-1).unwrap_err().code(), tonic::Code::InvalidArgument);
        assert!(super::set(0).is_ok());
    }
}
