//! What the agent knows: the guest's setup, its containers, and who waits for which process.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tonic::Status;

use crate::boot::Guest;
use crate::container::Container;
use crate::errno::{Failed, Step};
use crate::process::Spare;
use crate::process::patience::Patience;
use crate::process::slots::Slots;
use crate::reaper::Reaper;
use crate::setup::Ready;
use crate::setup::late::Unwritten;
use crate::sys;

pub struct Agent {
    pub guest: Guest,
    pub reaper: Reaper,
    pub slots: Arc<Slots>,
    pub pipes: Spare,
    pub patience: Patience,
    /// Of the guest that it has become.
    pub unwritten: Unwritten,
    /// How often the guest was cloned.
    generation: AtomicU64,
    /// It runs before everybody else who wants to.
    is_first: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    setup: Setup,
    containers: HashMap<String, Slot>,
}

#[derive(Default)]
enum Setup {
    #[default]
    None,
    Running,
    Done(Arc<Ready>),
}

enum Slot {
    /// The id is taken, the container is being made. Closed when that has ended, well or not.
    Coming(watch::Receiver<()>),
    Ready(Arc<Container>),
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("Setup has been called before")]
    SetupTwice,
    #[error("Setup has not been called yet")]
    NoSetup,
    #[error("container {0}: exists already")]
    Exists(String),
    #[error("container {0}: no such container")]
    NotFound(String),
    #[error("container {0}: not ready yet")]
    NotReady(String),
}

impl From<StateError> for Status {
    fn from(err: StateError) -> Self {
        let message = err.to_string();
        match err {
            StateError::SetupTwice | StateError::NoSetup | StateError::NotReady(_) => {
                Status::failed_precondition(message)
            }
            StateError::Exists(_) => Status::already_exists(message),
            StateError::NotFound(_) => Status::not_found(message),
        }
    }
}

impl Agent {
    pub fn new(guest: Guest, slots: Arc<Slots>, patience: Patience) -> Self {
        Self {
            guest,
            reaper: Reaper::default(),
            slots,
            pipes: Spare::default(),
            patience,
            unwritten: Unwritten::default(),
            generation: AtomicU64::new(0),
            is_first: AtomicBool::default(),
            state: Mutex::default(),
        }
    }

    /// The guest's generation; a new one where it has become another guest.
    pub fn generation(&self, is_another: bool) -> u64 {
        let step = u64::from(is_another);
        self.generation.fetch_add(step, Ordering::Relaxed) + step
    }

    /// Has the agent run before every other process, or not any more. In a guest that goes on from a saved one nothing shall
    /// be executed before it has become another.
    pub fn go_first(&self, first: bool) -> Result<(), Failed> {
        if self.is_first.swap(first, Ordering::Relaxed) != first {
            sys::set_realtime(first).step("schedule", "agent")?;
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the one call of Setup. A call that failed may be made again.
    pub fn begin_setup(&self) -> Result<(), StateError> {
        let mut state = self.state();
        match state.setup {
            Setup::None => {
                state.setup = Setup::Running;
                Ok(())
            }
            Setup::Running | Setup::Done(_) => Err(StateError::SetupTwice),
        }
    }

    pub fn end_setup(&self, ready: Option<Arc<Ready>>) {
        self.state().setup = match ready {
            Some(ready) => Setup::Done(ready),
            None => Setup::None,
        };
    }

    pub fn ready(&self) -> Result<Arc<Ready>, StateError> {
        match &self.state().setup {
            Setup::Done(ready) => Ok(ready.clone()),
            _ => Err(StateError::NoSetup),
        }
    }

    /// Takes an id for a container that is about to be made.
    pub fn claim(self: &Arc<Self>, id: &str) -> Result<Claim, StateError> {
        let mut state = self.state();
        if state.containers.contains_key(id) {
            return Err(StateError::Exists(id.to_owned()));
        }
        let (done, coming) = watch::channel(());
        state.containers.insert(id.to_owned(), Slot::Coming(coming));
        Ok(Claim { agent: self.clone(), id: id.to_owned(), _done: done })
    }

    /// The container with this id once it is no longer being made.
    pub async fn settled(&self, id: &str) -> Option<Arc<Container>> {
        loop {
            let mut coming = match self.state().containers.get(id)? {
                Slot::Ready(container) => return Some(container.clone()),
                Slot::Coming(coming) => coming.clone(),
            };
            while coming.changed().await.is_ok() {}
        }
    }

    pub fn is_current(&self, container: &Arc<Container>) -> bool {
        matches!(self.state().containers.get(&container.id), Some(Slot::Ready(known)) if Arc::ptr_eq(known, container))
    }

    /// Gives the id free.
    pub fn forget(&self, id: &str) {
        self.state().containers.remove(id);
    }

    pub fn container(&self, id: &str) -> Result<Arc<Container>, StateError> {
        match self.state().containers.get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            Some(Slot::Coming(_)) => Err(StateError::NotReady(id.to_owned())),
            None => Err(StateError::NotFound(id.to_owned())),
        }
    }

    pub fn containers(&self) -> Vec<Arc<Container>> {
        let state = self.state();
        let ready = |slot: &Slot| match slot {
            Slot::Ready(container) => Some(container.clone()),
            Slot::Coming(_) => None,
        };
        state.containers.values().filter_map(ready).collect()
    }
}

/// An id that is taken for a container to come. Dropped without one, the id is free again.
pub struct Claim {
    agent: Arc<Agent>,
    id: String,
    _done: watch::Sender<()>,
}

impl Claim {
    pub fn publish(self, container: &Arc<Container>) {
        self.agent.state().containers.insert(self.id.clone(), Slot::Ready(container.clone()));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.agent.state();
        if matches!(state.containers.get(&self.id), Some(Slot::Coming(_))) {
            state.containers.remove(&self.id);
        }
    }
}
