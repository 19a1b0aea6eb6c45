//! The Setup call: makes the guest ready for containers.

mod clock;
pub mod clone;
mod entropy;
pub mod identity;
pub mod names;
pub mod net;
mod netlink;
pub mod served;
mod volumes;

use std::sync::Arc;

use tonic::Status;

use crate::agent::Agent;
use crate::proto;
use crate::stats::Memory;
use crate::sys;
use crate::validate::{self, Invalid};
use names::Names;

/// What containers need to know of the guest.
pub struct Ready {
    pub names: Names,
    pub disks: Arc<volumes::Disks>,
}

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
    let names = plan.names.of_another("", identity::machine_id()?);
    net::apply(&plan.interfaces).await?;
    let disks = Arc::new(volumes::mount_all(plan.volumes).await?);
    Ok(Ready { names, disks })
}

/// The call itself: once, and again only if it failed.
pub async fn call(agent: &Agent, request: proto::SetupRequest) -> Result<proto::SetupResponse, Status> {
    agent.begin_setup()?;
    let ready = match apply(request).await {
        Ok(ready) => ready,
        Err(status) => {
            agent.end_setup(None);
            return Err(status);
        }
    };
    agent.end_setup(Some(ready));
    let memory = Memory::read()?;
    Ok(proto::SetupResponse {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
        kernel_ns: agent.guest.kernel_ns,
        agent_ns: agent.guest.agent_ns,
        memory_total: memory.total,
        memory_available: memory.available,
        now_ns: sys::boottime_ns(),
    })
}
