//! The agent of pykata's guest: PID 1 of the virtual machine. It serves the protocol of `agent.proto` to the host over
//! one byte stream, and runs containers.
//!
//! It has one thread. That makes `fork` without `exec` sound, lets it switch its own namespaces for the moment of a
//! clone, and makes "look the process up, then signal it" free of races. Everything that may block on a container's
//! files happens in a forked child.

pub mod agent;
pub mod boot;
pub mod cgroup;
pub mod container;
pub mod detach;
pub mod disk;
mod early;
pub mod errno;
pub mod files;
pub mod input;
pub mod log;
pub mod mounts;
pub mod oci;
pub mod output;
pub mod process;
#[allow(clippy::all, missing_docs)]
#[rustfmt::skip] // generated
pub mod proto;
pub mod reaper;
pub mod rehearsal;
pub mod run;
pub mod seccomp;
pub mod server;
pub mod service;
pub mod setup;
pub mod shares;
pub mod short;
pub mod stats;
pub mod stdio;
pub mod sys;
pub mod transport;
pub mod uevent;
pub mod validate;
pub mod window;
