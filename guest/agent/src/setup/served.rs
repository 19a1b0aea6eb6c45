//! A volume that the host serves itself: requests of the kernel's FUSE go to the host as they are, and its answers back
//! (linux/fuse.h). The agent knows of them only how long they are.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use bytes::{Buf, Bytes, BytesMut};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::volumes::{self, Mounted};
use crate::agent::Agent;
use crate::errno::{Failed, Step};
use crate::mounts::{self, Options};
use crate::proto::serve_request::Request;
use crate::proto::serve_response::Response;
use crate::proto::{ServeRequest, ServeResponse, Served};
use crate::sys;
use crate::validate::{self, Invalid};

/// Answers on their way to the host.
pub type Answers = mpsc::Sender<Result<ServeResponse, Status>>;
/// How many fit.
pub const QUEUE: usize = 2;

const DEVICE: &str = "/dev/fuse";
/// Largest piece of data in one message.
const PIECE: usize = 64 * 1024 - 64;
/// Longest request or answer: agent.proto.
const LONGEST: usize = 256 * 1024;
/// Shortest answer: struct fuse_out_header.
const SHORTEST: usize = 16;

/// Mounts it, and passes on what is asked and answered until the call ends. What goes wrong is the call's status.
pub async fn serve(agent: &Agent, start: Served, requests: Streaming<ServeRequest>, answers: Answers) {
    if let Err(status) = try_serve(agent, start, requests, &answers).await {
        let _ = answers.send(Err(status)).await;
    }
}

async fn try_serve(
    agent: &Agent,
    start: Served,
    requests: Streaming<ServeRequest>,
    answers: &Answers,
) -> Result<(), Status> {
    agent.ready()?;
    validate::list("start.options", &start.options, 64)?;
    let target = volumes::below("start.target", &start.target)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let device = rustix::fs::open(DEVICE, flags, Mode::empty()).step("open", DEVICE)?;
    // Nothing in here waits for the host, whose answers have to come through this very thread.
    mount(&device, &target, &start.options)?;
    let _mounted = Mounted::at(&target);
    let device = sys::watch(device, Interest::READABLE).step("epoll", DEVICE)?;
    if answers.send(Ok(message(Response::Mounted(Default::default())))).await.is_err() {
        return Ok(());
    }
    tokio::select! {
        () = to_host(&device, answers) => Ok(()),
        result = to_guest(&device, requests) => result,
    }
}

fn mount(device: &OwnedFd, target: &str, options: &[String]) -> Result<(), Failed> {
    let mut options = Options::parse(options);
    let own = [
        ("fd", Some(device.as_raw_fd().to_string())),
        ("rootmode", Some("40000".to_owned())),
        ("user_id", Some("0".to_owned())),
        ("group_id", Some("0".to_owned())),
        ("allow_other", None),
        ("default_permissions", None),
    ];
    options.data.retain(|(key, _)| own.iter().all(|(mine, _)| key != mine));
    options.data.extend(own.map(|(key, value)| (key.to_owned(), value)));
    let mount = mounts::filesystem("fuse", "host", &options)?;
    mounts::attach(mount.as_fd(), volumes::place(target)?.as_fd(), target)
}

fn message(response: Response) -> ServeResponse {
    ServeResponse { response: Some(response) }
}

/// Until it is unmounted, or the host wants no more.
async fn to_host(device: &AsyncFd<OwnedFd>, answers: &Answers) {
    let mut buffer = vec![0u8; LONGEST];
    loop {
        let Ok(mut ready) = device.readable().await else { return };
        // One request at a time: fuse(4).
        match rustix::io::read(device.as_fd(), &mut buffer[..]) {
            Ok(0) => return,
            Ok(count) => {
                for piece in buffer[..count].chunks(PIECE) {
                    let data = Response::Data(Bytes::copy_from_slice(piece));
                    if answers.send(Ok(message(data))).await.is_err() {
                        return;
                    }
                }
            }
            Err(Errno::AGAIN) => ready.clear_ready(),
            // The request was given up before it was read.
            Err(Errno::INTR | Errno::NOENT) => {}
            Err(_) => return,
        }
    }
}

async fn to_guest(device: &AsyncFd<OwnedFd>, mut requests: Streaming<ServeRequest>) -> Result<(), Status> {
    let mut waiting = BytesMut::new();
    while let Some(request) = requests.message().await? {
        let Some(Request::Data(data)) = request.request else {
            return Err(Invalid::new("request", "is no data").into());
        };
        if data.len() > validate::MAX_PIECE {
            return Err(Invalid::new("data", format!("{} bytes in one message", data.len())).into());
        }
        waiting.extend_from_slice(&data);
        while let Some(length) = whole(&waiting)? {
            match rustix::io::write(device.as_fd(), &waiting[..length]) {
                // Nobody waits for this answer any more.
                Ok(_) | Err(Errno::NOENT | Errno::INTR) => {}
                Err(errno) => return Err(Failed::new("write", DEVICE, errno).into()),
            }
            waiting.advance(length);
        }
    }
    Ok(())
}

/// The length of the first answer, if all of it is there.
fn whole(waiting: &[u8]) -> Result<Option<usize>, Invalid> {
    let Some(length) = waiting.first_chunk().map(|bytes| u32::from_le_bytes(*bytes) as usize) else { return Ok(None) };
    if !(SHORTEST..=LONGEST).contains(&length) {
        return Err(Invalid::new("data", format!("an answer of {length} bytes")));
    }
    Ok((waiting.len() >= length).then_some(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_whole() {
        let answer = [&20u32.to_le_bytes()[..], &[0; 16]].concat();
        assert_eq!(whole(&answer[..3]).expect("good"), None);
        assert_eq!(whole(&answer[..19]).expect("good"), None);
        assert_eq!(whole(&answer).expect("good"), Some(20));
        assert_eq!(whole(&[&answer[..], &[1, 2, 3]].concat()).expect("good"), Some(20));
        assert!(whole(&15u32.to_le_bytes()).is_err());
        assert!(whole(&u32::MAX.to_le_bytes()).is_err());
    }
}
