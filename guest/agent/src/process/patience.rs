//! How long the news of a start wait for those of an end: one timer for all who wait. For a timer of its own that comes
//! before all others the event loop has to be woken, which takes it one more round, and a command as long as that.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::errno::{Failed, Step};
use crate::sys;

/// Nanoseconds to a multiple of which all wait.
const STEP: i64 = 5_000_000;

pub struct Patience {
    timer: AsyncFd<OwnedFd>,
    /// When it fires, in nanoseconds of the monotonic clock.
    armed: Mutex<Option<i64>>,
    fired: Notify,
}

impl Patience {
    pub fn new() -> Result<Self, Errno> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = sys::watch(timerfd_create(TimerfdClockId::Monotonic, flags)?, Interest::READABLE)?;
        Ok(Self { timer, armed: Mutex::default(), fired: Notify::new() })
    }

    /// Waits for at least that long, and up to 5 ms longer; while [`Self::run`] runs.
    pub async fn wait(&self, duration: Duration) {
        let end = sys::now_ns(libc::CLOCK_MONOTONIC) + i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX / 2);
        let end = (end + STEP - 1) / STEP * STEP;
        let mut fired = Box::pin(self.fired.notified());
        while self.arm(end) {
            fired.as_mut().await;
            fired.set(self.fired.notified());
        }
    }

    /// Has the timer fire then at the latest. False: that is over.
    fn arm(&self, end: i64) -> bool {
        if sys::now_ns(libc::CLOCK_MONOTONIC) >= end {
            return false;
        }
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        if armed.is_none_or(|armed| armed > end) {
            let value = Timespec { tv_sec: end / 1_000_000_000, tv_nsec: end % 1_000_000_000 };
            let interval = Timespec { tv_sec: 0, tv_nsec: 0 };
            let timer = Itimerspec { it_interval: interval, it_value: value };
            // It takes any time that there is.
            let _ = timerfd_settime(self.timer.as_fd(), TimerfdTimerFlags::ABSTIME, &timer);
            *armed = Some(end);
        }
        true
    }

    /// Wakes who waits, for ever.
    pub async fn run(&self) -> Result<(), Failed> {
        loop {
            let mut ready = self.timer.readable().await.step("wait", "timer")?;
            let _ = rustix::io::read(self.timer.as_fd(), &mut [0u8; 8]);
            ready.clear_ready();
            *self.armed.lock().unwrap_or_else(PoisonError::into_inner) = None;
            self.fired.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_waits_as_long_as_it_shall() {
        let patience = Patience::new().expect("a timer");
        let after = async |ms: u64| {
            let began = sys::now_ns(libc::CLOCK_MONOTONIC);
            patience.wait(Duration::from_millis(ms)).await;
            sys::now_ns(libc::CLOCK_MONOTONIC) - began >= ms as i64 * 1_000_000
        };
        let all = async { tokio::join!(after(30), after(1), after(1), after(12)) };
        tokio::select! {
            waited = all => assert_eq!(waited, (true, true, true, true)),
            _ = patience.run() => panic!("the timer has failed"),
        }
    }
}
