//! Network interfaces: found by MAC address, named, given addresses and routes, and switched on.

use std::fmt::Display;
use std::net::IpAddr;
use std::time::Duration;

use tonic::Status;

use super::netlink::{Link, Message, Netlink};
use crate::errno::{Failed, Step};
use crate::proto;
use crate::sys;
use crate::uevent;
use crate::validate::{self, Invalid, shown};

/// How long an interface may take to appear after the host has named it.
const PATIENCE: Duration = Duration::from_secs(10);

/// An interface as a request wants it, checked.
#[derive(Debug)]
pub struct Interface {
    mac: [u8; 6],
    name: String,
    mtu: u32,
    addresses: Vec<Network>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

/// An address and the length of its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    prefix: u8,
}

#[derive(Debug)]
struct Route {
    destination: Network,
    gateway: Option<IpAddr>,
}

/// Who has an address on the link, for good.
#[derive(Debug)]
struct Neighbour {
    address: IpAddr,
    mac: [u8; 6],
}

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("interfaces.mac: no interface {0} appeared within {seconds} s", seconds = PATIENCE.as_secs())]
    Missing(String),
    #[error(transparent)]
    Syscall(#[from] Failed),
}

impl From<NetError> for Status {
    fn from(err: NetError) -> Self {
        match err {
            NetError::Missing(_) => Status::failed_precondition(err.to_string()),
            NetError::Syscall(failed) => failed.into(),
        }
    }
}

impl Interface {
    pub fn new(from: &proto::Interface) -> Result<Self, Invalid> {
        let good = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
        let name = &from.name;
        if name.is_empty() || name.len() > 15 || !name.bytes().all(good) || name == "." || name == ".." {
            return Err(Invalid::new("interfaces.name", format!("{} is no interface name", shown(name))));
        }
        validate::list("interfaces.addresses", &from.addresses, 64)?;
        validate::list("interfaces.routes", &from.routes, 1024)?;
        validate::list("interfaces.neighbours", &from.neighbours, 1024)?;
        Ok(Self {
            mac: parse_mac("interfaces.mac", &from.mac)?,
            name: name.clone(),
            mtu: from.mtu,
            addresses: from
                .addresses
                .iter()
                .map(|text| Network::parse("interfaces.addresses", text))
                .collect::<Result<_, _>>()?,
            routes: from.routes.iter().map(Route::new).collect::<Result<_, _>>()?,
            neighbours: from.neighbours.iter().map(Neighbour::new).collect::<Result<_, _>>()?,
        })
    }

    pub fn first_address(&self) -> Option<IpAddr> {
        self.addresses.first().map(|network| network.address)
    }

    fn shown_mac(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }
}

impl Network {
    fn parse(field: &'static str, text: &str) -> Result<Self, Invalid> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let network = Self { address: address.parse().ok()?, prefix: prefix.parse().ok()? };
            (network.prefix <= if network.address.is_ipv4() { 32 } else { 128 }).then_some(network)
        });
        parsed.ok_or_else(|| Invalid::new(field, format!("{} is not ADDRESS/PREFIX", shown(text))))
    }
}

impl Route {
    fn new(from: &proto::Route) -> Result<Self, Invalid> {
        let destination = Network::parse("interfaces.routes.destination", &from.destination)?;
        let refused =
            || Invalid::new("interfaces.routes.gateway", format!("{} is no such address", shown(&from.gateway)));
        let gateway = match from.gateway.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| refused())?),
        };
        if gateway.is_some_and(|gateway| gateway.is_ipv4() != destination.address.is_ipv4()) {
            return Err(refused());
        }
        Ok(Self { destination, gateway })
    }
}

impl Neighbour {
    fn new(from: &proto::Neighbour) -> Result<Self, Invalid> {
        let field = "interfaces.neighbours.address";
        let refused = |_| Invalid::new(field, format!("{} is no IP address", shown(&from.address)));
        Ok(Self {
            address: from.address.parse().map_err(refused)?,
            mac: parse_mac("interfaces.neighbours.mac", &from.mac)?,
        })
    }
}

fn parse_mac(field: &'static str, text: &str) -> Result<[u8; 6], Invalid> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|part| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten()).collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Invalid::new(field, format!("{} is no MAC address", shown(text))))
}

/// Sets up the loopback and all interfaces, waiting for those that aren't there yet.
pub async fn apply(interfaces: &[Interface]) -> Result<(), NetError> {
    loopback_up()?;
    let netlink = Netlink::open().step("socket", "netlink")?;
    let mut found = Vec::with_capacity(interfaces.len());
    for interface in interfaces {
        found.push((find(&netlink, interface).await?, interface));
    }
    if found.len() > 1 {
        // The name that one shall have may be what the kernel calls another one.
        for (index, _) in &found {
            rename(&netlink, *index, &format!("renamed{index}"))?;
        }
    }
    for (index, interface) in found {
        configure(&netlink, index, interface)?;
    }
    Ok(())
}

/// Switches the loopback on, in the network namespace one is in. By ioctl: every start of a guest does this, and few
/// need netlink.
pub fn loopback_up() -> Result<(), Failed> {
    sys::interface_up(c"lo").step("link up", "lo")
}

async fn find(netlink: &Netlink, interface: &Interface) -> Result<u32, NetError> {
    let look = || -> Result<Option<u32>, NetError> {
        let links = netlink.links().step("list", "links")?;
        Ok(links.into_iter().find(|link: &Link| link.mac == interface.mac).map(|link| link.index))
    };
    uevent::wait_for(Some(PATIENCE), look).await?.ok_or_else(|| NetError::Missing(interface.shown_mac()))
}

fn configure(netlink: &Netlink, index: u32, interface: &Interface) -> Result<(), Failed> {
    let what = |part: &dyn Display| format!("{} {part}", interface.name);
    let name = format!("{}\0", interface.name);
    let named = |message: Message| {
        let message = message.attribute(libc::IFLA_IFNAME, name.as_bytes());
        if interface.mtu > 0 { message.number(libc::IFLA_MTU, interface.mtu) } else { message }
    };
    up(netlink, index, named).step("link up", what(&interface.shown_mac()))?;
    for network in &interface.addresses {
        netlink.request(address_message(index, network)).step("add address", what(&network.address))?;
    }
    for neighbour in &interface.neighbours {
        netlink.request(neighbour_message(index, neighbour)).step("add neighbour", what(&neighbour.address))?;
    }
    // Routes through a gateway need the gateway's own route first.
    let (on_link, via): (Vec<_>, Vec<_>) = interface.routes.iter().partition(|route| route.gateway.is_none());
    for route in on_link.into_iter().chain(via) {
        netlink.request(route_message(index, route)).step("add route", what(&route.destination.address))?;
    }
    Ok(())
}

fn rename(netlink: &Netlink, index: u32, name: &str) -> Result<(), Failed> {
    let mut body = [0u8; 16]; // struct ifinfomsg
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    let message = Message::new(libc::RTM_NEWLINK, 0, &body);
    netlink.request(message.attribute(libc::IFLA_IFNAME, format!("{name}\0").as_bytes())).step("rename link", name)
}

fn up(netlink: &Netlink, index: u32, more: impl FnOnce(Message) -> Message) -> Result<(), rustix::io::Errno> {
    let mut body = [0u8; 16]; // struct ifinfomsg
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    let flags = (libc::IFF_UP as u32).to_ne_bytes();
    body[8..12].copy_from_slice(&flags);
    body[12..16].copy_from_slice(&flags);
    netlink.request(more(Message::new(libc::RTM_NEWLINK, 0, &body)))
}

fn family(address: &IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn octets(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn address_message(index: u32, network: &Network) -> Message {
    // struct ifaddrmsg. The host vouches for the address: nobody has to be asked whether it is taken.
    let mut body = vec![family(&network.address), network.prefix, libc::IFA_F_NODAD as u8, libc::RT_SCOPE_UNIVERSE];
    body.extend(index.to_ne_bytes());
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
    let bytes = octets(&network.address);
    let message = Message::new(libc::RTM_NEWADDR, flags, &body)
        .attribute(libc::IFA_LOCAL, &bytes)
        .attribute(libc::IFA_ADDRESS, &bytes);
    match network.address {
        IpAddr::V4(address) if network.prefix < 31 => {
            let broadcast = u32::from(address) | (u32::MAX >> network.prefix);
            message.attribute(libc::IFA_BROADCAST, &broadcast.to_be_bytes())
        }
        _ => message,
    }
}

fn route_message(index: u32, route: &Route) -> Message {
    let scope = if route.gateway.is_none() { libc::RT_SCOPE_LINK } else { libc::RT_SCOPE_UNIVERSE };
    let destination = &route.destination;
    // struct rtmsg
    let mut body = vec![family(&destination.address), destination.prefix, 0, 0, libc::RT_TABLE_MAIN];
    body.extend([libc::RTPROT_STATIC, scope, libc::RTN_UNICAST]);
    body.extend(0u32.to_ne_bytes());
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
    let mut message = Message::new(libc::RTM_NEWROUTE, flags, &body).number(libc::RTA_OIF, index);
    if destination.prefix > 0 {
        message = message.attribute(libc::RTA_DST, &octets(&destination.address));
    }
    match &route.gateway {
        Some(gateway) => message.attribute(libc::RTA_GATEWAY, &octets(gateway)),
        None => message,
    }
}

fn neighbour_message(index: u32, neighbour: &Neighbour) -> Message {
    // struct ndmsg
    let mut body = vec![family(&neighbour.address), 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(libc::NUD_PERMANENT.to_ne_bytes());
    body.extend([0, 0]);
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
    Message::new(libc::RTM_NEWNEIGH, flags, &body)
        .attribute(libc::NDA_DST, &octets(&neighbour.address))
        .attribute(libc::NDA_LLADDR, &neighbour.mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(mac: &str, name: &str, address: &str) -> Result<Interface, Invalid> {
        Interface::new(&proto::Interface {
            mac: mac.into(),
            name: name.into(),
            addresses: vec![address.into()],
            ..Default::default()
        })
    }

    #[test]
    fn what_is_no_interface_is_refused() {
        assert!(interface("52:54:00:12:34:56", "eth0", "10.0.2.15/24").is_ok());
        assert!(interface("52:54:00:12:34", "eth0", "10.0.2.15/24").is_err());
        assert!(interface("52:54:00:12:34:5g", "eth0", "10.0.2.15/24").is_err());
        assert!(interface("52:54:00:12:34:56", "a/b", "10.0.2.15/24").is_err());
        assert!(interface("52:54:00:12:34:56", "sixteen-letters-", "10.0.2.15/24").is_err());
        for bad in ["10.0.2.15", "10.0.2.15/33", "fd00::2/129", "x/8", "10.0.2.15/-1"] {
            assert!(interface("52:54:00:12:34:56", "eth0", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_neighbour_has_an_address_and_a_mac() {
        let neighbour =
            |address: &str, mac: &str| Neighbour::new(&proto::Neighbour { address: address.into(), mac: mac.into() });
        assert!(neighbour("10.0.2.2", "52:54:00:12:34:56").is_ok());
        assert!(neighbour("fd00::2", "52:54:00:12:34:56").is_ok());
        assert!(neighbour("10.0.2.2/24", "52:54:00:12:34:56").is_err());
        assert!(neighbour("10.0.2.2", "52:54:00").is_err());
    }

    #[test]
    fn a_gateway_is_of_its_destinations_family() {
        let route = |destination: &str, gateway: &str| {
            Route::new(&proto::Route { destination: destination.into(), gateway: gateway.into() })
        };
        assert!(route("0.0.0.0/0", "10.0.2.2").is_ok());
        assert!(route("::/0", "10.0.2.2").is_err());
        assert!(route("10.0.0.0/8", "").expect("good").gateway.is_none());
    }
}
