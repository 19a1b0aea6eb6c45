//! The Clone call: makes a guest that goes on from a saved one another guest.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use prost::Message;
use rustix::io::Errno;
use rustix::process::{PidfdFlags, pidfd_open};
use tonic::Status;

use super::names::{self, Names};
use super::{clock, entropy, identity};
use crate::agent::Agent;
use crate::container::names::{still_is, write};
use crate::container::{Container, inside};
use crate::errno::{Failed, Step};
use crate::validate::{self, Invalid};
use crate::{log, proto, sys};

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
    let (machine, boot) = ids.split_at(ids.len() / 2);
    if is_another {
        entropy::add(seed)?;
    }
    clock::set(request.unix_time_ns)?;
    let generation = agent.generation(is_another);
    if is_another {
        let names = ready.names.of_another(&request.hostname, identity::machine_id_of(machine)?);
        rename(agent, &ready.names, &names)?;
        agent.end_setup(Some(Arc::new(ready.of_another(names))));
        identity::set_boot_id(&identity::machine_id_of(boot)?)?;
        identity::set_generation(generation)?; // who sees this change finds the rest changed
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

fn rename(agent: &Agent, old: &Names, new: &Names) -> Result<(), Failed> {
    if new.hostname() != old.hostname() {
        names::set_hostname(new.hostname())?;
    }
    for container in agent.containers().iter().filter(|container| container.is_alive()) {
        // What a container did to its own files is its own affair.
        if let Err(failed) = rename_in(container, old, new) {
            log!("container {}: keeps a name: {failed}", container.id);
        }
    }
    Ok(())
}

/// One that has a name of its own keeps it.
fn rename_in(container: &Container, old: &Names, new: &Names) -> Result<(), Failed> {
    let own = container.hostname().filter(|own| own != old.hostname());
    // Without a namespace for it, the guest's name is the container's.
    if own.is_none() && container.namespaces.uts {
        container.set_hostname(new.hostname());
        set_hostname_in(container, new.hostname())?;
    }
    let mut root = None;
    // Each step costs a cold machine a good part of a millisecond: nothing is done that changes nothing.
    for ((path, text), (_, was)) in new.files(own.as_deref()).iter().zip(old.files(own.as_deref())) {
        if *text == was || container.write_known(path, &was, text)? {
            continue;
        }
        let root = match &root {
            Some(open) => open,
            None => root.insert(container.root()?),
        };
        replace(root.as_fd(), path, &was, text).step("write", path)?;
    }
    Ok(())
}

/// Puts `text` in the place of `was` at the beginning of a file, in place. A file that begins otherwise is the container's.
fn replace(root: BorrowedFd<'_>, path: &str, was: &str, text: &str) -> Result<(), Errno> {
    let file = inside::open_regular_for_writing(root, path)?;
    match still_is(file.as_fd(), was)? {
        true => write(file.as_fd(), was, text),
        false => Ok(()),
    }
}

fn set_hostname_in(container: &Container, hostname: &str) -> Result<(), Failed> {
    let own = pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).step("pidfd", "agent")?;
    sys::setns(container.pidfd(), libc::CLONE_NEWUTS).step("setns", "uts namespace")?;
    let renamed = names::set_hostname(hostname);
    sys::setns(own.as_fd(), libc::CLONE_NEWUTS).step("setns", "uts namespace of the guest")?;
    renamed
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
