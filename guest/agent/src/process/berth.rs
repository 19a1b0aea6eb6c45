//! Where a process of the host's lives with all its descendants: a cgroup of its own, below the container's. It is used
//! by one after the other, which may be made by the stem that lives in it, too.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Plan;
use super::stem::Stem;
use super::streams::Theirs;
use crate::cgroup::Cgroup;

pub struct Berth {
    cgroup: Cgroup,
    stem: Mutex<Option<Arc<Stem>>>,
}

impl Deref for Berth {
    type Target = Cgroup;

    fn deref(&self) -> &Cgroup {
        &self.cgroup
    }
}

impl Berth {
    pub fn new(cgroup: Cgroup) -> Self {
        Self { cgroup, stem: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Stem>>> {
        self.stem.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn stem(&self) -> Option<Arc<Stem>> {
        self.lock().clone()
    }

    pub fn set_stem(&self, stem: Stem) {
        *self.lock() = Some(Arc::new(stem));
    }

    /// Without this the stem ends, as soon as nobody talks to it any more.
    pub fn take_stem(&self) -> Option<Arc<Stem>> {
        self.lock().take()
    }

    /// Has the stem make a process with these streams. None: there is none that could.
    pub fn ask(&self, plan: &Plan, streams: &Theirs) -> Option<Arc<Stem>> {
        let stem = self.stem()?;
        match stem.ask(plan, streams) {
            Ok(asked) => asked.then_some(stem),
            Err(_) => {
                self.take_stem();
                None
            }
        }
    }

    /// No process is in it any more but its stem.
    pub fn is_free(&self) -> bool {
        match self.stem() {
            Some(stem) => stem.is_alone(),
            None => self.cgroup.is_empty(),
        }
    }
}
