//! The one place where children are waited for. SIGCHLD comes through a signalfd; every pending child is then
//! collected and its status handed to who waits for it. Nothing can be lost: a waiter is registered right after the
//! clone, before the loop runs again.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

use rustix::process::WaitOptions;
use tokio::io::Interest;
use tokio::sync::oneshot;

use crate::errno::{Failed, Step};
use crate::sys;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    /// The code a shell would report.
    pub fn code(self) -> i32 {
        match self {
            Exit::Code(code) => code & 0xff,
            Exit::Signal(signal) => 128 + signal,
        }
    }

    pub fn signal(self) -> i32 {
        match self {
            Exit::Code(_) => 0,
            Exit::Signal(signal) => signal,
        }
    }
}

#[derive(Default)]
pub struct Reaper {
    waiters: Mutex<HashMap<i32, oneshot::Sender<Exit>>>,
}

impl Reaper {
    /// Must be called before the event loop runs after the clone that gave `pid`.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (tx, rx) = oneshot::channel();
        self.lock().insert(pid, tx);
        rx
    }

    /// True until the process has been waited for. While this is true its pid can't belong to another process.
    pub fn is_unreaped(&self, pid: i32) -> bool {
        self.lock().contains_key(&pid)
    }

    /// Collects every child that has ended. Returns how many.
    pub fn reap(&self) -> usize {
        let mut count = 0;
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            count += 1;
            let exit = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => continue,
            };
            if let Some(waiter) = self.lock().remove(&pid.as_raw_pid()) {
                let _ = waiter.send(exit);
            }
        }
        count
    }

    /// Reaps for ever. `signals` is a signalfd of SIGCHLD.
    pub async fn run(&self, signals: OwnedFd) -> Result<(), Failed> {
        let signals = sys::watch(signals, Interest::READABLE).step("epoll", "signalfd")?;
        loop {
            let mut ready = signals.readable().await.step("wait", "signalfd")?;
            let mut record = [0u8; 128 * 4];
            while rustix::io::read(signals.as_fd(), &mut record).is_ok() {}
            ready.clear_ready();
            self.reap();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, oneshot::Sender<Exit>>> {
        self.waiters.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The signalfd that [`Reaper::run`] wants.
pub fn child_signals() -> Result<OwnedFd, Failed> {
    sys::signalfd(libc::SIGCHLD).step("signalfd", "SIGCHLD")
}
