//! Just enough of rtnetlink to set interfaces up: requests with attributes, and their acknowledgements.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// A message under construction.
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// `kind` is an `RTM_*`, `flags` are `NLM_F_*` beside REQUEST and ACK; `body` is the kind's own record.
    pub fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | libc::NLM_F_REQUEST as u16 | libc::NLM_F_ACK as u16).to_ne_bytes());
        bytes.extend([0; 8]); // sequence and port: one request at a time
        bytes.extend(body);
        Self { bytes }
    }

    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.bytes.extend((value.len() as u16 + 4).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    pub fn number(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    fn finish(mut self) -> Vec<u8> {
        let len = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes
    }
}

/// A link of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub mac: Vec<u8>,
}

pub struct Netlink {
    socket: OwnedFd,
}

impl Netlink {
    pub fn open() -> Result<Self, Errno> {
        // Protocol 0 is NETLINK_ROUTE.
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket })
    }

    /// Sends a request and waits for the kernel's answer, which comes at once.
    pub fn request(&self, message: Message) -> Result<(), Errno> {
        self.send(message)?;
        self.answers(|_, _| {})
    }

    /// All links.
    pub fn links(&self) -> Result<Vec<Link>, Errno> {
        let mut links = Vec::new();
        self.send(Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP as u16, &[0; 16]))?;
        self.answers(|kind, body| {
            if kind == libc::RTM_NEWLINK {
                links.extend(parse_link(body));
            }
        })?;
        Ok(links)
    }

    fn send(&self, message: Message) -> Result<(), Errno> {
        rustix::net::send(self.socket.as_fd(), &message.finish(), SendFlags::empty()).map(drop)
    }

    fn answers(&self, mut each: impl FnMut(u16, &[u8])) -> Result<(), Errno> {
        let mut buffer = vec![0u8; 32 * 1024];
        loop {
            let (n, _) = rustix::net::recv(self.socket.as_fd(), &mut buffer[..], RecvFlags::empty())?;
            for (kind, body) in (Parts { bytes: &buffer[..n], header: HEADER }) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = body.get(..4).and_then(|b| b.try_into().ok()).map_or(-libc::EIO, i32::from_ne_bytes);
                        return if code == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(-code)) };
                    }
                    _ => each(kind, body),
                }
            }
        }
    }
}

/// Messages (16-byte headers, 32-bit length) or attributes (4-byte headers, 16-bit length) one after another.
struct Parts<'a> {
    bytes: &'a [u8],
    header: usize,
}

impl<'a> Iterator for Parts<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let head = self.bytes.get(..self.header)?;
        let (len, kind) = match self.header {
            HEADER => (u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize, [head[4], head[5]]),
            _ => (usize::from(u16::from_ne_bytes([head[0], head[1]])), [head[2], head[3]]),
        };
        let body = self.bytes.get(self.header..len)?;
        self.bytes = self.bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes(kind), body))
    }
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let index = u32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
    let mut attributes = Parts { bytes: body.get(16..)?, header: 4 };
    let mac = attributes.find(|(kind, _)| *kind == libc::IFLA_ADDRESS).map(|(_, mac)| mac.to_vec());
    Some(Link { index, mac: mac.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_a_link() {
        let links = Netlink::open().and_then(|netlink| netlink.links()).expect("netlink works");
        assert!(links.iter().any(|link| link.index == 1 && link.mac == [0; 6]), "{links:?}");
    }

    #[test]
    fn a_refusal_has_its_errno() {
        let mut body = [0u8; 16];
        body[4..8].copy_from_slice(&0x7fff_fff0u32.to_ne_bytes());
        let netlink = Netlink::open().expect("netlink works");
        assert_eq!(netlink.request(Message::new(libc::RTM_NEWLINK, 0, &body)), Err(Errno::NODEV));
    }

    #[test]
    fn attributes_are_padded() {
        let bytes = Message::new(16, 0, &[]).attribute(3, b"eth0\0").finish();
        assert_eq!(bytes.len(), 16 + 12);
        assert_eq!(Parts { bytes: &bytes[16..], header: 4 }.next(), Some((3, &b"eth0\0"[..])));
    }
}
