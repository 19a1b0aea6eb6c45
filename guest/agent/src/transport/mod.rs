//! The byte stream to the host: a virtio-serial port, or a vsock connection where the kernel's command line names one.

pub mod ahead;
mod channel;
mod conduit;
pub mod inlet;
pub mod outlet;
mod preface;
mod serial;
pub mod staging;
mod stream;
mod vigil;
mod vsock;

pub use channel::Channel;
use inlet::Inlet;
use outlet::Outlet;

use std::sync::Arc;

use crate::errno::Failed;

/// What goes over a connection beside HTTP/2.
#[derive(Clone)]
pub struct Beside {
    pub outlet: Arc<Outlet>,
    pub inlet: Arc<Inlet>,
}

/// Where connections come from.
pub enum Endpoint {
    Serial(serial::Port),
    Vsock { port: u32 },
}

#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("kernel command line: pykata.vsock={0:?} is no port number")]
    VsockPort(String),
    #[error(transparent)]
    Syscall(#[from] Failed),
}

impl Endpoint {
    /// What the kernel's command line asks for; for a serial port waits until the port is there.
    pub async fn open(cmdline: &str) -> Result<Self, TransportError> {
        match vsock_port(cmdline)? {
            Some(port) => Ok(Endpoint::Vsock { port }),
            None => Ok(Endpoint::Serial(serial::Port::find().await?)),
        }
    }

    /// Waits for the host and gives the stream to it. `last` is the connection before this one.
    pub async fn connect(&self, last: Option<Channel>) -> Result<Channel, TransportError> {
        match self {
            Endpoint::Serial(port) => Ok(port.connect(last).await?),
            Endpoint::Vsock { port } => Ok(vsock::dial(*port).await?),
        }
    }
}

fn vsock_port(cmdline: &str) -> Result<Option<u32>, TransportError> {
    let Some(value) = cmdline.split_ascii_whitespace().find_map(|word| word.strip_prefix("pykata.vsock=")) else {
        return Ok(None);
    };
    value.parse().map(Some).map_err(|_| TransportError::VsockPort(value.chars().take(40).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vsock_is_chosen_by_the_command_line() {
        assert!(matches!(vsock_port("console=ttyS0 pykata.vsock=1024 x"), Ok(Some(1024))));
        assert!(matches!(vsock_port("console=ttyS0"), Ok(None)));
        assert!(vsock_port("pykata.vsock=").is_err());
        assert!(vsock_port("pykata.vsock=-1").is_err());
    }
}
