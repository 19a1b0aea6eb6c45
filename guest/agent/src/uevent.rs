//! The kernel's device events. A device that is looked for may not be there yet: one subscribes, looks, and waits for
//! the next event, so that nothing is missed and nothing polled.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

use crate::errno::{Failed, Step};
use crate::sys;

pub struct Uevents {
    socket: AsyncFd<OwnedFd>,
}

impl Uevents {
    pub fn subscribe() -> Result<Self, Failed> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::KOBJECT_UEVENT),
        )
        .step("socket", "uevents")?;
        rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, 1)).step("bind", "uevents")?;
        Ok(Self { socket: sys::watch(socket, Interest::READABLE).step("epoll", "uevents")? })
    }

    /// Waits until something happened; several events count as one.
    pub async fn changed(&self) -> Result<(), Failed> {
        let mut ready = self.socket.readable().await.step("wait", "uevents")?;
        let mut event = [0u8; 4096];
        // ENOBUFS (events were dropped) also ends the loop: the caller looks again anyway.
        while rustix::io::read(self.socket.as_fd(), &mut event).is_ok() {}
        ready.clear_ready();
        Ok(())
    }
}

/// Calls `look` until it finds something, at once and after each event. `None` when `patience` is over.
pub async fn wait_for<T, E: From<Failed>>(
    patience: Option<Duration>,
    mut look: impl FnMut() -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    if let Some(found) = look()? {
        return Ok(Some(found));
    }
    let deadline = patience.map(|p| Instant::now() + p);
    let events = Uevents::subscribe()?;
    loop {
        if let Some(found) = look()? {
            return Ok(Some(found));
        }
        match deadline {
            None => events.changed().await?,
            Some(deadline) => match timeout_at(deadline, events.changed()).await {
                Ok(changed) => changed?,
                Err(_) => return look(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn gives_up_at_the_deadline() {
        let found: Option<()> =
            wait_for::<_, Failed>(Some(Duration::from_millis(5)), || Ok(None)).await.expect("no failure");
        assert_eq!(found, None);
    }

    #[tokio::test]
    async fn finds_at_once_without_subscribing() {
        let found = wait_for::<_, Failed>(Some(Duration::ZERO), || Ok(Some(7))).await.expect("no failure");
        assert_eq!(found, Some(7));
    }
}
