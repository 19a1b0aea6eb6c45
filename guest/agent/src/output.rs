//! What a process writes, on its way to the host: each stream for itself, so that one that the host doesn't take never
//! holds up the other.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::proto::run_response::Response;
use crate::proto::{Ended, RunResponse, Start};
use crate::run::Answers;
use crate::stdio::{self, Fill, Output, Piece};
use crate::sys;
use crate::transport::outlet::{self, Flag, Outlet};
use crate::window::Window;

/// How long output may gather that comes right after other output.
const GATHER: Duration = Duration::from_millis(1);
/// How long after the end of a stream the end of the other one or the exit may come, so that it isn't told separately.
const MOMENT: Duration = Duration::from_millis(2);
/// How often a stream that nobody wants is emptied, where it brings much: it must not cost what a stream to the host does.
const LISTLESS: Duration = Duration::from_millis(20);

/// A stream that has brought so much goes on in bulk frames. What is short never gets there.
const MUCH: usize = 256 * 1024;

/// From so much on, what is in a pipe is moved to the port rather than read.
const MUCH_AT_ONCE: usize = 32 * 1024;

/// How a stream goes to the host.
pub struct Way {
    /// What the host takes before it says that it takes more; 0: there is no limit.
    pub window: u32,
    pub bulk: Option<Bulk>,
}

/// The way for much.
pub struct Bulk {
    outlet: Arc<Outlet>,
    call: u32,
}

impl Bulk {
    /// Where the host knows of it.
    pub fn new(outlet: &Arc<Outlet>, start: &Start) -> Option<Self> {
        let possible = start.bulk != 0 && start.window != 0;
        possible.then(|| Self { outlet: outlet.clone(), call: start.bulk })
    }
}

/// One stream of a process.
pub struct Side {
    output: Output,
    /// Read already, and not sent yet.
    ready: Mutex<VecDeque<Bytes>>,
    pub window: Window,
    wrap: fn(Bytes) -> Response,
    end: Ended,
    flag: Flag,
    bulk: Option<Bulk>,
    /// Bytes that went by gRPC; from `MUCH` on the rest goes in bulk.
    sent: AtomicUsize,
    /// There is nothing more to come of it, and the host knows that.
    over: AtomicBool,
    told: AtomicBool,
}

impl Side {
    pub fn stdout(output: Output, way: Way) -> Self {
        Self::new(output, way, Response::Stdout, Flag::Stdout)
    }

    pub fn stderr(output: Output, way: Way) -> Self {
        Self::new(output, way, Response::Stderr, Flag::Stderr)
    }

    fn new(output: Output, way: Way, wrap: fn(Bytes) -> Response, flag: Flag) -> Self {
        Self {
            window: Window::new(way.window),
            bulk: way.bulk.filter(|_| !output.is_terminal()),
            output,
            ready: Mutex::default(),
            wrap,
            end: Ended { stdout: flag == Flag::Stdout, stderr: flag == Flag::Stderr },
            flag,
            sent: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            told: AtomicBool::new(false),
        }
    }

    /// The way for much, once it is taken.
    fn bulk(&self) -> Option<&Bulk> {
        self.bulk.as_ref().filter(|_| self.sent.load(Ordering::Relaxed) == usize::MAX)
    }

    /// Sent by gRPC. True: the rest goes in bulk, which the host has still to be told.
    fn count(&self, size: usize) -> bool {
        let sent = self.sent.load(Ordering::Relaxed).saturating_add(size).min(usize::MAX - 1);
        self.sent.store(sent, Ordering::Relaxed);
        sent >= MUCH && self.bulk.is_some()
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn ready(&self) -> MutexGuard<'_, VecDeque<Bytes>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece, of at most `most` bytes, without waiting.
    fn next(&self, most: usize) -> Piece {
        let mut ready = self.ready();
        if ready.is_empty() && !self.output.try_read_much(&mut ready) {
            return self.output.take(most);
        }
        match ready.pop_front() {
            Some(mut data) if data.len() > most => {
                let rest = data.split_off(most);
                ready.push_front(rest);
                Piece::Data(data)
            }
            Some(data) => Piece::Data(data),
            None => Piece::Nothing,
        }
    }

    /// Waits until there is something to send, or the end.
    ///
    /// A message costs much the same whatever its size. Who writes on and on in small pieces is therefore left to write
    /// for a moment; on one CPU the agent would otherwise be woken by each.
    async fn gather(&self, next: &mut Option<Instant>) {
        if !self.ready().is_empty() {
            return;
        }
        self.output.readable().await;
        if let Some(next) = next.filter(|next| Instant::now() < *next && self.output.waiting() < stdio::PIECE) {
            tokio::time::sleep_until(next).await;
        }
        *next = Some(Instant::now() + GATHER);
    }

    /// Sends what comes until the end of the stream. May be dropped at any time: what has left the pipe is kept until
    /// there is a place for it in the queue.
    async fn pump(&self, answers: &Answers) {
        let mut next: Option<Instant> = None;
        loop {
            let room = self.window.open().await;
            self.gather(&mut next).await;
            let Ok(place) = answers.reserve().await else { return };
            match self.next(room.min(stdio::PIECE)) {
                Piece::Data(data) => {
                    if data.len() == stdio::PIECE && self.bulk.is_none() {
                        self.output.widen();
                    }
                    let (much, size) = (self.count(data.len()), data.len());
                    self.window.spend(size);
                    place.send(Ok(RunResponse { response: Some((self.wrap)(data)) }));
                    if much {
                        return self.switch(answers).await;
                    }
                }
                Piece::Nothing => {}
                Piece::End => return self.over.store(true, Ordering::Relaxed),
            }
        }
    }

    async fn switch(&self, answers: &Answers) {
        let Ok(place) = answers.reserve().await else { return };
        place.send(Ok(RunResponse { response: Some(Response::Bulk(self.end)) }));
        self.sent.store(usize::MAX, Ordering::Relaxed);
        self.output.widen();
        if let Some(bulk) = self.bulk() {
            self.pump_bulk(bulk, answers).await;
        }
    }

    /// As `pump`, in bulk. What has left the pipe is in the outlet at once.
    async fn pump_bulk(&self, bulk: &Bulk, answers: &Answers) {
        taken(answers).await;
        loop {
            let room = self.window.open().await;
            self.output.readable().await;
            if !bulk.outlet.turn().await {
                return;
            }
            if self.output.waiting() < outlet::MOST_MOVED {
                sys::let_others_run(); // who writes would be interrupted at each piece, on one CPU
            }
            match self.put(bulk, room) {
                Fill::Data(size) => self.window.spend(size),
                Fill::Nothing => self.output.clear(),
                Fill::End => return self.over.store(true, Ordering::Relaxed),
            }
        }
    }

    fn put(&self, bulk: &Bulk, most: usize) -> Fill {
        if most.min(self.output.waiting()) >= MUCH_AT_ONCE {
            let move_to = |pipe: BorrowedFd<'_>| self.output.splice_to(pipe, most.min(outlet::MOST_MOVED));
            if let Some(filled) = bulk.outlet.put_moved(bulk.call, self.flag, move_to) {
                return filled;
            }
        }
        let most = most.min(outlet::MOST);
        bulk.outlet.put(bulk.call, self.flag, |frame| self.output.fill(frame, most))
    }

    /// As `drain`, in bulk.
    async fn drain_bulk(&self, bulk: &Bulk, answers: &Answers) {
        taken(answers).await;
        let mut left = self.output.waiting();
        while left > 0 {
            let room = self.window.open().await;
            if !bulk.outlet.turn().await {
                return;
            }
            let Fill::Data(size) = self.put(bulk, room.min(left)) else { break };
            self.window.spend(size);
            left = left.saturating_sub(size);
        }
        bulk.outlet.turn().await; // what is sent next comes after it
    }

    /// Sends what is in the pipe now, and no more.
    async fn drain(&self, answers: &Answers) {
        if self.is_over() {
            return;
        }
        if let Some(bulk) = self.bulk() {
            return self.drain_bulk(bulk, answers).await;
        }
        let mut left = self.output.waiting() + self.ready().iter().map(Bytes::len).sum::<usize>();
        while left > 0 {
            let room = self.window.open().await;
            let Ok(place) = answers.reserve().await else { return };
            let Piece::Data(data) = self.next(left.min(room).min(stdio::PIECE)) else { return };
            left = left.saturating_sub(data.len());
            self.window.spend(data.len());
            place.send(Ok(RunResponse { response: Some((self.wrap)(data)) }));
        }
    }

    /// Tells the host that nothing more comes of it.
    async fn tell(&self, answers: &Answers) {
        if !self.told.swap(true, Ordering::Relaxed) {
            let _ = answers.send(Ok(RunResponse { response: Some(Response::Ended(self.end)) })).await;
        }
    }

    /// Whoever still holds the other end must not be hurt by its closing: what it writes is read, and thrown away.
    fn abandon(self) {
        if !self.is_over() && self.output.try_read(stdio::PIECE) != Piece::End {
            tokio::spawn(async move { self.output.follow(|_| {}).await });
        }
    }
}

/// Waits until whoever takes the answers has all there are, or is gone. Of a short command that goes on nobody takes any
/// before the host has attached, and until then it knows of no bulk frames.
async fn taken(answers: &Answers) {
    let _ = answers.reserve_many(answers.max_capacity()).await;
}

impl Output {
    /// Reads to the end, in no hurry, handing each piece on.
    pub async fn follow(&self, mut take: impl FnMut(Bytes)) {
        loop {
            self.readable().await;
            match self.take(stdio::PIECE) {
                Piece::Data(data) => {
                    let much = data.len() >= stdio::PIECE / 2;
                    take(data);
                    if much {
                        tokio::time::sleep(LISTLESS).await;
                    }
                }
                Piece::Nothing => {}
                Piece::End => return,
            }
        }
    }

    /// Hands on what is there now, and no more.
    pub fn drain(&self, mut take: impl FnMut(Bytes)) {
        let mut left = self.waiting();
        while left > 0 {
            let Piece::Data(data) = self.try_read(left) else { return };
            left = left.saturating_sub(data.len());
            take(data);
        }
    }
}

/// stdout and stderr of a process. With a terminal there is no stderr.
pub struct Sides {
    pub stdout: Side,
    pub stderr: Option<Side>,
}

impl Sides {
    /// Sends both to their ends. May be dropped at any time.
    pub async fn pump(&self, answers: &Answers) {
        match &self.stderr {
            None => self.stdout.pump(answers).await,
            Some(stderr) => {
                let sides = [&self.stdout, stderr];
                both(answers, sides, self.stdout.pump(answers), stderr.pump(answers)).await;
            }
        }
        tokio::time::sleep(MOMENT).await;
        for side in [&self.stdout].into_iter().chain(&self.stderr) {
            side.tell(answers).await;
        }
    }

    /// Sends what is in the pipes now, and no more.
    pub async fn drain(&self, answers: &Answers) {
        match &self.stderr {
            None => self.stdout.drain(answers).await,
            Some(stderr) => {
                let sides = [&self.stdout, stderr];
                both(answers, sides, self.stdout.drain(answers), stderr.drain(answers)).await;
            }
        }
    }

    pub fn is_over(&self) -> bool {
        self.stdout.is_over() && self.stderr.as_ref().is_none_or(Side::is_over)
    }

    /// Nobody wants the rest.
    pub fn abandon(self) {
        self.stdout.abandon();
        self.stderr.into_iter().for_each(Side::abandon);
    }
}

/// Runs the work of both, and tells the host when one of them is over and the other isn't.
async fn both(answers: &Answers, sides: [&Side; 2], one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    let first = tokio::select! {
        () = &mut one => 0,
        () = &mut other => 1,
    };
    let mut rest = async || if first == 0 { other.as_mut().await } else { one.as_mut().await };
    if tokio::time::timeout(MOMENT, rest()).await.is_err() {
        // Together: who isn't polled keeps the room that it waits for, which may be all there is.
        tokio::join!(sides[first].tell(answers), rest());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run;

    fn side() -> Side {
        let (read, _write) = stdio::pipe().expect("pipe");
        Side::stdout(Output::pipe(read).expect("watched"), Way { window: 0, bulk: None })
    }

    #[tokio::test]
    async fn the_end_of_one_is_told_while_the_other_waits_for_all_room() {
        let (answers, mut rest) = tokio::sync::mpsc::channel(run::QUEUE);
        let (stdout, stderr) = (side(), side());
        answers.try_send(Ok(RunResponse { response: Some(Response::Bulk(stdout.end)) })).expect("room");
        let host = async {
            while !stderr.told.load(Ordering::Relaxed) {
                tokio::time::sleep(MOMENT).await; // what it took before would leave nothing to tell
            }
            (rest.recv().await, rest.recv().await)
        };
        let work = both(&answers, [&stdout, &stderr], taken(&answers), async {});
        let all = tokio::time::timeout(Duration::from_secs(300), async { tokio::join!(work, host).1 }).await;
        assert!(matches!(all, Ok((Some(Ok(_)), Some(Ok(_))))), "{all:?}");
    }
}
