//! The agent in a real guest: needs QEMU, mksquashfs, busybox-static, a kernel and a built agent.
//!
//!     cargo build --release && cargo test --features client --test vm
//!
//! See `harness.rs` for the environment variables that say where these are. A boot takes a second or two under
//! emulation, so that a test asks a guest several things.

mod commands;
mod harness;
mod isolation;
mod lifecycle;
mod limits;
mod run;
mod setup;
mod speed;
mod stdio;
