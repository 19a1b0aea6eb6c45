//! What the host sends within a Run: stdin of the process, and room for its output.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustix::io::Errno;
use tokio::sync::{Notify, oneshot};
use tonic::{Status, Streaming};

use crate::output::Sides;
use crate::proto::run_request::Request;
use crate::proto::run_response::Response;
use crate::proto::{RunRequest, RunResponse, Start};
use crate::run::Answers;
use crate::stdio::Input;
use crate::transport::inlet::{Inlet, Move, Taker, Taking};
use crate::validate::{self, Invalid};

/// Bytes of stdin that the host may send before it is allowed more: agent.proto, `Start.window`.
const WINDOW: usize = 64 * 1024;
/// ... where it may send it in bulk frames.
const BULK_WINDOW: usize = 1024 * 1024;
/// Room is given back from so many bytes on, or from half a window.
const WORTH_SAYING: usize = 512 * 1024;

/// From so much on, stdin is moved from the port to the process's pipe.
const MUCH: usize = 64 * 1024;

/// What the host sends in a call.
pub enum Requests {
    Call(Box<Streaming<RunRequest>>),
    /// The call is still to come.
    Coming(oneshot::Receiver<Streaming<RunRequest>>),
}

impl Requests {
    /// The next one. May be dropped at any time.
    async fn message(&mut self) -> Result<Option<RunRequest>, Status> {
        loop {
            match self {
                Requests::Call(call) => return call.message().await,
                Requests::Coming(coming) => match coming.await {
                    Ok(call) => *self = Requests::Call(Box::new(call)),
                    Err(_) => std::future::pending().await, // given up, of which `answers` tells
                },
            }
        }
    }
}

/// Takes the host's requests to the end of its side of the call. With windows it never waits for the process: the
/// host's next message may be the one that the process waits for.
pub async fn take(
    stdin: &mut Option<Input>,
    queue: &Queue,
    requests: &mut Requests,
    sides: &Sides,
    answers: &Answers,
) -> Result<(), Status> {
    if !sides.stdout.window.is_limited() {
        return take_in_turn(stdin, requests).await;
    }
    let (taken, ()) = tokio::join!(queue.fill(requests, sides), queue.empty(stdin, answers));
    taken
}

/// Without windows: the call itself is what stdin waits in.
async fn take_in_turn(stdin: &mut Option<Input>, requests: &mut Requests) -> Result<(), Status> {
    while let Some(request) = requests.message().await? {
        match request.request {
            Some(Request::Stdin(data)) => {
                check_size(&data)?;
                write(stdin, &data).await;
            }
            Some(Request::StdinClosed(_)) => close(stdin).await,
            other => return Err(unexpected(other).into()),
        }
    }
    close(stdin).await;
    Ok(())
}

fn check_size(data: &Bytes) -> Result<(), Invalid> {
    match data.len() {
        size if size > validate::MAX_PIECE => Err(Invalid::new("stdin", format!("{size} bytes in one message"))),
        _ => Ok(()),
    }
}

fn unexpected(request: Option<Request>) -> Invalid {
    match request {
        Some(Request::Start(_) | Request::Attach(_)) => Invalid::new("start", "was sent before"),
        Some(Request::Window(_)) => Invalid::new("window", "start.window is 0: there is none"),
        _ => Invalid::new("request", "is empty"),
    }
}

async fn write(stdin: &mut Option<Input>, data: &[u8]) {
    if let Some(pipe) = stdin
        && !pipe.write_all(data).await
    {
        *stdin = None; // nobody reads it any more; the process is free not to
    }
}

async fn close(stdin: &mut Option<Input>) {
    if let Some(pipe) = stdin.take() {
        pipe.close().await;
    }
}

/// Stdin between the host and a process that may not read it.
pub struct Queue {
    shared: Arc<Shared>,
    window: usize,
    /// Bulk frames come here.
    _taking: Option<Taking>,
}

#[derive(Default)]
struct Shared {
    held: Mutex<Held>,
    changed: Notify,
}

#[derive(Default)]
struct Held {
    pieces: VecDeque<Bytes>,
    /// Bytes that the host has sent and hasn't been given back as room.
    used: usize,
    /// ... and of these what has gone to the process.
    gone: usize,
    /// A piece is on its way to the process.
    writing: bool,
    /// The process's pipe, where data is moved to it.
    pipe: Option<OwnedFd>,
    closed: bool,
    /// More came in bulk than there is room for, or after the end.
    broken: bool,
}

impl Held {
    /// Writes what waits to the pipe, as far as that has room. False: some of it still waits.
    fn write_now(&mut self) -> bool {
        while let (Some(data), Some(pipe)) = (self.pieces.front_mut(), &self.pipe) {
            let Ok(size) = rustix::io::write(pipe, data) else { return false };
            self.gone += size;
            if size < data.len() {
                bytes::Buf::advance(data, size);
                return false;
            }
            self.pieces.pop_front();
        }
        self.pieces.is_empty()
    }
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, data: Bytes, window: usize) -> Result<(), Invalid> {
        let mut held = self.held();
        if held.closed {
            return Err(Invalid::new("stdin", "was closed before"));
        }
        held.used += data.len();
        if held.used > window {
            return Err(Invalid::new("stdin", format!("{} bytes beyond its window", held.used - window)));
        }
        held.pieces.push_back(data);
        drop(held);
        self.changed.notify_one();
        Ok(())
    }
}

/// What comes in bulk frames.
impl Taker for Shared {
    fn take(&self, data: Bytes) {
        if self.put(data, BULK_WINDOW).is_err() {
            self.held().broken = true;
        }
    }

    fn take_from(&self, data: &mut Move<'_>) -> Option<usize> {
        let mut held = self.held();
        if held.writing || held.closed || !held.write_now() {
            return None;
        }
        match data(held.pipe.as_ref()?.as_fd()) {
            Ok(size) => {
                held.used += size;
                held.gone += size;
                held.broken |= held.used > BULK_WINDOW;
                if held.gone >= WORTH_SAYING {
                    self.changed.notify_one();
                }
                Some(size)
            }
            Err(Errno::AGAIN | Errno::INTR) => None,
            Err(_) => {
                held.pipe = None; // nobody reads it any more, as who writes will find
                None
            }
        }
    }
}

/// What is to be done next.
enum Next {
    Write(Bytes),
    /// So much has gone to the process.
    Gone(usize),
    End,
}

impl Queue {
    /// For a call that has begun, and whose number the host knows.
    pub fn new(inlet: &Arc<Inlet>, start: &Start) -> Self {
        let shared = Arc::new(Shared::default());
        if start.bulk == 0 || start.window == 0 {
            return Self { shared, window: WINDOW, _taking: None };
        }
        let taking = inlet.register(start.bulk, shared.clone());
        Self { shared, window: BULK_WINDOW, _taking: Some(taking) }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.shared.held()
    }

    async fn fill(&self, requests: &mut Requests, sides: &Sides) -> Result<(), Status> {
        let result = self.fill_until_end(requests, sides).await;
        self.held().closed = true;
        self.shared.changed.notify_one();
        result
    }

    async fn fill_until_end(&self, requests: &mut Requests, sides: &Sides) -> Result<(), Status> {
        while let Some(request) = requests.message().await? {
            match request.request {
                Some(Request::Stdin(data)) => {
                    check_size(&data)?;
                    self.shared.put(data, self.window)?;
                }
                Some(Request::StdinClosed(_)) => self.held().closed = true,
                Some(Request::Window(more)) => {
                    sides.stdout.window.grow(more.stdout);
                    if let Some(stderr) = &sides.stderr {
                        stderr.window.grow(more.stderr);
                    }
                    continue;
                }
                other => return Err(unexpected(other).into()),
            }
            self.shared.changed.notify_one();
            if self.held().broken {
                return Err(Invalid::new("stdin", "bulk frames beyond its window, or after its end").into());
            }
        }
        Ok(())
    }

    async fn next(&self) -> Next {
        loop {
            {
                let mut held = self.held();
                if held.gone >= WORTH_SAYING.min(self.window / 2) {
                    let gone = std::mem::take(&mut held.gone);
                    held.used = held.used.saturating_sub(gone);
                    return Next::Gone(gone);
                }
                if let Some(data) = held.pieces.pop_front() {
                    held.writing = true;
                    return Next::Write(data);
                }
                if held.closed {
                    held.pipe = None;
                    return Next::End;
                }
            }
            self.shared.changed.notified().await;
        }
    }

    async fn empty(&self, stdin: &mut Option<Input>, answers: &Answers) {
        let mut left = MUCH;
        loop {
            match self.next().await {
                Next::Write(data) => {
                    write(stdin, &data).await;
                    let mut held = self.held();
                    held.writing = false;
                    held.gone += data.len();
                    let becomes_much = left > 0 && left <= data.len();
                    left = left.saturating_sub(data.len());
                    match stdin {
                        None => held.pipe = None,
                        Some(stdin) if becomes_much => held.pipe = stdin.share(),
                        Some(_) => {}
                    }
                }
                Next::Gone(size) => {
                    let more = Response::StdinWindow(size as u32);
                    let _ = answers.send(Ok(RunResponse { response: Some(more) })).await;
                }
                Next::End => return close(stdin).await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stdio;

    fn queue() -> (Queue, Arc<Inlet>) {
        let inlet = Arc::default();
        let start = Start { bulk: 5, window: 1, ..Start::default() };
        (Queue::new(&inlet, &start), inlet)
    }

    /// Moves so many bytes; how many went.
    fn moved(queue: &Queue, size: usize) -> Option<usize> {
        queue.shared.take_from(&mut |pipe| rustix::io::write(pipe, &vec![7; size]))
    }

    #[tokio::test]
    async fn much_goes_straight_to_the_pipe_and_never_overtakes() {
        let (queue, _inlet) = queue();
        let (read, write) = stdio::pipe().expect("pipe");
        let (answers, mut said) = tokio::sync::mpsc::channel::<Result<RunResponse, Status>>(4);
        let mut stdin = Some(Input::pipe(write).expect("watched"));
        assert_eq!(moved(&queue, 1), None, "not much has come yet");
        queue.shared.take(Bytes::from(vec![1; MUCH]));
        assert_eq!(moved(&queue, 1), None, "there is something before it");
        let fed = async {
            while moved(&queue, WORTH_SAYING - MUCH).is_none() {
                tokio::task::yield_now().await;
            }
            queue.shared.take(Bytes::from_static(b"behind"));
            assert_eq!(moved(&queue, 1), Some(1), "what is before it has gone at once");
            let room = said.recv().await.expect("told").expect("no error").response;
            assert_eq!(room, Some(Response::StdinWindow(WORTH_SAYING as u32 + 7)));
            queue.held().closed = true;
            queue.shared.changed.notify_one();
        };
        tokio::join!(queue.empty(&mut stdin, &answers), fed);
        assert!(stdin.is_none() && moved(&queue, 1).is_none());
        let mut all = vec![0; BULK_WINDOW];
        let mut have = 0;
        while let Ok(size @ 1..) = rustix::io::read(&read, &mut all[have..]) {
            have += size;
        }
        assert_eq!(have, WORTH_SAYING + 7, "and then it is at its end");
        assert!(all[..MUCH].iter().all(|byte| *byte == 1) && all[..have].ends_with(b"behind\x07"));
    }

    #[tokio::test]
    async fn nobody_reads_it() {
        let (queue, _inlet) = queue();
        let (read, write) = stdio::pipe().expect("pipe");
        queue.held().pipe = Some(write);
        crate::sys::ignore_signal(libc::SIGPIPE);
        drop(read);
        assert_eq!(moved(&queue, 1), None);
        assert!(queue.held().pipe.is_none());
    }
}
