//! A Run whose process outlives it: the call ends when the command runs, and the agent attends to the rest.

use std::sync::Arc;
use std::time::Duration;

use tonic::Status;

use crate::agent::Agent;
use crate::container::Container;
use crate::process::detached::{self, Detached};
use crate::process::{self, Kind, Streams};
use crate::proto::run_response::Response;
use crate::proto::{InspectRequest, InspectResponse, Process, Start, Started};
use crate::run::{self, Answers, Begun, Used};
use crate::stdio::Output;
use crate::validate::{self, Invalid};

/// Starts it. What goes wrong until it runs is the call's status.
pub async fn run(agent: &Arc<Agent>, start: &Start, process: Process, answers: &Answers) -> Result<(), Status> {
    if start.create.is_some() || process.terminal.is_some() || process.tool != 0 {
        return Err(Invalid::new("start.detached", "goes with neither create nor a terminal nor a tool").into());
    }
    detached::check_log(start.log)?;
    let container = agent.container(&start.container_id)?;
    let kind = if start.log > 0 { Kind::Log } else { Kind::Null };
    let mut begun = run::begin(agent, &container, process, |_| kind, Duration::ZERO)?;
    let started = tokio::select! {
        started = begun.started(agent, &container) => started,
        () = answers.closed() => Err(Status::cancelled("start: the host has gone")),
    };
    let started = match started {
        Ok(process::Started { here, .. }) => {
            run::answer(answers, Response::Started(Started { pid: here })).await.map_err(|_| Status::cancelled(""))
        }
        Err(status) => Err(status),
    };
    let Streams { stdout, .. } = begun.streams(&container)?;
    let known = Arc::new(Detached::new(start.log));
    match started {
        Ok(()) => container.processes.detach(&begun.plan.id, known.clone()),
        Err(_) => drop(begun.spawned.berth.kill()),
    }
    tokio::spawn(attend(agent.clone(), container, begun, known, stdout, started.is_ok()));
    started
}

/// Takes what it writes and waits for its end.
async fn attend(
    agent: Arc<Agent>,
    container: Arc<Container>,
    mut begun: Begun,
    known: Arc<Detached>,
    output: Option<Output>,
    keep: bool,
) {
    let used = Used::by(&container, &begun);
    if !keep {
        begun.spawned.gone().await; // nobody asks how
        container.processes.end(&begun.plan.id);
        return used.give_back(&agent);
    }
    let writing = async {
        match &output {
            Some(output) => output.follow(|data| known.wrote(&data)).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(writing);
    let mut closed = false;
    let exit = loop {
        tokio::select! {
            exit = &mut begun.spawned.exit => break exit,
            () = &mut writing, if !closed => closed = true,
        }
    };
    if let Some(output) = output.as_ref().filter(|_| !closed) {
        output.drain(|data| known.wrote(&data));
    }
    container.processes.end(&begun.plan.id);
    if let Ok(exit) = exit {
        known.ended(begun.exited(&container, exit));
        container.processes.retire(&begun.plan.id);
    }
    used.give_back(&agent);
    drop(container);
    if output.is_some() && !closed {
        writing.await; // of those that it has left behind
    }
}

/// Answers Inspect.
pub async fn inspect(agent: &Agent, request: InspectRequest) -> Result<InspectResponse, Status> {
    let container = agent.container(&request.container_id)?;
    let known = container.processes.detached(&request.process_id).ok_or_else(|| {
        Status::not_found(format!("process {}: not known as detached", validate::shown(&request.process_id)))
    })?;
    drop(container);
    if request.wait {
        known.wait().await;
    }
    let (log, written) = known.written();
    Ok(InspectResponse { exited: known.exited(), log: log.into(), written })
}

/// Gives a process's terminal another size.
pub fn resize(agent: &Agent, request: crate::proto::ResizeRequest) -> Result<(), Status> {
    let container = agent.container(&request.container_id)?;
    let size = crate::process::Size::new(&request.terminal.unwrap_or_default())?;
    let shown = || validate::shown(&request.process_id);
    let running = container.processes.get(&request.process_id);
    let running = running.ok_or_else(|| Status::not_found(format!("process {}: not running", shown())))?;
    match running.terminal {
        Some(terminal) => Ok(size.apply(&terminal)?),
        None => Err(Status::failed_precondition(format!("process {}: has no terminal", shown()))),
    }
}
