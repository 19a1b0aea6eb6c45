//! Commands that come and are answered in one frame each, beside HTTP/2: to open a call, and to end it, takes the agent and
//! the host longer than a small program takes. One that isn't over soon goes on as a call.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use prost::Message;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tonic::{Status, Streaming};

use crate::agent::Agent;
use crate::input::Requests;
use crate::proto::run_request::Request;
use crate::proto::{RunRequest, RunResponse, Start};
use crate::run;
use crate::stdio;
use crate::transport::Beside;
use crate::transport::inlet::COMMAND;
use crate::transport::outlet::{Flag, PREFIX, prefix};
use crate::validate::Invalid;

/// What a command answers.
type Answered = mpsc::Receiver<Result<RunResponse, Status>>;

/// The most bytes of an answer.
const LONGEST: usize = 132 * 1024;
/// The most bytes that a response adds to it.
const RESPONSE: usize = stdio::PIECE + 64;

/// Those of a connection that aren't over.
pub struct Shorts {
    agent: Arc<Agent>,
    beside: Beside,
    calls: Mutex<HashMap<u32, Short>>,
}

enum Short {
    /// It was begun, and is given up when this is dropped.
    Begun(#[allow(dead_code)] oneshot::Sender<()>),
    /// The host was told that it goes on; dropped, it is given up.
    GoesOn { rest: Answered, requests: oneshot::Sender<Streaming<RunRequest>> },
}

impl Shorts {
    pub fn new(agent: &Arc<Agent>, beside: &Beside) -> Arc<Self> {
        Arc::new(Self { agent: agent.clone(), beside: beside.clone(), calls: Mutex::default() })
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<u32, Short>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a frame.
    pub fn take(self: &Arc<Self>, call: u32, flag: u8, data: Bytes) {
        let given_up = self.calls().remove(&call); // a number that is used twice is nobody's any more, too
        drop(given_up);
        if flag != COMMAND {
            return;
        }
        let (kept, given_up) = oneshot::channel();
        self.calls().insert(call, Short::Begun(kept));
        let shorts = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                _ = given_up => {}
                () = shorts.run(call, data) => {}
            }
        });
    }

    /// The connection has ended: all are given up.
    pub fn close(&self) {
        let given_up = std::mem::take(&mut *self.calls());
        drop(given_up);
    }

    /// The rest of one that goes on, in a call.
    pub fn attach(&self, call: u32, requests: Streaming<RunRequest>) -> Result<Answered, Status> {
        match self.calls().remove(&call) {
            Some(Short::GoesOn { rest, requests: taker }) => {
                let _ = taker.send(requests);
                Ok(rest)
            }
            _ => Err(Status::not_found(format!("attach: {call}: no such command goes on"))),
        }
    }

    /// From its frame to the answer. May be dropped at any time.
    async fn run(&self, call: u32, data: Bytes) {
        let start = match decode(data) {
            Ok(start) => start,
            Err(invalid) => return self.answer(call, Answer::failed(&invalid.into()), None).await,
        };
        let (answers, mut rest) = mpsc::channel(run::QUEUE);
        let (requests, coming) = oneshot::channel();
        let run = run::run(self.agent.clone(), start, Requests::Coming(coming), answers, self.beside.clone());
        tokio::spawn(run);
        let answer = Answer::of(&mut rest).await;
        let going = (answer.flag == Flag::GoesOn).then_some(Short::GoesOn { rest, requests });
        self.answer(call, answer, going).await;
    }

    async fn answer(&self, call: u32, answer: Answer, going: Option<Short>) {
        if !self.beside.outlet.turn().await {
            return;
        }
        let mut calls = self.calls();
        match going {
            Some(going) => drop(calls.insert(call, going)),
            None => drop(calls.remove(&call)),
        }
        self.beside.outlet.put(call, answer.flag, |frame| frame.extend_from_slice(&answer.data));
    }
}

fn decode(data: Bytes) -> Result<Start, Invalid> {
    match RunRequest::decode(data).ok().and_then(|request| request.request) {
        Some(Request::Start(start)) if start.create.is_none() && !start.last && !start.detached => Ok(start),
        _ => Err(Invalid::new("start", "is none of a short command")),
    }
}

/// What is said of a command that has begun.
struct Answer {
    flag: Flag,
    data: Vec<u8>,
}

impl Answer {
    fn failed(status: &Status) -> Self {
        let code = [status.code() as u8];
        Self { flag: Flag::Failed, data: [&code, status.message().as_bytes()].concat() }
    }

    /// From the first response on those that are there, as long as there is room.
    async fn of(rest: &mut Answered) -> Self {
        let mut data = Vec::with_capacity(64);
        let mut next = rest.recv().await.ok_or(TryRecvError::Disconnected);
        loop {
            match next {
                Ok(Ok(response)) => frame(&response, &mut data),
                Ok(Err(status)) => return Self::failed(&status),
                Err(TryRecvError::Disconnected) => return Self { flag: Flag::Over, data },
                Err(TryRecvError::Empty) => return Self { flag: Flag::GoesOn, data },
            }
            if data.len() > LONGEST - RESPONSE {
                return Self { flag: Flag::GoesOn, data };
            }
            next = rest.try_recv();
        }
    }
}

/// A message as gRPC frames it.
fn frame(response: &RunResponse, out: &mut Vec<u8>) {
    let size = response.encoded_len();
    out.reserve(PREFIX + size);
    out.extend(prefix(0, size));
    let _ = response.encode(out); // a vector has room for all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::run_response::Response;
    use crate::proto::{Exited, Started};

    fn said(response: Response) -> Result<RunResponse, Status> {
        Ok(RunResponse { response: Some(response) })
    }

    #[tokio::test]
    async fn all_that_is_there_is_one_answer() {
        let (answers, mut rest) = mpsc::channel(4);
        answers.try_send(said(Response::Started(Started { pid: 3 }))).expect("room");
        answers.try_send(said(Response::Exited(Exited::default()))).expect("room");
        drop(answers);
        let answer = Answer::of(&mut rest).await;
        assert_eq!(answer.flag, Flag::Over);
        assert_eq!(answer.data, b"\0\0\0\0\x04\x0a\x02\x08\x03\0\0\0\0\x02\x22\0");
    }

    #[tokio::test]
    async fn what_may_say_more_goes_on() {
        let (answers, mut rest) = mpsc::channel(4);
        answers.try_send(said(Response::Started(Started { pid: 3 }))).expect("room");
        assert_eq!(Answer::of(&mut rest).await.flag, Flag::GoesOn);
        drop(answers);
    }

    #[tokio::test]
    async fn more_than_one_answer_holds_goes_on() {
        let (answers, mut rest) = mpsc::channel(4);
        for _ in 0..3 {
            answers.try_send(said(Response::Stdout(vec![0; stdio::PIECE].into()))).expect("room");
        }
        drop(answers);
        let answer = Answer::of(&mut rest).await;
        assert_eq!(answer.flag, Flag::GoesOn);
        assert!(answer.data.len() <= LONGEST && rest.try_recv().is_ok());
    }

    #[tokio::test]
    async fn a_failure_says_why() {
        let (answers, mut rest) = mpsc::channel(4);
        answers.try_send(Err(Status::not_found("no"))).expect("room");
        let answer = Answer::of(&mut rest).await;
        assert_eq!((answer.flag, &answer.data[..]), (Flag::Failed, &b"\x05no"[..]));
    }

    #[test]
    fn what_goes_with_a_container_is_no_short_command() {
        let whole = |start: Start| RunRequest { request: Some(Request::Start(start)) }.encode_to_vec().into();
        assert!(decode(whole(Start::default())).is_ok());
        assert!(decode(whole(Start { last: true, ..Start::default() })).is_err());
        assert!(decode(Bytes::from_static(b"\xff")).is_err());
    }
}
