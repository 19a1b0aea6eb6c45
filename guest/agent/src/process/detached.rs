//! A process that outlives the call that started it: how it ended, and the end of what it wrote.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::proto::Exited;
use crate::validate::Invalid;

/// Most bytes that are kept of what one writes.
pub const MAX_LOG: u32 = 64 * 1024;

pub struct Detached {
    log: Mutex<Log>,
    exit: watch::Sender<Option<Exited>>,
}

/// The last bytes of a stream.
struct Log {
    most: usize,
    bytes: Vec<u8>,
    written: u64,
}

pub fn check_log(size: u32) -> Result<(), Invalid> {
    if size > MAX_LOG {
        return Err(Invalid::new("start.log", format!("{size} bytes; at most {MAX_LOG}")));
    }
    Ok(())
}

impl Detached {
    /// One of which the last `log` bytes are kept.
    pub fn new(log: u32) -> Self {
        let log = Log { most: log as usize, bytes: Vec::new(), written: 0 };
        Self { log: Mutex::new(log), exit: watch::Sender::new(None) }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wrote(&self, data: &[u8]) {
        self.log().push(data);
    }

    /// What is kept, and how much was written in all.
    pub fn written(&self) -> (Vec<u8>, u64) {
        let log = self.log();
        (log.bytes[log.bytes.len().saturating_sub(log.most)..].to_vec(), log.written)
    }

    pub fn ended(&self, exited: Exited) {
        self.exit.send_replace(Some(exited));
    }

    /// How it ended, where it has.
    pub fn exited(&self) -> Option<Exited> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) {
        let _ = self.exit.subscribe().wait_for(Option::is_some).await;
    }
}

impl Log {
    fn push(&mut self, data: &[u8]) {
        self.written += data.len() as u64;
        self.bytes.extend_from_slice(&data[data.len().saturating_sub(self.most)..]);
        if self.bytes.len() > 2 * self.most {
            self.bytes.drain(..self.bytes.len() - self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_end_is_kept(most in 0u32..20, pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..30), 0..20)) {
            let detached = Detached::new(most);
            pieces.iter().for_each(|piece| detached.wrote(piece));
            let all = pieces.concat();
            let (kept, written) = detached.written();
            prop_assert_eq!(written, all.len() as u64);
            prop_assert_eq!(kept.as_slice(), &all[all.len().saturating_sub(most as usize)..]);
        }
    }

    #[tokio::test]
    async fn who_waits_hears_of_the_end() {
        let detached = Detached::new(0);
        let exited = Exited { exit_code: 7, ..Exited::default() };
        tokio::join!(detached.wait(), async { detached.ended(exited) });
        assert_eq!(detached.exited(), Some(exited));
        detached.wait().await;
    }
}
