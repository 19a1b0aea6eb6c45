//! What a process writes, on its way to the host: each stream for itself, so that one that the host doesn't take never
//! holds up the other.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::proto::run_response::Response;
use crate::proto::{Ended, RunResponse};
use crate::run::Answers;
use crate::stdio::{self, Output, Piece};
use crate::window::Window;

/// How long output may gather that comes right after other output.
const GATHER: Duration = Duration::from_millis(1);
/// How long after the end of a stream the end of the other one or the exit may come, so that it isn't told separately.
const MOMENT: Duration = Duration::from_millis(2);
/// How often a stream that nobody wants is emptied, where it brings much: it must not cost what a stream to the host does.
const LISTLESS: Duration = Duration::from_millis(20);

/// One stream of a process.
pub struct Side {
    output: Output,
    /// Read already, and not sent yet.
    ready: Mutex<VecDeque<Bytes>>,
    pub window: Window,
    wrap: fn(Bytes) -> Response,
    end: Ended,
    /// There is nothing more to come of it, and the host knows that.
    over: AtomicBool,
    told: AtomicBool,
}

impl Side {
    pub fn stdout(output: Output, window: u32) -> Self {
        Self::new(output, window, Response::Stdout, Ended { stdout: true, stderr: false })
    }

    pub fn stderr(output: Output, window: u32) -> Self {
        Self::new(output, window, Response::Stderr, Ended { stdout: false, stderr: true })
    }

    fn new(output: Output, window: u32, wrap: fn(Bytes) -> Response, end: Ended) -> Self {
        let window = Window::new(window);
        let (over, told) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { output, ready: Mutex::default(), window, wrap, end, over, told }
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
                    if data.len() == stdio::PIECE {
                        self.output.widen();
                    }
                    self.window.spend(data.len());
                    place.send(Ok(RunResponse { response: Some((self.wrap)(data)) }));
                }
                Piece::Nothing => {}
                Piece::End => return self.over.store(true, Ordering::Relaxed),
            }
        }
    }

    /// Sends what is in the pipe now, and no more.
    async fn drain(&self, answers: &Answers) {
        if self.is_over() {
            return;
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
        sides[first].tell(answers).await;
        rest().await;
    }
}
