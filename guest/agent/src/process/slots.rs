//! Numbers that a forked child leaves to the agent, in memory that both share: cheaper than a message, as the agent has
//! to be woken anyway when the child's end of a pipe closes.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

const COUNT: usize = 1024;

/// A page of numbers, and which of them are free.
pub struct Slots {
    page: &'static [AtomicI32; COUNT],
    free: Mutex<Vec<u16>>,
}

/// One of them, 0 at first.
pub struct Slot {
    slots: Arc<Slots>,
    index: u16,
}

impl Slots {
    pub fn new() -> Result<Arc<Self>, Errno> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let size = COUNT * size_of::<AtomicI32>();
        // SAFETY: a new mapping, which is never taken away again.
        let page = unsafe {
            mmap_anonymous(std::ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)?
        };
        // SAFETY: it is large enough, aligned to a page, zeroed by the kernel, and all access is atomic.
        let page = unsafe { &*page.cast::<[AtomicI32; COUNT]>() };
        Ok(Arc::new(Self { page, free: Mutex::new((0..COUNT as u16).collect()) }))
    }

    pub fn take(self: &Arc<Self>) -> Result<Slot, Errno> {
        let index = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop().ok_or(Errno::AGAIN)?;
        let slot = Slot { slots: self.clone(), index };
        slot.set(0);
        Ok(slot)
    }
}

impl Slot {
    fn word(&self) -> &'static AtomicI32 {
        &self.slots.page[usize::from(self.index)]
    }

    pub fn set(&self, value: i32) {
        self.word().store(value, Ordering::SeqCst);
    }

    pub fn get(&self) -> i32 {
        self.word().load(Ordering::SeqCst)
    }

    /// Another number in place of this one. False: there is none of this.
    pub fn replace(&self, old: i32, new: i32) -> bool {
        self.word().compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// For the kernel to write to.
    pub fn as_ptr(&self) -> *mut i32 {
        self.word().as_ptr()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{self, Cloned};

    #[test]
    fn a_childs_number_arrives() {
        let slot = Slots::new().and_then(|slots| slots.take()).expect("a slot");
        // SAFETY: the child stores a number and ends.
        match unsafe { sys::clone_into(0, None) }.expect("clone") {
            Cloned::Child => {
                slot.set(7);
                sys::exit_now(0)
            }
            Cloned::Parent { pid } => {
                let pid = rustix::process::Pid::from_raw(pid);
                rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).expect("wait");
                assert_eq!(slot.get(), 7);
            }
        }
    }

    #[test]
    fn slots_come_back() {
        let slots = Slots::new().expect("a page");
        let all: Vec<_> = (0..COUNT).map(|_| slots.take().expect("free")).collect();
        assert!(slots.take().is_err());
        drop(all);
        assert_eq!(slots.take().expect("free again").get(), 0);
    }
}
