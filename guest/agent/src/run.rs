//! One Run call from its first message to its end: container (where asked for), process, stdio, exit, and the clean-up.
//! It is a task of its own that no cancelled call can drop half-way; a call that goes away is an event to it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendError;
use tokio::time::Instant;
use tonic::{Status, Streaming};

use crate::agent::Agent;
use crate::cgroup::Cgroup;
use crate::container::{self, Container, Running};
use crate::process::{self, Plan, Spawned};
use crate::proto::run_request::Request;
use crate::proto::run_response::Response;
use crate::proto::{Exited, Process, RunRequest, RunResponse, Start, Started};
use crate::reaper::Exit;
use crate::stdio::{self, Input, Output, Piece, Report};
use crate::validate::{self, Invalid};

/// Answers on their way to the host; a full queue holds the reading of the pipes back.
pub type Answers = mpsc::Sender<Result<RunResponse, Status>>;
/// How many fit: one piece of each stream.
pub const QUEUE: usize = 2;

/// How long output may gather that comes right after other output.
const GATHER: Duration = Duration::from_millis(1);

/// How a process that started came to its end for the call.
enum Ended {
    Exit(Exit),
    /// The call was reset, or its connection died.
    Cancelled,
}

/// Runs it all. What goes wrong is the call's status.
pub async fn run(agent: Arc<Agent>, start: Start, requests: Streaming<RunRequest>, answers: Answers) {
    let mut used = Used::default();
    if let Err(status) = try_run(&agent, start, requests, &answers, &mut used).await {
        let _ = answers.send(Err(status)).await;
    }
    // The host need not wait for what nobody sees: let the end of the call go out first.
    drop(answers);
    tokio::task::yield_now().await;
    drop(used);
}

/// The cgroup of a process that has ended, on its way back.
#[derive(Default)]
struct Used(Option<(Arc<Container>, Arc<Cgroup>)>);

impl Drop for Used {
    fn drop(&mut self) {
        if let Some((container, cgroup)) = self.0.take() {
            container.return_cgroup(cgroup);
        }
    }
}

async fn try_run(
    agent: &Arc<Agent>,
    start: Start,
    requests: Streaming<RunRequest>,
    answers: &Answers,
    used: &mut Used,
) -> Result<(), Status> {
    let process = start.process.ok_or_else(|| Invalid::new("start.process", "is missing"))?;
    agent.ready()?;
    let Some(create) = start.create else {
        let container = agent.container(&start.container_id)?;
        return execute(agent, &container, process, requests, answers, false, used).await;
    };
    let id = create.id.clone();
    if id != start.container_id {
        return Err(Invalid::new("start.create.id", "is not container_id").into());
    }
    validate::id("start.container_id", &id)?;
    let claim = agent.claim(&id)?;
    let prepared = tokio::select! {
        prepared = container::prepare(create) => prepared?,
        () = answers.closed() => return Ok(()),
    };
    let container = container::build(agent, prepared).await?;
    claim.publish(&container);
    let result = execute(agent, &container, process, requests, answers, true, used).await;
    used.0 = None;
    let removed = container::remove(agent, &id).await;
    result.and(removed)
}

/// Runs the process. `own`: the container is this call's alone.
async fn execute(
    agent: &Arc<Agent>,
    container: &Arc<Container>,
    process: Process,
    requests: Streaming<RunRequest>,
    answers: &Answers,
    own: bool,
    used: &mut Used,
) -> Result<(), Status> {
    let plan = Plan::new(process, &container.defaults)?;
    if container.processes().contains_key(&plan.id) {
        return Err(Status::already_exists(format!("process {}: exists already in {}", plan.id, container.id)));
    }
    let oom_kills = container.oom_kills();
    let mut spawned = process::spawn(agent, container, &plan)?;
    let cgroup = spawned.cgroup.clone();
    used.0 = Some((container.clone(), cgroup.clone()));
    let running = Running { pid: spawned.pid, cgroup: cgroup.clone() };
    container.processes().insert(plan.id.clone(), running);

    let whole = if own { &container.cgroup } else { &*cgroup };
    let result = follow(&mut spawned, requests, answers, own.then_some(whole)).await;
    if !matches!(result, Ok(Ended::Exit(_))) {
        let _ = whole.kill();
        let _ = (&mut spawned.exit).await;
    }
    container.processes().remove(&plan.id);
    match result {
        Ok(Ended::Exit(exit)) => {
            let oom_killed = exit == Exit::Signal(libc::SIGKILL) && container.oom_kills() > oom_kills;
            let exited = Exited { exit_code: exit.code(), signal: exit.signal(), oom_killed };
            let _ = answer(answers, Response::Exited(exited)).await;
            Ok(())
        }
        Ok(Ended::Cancelled) => Ok(()),
        Err(status) => Err(status),
    }
}

async fn answer(answers: &Answers, response: Response) -> Result<(), SendError<Result<RunResponse, Status>>> {
    answers.send(Ok(RunResponse { response: Some(response) })).await
}

/// From the clone to the exit and the last byte of output. `rest` is what is killed when the process has ended and
/// something else still holds its output open; without it that may live on, and only what is in the pipes counts.
async fn follow(
    spawned: &mut Spawned,
    mut requests: Streaming<RunRequest>,
    answers: &Answers,
    rest: Option<&Cgroup>,
) -> Result<Ended, Status> {
    let reported = tokio::select! {
        reported = spawned.report.read() => reported?.report,
        () = answers.closed() => return Ok(Ended::Cancelled),
    };
    let pid = spawned.started.get();
    if reported != Report::Silent || pid == 0 {
        return Err(reported.status());
    }
    if answer(answers, Response::Started(Started { pid })).await.is_err() {
        return Ok(Ended::Cancelled);
    }
    let (stdout, stderr) = (&spawned.stdout, &spawned.stderr);
    let input = feed(&mut spawned.stdin, &mut requests);
    let mut output = Box::pin(async {
        tokio::join!(pump(stdout, answers, Response::Stdout), pump(stderr, answers, Response::Stderr))
    });
    tokio::pin!(input);
    let (mut fed, mut pumped) = (false, false);
    let exit = loop {
        tokio::select! {
            exit = &mut spawned.exit => break exit.map_err(|_| Status::internal("wait: process: lost"))?,
            result = &mut input, if !fed => {
                result?;
                fed = true;
            }
            _ = &mut output, if !pumped => pumped = true,
            () = answers.closed() => return Ok(Ended::Cancelled),
        }
    };
    if pumped {
        return Ok(Ended::Exit(exit));
    }
    match rest {
        Some(rest) => {
            rest.kill()?;
            output.await;
        }
        None => {
            // Its turn in the queue of answers would go to it, which nobody polls any more.
            drop(output);
            drain(stdout, answers, Response::Stdout).await;
            drain(stderr, answers, Response::Stderr).await;
        }
    }
    Ok(Ended::Exit(exit))
}

/// Hands the host's input to the process, until the host's side of the call ends.
async fn feed(stdin: &mut Option<Input>, requests: &mut Streaming<RunRequest>) -> Result<(), Status> {
    while let Some(request) = requests.message().await? {
        match request.request {
            Some(Request::Stdin(data)) => {
                if data.len() > validate::MAX_PIECE {
                    return Err(Invalid::new("stdin", format!("{} bytes in one message", data.len())).into());
                }
                if let Some(pipe) = stdin
                    && !pipe.write_all(&data).await
                {
                    *stdin = None; // nobody reads it any more; the process is free not to
                }
            }
            Some(Request::StdinClosed(_)) => *stdin = None,
            Some(Request::Start(_)) => return Err(Invalid::new("start", "was sent before").into()),
            None => return Err(Invalid::new("request", "is empty").into()),
        }
    }
    *stdin = None;
    Ok(())
}

/// Sends what comes until the end of the stream. May be dropped at any time: a byte leaves the pipe only when there is
/// a place for it in the queue.
///
/// A message costs much the same whatever its size. Who writes on and on in small pieces is therefore left to write for a
/// moment; on one CPU the agent would otherwise be woken by each.
async fn pump(output: &Output, answers: &Answers, wrap: fn(Bytes) -> Response) {
    let mut next: Option<Instant> = None;
    loop {
        output.readable().await;
        if let Some(next) = next.filter(|next| Instant::now() < *next && output.waiting() < stdio::PIECE) {
            tokio::time::sleep_until(next).await;
        }
        next = Some(Instant::now() + GATHER);
        let Ok(place) = answers.reserve().await else { return };
        match output.take() {
            Piece::Data(data) => {
                if data.len() == stdio::PIECE {
                    output.widen();
                }
                place.send(Ok(RunResponse { response: Some(wrap(data)) }));
            }
            Piece::Nothing => {}
            Piece::End => return,
        }
    }
}

/// Sends what is in the pipe now, and no more.
async fn drain(output: &Output, answers: &Answers, wrap: fn(Bytes) -> Response) {
    let mut left = output.waiting();
    while left > 0 {
        let Ok(place) = answers.reserve().await else { return };
        let Piece::Data(data) = output.try_read(left) else { return };
        left = left.saturating_sub(data.len());
        place.send(Ok(RunResponse { response: Some(wrap(data)) }));
    }
}
