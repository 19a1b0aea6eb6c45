//! What a stem lets the agent know without a message, in memory that both share.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::io::Errno;

use super::super::slots::{Slot, Slots};

/// How far an order is, by the number of the order: older ones say nothing any more.
const PENDING: i32 = 0;
const DONE: i32 = 1;
/// The agent waits for a message.
const ASKED: i32 = 2;
const STATES: i32 = 4;
/// Numbers of orders begin anew here.
const ORDERS: i32 = 1 << 20;

pub struct Told {
    /// Of the process that is made: its PID in the guest, from before it runs.
    pub pid: Arc<Slot>,
    /// Its PID in the container, from just before it executes the command.
    pub here: Slot,
    state: Slot,
    /// Orders so far. Each side counts for itself.
    order: AtomicI32,
}

impl Told {
    pub fn new(slots: &Arc<Slots>) -> Result<Self, Errno> {
        let (pid, here, state) = (slots.take()?, slots.take()?, slots.take()?);
        Ok(Self { pid: Arc::new(pid), here, state, order: AtomicI32::new(0) })
    }

    fn state(&self, what: i32) -> i32 {
        self.order.load(Ordering::Relaxed) * STATES + what
    }

    fn count(&self) {
        let next = (self.order.load(Ordering::Relaxed) + 1) % ORDERS;
        self.order.store(next, Ordering::Relaxed);
    }

    /// The agent gives the next order.
    pub fn begin(&self) {
        self.count();
        self.pid.set(0);
        self.here.set(0);
        self.state.set(self.state(PENDING));
    }

    /// The stem takes the next order.
    pub fn take(&self) {
        self.count();
    }

    /// The stem has done it. True: the agent wants a message.
    pub fn done(&self) -> bool {
        let done = self.state.replace(self.state(PENDING), self.state(DONE));
        !done && self.state.get() == self.state(ASKED)
    }

    /// The agent wants to know when it is done. False: it is.
    pub fn ask(&self) -> bool {
        self.state.replace(self.state(PENDING), self.state(ASKED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::ManuallyDrop;

    /// As the two sides of a fork have it.
    fn both() -> (Told, ManuallyDrop<Told>) {
        let told = Told::new(&Slots::new().expect("a page")).expect("slots");
        // SAFETY: the copy is never dropped, and ends before what it is a copy of.
        let copy = unsafe { std::ptr::read(&raw const told) };
        (told, ManuallyDrop::new(copy))
    }

    #[test]
    fn a_message_comes_if_and_only_if_it_is_waited_for() {
        let (agent, stem) = both();
        for _ in 0..3 {
            agent.begin();
            stem.take();
            assert!(!stem.done());
            assert!(!agent.ask());
            agent.begin();
            stem.take();
            assert!(agent.ask());
            assert!(stem.done());
        }
    }

    #[test]
    fn an_old_order_says_nothing_about_the_next() {
        let (agent, stem) = both();
        agent.begin();
        stem.take();
        agent.begin();
        assert!(!stem.done());
        assert!(agent.ask());
        stem.take();
        assert!(stem.done());
    }

    #[test]
    fn what_is_asked_for_the_next_is_no_answer_to_the_old() {
        let (agent, stem) = both();
        agent.begin();
        stem.take();
        agent.begin();
        assert!(agent.ask());
        assert!(!stem.done());
        stem.take();
        assert!(stem.done());
    }
}
