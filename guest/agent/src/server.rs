//! Serves the protocol on one connection: hyper's HTTP/2 with tonic's generated service on top.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use tower_service::Service;

use crate::agent::Agent;
use crate::early;
use crate::proto::agent_server::AgentServer;
use crate::service::Rpc;
use crate::setup;
use crate::short::Shorts;
use crate::transport::{Channel, ahead};

/// Largest message either way, as the protocol says.
pub const MAX_MESSAGE: usize = 4 << 20;
/// A stream's window; the connection's is the largest there is, so that a stream nobody reads blocks no other.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
const MAX_STREAMS: u32 = 4096;
/// A piece of stdio comes in one frame: four cost four times as much, on both sides.
const MAX_FRAME: u32 = 128 * 1024;
/// Output that waits for the host, per stream, beside what the pipe holds.
const SEND_BUFFER: usize = 128 * 1024;

#[derive(Clone)]
struct Spawn;

impl<F> hyper::rt::Executor<F> for Spawn
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        tokio::spawn(task);
    }
}

/// Serves until the host closes the connection or breaks HTTP/2.
pub async fn serve(channel: &mut Channel, agent: Arc<Agent>) -> Result<(), hyper::Error> {
    let beside = channel.beside();
    let (of_us, apart) = (agent.clone(), beside.clone());
    channel.answer_ahead(Box::new(move |kind, request| match kind {
        ahead::Kind::Clone => ahead::answer(setup::clone::ahead(&of_us, request)),
        ahead::Kind::Run => {
            early::begin(&of_us, &apart, request);
            Vec::new()
        }
    }));
    let outlet = beside.outlet.clone();
    let shorts = Shorts::new(&agent, &beside);
    let taker = Arc::downgrade(&shorts); // which has the inlet
    beside.inlet.command(Box::new(move |call, flag, data| {
        if let Some(shorts) = taker.upgrade() {
            shorts.take(call, flag, data);
        }
    }));
    let service = AgentServer::new(Rpc::new(agent, beside, shorts.clone()))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let call = service_fn(move |request: hyper::Request<Incoming>| {
        let mut service = service.clone();
        async move { Ok::<_, Infallible>(service.call(request).await.unwrap_or_else(|never| match never {})) }
    });
    let served = http2::Builder::new(Spawn)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(MAX_STREAMS as usize)
        .max_local_error_reset_streams(None)
        .auto_date_header(false)
        .serve_connection(channel, call)
        .await;
    outlet.close();
    shorts.close();
    served
}
