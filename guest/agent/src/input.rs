//! What the host sends within a Run: stdin of the process, and room for its output.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustix::io::Errno;
use tokio::sync::{Notify, oneshot};
use tonic::{Status, Streaming};

use crate::errno::Failed;
use crate::output::Sides;
use crate::proto::run_request::Request;
use crate::proto::run_response::Response;
use crate::proto::{RunRequest, RunResponse, Start};
use crate::run::Answers;
use crate::stdio::{self, Input};
use crate::sys;
use crate::transport::inlet::{Inlet, Move, Taker, Taking};
use crate::transport::staging::Staged;
use crate::validate::{self, Invalid};

/// Bytes of stdin that the host may send before it is allowed more: agent.proto, `Start.window`.
const WINDOW: usize = 64 * 1024;
/// ... where it may send it in bulk frames. What is in the disk beside the port isn't held here and doesn't count.
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

/// Waits until the host wants the container of a process that has ended to go, or can't say so any more.
pub async fn farewell(requests: &mut Requests, answers: &Answers) {
    loop {
        tokio::select! {
            request = requests.message() => match request.map(|request| request.and_then(|request| request.request)) {
                // Others were under way when the process ended.
                Ok(Some(request)) if !matches!(request, Request::Remove(_)) => {}
                _ => return,
            },
            () = answers.closed() => return,
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
    let filled = async { Ok(queue.fill(requests, sides).await) };
    let (taken, ()) = tokio::try_join!(filled, queue.empty(stdin, answers))?;
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
        Some(Request::Remove(_)) => Invalid::new("remove", "the process hasn't ended yet"),
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

/// Data on its way to the process.
enum Waiting {
    Here { data: Bytes, by_port: bool },
    InDisk(Staged),
}

#[derive(Default)]
struct Held {
    pieces: VecDeque<Waiting>,
    /// Bytes that the host has sent by the port and hasn't been given back as room.
    used: usize,
    /// ... and of these what has gone to the process.
    gone_by_port: usize,
    /// What has gone there in whichever way, and the host doesn't know of.
    gone: usize,
    /// A piece is on its way to the process.
    writing: bool,
    /// The process's pipe, where data is moved to it.
    pipe: Option<OwnedFd>,
    closed: bool,
    /// More came in bulk than there is room for, or after the end.
    broken: bool,
    /// Why something can't be read from the disk.
    lost: Option<Errno>,
}

impl Held {
    fn has_much_room(&self) -> bool {
        self.pipe.as_ref().is_none_or(|pipe| sys::readable_bytes(pipe.as_fd()) <= stdio::WIDE / 2)
    }

    fn went(&mut self, size: usize, by_port: bool) {
        self.gone += size;
        if by_port {
            self.gone_by_port += size;
        }
    }

    /// Brings what waits to the pipe, as far as that has room. False: some of it still waits.
    fn write_now(&mut self) -> bool {
        while let (Some(first), Some(pipe)) = (self.pieces.front_mut(), &self.pipe) {
            let (result, by_port) = match first {
                Waiting::Here { data, by_port } => (rustix::io::write(pipe, data), *by_port),
                Waiting::InDisk(staged) => (staged.move_to(pipe.as_fd()), false),
            };
            let size = match result {
                Ok(size) => size,
                Err(errno) if self.goes_on_after(errno) => continue,
                Err(_) => return false,
            };
            let left = match first {
                Waiting::Here { data, .. } => {
                    bytes::Buf::advance(data, size);
                    data.len()
                }
                Waiting::InDisk(staged) => staged.left(),
            };
            self.went(size, by_port);
            // What is left doesn't mean that the pipe is full: a guest short of memory moves less at once. Nor would it be
            // told of room in a pipe that never was full.
            if left == 0 {
                self.pieces.pop_front();
            }
        }
        self.pieces.is_empty()
    }

    /// Whether there is more to be tried after an error: only `EAGAIN` says that the pipe is full.
    fn goes_on_after(&mut self, errno: Errno) -> bool {
        match errno {
            Errno::INTR => return true,
            Errno::NOMEM if matches!(self.pieces.front(), Some(Waiting::InDisk(_))) => {
                self.fetch(1); // with no page for the pipe the agent's own memory may do, and what is read isn't moved again
                return self.lost.is_none();
            }
            Errno::AGAIN => {}
            Errno::PIPE => self.pipe = None, // nobody reads it any more, as who writes will find
            errno => self.lost = Some(errno),
        }
        false
    }

    /// Reads up to so many pieces from the disk that wait there.
    fn fetch(&mut self, most: usize) {
        for waiting in self.pieces.iter_mut().filter(|waiting| matches!(waiting, Waiting::InDisk(_))).take(most) {
            let Waiting::InDisk(staged) = waiting else { continue };
            match staged.read() {
                Ok(data) => *waiting = Waiting::Here { data, by_port: false },
                Err(errno) => self.lost = Some(errno),
            }
        }
        if self.lost.is_some() {
            self.pieces.clear();
        }
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
        held.pieces.push_back(Waiting::Here { data, by_port: true });
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
                held.went(size, true);
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

    /// It goes to the pipe as that has room, so who doesn't read has no more of it here than a pipe holds.
    fn take_staged(&self, staged: Staged) -> Result<(), Errno> {
        let mut held = self.held();
        if held.closed {
            held.broken = true;
            return Ok(());
        }
        held.pieces.push_back(Waiting::InDisk(staged));
        let waits = held.writing || !held.has_much_room() || !held.write_now();
        if waits || held.gone >= WORTH_SAYING {
            self.changed.notify_one();
        }
        Ok(())
    }

    fn fetch(&self) {
        self.held().fetch(usize::MAX);
        self.changed.notify_one();
    }
}

/// What is to be done next.
enum Next {
    Write {
        data: Bytes,
        by_port: bool,
    },
    /// From the disk, what is first.
    Move,
    /// So much has gone to the process.
    Gone(usize),
    Lost(Errno),
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
                if let Some(errno) = held.lost {
                    return Next::Lost(errno);
                }
                if held.gone >= WORTH_SAYING.min(self.window / 2) {
                    held.used = held.used.saturating_sub(std::mem::take(&mut held.gone_by_port));
                    return Next::Gone(std::mem::take(&mut held.gone));
                }
                match held.pieces.pop_front() {
                    Some(Waiting::Here { data, by_port }) => {
                        held.writing = true;
                        return Next::Write { data, by_port };
                    }
                    Some(staged) => {
                        held.pieces.push_front(staged); // until it is moved, `fetch` has to find it
                        return Next::Move;
                    }
                    None if held.closed => {
                        held.pipe = None;
                        return Next::End;
                    }
                    None => {}
                }
            }
            self.shared.changed.notified().await;
        }
    }

    /// As soon as the process has room.
    async fn move_on(&self, stdin: &mut Option<Input>) {
        let has_pipe = self.held().pipe.is_some();
        match stdin {
            Some(pipe) if has_pipe => {
                if !pipe.when_writable(|| self.write_much()).await {
                    self.held().pipe = None;
                    *stdin = None;
                }
            }
            Some(_) => self.held().fetch(1), // a terminal
            None => {
                let mut held = self.held();
                if let Some(Waiting::InDisk(staged)) = held.pieces.pop_front() {
                    held.went(staged.left(), false);
                }
            }
        }
    }

    /// What a process has read with one small read isn't worth a request to the disk, nor an interruption at each.
    fn write_much(&self) -> bool {
        if !self.held().has_much_room() {
            sys::let_others_run();
        }
        self.held().write_now()
    }

    async fn empty(&self, stdin: &mut Option<Input>, answers: &Answers) -> Result<(), Status> {
        let mut left = MUCH;
        loop {
            match self.next().await {
                Next::Write { data, by_port } => {
                    write(stdin, &data).await;
                    let mut held = self.held();
                    held.writing = false;
                    held.went(data.len(), by_port);
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
                Next::Move => self.move_on(stdin).await,
                Next::Lost(errno) => {
                    return Err(Failed::new("read", "stdin", errno).into());
                }
                Next::End => {
                    close(stdin).await;
                    return Ok(());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        let (emptied, ()) = tokio::join!(queue.empty(&mut stdin, &answers), fed);
        emptied.expect("all is there");
        assert!(stdin.is_none() && moved(&queue, 1).is_none());
        let mut all = vec![0; BULK_WINDOW];
        let mut have = 0;
        while let Ok(size @ 1..) = rustix::io::read(&read, &mut all[have..]) {
            have += size;
        }
        assert_eq!(have, WORTH_SAYING + 7, "and then it is at its end");
        assert!(all[..MUCH].iter().all(|byte| *byte == 1) && all[..have].ends_with(b"behind\x07"));
    }

    /// A queue that data can be moved from, and the pipe that it goes to.
    fn moving() -> (Queue, Arc<Inlet>, Input, OwnedFd) {
        let (queue, inlet) = queue();
        let (read, write) = stdio::pipe().expect("pipe");
        rustix::io::ioctl_fionbio(&read, true).expect("set");
        let stdin = Input::pipe(write).expect("watched");
        queue.held().pipe = stdin.share();
        (queue, inlet, stdin, read)
    }

    fn block(byte: u8, blocks: usize) -> Vec<u8> {
        vec![byte; blocks * 4096]
    }

    #[tokio::test]
    async fn who_does_not_read_has_no_more_here_than_a_pipe_holds() {
        let (queue, _inlet, stdin, _read) = moving();
        let (answers, mut said) = tokio::sync::mpsc::channel(16);
        for _ in 0..8 {
            queue.shared.take_staged(Staged::of(&block(1, 128))).expect("taken");
        }
        {
            let mut stdin = Some(stdin);
            let emptied = queue.empty(&mut stdin, &answers);
            assert!(tokio::time::timeout(std::time::Duration::ZERO, emptied).await.is_err(), "it waits");
        }
        let held = queue.held();
        assert!(held.pieces.len() == 6 && held.pieces.iter().all(|piece| matches!(piece, Waiting::InDisk(_))));
        assert_eq!(said.recv().await.expect("said").expect("well").response, Some(Response::StdinWindow(1 << 20)));
    }

    #[tokio::test]
    async fn a_move_that_leaves_room_is_followed_by_another() {
        let (queue, _inlet, stdin, read) = moving();
        let (answers, _said) = tokio::sync::mpsc::channel(16);
        for _ in 0..3 {
            queue.shared.take_staged(Staged::of(&block(1, 128)).in_moves_of(3)).expect("taken");
        }
        assert_eq!(queue.held().pieces.len(), 1, "the pipe is full");
        for _ in 0..2 {
            queue.shared.take_staged(Staged::of(&block(1, 128)).in_moves_of(3)).expect("taken");
        }
        queue.held().closed = true;
        let mut stdin = Some(stdin);
        let emptying = async {
            let mut found = Vec::new();
            while read_some(&read, 1024 * 1024, &mut found) {
                tokio::task::yield_now().await;
            }
            found.len()
        };
        let (emptied, found) = tokio::join!(queue.empty(&mut stdin, &answers), emptying);
        emptied.expect("all has gone");
        assert_eq!(found, 5 * 128 * 4096);
    }

    #[tokio::test]
    async fn what_cannot_be_read_from_the_disk_ends_the_call() {
        for fetched in [false, true] {
            let (queue, _inlet, stdin, _read) = moving();
            let (answers, _said) = tokio::sync::mpsc::channel(1);
            let lost = Staged::of(&block(2, 1));
            lost.lose();
            if fetched {
                queue.held().writing = true; // so that it isn't moved at once
            }
            queue.shared.take_staged(lost).expect("taken");
            queue.shared.fetch();
            queue.held().writing = false;
            let emptied = queue.empty(&mut Some(stdin), &answers).await;
            assert_eq!(emptied.expect_err("lost").message(), "read: stdin: EIO");
        }
    }

    #[tokio::test]
    async fn a_terminal_and_nobody() {
        crate::sys::ignore_signal(libc::SIGPIPE);
        let (answers, mut said) = tokio::sync::mpsc::channel::<Result<RunResponse, Status>>(16);
        let (queue, _inlet, stdin, read) = moving();
        queue.held().pipe = None; // as for a terminal
        queue.shared.take_staged(Staged::of(&block(1, 2))).expect("taken");
        let mut found = Vec::new();
        let mut stdin = Some(stdin);
        let reading = async {
            while found.len() < 2 * 4096 {
                read_some(&read, 8192, &mut found);
                tokio::task::yield_now().await;
            }
            drop(read);
            for _ in 0..2 {
                queue.shared.take_staged(Staged::of(&block(1, 128))).expect("taken");
            }
            let all = Response::StdinWindow(2 * 4096 + 128 * 4096);
            assert_eq!(said.recv().await.expect("said").expect("well").response, Some(all));
            queue.held().closed = true;
            queue.shared.changed.notify_one();
        };
        let (emptied, ()) = tokio::join!(queue.empty(&mut stdin, &answers), reading);
        emptied.expect("no error of the call");
        assert!(stdin.is_none() && queue.held().pieces.is_empty());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Port(usize),
        /// So many blocks, of which so many are moved at once.
        Disk(usize, usize),
        /// The slot is given back.
        Fetch,
        Read(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (1..=64 * 1024usize).prop_map(Step::Port),
            3 => (16..=128usize, 1..=128usize).prop_map(|(blocks, most)| Step::Disk(blocks, most)),
            1 => Just(Step::Fetch),
            3 => (1..=1024 * 1024usize).prop_map(Step::Read),
        ];
        prop::collection::vec(step, 1..14)
    }

    /// Reads what is there, at most so much; false at the end.
    fn read_some(read: &OwnedFd, most: usize, into: &mut Vec<u8>) -> bool {
        let mut buffer = vec![0; most];
        match rustix::io::read(read, &mut buffer) {
            Ok(0) => return false,
            Ok(size) => into.extend_from_slice(&buffer[..size]),
            Err(Errno::AGAIN) => {}
            Err(errno) => panic!("{errno}"),
        }
        true
    }

    async fn follow(steps: &[Step]) -> Result<(), TestCaseError> {
        let (queue, _inlet, stdin, read) = moving();
        let (answers, mut said) = tokio::sync::mpsc::channel(64);
        let (mut sent, mut found) = (Vec::new(), Vec::new());
        let mut stdin = Some(stdin);
        let fed = async {
            for (byte, step) in steps.iter().enumerate() {
                match *step {
                    Step::Port(size) => {
                        sent.extend(vec![byte as u8; size]);
                        queue.shared.take(Bytes::from(vec![byte as u8; size]));
                    }
                    Step::Disk(blocks, most) => {
                        sent.extend(block(byte as u8, blocks));
                        let staged = Staged::of(&block(byte as u8, blocks)).in_moves_of(most);
                        queue.shared.take_staged(staged).expect("taken");
                    }
                    Step::Fetch => {
                        queue.shared.fetch();
                        assert!(!queue.held().pieces.iter().any(|piece| matches!(piece, Waiting::InDisk(_))));
                    }
                    Step::Read(most) => {
                        read_some(&read, most, &mut found);
                    }
                }
                tokio::task::yield_now().await;
            }
            queue.held().closed = true;
            queue.shared.changed.notify_one();
            while read_some(&read, 300_000, &mut found) {
                tokio::task::yield_now().await;
            }
        };
        let (emptied, ()) = tokio::join!(queue.empty(&mut stdin, &answers), fed);
        prop_assert!(emptied.is_ok() && !queue.held().broken);
        prop_assert!(found == sent);
        drop(answers);
        let mut given_back = queue.held().gone;
        while let Some(Ok(RunResponse { response: Some(Response::StdinWindow(size)) })) = said.recv().await {
            given_back += size as usize;
        }
        prop_assert_eq!(given_back, sent.len());
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn whichever_way_it_comes_it_arrives_whole_and_in_order(steps in steps()) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(follow(&steps))?;
        }
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
