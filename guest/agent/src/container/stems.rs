//! The stems of a container: which processes are worth one, and when it is made.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;

use super::{Container, lock};
use crate::agent::Agent;
use crate::errno::Failed;
use crate::log;
use crate::process::berth::Berth;
use crate::process::stem::{Kind, Stem};
use crate::stdio::{self, Reporting};

/// So many of a container's processes that run on may keep the stems they were made by.
const MOST_STEMS: usize = 8;

/// After so many stems that died before they were of use, no more are made.
const USELESS: u64 = 5;

/// In so many containers stems are made before the guest is saved: that takes time which nobody wants to wait for.
const MOST_AHEAD: usize = 4;

/// One that takes longer to become ready goes on with that in whoever goes on from the saved guest.
const READY: Duration = Duration::from_secs(1);

/// Before the guest is saved: has the next process of each container find a stem. Those that go on from there have all
/// code still to be translated, and to make a process without a stem takes as much of it as all the rest of a command.
pub async fn plant_all(agent: &Agent) {
    let mut growing = Vec::new();
    for container in agent.containers() {
        match container.plant_ahead(agent) {
            Ok(ready) => growing.extend(ready),
            Err(failed) => log!("container {}: {failed}", container.id),
        }
        if growing.len() == MOST_AHEAD {
            break;
        }
    }
    for ready in growing {
        let _ = timeout(READY, ready.read()).await;
    }
}

impl Container {
    /// After a process has ended: makes a stem for the next one, if this one was like the one before it.
    pub fn plant(self: &Arc<Self>, agent: &Agent, kind: Kind) {
        let again = lock(&self.last).replace(kind.clone()).is_some_and(|last| last == kind);
        let spare = lock(&self.spare).clone().filter(|_| again);
        if let Some(spare) = spare {
            self.grow(agent, &spare, kind);
        }
    }

    /// Makes one for the next process, should it be like the last. What is given ends when that is ready.
    fn plant_ahead(self: &Arc<Self>, agent: &Agent) -> Result<Option<Reporting>, Failed> {
        let last = lock(&self.last).clone();
        let Some(kind) = last.filter(|_| self.stems.is_some() && self.is_alive()) else { return Ok(None) };
        let (ready, reporter) = stdio::report_pipe()?; // the stem has it until it has closed all but what it needs
        let berth = self.next_berth()?;
        let grows = self.grow(agent, &berth, kind);
        self.return_berth(berth);
        drop(reporter);
        Ok(grows.then_some(ready))
    }

    /// Makes a stem that lives there, unless there is one. Whether one was made.
    fn grow(self: &Arc<Self>, agent: &Agent, berth: &Berth, kind: Kind) -> bool {
        let few = self.stems.is_some() && self.count_stems() < MOST_STEMS;
        if !few || !self.is_alive() || berth.stem().is_some_and(|stem| stem.is_of(&kind)) {
            return false;
        }
        drop(berth.take_stem());
        if self.useless.fetch_add(1, Ordering::Relaxed) >= USELESS {
            return false;
        }
        match Stem::new(agent, self, berth, kind) {
            Ok(stem) => berth.set_stem(stem),
            Err(failed) => {
                log!("container {}: {failed}", self.id);
                return false;
            }
        }
        true
    }
    /// One was of use.
    pub fn stem_works(&self) {
        self.useless.store(0, Ordering::Relaxed);
    }

    pub fn count_stems(&self) -> usize {
        self.stems.as_ref().map_or(0, |stems| Arc::strong_count(stems) - 1)
    }

    /// Waits for the end of the stem that had nothing to do. Its mounts are the container's.
    pub(super) async fn uproot(&self) {
        let spare = lock(&self.spare).take();
        if let Some(stem) = spare.and_then(|spare| spare.take_stem()).and_then(Arc::into_inner) {
            stem.gone().await;
        }
    }
}
