//! How much of a stream may be sent: what the other side has allowed, less what was sent.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// The window of one stream. At most one task waits for it.
pub struct Window {
    left: AtomicU64,
    grown: Notify,
}

/// The left of a window without a limit.
const UNLIMITED: u64 = u64::MAX;

impl Window {
    /// `size` bytes to begin with; 0: there is no limit.
    pub fn new(size: u32) -> Self {
        let left = if size == 0 { UNLIMITED } else { size.into() };
        Self { left: AtomicU64::new(left), grown: Notify::new() }
    }

    pub fn is_limited(&self) -> bool {
        self.left.load(Ordering::Relaxed) != UNLIMITED
    }

    /// Waits until something may be sent; how much.
    pub async fn open(&self) -> usize {
        loop {
            let left = self.left.load(Ordering::Relaxed);
            if left > 0 {
                return usize::try_from(left).unwrap_or(usize::MAX);
            }
            self.grown.notified().await;
        }
    }

    /// So much was sent.
    pub fn spend(&self, size: usize) {
        self.change(|left| left.saturating_sub(size as u64));
    }

    /// So much more may be sent.
    pub fn grow(&self, size: u32) {
        if size > 0 {
            self.change(|left| left.saturating_add(size.into()).min(UNLIMITED - 1));
            self.grown.notify_one();
        }
    }

    fn change(&self, how: impl Fn(u64) -> u64) {
        let change = |left| if left == UNLIMITED { None } else { Some(how(left)) };
        let _ = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::{Context, Poll, Waker};

    fn now<T>(future: impl Future<Output = T>) -> Option<T> {
        match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[tokio::test]
    async fn closes_and_opens() {
        let window = Window::new(10);
        assert_eq!(now(window.open()), Some(10));
        window.spend(10);
        assert_eq!(now(window.open()), None);
        window.grow(0);
        assert_eq!(now(window.open()), None);
        window.grow(3);
        assert_eq!(window.open().await, 3);
    }

    #[tokio::test]
    async fn a_waiter_is_woken() {
        let window = Window::new(1);
        window.spend(1);
        let (size, ()) = tokio::join!(window.open(), async { window.grow(7) });
        assert_eq!(size, 7);
    }

    #[test]
    fn no_limit_stays_none() {
        let window = Window::new(0);
        window.spend(usize::MAX);
        window.grow(1);
        assert!(!window.is_limited());
        assert_eq!(now(window.open()), Some(usize::MAX));
    }

    #[test]
    fn never_overflows_into_no_limit() {
        let window = Window::new(u32::MAX);
        (0..3).for_each(|_| window.change(|_| UNLIMITED - 2));
        window.grow(u32::MAX);
        assert!(window.is_limited());
    }
}
