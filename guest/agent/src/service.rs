//! The protocol's calls, each handed to who does the work.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::mpsc;
use tonic::codegen::tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::agent::Agent;
use crate::container;
use crate::detach;
use crate::input::Requests;
use crate::process::waiting::Waiting;
use crate::proto::agent_server;
use crate::proto::signal_request::Scope;
use crate::proto::{self, run_request, serve_request};
use crate::run;
use crate::setup::served;
use crate::shares;
use crate::short::Shorts;
use crate::stats;
use crate::sys;
use crate::transport::Beside;
use crate::validate::{self, Invalid};

#[derive(Clone)]
pub struct Rpc {
    agent: Arc<Agent>,
    beside: Beside,
    shorts: Arc<Shorts>,
}

/// The answers of a call that goes on. Dropped when it ends, however it does; that is how the task behind it learns of
/// it.
pub struct Answers<T> {
    first: Option<Result<T, Status>>,
    rest: mpsc::Receiver<Result<T, Status>>,
}

impl<T: Unpin> Stream for Answers<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.first.take() {
            Some(first) => Poll::Ready(Some(first)),
            None => self.rest.poll_recv(cx),
        }
    }
}

impl Rpc {
    /// `beside` and `shorts` are those of the connection.
    pub fn new(agent: Arc<Agent>, beside: Beside, shorts: Arc<Shorts>) -> Self {
        Self { agent, beside, shorts }
    }

    /// Runs in a task of its own, so that a call that is reset doesn't leave the work half-done.
    async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        match tokio::spawn(work).await {
            Ok(result) => result.map(Response::new),
            Err(_) => Err(Status::internal("task: call: lost")),
        }
    }
}

#[tonic::async_trait]
impl agent_server::Agent for Rpc {
    type RunStream = Answers<proto::RunResponse>;
    type ServeStream = Answers<proto::ServeResponse>;

    async fn setup(&self, request: Request<proto::SetupRequest>) -> Result<Response<proto::SetupResponse>, Status> {
        let agent = self.agent.clone();
        self.detached(async move { crate::setup::call(&agent, request.into_inner()).await }).await
    }

    async fn clone(&self, request: Request<proto::CloneRequest>) -> Result<Response<proto::CloneResponse>, Status> {
        Ok(Response::new(crate::setup::clone::call(&self.agent, request.get_ref())?))
    }

    async fn hold(&self, request: Request<proto::HoldRequest>) -> Result<Response<proto::HoldResponse>, Status> {
        let hold = request.get_ref().hold;
        if hold {
            container::stems::plant_all(&self.agent).await;
        }
        self.agent.go_first(hold)?;
        for container in self.agent.containers() {
            container.processes.keep_all(hold);
            if hold {
                container.hold_names();
            }
        }
        Ok(Response::new(proto::HoldResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<proto::CreateContainerRequest>,
    ) -> Result<Response<proto::CreateContainerResponse>, Status> {
        let agent = self.agent.clone();
        self.detached(async move {
            let request = request.into_inner();
            validate::id("id", &request.id)?;
            agent.ready()?;
            let claim = agent.claim(&request.id)?;
            let prepared = container::prepare(request).await?;
            let waiting = prepared.waiting();
            let container = container::build(&agent, prepared).await?;
            claim.publish(&container);
            if let Some((process, explores)) = waiting {
                let mut waiting = Waiting::new(&agent, &container, process, explores)?;
                waiting.explored().await?;
                container.set_waiting(waiting)?;
            }
            Ok(proto::CreateContainerResponse {})
        })
        .await
    }

    async fn remove_container(
        &self,
        request: Request<proto::RemoveContainerRequest>,
    ) -> Result<Response<proto::RemoveContainerResponse>, Status> {
        let agent = self.agent.clone();
        self.detached(async move {
            let id = request.into_inner().id;
            validate::id("id", &id)?;
            container::remove(&agent, &id).await?;
            Ok(proto::RemoveContainerResponse {})
        })
        .await
    }

    async fn run(&self, request: Request<Streaming<proto::RunRequest>>) -> Result<Response<Self::RunStream>, Status> {
        let mut requests = request.into_inner();
        let mut rest = match requests.message().await?.and_then(|first| first.request) {
            Some(run_request::Request::Start(start)) => {
                let (answers, rest) = mpsc::channel(run::QUEUE);
                let requests = Requests::Call(Box::new(requests));
                tokio::spawn(run::run(self.agent.clone(), start, requests, answers, self.beside.clone()));
                rest
            }
            Some(run_request::Request::Attach(call)) => self.shorts.attach(call, requests)?,
            _ => return Err(Invalid::new("start", "has to come first").into()),
        };
        // The headers go with the first of them: by themselves they would cost as much, here and on the host.
        let first = rest.recv().await;
        Ok(Response::new(Answers { first, rest }))
    }

    async fn signal(&self, request: Request<proto::SignalRequest>) -> Result<Response<proto::SignalResponse>, Status> {
        let request = request.into_inner();
        let container = self.agent.container(&request.container_id)?;
        let process = container.processes.get(&request.process_id);
        let shown = || validate::shown(&request.process_id);
        let process = process
            .filter(|process| process.pid == 0 || self.agent.reaper.is_unreaped(process.pid))
            .ok_or_else(|| Status::not_found(format!("process {}: not running", shown())))?;
        if !(1..=64).contains(&request.signal) {
            return Err(Invalid::new("signal", format!("{} is no signal", request.signal)).into());
        }
        let sent = match request.scope() {
            // Until it leads a group of its own there is only the process.
            Scope::Group | Scope::Process if process.pid == 0 => {
                return Err(Status::failed_precondition(format!("process {}: not started yet", shown())));
            }
            Scope::Group => sys::kill(-process.pid, request.signal).or_else(|_| sys::kill(process.pid, request.signal)),
            Scope::Process => sys::kill(process.pid, request.signal),
            Scope::Tree if request.signal == libc::SIGKILL => {
                process.berth.kill()?;
                Ok(())
            }
            Scope::Tree => return Err(Invalid::new("scope", "TREE is for SIGKILL only").into()),
        };
        sent.map_err(|errno| crate::errno::Failed::new("kill", &request.process_id, errno))?;
        Ok(Response::new(proto::SignalResponse {}))
    }

    async fn resize(&self, request: Request<proto::ResizeRequest>) -> Result<Response<proto::ResizeResponse>, Status> {
        detach::resize(&self.agent, request.into_inner())?;
        Ok(Response::new(proto::ResizeResponse {}))
    }

    async fn inspect(
        &self,
        request: Request<proto::InspectRequest>,
    ) -> Result<Response<proto::InspectResponse>, Status> {
        detach::inspect(&self.agent, request.into_inner()).await.map(Response::new)
    }

    async fn serve(
        &self,
        request: Request<Streaming<proto::ServeRequest>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|first| first.request);
        let Some(serve_request::Request::Start(start)) = first else {
            return Err(Invalid::new("start", "has to come first").into());
        };
        let (answers, rest) = mpsc::channel(served::QUEUE);
        let agent = self.agent.clone();
        tokio::spawn(async move { served::serve(&agent, start, requests, answers).await });
        Ok(Response::new(Answers { first: None, rest }))
    }

    async fn abort_share(
        &self,
        request: Request<proto::AbortShareRequest>,
    ) -> Result<Response<proto::AbortShareResponse>, Status> {
        shares::abort(&request.get_ref().tag)?;
        Ok(Response::new(proto::AbortShareResponse {}))
    }

    async fn stats(&self, _: Request<proto::StatsRequest>) -> Result<Response<proto::StatsResponse>, Status> {
        Ok(Response::new(stats::collect(&self.agent)?))
    }
}
