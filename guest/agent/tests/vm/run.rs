//! What a Run gives, collected.

use pykata_agent::proto::run_request::Request;
use pykata_agent::proto::run_response::Response;
use pykata_agent::proto::{CreateContainerRequest, Exited, Process, RunRequest, RunResponse, Start};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::harness::Client;

/// What goes to a process.
#[derive(Clone)]
pub struct Input(mpsc::Sender<RunRequest>);

/// A Run that is under way. Dropped, it is reset.
pub struct Running {
    requests: Input,
    answers: Streaming<RunResponse>,
    pub pid: i32,
}

#[derive(Debug, Default, Clone, PartialEq)]
pub struct Done {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exited: Exited,
}

impl Done {
    pub fn code(&self) -> i32 {
        self.exited.exit_code
    }

    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

struct Requests(mpsc::Receiver<RunRequest>);

impl tonic::codegen::tokio_stream::Stream for Requests {
    type Item = RunRequest;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<RunRequest>> {
        self.0.poll_recv(cx)
    }
}

/// Starts a process; with `create`, in a container of its own.
pub async fn start(
    client: &mut Client,
    container: &str,
    process: Process,
    create: Option<CreateContainerRequest>,
) -> Result<Running, Status> {
    let (requests, receiver) = mpsc::channel(4);
    let start = Start { container_id: container.into(), process: Some(process), create, ..Default::default() };
    requests.send(RunRequest { request: Some(Request::Start(start)) }).await.expect("open");
    let mut answers = client.run(Requests(receiver)).await?.into_inner();
    match answers.message().await?.and_then(|first| first.response) {
        Some(Response::Started(started)) => Ok(Running { requests: Input(requests), answers, pid: started.pid }),
        other => panic!("not started: {other:?}"),
    }
}

impl Input {
    pub async fn stdin(&self, data: &[u8]) {
        let _ = self.0.send(RunRequest { request: Some(Request::Stdin(data.to_vec().into())) }).await;
    }

    pub async fn close_stdin(&self) {
        let _ = self.0.send(RunRequest { request: Some(Request::StdinClosed(true)) }).await;
    }
}

impl Running {
    pub fn input(&self) -> Input {
        self.requests.clone()
    }

    pub async fn stdin(&self, data: &[u8]) {
        self.requests.stdin(data).await;
    }

    pub async fn close_stdin(&self) {
        self.requests.close_stdin().await;
    }

    pub async fn next(&mut self) -> Result<Option<Response>, Status> {
        Ok(self.answers.message().await?.and_then(|message| message.response))
    }

    pub async fn finish(mut self) -> Result<Done, Status> {
        let mut done = Done::default();
        let mut exited = None;
        while let Some(response) = self.next().await? {
            assert!(exited.is_none(), "something came after the exit: {response:?}");
            match response {
                Response::Stdout(data) => done.stdout.extend_from_slice(&data),
                Response::Stderr(data) => done.stderr.extend_from_slice(&data),
                Response::Exited(value) => exited = Some(value),
                Response::Ended(_) => {}
                other => panic!("{other:?}"),
            }
        }
        done.exited = exited.expect("the exit is always told");
        Ok(done)
    }
}

/// Runs to completion without input.
pub async fn run(
    client: &mut Client,
    container: &str,
    process: Process,
    create: Option<CreateContainerRequest>,
) -> Result<Done, Status> {
    let running = start(client, container, process, create).await?;
    running.close_stdin().await;
    running.finish().await
}

/// Runs a shell script in a container that is there; what it prints to stderr counts as output, too.
pub async fn sh(client: &mut Client, container: &str, script: &str) -> (String, i32) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let id = format!("sh-{}", SERIAL.fetch_add(1, Ordering::Relaxed));
    let script = format!("exec 2>&1; {script}");
    let process = crate::harness::process(&id, &["sh", "-c", &script]);
    let done = run(client, container, process, None).await.expect("runs");
    (done.out().trim_end().to_owned(), done.exited.exit_code)
}

/// Waits for what is to come about by itself.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..500 {
        if holds().await {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("{what}: still not so");
}
