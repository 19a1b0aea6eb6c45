//! The processes of a container that the host has started, by their ids.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::berth::Berth;
use super::detached::Detached;

/// So many detached processes are remembered after their end.
const REMEMBERED: usize = 256;

/// A process that has not been waited for.
#[derive(Clone)]
pub struct Running {
    /// 0: it isn't known yet.
    pub pid: i32,
    pub berth: Arc<Berth>,
    /// The master of its terminal.
    pub terminal: Option<Arc<OwnedFd>>,
    /// It outlives the connection on which it was started.
    pub kept: Arc<AtomicBool>,
}

#[derive(Default)]
pub struct Registry(Mutex<Known>);

#[derive(Default)]
struct Known {
    running: HashMap<String, Running>,
    detached: HashMap<String, Arc<Detached>>,
    /// Those of `detached` that have ended, in that order.
    ended: VecDeque<String>,
    /// How many were ever started.
    started: u64,
}

/// What ran when a process was started.
#[derive(Debug, Clone, Copy)]
pub struct Company {
    others: bool,
    started: u64,
}

impl Registry {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True for an id that can't be given to another process.
    pub fn has(&self, id: &str) -> bool {
        let known = self.known();
        known.running.contains_key(id) || known.detached.contains_key(id)
    }

    pub fn start(&self, id: &str, running: Running) -> Company {
        let mut known = self.known();
        let others = !known.running.is_empty();
        known.running.insert(id.to_owned(), running);
        known.started += 1;
        Company { others, started: known.started }
    }

    /// How many were ever started.
    pub fn started(&self) -> u64 {
        self.known().started
    }

    /// None of them runs.
    pub fn is_quiet(&self) -> bool {
        self.known().running.is_empty()
    }

    /// It runs by now; its PID, and its terminal.
    pub fn runs(&self, id: &str, pid: i32, terminal: Option<Arc<OwnedFd>>) {
        if let Some(running) = self.known().running.get_mut(id) {
            (running.pid, running.terminal) = (pid, terminal);
        }
    }

    /// Whether those that run now outlive their connections.
    pub fn keep_all(&self, keep: bool) {
        self.known().running.values().for_each(|running| running.kept.store(keep, Ordering::Relaxed));
    }

    /// Of all that run.
    pub fn pids(&self) -> Vec<i32> {
        self.known().running.values().map(|running| running.pid).filter(|pid| *pid != 0).collect()
    }

    pub fn get(&self, id: &str) -> Option<Running> {
        self.known().running.get(id).cloned()
    }

    /// It has ended, or is about to.
    pub fn end(&self, id: &str) {
        self.known().running.remove(id);
    }

    /// True when nothing else was running since `company` was taken.
    pub fn was_alone(&self, company: Company) -> bool {
        !company.others && company.started == self.known().started
    }

    pub fn detach(&self, id: &str, detached: Arc<Detached>) {
        self.known().detached.insert(id.to_owned(), detached);
    }

    pub fn detached(&self, id: &str) -> Option<Arc<Detached>> {
        self.known().detached.get(id).cloned()
    }

    /// A detached process has ended; it is remembered for a while.
    pub fn retire(&self, id: &str) {
        let mut known = self.known();
        known.ended.push_back(id.to_owned());
        if known.ended.len() > REMEMBERED
            && let Some(oldest) = known.ended.pop_front()
        {
            known.detached.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_ends_are_remembered() {
        let registry = Registry::default();
        for number in 0..=REMEMBERED {
            let id = number.to_string();
            registry.detach(&id, Arc::new(Detached::new(0)));
            registry.retire(&id);
        }
        assert!(!registry.has("0"));
        assert!(registry.has("1"));
        assert!(registry.detached(&REMEMBERED.to_string()).is_some());
    }
}
