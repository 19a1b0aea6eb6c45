//! The Setup call: makes the guest ready for containers.

mod clock;
pub mod clone;
mod entropy;
pub mod identity;
pub mod late;
pub mod names;
pub mod net;
mod netlink;
pub mod served;
mod volumes;

use std::sync::{Arc, Mutex, PoisonError};

use tonic::Status;

use crate::agent::Agent;
use crate::boot;
use crate::errno::Failed;
use crate::log;
use crate::proto;
use crate::stats::Memory;
use crate::sys;
use crate::validate::{self, Invalid};
use names::Names;

/// What containers need to know of the guest.
pub struct Ready {
    pub names: Names,
    pub disks: Arc<volumes::Disks>,
    rest: Arc<Rest>,
}

/// What nobody needs before there is a container: it is done while the host gets the first one ready, which would find the
/// guest idle, or when that comes, if it was faster.
#[derive(Default)]
struct Rest(Mutex<bool>);

impl Ready {
    /// The same with other names.
    fn of_another(&self, names: Names) -> Self {
        Self { names, disks: self.disks.clone(), rest: self.rest.clone() }
    }

    /// Has the rest done.
    pub fn complete(&self) -> Result<(), Failed> {
        let mut done = self.rest.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !*done {
            net::loopback_up()?;
            boot::set_sysctls()?;
            *done = true;
        }
        Ok(())
    }

    /// Does it as soon as nobody else has anything to do. Without success it is tried again for the first container, which
    /// is told of the failure.
    async fn complete_later(self: Arc<Self>) {
        for _ in 0..TURNS {
            tokio::task::yield_now().await;
        }
        if let Err(failed) = self.complete() {
            log!("setup: {failed}");
        }
    }
}

/// So often others have their turn before the rest is begun: the answer goes through several tasks on its way to the host.
const TURNS: usize = 8;

/// A request that has been checked as a whole, before anything was changed.
struct Plan {
    names: Names,
    interfaces: Vec<net::Interface>,
    volumes: Vec<volumes::Volume>,
}

fn check(request: &mut proto::SetupRequest) -> Result<Plan, Invalid> {
    validate::hostname("hostname", &request.hostname)?;
    validate::list("interfaces", &request.interfaces, 64)?;
    validate::list("mounts", &request.mounts, 256)?;
    if request.entropy.len() < entropy::LEAST || request.entropy.len() > entropy::MOST {
        return Err(Invalid::new("entropy", format!("{} bytes", request.entropy.len())));
    }
    let interfaces: Vec<_> = request.interfaces.iter().map(net::Interface::new).collect::<Result<_, Invalid>>()?;
    let address = interfaces.iter().find_map(net::Interface::first_address);
    Ok(Plan {
        names: Names::new(&request.hostname, address, &request.nameservers, &request.search, &request.hosts)?,
        interfaces,
        volumes: request.mounts.drain(..).map(volumes::Volume::new).collect::<Result<_, Invalid>>()?,
    })
}

/// Does everything a Setup asks for.
pub async fn apply(mut request: proto::SetupRequest) -> Result<Ready, Status> {
    let plan = check(&mut request)?;
    clock::set(request.unix_time_ns)?;
    entropy::add(&request.entropy)?;
    names::set_hostname(&request.hostname)?;
    identity::set_generation(0)?;
    identity::set_boot_id(identity::random()?)?;
    let names = plan.names.of_another("", identity::random()?);
    if !plan.interfaces.is_empty() {
        net::apply(&plan.interfaces).await?;
    }
    let disks = Arc::new(volumes::mount_all(plan.volumes).await?);
    Ok(Ready { names, disks, rest: Arc::default() })
}

/// The call itself: once, and again only if it failed.
pub async fn call(agent: &Agent, request: proto::SetupRequest) -> Result<proto::SetupResponse, Status> {
    agent.begin_setup()?;
    let ready = match apply(request).await {
        Ok(ready) => Arc::new(ready),
        Err(status) => {
            agent.end_setup(None);
            return Err(status);
        }
    };
    agent.end_setup(Some(ready.clone()));
    tokio::spawn(ready.complete_later());
    let memory = Memory::read()?;
    Ok(proto::SetupResponse {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
        kernel_ns: agent.guest.kernel_ns,
        agent_ns: agent.guest.agent_ns,
        memory_total: memory.total,
        memory_available: memory.available,
        now_ns: sys::now_ns(libc::CLOCK_BOOTTIME),
        short_commands: true,
    })
}
