//! What the host sends within a Run: stdin of the process, and room for its output.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, oneshot};
use tonic::{Status, Streaming};

use crate::output::Sides;
use crate::proto::run_request::Request;
use crate::proto::run_response::Response;
use crate::proto::{RunRequest, RunResponse, Start};
use crate::run::Answers;
use crate::stdio::Input;
use crate::transport::inlet::{Inlet, Taking};
use crate::validate::{self, Invalid};

/// Bytes of stdin that the host may send before it is allowed more: agent.proto, `Start.window`.
const WINDOW: usize = 64 * 1024;
/// ... where it may send it in bulk frames.
const BULK_WINDOW: usize = 512 * 1024;

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
    closed: bool,
    /// More came in bulk than there is room for, or after the end.
    broken: bool,
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

impl Queue {
    /// For a call that has begun, and whose number the host knows.
    pub fn new(inlet: &Arc<Inlet>, start: &Start) -> Self {
        let shared = Arc::new(Shared::default());
        if start.bulk == 0 || start.window == 0 {
            return Self { shared, window: WINDOW, _taking: None };
        }
        let taker = shared.clone();
        let put = move |data| {
            if taker.put(data, BULK_WINDOW).is_err() {
                taker.held().broken = true;
            }
        };
        Self { shared, window: BULK_WINDOW, _taking: Some(inlet.register(start.bulk, Arc::new(put))) }
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

    /// The next piece; None at the end.
    async fn next(&self) -> Option<Bytes> {
        loop {
            {
                let mut held = self.held();
                if let Some(data) = held.pieces.pop_front() {
                    return Some(data);
                }
                if held.closed {
                    return None;
                }
            }
            self.shared.changed.notified().await;
        }
    }

    async fn empty(&self, stdin: &mut Option<Input>, answers: &Answers) {
        let mut gone = 0;
        while let Some(data) = self.next().await {
            write(stdin, &data).await;
            gone += data.len();
            if gone >= self.window / 2 {
                self.held().used -= gone;
                let more = Response::StdinWindow(std::mem::take(&mut gone) as u32);
                let _ = answers.send(Ok(RunResponse { response: Some(more) })).await;
            }
        }
        close(stdin).await;
    }
}
