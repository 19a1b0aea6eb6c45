//! The one place where children are waited for. SIGCHLD comes through a signalfd; every pending child is then
//! collected and its status handed to who waits for it. Nothing can be lost: a waiter is registered right after the
//! clone, before the loop runs again.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::WaitOptions;
use tokio::io::Interest;
use tokio::sync::oneshot;

use crate::errno::{Failed, Step};
use crate::process::slots::Slot;
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
    /// For children that somebody else clones, who has the kernel write their PIDs there.
    expected: Mutex<Vec<(Arc<Slot>, oneshot::Sender<Exit>)>>,
    /// Exits that nobody waited for, while somebody may yet come for one.
    unclaimed: Mutex<Unclaimed>,
}

#[derive(Default)]
struct Unclaimed {
    holders: usize,
    exits: HashMap<i32, Exit>,
}

/// Keeps unclaimed exits: of a child whose PID is not known yet.
pub struct Hold<'a>(&'a Reaper);

impl Reaper {
    /// Must be called before the event loop runs after the clone that gave `pid`.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (tx, rx) = oneshot::channel();
        match lock(&self.unclaimed).exits.remove(&pid) {
            Some(exit) => drop(tx.send(exit)),
            None => drop(lock(&self.waiters).insert(pid, tx)),
        }
        rx
    }

    /// From before the clone of a child that somebody else clones: its PID will be in that slot by the time that it runs.
    pub fn expect(&self, pid: Arc<Slot>) -> oneshot::Receiver<Exit> {
        let (tx, rx) = oneshot::channel();
        let mut expected = lock(&self.expected);
        expected.retain(|(_, waiter)| !waiter.is_closed());
        expected.push((pid, tx));
        rx
    }

    /// Who waits for this child.
    fn waiter(&self, pid: i32) -> Option<oneshot::Sender<Exit>> {
        lock(&self.waiters).remove(&pid).or_else(|| {
            let mut expected = lock(&self.expected);
            let index = expected.iter().position(|(slot, _)| slot.get() == pid)?;
            Some(expected.swap_remove(index).1)
        })
    }

    /// From before the clone of a child that somebody else clones, until its PID is known and watched.
    pub fn hold(&self) -> Hold<'_> {
        lock(&self.unclaimed).holders += 1;
        Hold(self)
    }

    /// True until the process has been waited for. While this is true its pid can't belong to another process.
    pub fn is_unreaped(&self, pid: i32) -> bool {
        lock(&self.waiters).contains_key(&pid) || lock(&self.expected).iter().any(|(slot, _)| slot.get() == pid)
    }

    /// Collects a child that has ended, and says whether somebody waited for it. None: there is none.
    pub fn reap(&self) -> Option<bool> {
        let (pid, status) = rustix::process::wait(WaitOptions::NOHANG).ok()??;
        let exit = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => return Some(false),
        };
        let pid = pid.as_raw_pid();
        if let Some(waiter) = self.waiter(pid) {
            return Some(waiter.send(exit).is_ok());
        }
        let mut unclaimed = lock(&self.unclaimed);
        if unclaimed.holders > 0 {
            unclaimed.exits.insert(pid, exit);
        }
        Some(false)
    }

    /// Reaps for ever. `signals` is a signalfd of SIGCHLD.
    pub async fn run(&self, signals: OwnedFd) -> Result<(), Failed> {
        let signals = sys::watch(signals, Interest::READABLE).step("epoll", "signalfd")?;
        loop {
            let mut ready = signals.readable().await.step("wait", "signalfd")?;
            // However many there are, one record stands for them all.
            let _ = rustix::io::read(signals.as_fd(), &mut [0u8; 128]);
            ready.clear_ready();
            while let Some(awaited) = self.reap() {
                if awaited {
                    tokio::task::yield_now().await; // the host is told first: mostly there is no other
                }
            }
        }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut unclaimed = lock(&self.0.unclaimed);
        unclaimed.holders -= 1;
        if unclaimed.holders == 0 {
            unclaimed.exits.clear();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The signalfd that [`Reaper::run`] wants.
pub fn child_signals() -> Result<OwnedFd, Failed> {
    sys::signalfd(libc::SIGCHLD).step("signalfd", "SIGCHLD")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::slots::Slots;
    use crate::sys::Cloned;

    fn child(code: i32) -> i32 {
        // SAFETY: the child ends at once.
        match unsafe { sys::clone_into(0, None) }.expect("clone") {
            Cloned::Child => sys::exit_now(code),
            Cloned::Parent { pid } => pid,
        }
    }

    /// Reaping takes every child of the process, those of other tests, too: it is tried in a process of its own.
    fn alone(test: impl Fn() -> bool) {
        // SAFETY: the child allocates and ends in _exit; no other thread of the test program holds the reaper's locks.
        match unsafe { sys::clone_into(0, None) }.expect("clone") {
            Cloned::Child => sys::exit_now(if test() { 0 } else { 1 }),
            Cloned::Parent { pid } => {
                let pid = rustix::process::Pid::from_raw(pid);
                let (_, status) =
                    rustix::process::waitpid(pid, WaitOptions::empty()).expect("wait").expect("has ended");
                assert_eq!(status.exit_status(), Some(0));
            }
        }
    }

    fn reap_all(reaper: &Reaper, count: usize) {
        let mut left = count;
        while left > 0 {
            left -= usize::from(reaper.reap().is_some());
        }
    }

    #[test]
    fn each_exit_finds_its_waiter() {
        alone(|| {
            let reaper = Reaper::default();
            let mut waiting: Vec<_> = (0..50).map(|code| (code, reaper.watch(child(code)))).collect();
            reap_all(&reaper, 50);
            waiting.iter_mut().all(|(code, exit)| exit.try_recv() == Ok(Exit::Code(*code)))
        });
    }

    #[test]
    fn an_expected_exit_finds_its_waiter() {
        alone(|| {
            let (reaper, slots) = (Reaper::default(), Slots::new().expect("a page"));
            let [one, other] = [(); 2].map(|()| Arc::new(slots.take().expect("a slot")));
            let (mut first, mut second) = (reaper.expect(one.clone()), reaper.expect(other));
            one.set(child(5));
            let known = reaper.is_unreaped(one.get());
            reap_all(&reaper, 1);
            known
                && first.try_recv() == Ok(Exit::Code(5))
                && second.try_recv().is_err()
                && !reaper.is_unreaped(one.get())
        });
    }

    #[test]
    fn a_held_exit_can_be_claimed_late() {
        alone(|| {
            let reaper = Reaper::default();
            let held = reaper.hold();
            let (early, late) = (child(3), child(4));
            reap_all(&reaper, 2);
            let claimed = reaper.watch(early).try_recv() == Ok(Exit::Code(3));
            drop(held);
            claimed && reaper.watch(late).try_recv().is_err()
        });
    }
}
