//! The Clone call: makes a guest that goes on from a saved one another guest.

use std::sync::Arc;

use prost::Message;
use tonic::Status;

use super::late::{self, Ids};
use super::{clock, entropy, identity, names};
use crate::agent::Agent;
use crate::validate::{self, Invalid};
use crate::{proto, sys};

fn check(request: &proto::CloneRequest) -> Result<(), Invalid> {
    if !request.hostname.is_empty() {
        validate::hostname("hostname", &request.hostname)?;
    }
    let size = request.entropy.len();
    if size != 0 && !(entropy::LEAST + 2 * identity::ID..=entropy::MOST).contains(&size) {
        return Err(Invalid::new("entropy", format!("{size} bytes")));
    }
    match request.signal {
        0..=64 => Ok(()),
        other => Err(Invalid::new("signal", format!("{other} is no signal"))),
    }
}

/// The call. It may be made any number of times.
pub fn call(agent: &Agent, request: &proto::CloneRequest) -> Result<proto::CloneResponse, Status> {
    let ready = agent.ready()?;
    check(request)?;
    let is_another = !request.entropy.is_empty();
    // The ids are the host's: the guest's own generator takes as long for the first number it makes.
    let (seed, ids) = request.entropy.split_at(request.entropy.len().saturating_sub(2 * identity::ID));
    if is_another {
        entropy::add(seed)?;
    }
    clock::set(request.unix_time_ns)?;
    let generation = agent.generation(is_another);
    if is_another {
        let (&machine, boot) = ids.split_first_chunk().ok_or(Invalid::new("entropy", "has no ids".to_owned()))?;
        let &boot = boot.first_chunk().ok_or(Invalid::new("entropy", "has no boot id".to_owned()))?;
        let names = ready.names.of_another(&request.hostname, machine);
        if names.hostname() != ready.names.hostname() {
            names::set_hostname(names.hostname())?;
        }
        agent.end_setup(Some(Arc::new(ready.of_another(names))));
        late::tell(agent, &ready, Ids { boot, generation })?;
    }
    if request.signal != 0 {
        signal_all(agent, request.signal);
    }
    if is_another {
        agent.go_first(false)?;
    }
    let unix_time_ns = sys::now_ns(libc::CLOCK_REALTIME);
    Ok(proto::CloneResponse { generation, unix_time_ns, short_commands: true })
}

/// The call as it comes ahead of HTTP/2.
pub fn ahead(agent: &Agent, request: &[u8]) -> Result<Vec<u8>, String> {
    let request = proto::CloneRequest::decode(request).map_err(|err| err.to_string())?;
    call(agent, &request).map(|answer| answer.encode_to_vec()).map_err(|status| status.message().to_owned())
}

/// Only who still runs can be meant: a process that wasn't waited for keeps its PID.
fn signal_all(agent: &Agent, signal: i32) {
    for container in agent.containers() {
        for pid in container.processes.pids() {
            if agent.reaper.is_unreaped(pid) {
                let _ = sys::kill(pid, signal);
            }
        }
    }
}
