//! Waiting awake for the next host, on a connection that is parked.
//!
//! Such a guest is saved in a moment, and each that goes on from there finds the host's first call in its port at once. One
//! that was saved asleep has to be woken for it: the idle loop is left, the scheduler finds the agent, epoll tells it
//! where to look. That is a third of all the code between the restore and the answer, and the emulator has to translate
//! each piece of it. So the agent doesn't sleep: it reads until something is there.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::io::Errno;
use tokio::task::yield_now;

/// So often everybody else in the agent has a turn first, whose work would otherwise be done in each clone.
const TURNS: usize = 100;
/// ... and so often it is looked whether something is there: for some seconds. A guest that nobody saves shall go to sleep.
const READS: usize = 5_000_000;

type Turns = Pin<Box<dyn Future<Output = ()> + Send>>;

pub enum Vigil {
    Begins,
    Settles(Turns),
    Over,
}

impl Vigil {
    /// Reads until that gives something else than that there is nothing. None: it is to be waited for as usual.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut read: impl FnMut() -> Result<usize, Errno>,
    ) -> Poll<Option<Result<usize, Errno>>> {
        if let Self::Begins = self {
            *self = Self::Settles(Box::pin(async {
                for _ in 0..TURNS {
                    yield_now().await;
                }
            }));
        }
        let Self::Settles(turns) = self else { return Poll::Ready(None) };
        let reads = if turns.as_mut().poll(cx).is_ready() { READS } else { 1 };
        let found = (0..reads).map(|_| read()).find(|found| !matches!(found, Err(Errno::AGAIN)));
        if found.is_none() && reads == 1 {
            return Poll::Pending;
        }
        *self = Self::Over;
        Poll::Ready(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    async fn waited(nothing: usize) -> (Option<Result<usize, Errno>>, usize) {
        let (mut vigil, mut reads) = (Vigil::Begins, 0);
        let found = poll_fn(|cx| {
            vigil.poll(cx, || {
                reads += 1;
                if reads > nothing { Ok(7) } else { Err(Errno::AGAIN) }
            })
        });
        (found.await, reads)
    }

    #[tokio::test]
    async fn it_reads_until_something_is_there() {
        for nothing in [0, 1, TURNS, 10 * TURNS] {
            assert_eq!(waited(nothing).await, (Some(Ok(7)), nothing + 1));
        }
    }

    #[tokio::test]
    async fn it_ends() {
        let (found, reads) = waited(usize::MAX).await;
        assert_eq!(found, None);
        assert!(reads >= READS);
    }

    #[tokio::test]
    async fn the_others_have_their_turn_before() {
        let others = tokio::spawn(async {
            for _ in 0..TURNS / 2 {
                yield_now().await;
            }
        });
        let mut vigil = Vigil::Begins;
        let found = poll_fn(|cx| vigil.poll(cx, || if others.is_finished() { Ok(1) } else { Err(Errno::AGAIN) }));
        assert_eq!(found.await, Some(Ok(1)));
    }

    #[tokio::test]
    async fn what_went_wrong_is_left_to_others() {
        let mut vigil = Vigil::Begins;
        assert_eq!(poll_fn(|cx| vigil.poll(cx, || Err(Errno::IO))).await, Some(Err(Errno::IO)));
        assert_eq!(poll_fn(|cx| vigil.poll(cx, || Ok(1))).await, None);
    }
}
