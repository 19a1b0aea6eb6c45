//! What of becoming another guest can wait until something runs that could see it: the files with names and ids in them.
//! To write them takes a cold machine as long as all the rest, and most guests have containers that are never used.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::process::{PidfdFlags, pidfd_open};

use super::Ready;
use super::identity::{self, Random};
use super::names::{self, Names};
use crate::agent::Agent;
use crate::container::names::{still_is, write};
use crate::container::{Container, inside};
use crate::errno::{Failed, Step};
use crate::{log, sys};

/// What is in the guest's own files.
#[derive(Clone, Copy)]
pub struct Ids {
    pub boot: Random,
    pub generation: u64,
}

impl Ids {
    fn write(self) -> Result<(), Failed> {
        identity::set_boot_id(self.boot)?;
        identity::set_generation(self.generation) // who sees this change finds the rest changed
    }
}

/// Those that aren't written yet.
#[derive(Default)]
pub struct Unwritten(Mutex<Option<Ids>>);

impl Unwritten {
    fn get(&self) -> Option<Ids> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, ids: Option<Ids>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = ids;
    }
}

/// The guest is another one than it `was`: tells each container in which something may run. The others, and the ids if
/// there is none of those, wait for [`catch_up`].
pub fn tell(agent: &Agent, was: &Arc<Ready>, ids: Ids) -> Result<(), Failed> {
    let now = agent.ready().map_err(|_| Failed::new("rename", "containers", Errno::INVAL))?;
    let mut all_wait = true;
    for container in agent.containers().iter().filter(|container| container.is_alive()) {
        if container.is_known_idle() {
            container.set_former(was);
        } else {
            all_wait = false;
            rename(container, &was.names, &now.names);
        }
    }
    agent.unwritten.set(all_wait.then_some(ids));
    match all_wait {
        true => Ok(()),
        false => ids.write(),
    }
}

/// Before anything is started in the container.
pub fn catch_up(agent: &Agent, container: &Container) -> Result<(), Failed> {
    if let Some(former) = container.take_former()
        && let Ok(now) = agent.ready()
    {
        rename(container, &former.names, &now.names);
    }
    if let Some(ids) = agent.unwritten.get() {
        ids.write()?;
        agent.unwritten.set(None);
    }
    Ok(())
}

/// What a container did to its own files is its own affair.
fn rename(container: &Container, old: &Names, new: &Names) {
    if let Err(failed) = rename_in(container, old, new) {
        log!("container {}: keeps a name: {failed}", container.id);
    }
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
