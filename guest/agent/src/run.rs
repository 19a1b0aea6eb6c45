//! One Run call from its first message to its end: container (where asked for), process, stdio, exit, and the clean-up.
//! It is a task of its own that no cancelled call can drop half-way; a call that goes away is an event to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendError;
use tokio::time::timeout;
use tonic::Status;

use crate::agent::Agent;
use crate::cgroup::Cgroup;
use crate::container::{self, Container};
use crate::errno::Failed;
use crate::input::Requests;
use crate::output::{Bulk, Side, Sides, Way};
use crate::process::berth::Berth;
use crate::process::registry::Company;
use crate::process::stem::Kind as StemKind;
use crate::process::{self, Kind, Plan, Running, Spawned, Streams};
use crate::proto::run_response::Response;
use crate::proto::{Exited, Process, RunResponse, Start, Started};
use crate::reaper::Exit;
use crate::setup::late;
use crate::stdio::{self, Input};
use crate::transport::Beside;
use crate::validate::{self, Invalid};
use crate::{detach, input};

/// Answers on their way to the host; a full queue holds the reading of the pipes back.
pub type Answers = mpsc::Sender<Result<RunResponse, Status>>;
/// How many fit: all that there is to say of a small command.
pub const QUEUE: usize = 4;

/// How long a process has to say goodbye after its terminal has hung up, before it is killed.
const GOODBYE: Duration = Duration::from_millis(250);

/// How long the news that a process has started may wait for those of its end: to tell the host takes longer than a small
/// program does, and its pipes need not be watched for it.
const PATIENCE: Duration = Duration::from_millis(10);

/// How a process that started came to its end for the call.
enum Ended {
    Exit(Exit),
    /// The call was reset, or its connection died.
    Cancelled,
}

/// Runs it all. What goes wrong is the call's status.
pub async fn run(agent: Arc<Agent>, start: Start, requests: Requests, answers: Answers, beside: Beside) {
    let mut used = Used::default();
    if let Err(status) = try_run(&agent, start, requests, (&answers, &beside), &mut used).await {
        let _ = answers.send(Err(status)).await;
    }
    // The host need not wait for what nobody sees: let the end of the call go out first.
    drop(answers);
    tokio::task::yield_now().await;
    used.give_back(&agent);
}

/// What a process that has ended leaves: for the next one, and to be cleared away when the host has heard of its end.
#[derive(Default)]
pub struct Used {
    place: Option<(Arc<Container>, Arc<Berth>, Option<StemKind>)>,
    begun: Option<Begun>,
}

impl Used {
    pub fn by(container: &Arc<Container>, begun: &Begun) -> Self {
        let place = (container.clone(), begun.spawned.berth.clone(), StemKind::of(&begun.plan));
        Self { place: Some(place), begun: None }
    }

    /// Its place goes with the container.
    fn forget(&mut self) {
        *self = Self::default();
    }

    pub fn give_back(self, agent: &Agent) {
        drop(self.begun);
        let Some((container, berth, kind)) = self.place else { return };
        container.return_berth(berth);
        if let Some(kind) = kind {
            container.plant(agent, kind);
        }
        agent.pipes.refill();
    }
}

async fn try_run(
    agent: &Arc<Agent>,
    mut start: Start,
    mut requests: Requests,
    (answers, beside): (&Answers, &Beside),
    used: &mut Used,
) -> Result<(), Status> {
    let process = start.process.take().ok_or_else(|| Invalid::new("start.process", "is missing"))?;
    agent.ready()?;
    if start.detached {
        return detach::run(agent, &start, process, answers).await;
    }
    let Some(create) = start.create.take() else {
        let container = agent.container(&start.container_id)?;
        let call = Call { agent, container: &container, start: &start, answers, beside };
        let result = call.run(process, &mut requests, start.last, used).await;
        if !start.last {
            return result;
        }
        call.farewell(&result, requests).await;
        used.forget();
        let removed = container::remove(agent, &container.id).await;
        return result.and(removed);
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
    let call = Call { agent, container: &container, start: &start, answers, beside };
    let result = call.run(process, &mut requests, true, used).await;
    call.farewell(&result, requests).await;
    used.forget();
    let removed = container::remove(agent, &id).await;
    result.and(removed)
}

/// A process that was started, as the container knows it.
pub struct Begun {
    pub plan: Plan,
    pub spawned: Spawned,
    company: Company,
    oom_kills: u64,
    kept: Arc<AtomicBool>,
}

/// Starts a process with these streams.
pub fn begin(
    agent: &Agent,
    container: &Arc<Container>,
    process: Process,
    kind: impl FnOnce(&Plan) -> Kind,
    patience: Duration,
) -> Result<Begun, Status> {
    let plan = Plan { patience, ..Plan::new(process, &container.defaults)? };
    if container.processes.has(&plan.id) {
        return Err(Status::already_exists(format!("process {}: exists already in {}", plan.id, container.id)));
    }
    late::catch_up(agent, container)?;
    let kind = kind(&plan);
    let before = container.take_kills_before();
    let (oom_kills, spawned) = match become_process(agent, container, &plan, kind) {
        Some(spawned) => (before.unwrap_or(0), spawned), // mostly the first that runs in there
        None => {
            let before = before.unwrap_or_else(|| container.oom_kills());
            (before, process::spawn(agent, container, &plan, kind, None)?)
        }
    };
    let kept = Arc::new(AtomicBool::new(false));
    let running = Running { pid: spawned.pid, berth: spawned.berth.clone(), terminal: None, kept: kept.clone() };
    let company = container.processes.start(&plan.id, running);
    Ok(Begun { plan, spawned, company, oom_kills, kept })
}

/// By the process that waits for its first command, if there is one that fits.
fn become_process(agent: &Agent, container: &Container, plan: &Plan, kind: Kind) -> Option<Spawned> {
    match kind {
        Kind::Pipes { stdin } => container.take_waiting()?.become_process(agent, plan, stdin),
        _ => None,
    }
}

impl Begun {
    /// Nobody is there any more who started it, and it lives on.
    fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// Waits until the command runs, and for its end if it may wait for that.
    pub async fn started(&mut self, agent: &Agent, container: &Arc<Container>) -> Result<process::Started, Status> {
        self.spawned.started(agent, container, &self.plan).await
    }

    /// Its streams, once it runs, when others may know that.
    pub fn streams(&mut self, container: &Container) -> Result<Streams, Failed> {
        let streams = self.spawned.streams()?;
        container.processes.runs(&self.plan.id, self.spawned.pid, streams.terminal.clone());
        Ok(streams)
    }

    /// What the host is told of its end.
    pub fn exited(&self, container: &Container, exit: Exit) -> Exited {
        let oom_kills = container.oom_kills().saturating_sub(self.oom_kills);
        let blamed = match exit {
            Exit::Code(0) => false,
            Exit::Code(137) | Exit::Signal(libc::SIGKILL) => true,
            _ => container.processes.was_alone(self.company),
        };
        Exited {
            exit_code: exit.code(),
            signal: exit.signal(),
            oom_killed: blamed && oom_kills > 0,
            oom_kills: u32::try_from(oom_kills).unwrap_or(u32::MAX),
        }
    }
}

pub async fn answer(answers: &Answers, response: Response) -> Result<(), SendError<Result<RunResponse, Status>>> {
    answers.send(Ok(RunResponse { response: Some(response) })).await
}

/// What a call is about.
struct Call<'a> {
    agent: &'a Arc<Agent>,
    container: &'a Arc<Container>,
    start: &'a Start,
    answers: &'a Answers,
    beside: &'a Beside,
}

impl Call<'_> {
    /// Runs the process. `own`: the container is this call's alone.
    async fn run(&self, process: Process, requests: &mut Requests, own: bool, used: &mut Used) -> Result<(), Status> {
        let kind = |plan: &Plan| match plan.terminal {
            Some(size) => Kind::Terminal { size, console: own },
            None => Kind::Pipes { stdin: !self.start.stdin_closed },
        };
        let patience = if self.start.collected { PATIENCE } else { Duration::ZERO };
        let mut begun = begin(self.agent, self.container, process, kind, patience)?;
        let berth = begun.spawned.berth.clone();
        *used = Used::by(self.container, &begun);
        let whole = if own { &self.container.cgroup } else { &**berth };
        let result = self.follow(&mut begun, requests, own.then_some(whole)).await;
        self.container.processes.end(&begun.plan.id);
        if !matches!(result, Ok(Ended::Exit(_))) {
            // Its terminal is closed by now.
            let gone = begun.plan.terminal.is_some() && timeout(GOODBYE, begun.spawned.gone()).await.is_ok();
            let _ = whole.kill();
            if !gone {
                begun.spawned.gone().await;
            }
        }
        match result {
            Ok(Ended::Exit(exit)) => {
                let exited = begun.exited(self.container, exit);
                let _ = answer(self.answers, Response::Exited(exited)).await;
                used.begun = Some(begun);
                Ok(())
            }
            Ok(Ended::Cancelled) => Ok(()),
            Err(status) => Err(status),
        }
    }

    /// Before a container that was the process's alone is removed: what there is to say goes out, which takes less than the
    /// removal, and where nobody waits for that, and nothing runs in there, the host says when it shall be.
    async fn farewell(&self, result: &Result<(), Status>, mut requests: Requests) {
        tokio::task::yield_now().await;
        if self.start.lingers && result.is_ok() && self.container.is_deserted() {
            input::farewell(&mut requests, self.answers).await;
        }
    }

    /// From the clone to the exit and the last byte of output. `rest` is what is killed when the process has ended and
    /// something else still holds its output open; without it that may live on, and only what is in the pipes counts.
    async fn follow(&self, begun: &mut Begun, requests: &mut Requests, rest: Option<&Cgroup>) -> Result<Ended, Status> {
        let answers = self.answers;
        let process::Started { here, exit } = tokio::select! {
            started = begun.started(self.agent, self.container) => started?,
            () = answers.closed() => return Ok(Ended::Cancelled),
        };
        let queue = input::Queue::new(&self.beside.inlet, self.start); // before the host may send something
        if answer(answers, Response::Started(Started { pid: here })).await.is_err() {
            return Ok(Ended::Cancelled);
        }
        if let Some((exit, words)) = exit.and_then(|exit| Some((exit, self.last_words(begun)?))) {
            for response in words {
                let _ = answer(answers, response).await;
            }
            return Ok(Ended::Exit(exit));
        }
        let (mut stdin, sides) = self.connect(begun)?;
        let ended = self.pass(begun, exit, requests, (&mut stdin, &queue), &sides, rest).await;
        if !matches!(ended, Ok(Ended::Exit(_))) && begun.is_kept() && !begun.spawned.exit.is_terminated() {
            sides.abandon();
            let exit = (&mut begun.spawned.exit).await.map_err(|_| Status::internal("wait: process: lost"))?;
            drop(stdin); // open until here
            return Ok(Ended::Exit(exit));
        }
        let ended = ended?;
        if matches!(ended, Ended::Exit(_)) {
            sides.abandon();
        }
        Ok(ended)
    }

    /// What a process wrote that has ended, if that is all there is and the host has room for it.
    fn last_words(&self, begun: &Begun) -> Option<impl Iterator<Item = Response>> {
        if self.start.window != 0 && (self.start.window as usize) < stdio::PIECE {
            return None;
        }
        let [stdout, stderr] = begun.spawned.last_words()?;
        Some([Response::Stdout(stdout), Response::Stderr(stderr)].into_iter().filter(|response| match response {
            Response::Stdout(data) | Response::Stderr(data) => !data.is_empty(),
            _ => true,
        }))
    }

    /// Passes everything on until the process has ended, unless it has, and its output is drained.
    async fn pass(
        &self,
        begun: &mut Begun,
        early: Option<Exit>,
        requests: &mut Requests,
        (stdin, queue): (&mut Option<Input>, &input::Queue),
        sides: &Sides,
        rest: Option<&Cgroup>,
    ) -> Result<Ended, Status> {
        let answers = self.answers;
        let input = input::take(stdin, queue, requests, sides, answers);
        let mut output = Box::pin(sides.pump(answers));
        tokio::pin!(input);
        let (mut fed, mut pumped) = (false, false);
        let exit = loop {
            if let Some(exit) = early {
                break exit;
            }
            tokio::select! {
                exit = &mut begun.spawned.exit => break exit.map_err(|_| Status::internal("wait: process: lost"))?,
                result = &mut input, if !fed => {
                    result?;
                    fed = true;
                }
                () = &mut output, if !pumped => pumped = true,
                () = answers.closed() => return Ok(Ended::Cancelled),
            }
        };
        // Its turn in the queue of answers would go to it, which nobody polls any more.
        drop(output);
        if sides.is_over() {
            return Ok(Ended::Exit(exit));
        }
        if let Some(rest) = rest {
            rest.kill()?;
        }
        let drained = sides.drain(answers);
        tokio::pin!(drained);
        loop {
            tokio::select! {
                () = &mut drained => return Ok(Ended::Exit(exit)),
                result = &mut input, if !fed => {
                    result?; // the host's room for the rest comes this way
                    fed = true;
                }
                () = answers.closed() => return Ok(Ended::Exit(exit)),
            }
        }
    }

    /// The streams of a process that runs.
    fn connect(&self, begun: &mut Begun) -> Result<(Option<Input>, Sides), Failed> {
        let Streams { stdin, stdout, stderr, .. } = begun.streams(self.container)?;
        let stdout = stdout.ok_or_else(|| Failed::new("open", "stdout", rustix::io::Errno::BADF))?;
        let way = || Way { window: self.start.window, bulk: Bulk::new(&self.beside.outlet, self.start) };
        let sides =
            Sides { stdout: Side::stdout(stdout, way()), stderr: stderr.map(|stderr| Side::stderr(stderr, way())) };
        Ok((stdin, sides))
    }
}
