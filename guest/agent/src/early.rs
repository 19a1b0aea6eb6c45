//! A Run that comes ahead of HTTP/2, on a connection on which that has not begun: the first command of a guest that goes on
//! from a saved one. All that HTTP/2 and gRPC would do for it for the first time takes longer than to start the command.
//!
//! What the host and the agent say to each other is the same as in any Run. It goes in bulk frames: the agent's messages
//! as those of [`CALL`] with a flag of their own, the host's as those of [`REQUESTS`], by when HTTP/2 has begun as well.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::Frame;
use prost::Message;
use tokio::sync::{Notify, mpsc};
use tonic::codec::BufferSettings;
use tonic::{Code, Status, Streaming};
use tonic_prost::ProstDecoder;

use crate::agent::Agent;
use crate::input;
use crate::proto::{RunRequest, RunResponse, run_request};
use crate::run;
use crate::server::MAX_MESSAGE;
use crate::transport::Beside;
use crate::transport::outlet::{Flag, Outlet, frame, prefix};

/// Its number, which no stream of HTTP/2 ever has.
pub const CALL: u32 = 0x7fff_ffff;
const REQUESTS: u32 = CALL - 2;
const CANCEL: u32 = CALL - 4;
/// Stands where a message has 0, before the status with which the call has ended: its code, and what there is to say.
const END: u8 = 0x80;

/// The host's messages as tonic wants them.
struct Requests(mpsc::UnboundedReceiver<Bytes>);

impl http_body::Body for Requests {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data))))
    }
}

/// Begins the call with its first message.
pub fn begin(agent: &Arc<Agent>, beside: &Beside, first: &[u8]) {
    let (answers, rest) = mpsc::channel(run::QUEUE);
    let (requests, body) = mpsc::unbounded_channel();
    let cancelled = Arc::new(Notify::new());
    let cancel = cancelled.clone();
    let taking = [
        beside.inlet.register(REQUESTS, Arc::new(move |data: Bytes| drop(requests.send(data)))),
        beside.inlet.register(CANCEL, Arc::new(move |_: Bytes| cancel.notify_one())),
    ];
    match RunRequest::decode(first).map(|first| first.request) {
        Ok(Some(run_request::Request::Start(start))) => {
            let decoder = ProstDecoder::new(BufferSettings::default());
            let requests = Streaming::new_request(decoder, Requests(body), None, Some(MAX_MESSAGE));
            let requests = input::Requests::Call(Box::new(requests));
            tokio::spawn(run::run(agent.clone(), start, requests, answers, beside.clone()));
        }
        _ => drop(answers.try_send(Err(Status::invalid_argument("start: has to come first")))),
    }
    let outlet = beside.outlet.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = pass_on(rest, &outlet) => {}
            () = cancelled.notified() => {}
            () = outlet.closed() => {}
        }
        drop(taking);
    });
}

/// The answers, until the end. Dropped before that, the call learns that nobody is there any more.
async fn pass_on(mut answers: mpsc::Receiver<Result<RunResponse, Status>>, outlet: &Outlet) {
    let mut over = false;
    while !over {
        let mut next = answers.recv().await;
        let mut out = Vec::with_capacity(512);
        loop {
            over = !matches!(next, Some(Ok(_)));
            out.extend(frame(CALL, Flag::Message, &message(next)));
            match answers.try_recv() {
                Ok(more) if !over => next = Some(more),
                _ => break,
            }
        }
        if !outlet.turn().await {
            return;
        }
        outlet.give(out);
    }
}

/// As gRPC sends it.
fn message(answer: Option<Result<RunResponse, Status>>) -> Vec<u8> {
    let (mark, text) = match answer {
        Some(Ok(response)) => (0, response.encode_to_vec()),
        Some(Err(status)) => (END, [&[status.code() as u8], status.message().as_bytes()].concat()),
        None => (END, vec![Code::Ok as u8]),
    };
    [&prefix(mark, text.len())[..], &text].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Started;
    use crate::proto::run_response::Response;

    #[tokio::test]
    async fn answers_go_together_and_the_end_is_told() {
        let (outlet, (answers, rest)) = (Outlet::default(), mpsc::channel(4));
        let started = RunResponse { response: Some(Response::Started(Started { pid: 7 })) };
        answers.try_send(Ok(started)).expect("room");
        answers.try_send(Err(Status::not_found("no"))).expect("room");
        pass_on(rest, &outlet).await;
        let expected = b"\0\0\x09\xb0\x02\x7f\xff\xff\xff\0\0\0\0\x04\x0a\x02\x08\x07\0\0\x08\xb0\x02\x7f\xff\xff\xff\x80\0\0\0\x03\x05no";
        assert_eq!(outlet.state().rest(), expected);
    }

    #[test]
    fn an_end_without_an_error() {
        assert_eq!(message(None), [0x80, 0, 0, 0, 1, 0]);
    }
}
