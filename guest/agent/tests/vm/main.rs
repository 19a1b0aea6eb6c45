//! The agent in a real guest: needs QEMU, mksquashfs, busybox-static, a kernel and a built agent.
//!
//!     cargo build --release && cargo test --features client --test vm
//!
//! See `harness.rs` for the environment variables that say where these are.

mod harness;
mod run;

use harness::{Vm, create, process};
use run::run;

#[tokio::test]
async fn an_inline_container_says_hello() {
    let (_vm, mut client) = Vm::ready().await;
    let done = run(&mut client, "c1", process("p1", &["echo", "hello"]), Some(create("c1", ""))).await.expect("runs");
    assert_eq!((done.out().as_str(), done.err().as_str(), done.code()), ("hello\n", "", 0));
}
