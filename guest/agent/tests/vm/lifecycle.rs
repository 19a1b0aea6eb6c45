//! Containers and calls that come, go, and are torn away.

use std::time::Duration;

use pykata_agent::proto::{RemoveContainerRequest, SignalRequest, StatsRequest, StatsResponse};
use tonic::Code;

use crate::harness::{Client, Vm, create, process};
use crate::run::{run, sh, start, until};

async fn stats(client: &mut Client) -> StatsResponse {
    client.stats(StatsRequest {}).await.expect("stats").into_inner()
}

async fn remove(client: &mut Client, id: &str) {
    client.remove_container(RemoveContainerRequest { id: id.into() }).await.expect("removed");
}

#[tokio::test]
async fn removal_takes_everything_with_it() {
    let (_vm, mut client) = Vm::ready().await;
    let before = stats(&mut client).await.open_files;
    for round in 0..5 {
        client.create_container(create("c", "")).await.expect("created");
        sh(&mut client, "c", "sleep 1000 & sh -c 'setsid sleep 1000 &' ; true").await;
        let mut running = start(&mut client, "c", process("p", &["sleep", "1000"]), None).await.expect("starts");
        assert!(stats(&mut client).await.containers["c"].pids >= 4, "round {round}");
        remove(&mut client, "c").await;
        assert!(
            matches!(running.next().await, Ok(Some(pykata_agent::proto::run_response::Response::Exited(e))) if e.signal == 9)
        );
        assert!(running.next().await.expect("ends").is_none());
        remove(&mut client, "c").await;
        assert!(stats(&mut client).await.containers.is_empty());
    }
    let after = stats(&mut client).await;
    assert_eq!(after.open_files, before, "descriptors leak");
}

#[tokio::test]
async fn a_reset_call_leaves_nothing() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    let script = "sleep 1000 & (setsid sleep 1000 &) ; sleep 1000";
    let running = start(&mut client, "c", process("p", &["sh", "-c", script]), None).await.expect("starts");
    until("three sleeps", async || sh(&mut client.clone(), "c", "ps -o args | grep -c '^sleep'").await.0 == "3").await;
    drop(running);
    until("no sleep", async || sh(&mut client.clone(), "c", "ps -o args | grep -c '^sleep'").await.0 == "0").await;

    let running = start(&mut client, "inline", process("p", &["sleep", "1000"]), Some(create("inline", "")))
        .await
        .expect("starts");
    assert!(stats(&mut client).await.containers.contains_key("inline"));
    drop(running);
    until("gone", async || !stats(&mut client.clone()).await.containers.contains_key("inline")).await;
    // A call that writes and isn't read is no different.
    let running =
        start(&mut client, "inline", process("p", &["yes"]), Some(create("inline", ""))).await.expect("starts");
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(running);
    until("gone", async || !stats(&mut client.clone()).await.containers.contains_key("inline")).await;
}

#[tokio::test]
async fn the_agent_outlives_its_connections() {
    let (vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    let running = start(&mut client, "c", process("p", &["sleep", "1000"]), None).await.expect("starts");
    drop((client, running));
    tokio::time::sleep(Duration::from_millis(200)).await;
    for _ in 0..5 {
        let mut client = vm.connect().await;
        until("killed with its call", async || {
            sh(&mut client.clone(), "c", "ps -o args | grep -c '^sleep'").await.0 == "0"
        })
        .await;
        assert_eq!(
            client.setup(crate::harness::setup()).await.expect_err("once only").code(),
            Code::FailedPrecondition
        );
    }
    // Garbage is a connection's end, not the agent's.
    vm.send_raw(b"GET / HTTP/1.1\r\n\r\n").await;
    vm.send_raw(&[0xff; 5000]).await;
    let mut client = vm.connect().await;
    assert_eq!(sh(&mut client, "c", "echo alive").await.0, "alive");
}

#[tokio::test]
async fn signals_and_their_scopes() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    let request = |id: &str, signal: i32, scope: i32| SignalRequest {
        container_id: "c".into(),
        process_id: id.into(),
        signal,
        scope,
    };
    // PROCESS: the trap runs, the child lives.
    let script = "trap 'echo got; exit 5' USR1; sleep 1000 & echo ready; wait";
    let mut running = start(&mut client, "c", process("p", &["sh", "-c", script]), None).await.expect("starts");
    running.next().await.expect("ready");
    client.signal(request("p", libc::SIGUSR1, 1)).await.expect("signalled");
    let done = running.finish().await.expect("ends");
    assert_eq!((done.out().as_str(), done.code()), ("got\n", 5));
    assert_eq!(sh(&mut client, "c", "ps -o args | grep -c '^sleep'; killall sleep").await.0, "1");

    // GROUP: both go.
    let mut running = start(&mut client, "c", process("p", &["sh", "-c", "sleep 1000 & echo ready; wait"]), None)
        .await
        .expect("starts");
    running.next().await.expect("ready");
    client.signal(request("p", libc::SIGTERM, 0)).await.expect("signalled");
    assert_eq!(running.finish().await.expect("ends").exited.signal, libc::SIGTERM);
    assert_eq!(sh(&mut client, "c", "ps -o args | grep -c '^sleep'").await.0, "0");

    // TREE: whatever they did to hide.
    let script = "(setsid sh -c 'setsid sleep 1000 & sleep 1000' &) ; echo ready; sleep 1000";
    let mut running = start(&mut client, "c", process("p", &["sh", "-c", script]), None).await.expect("starts");
    running.next().await.expect("ready");
    assert_eq!(
        client.signal(request("p", libc::SIGTERM, 2)).await.expect_err("SIGKILL only").code(),
        Code::InvalidArgument
    );
    client.signal(request("p", libc::SIGKILL, 2)).await.expect("signalled");
    assert_eq!(running.finish().await.expect("ends").exited.signal, libc::SIGKILL);
    assert_eq!(sh(&mut client, "c", "ps -o args | grep -c '^sleep'").await.0, "0");
    assert_eq!(client.signal(request("p", 9, 1)).await.expect_err("is gone").code(), Code::NotFound);
}

#[tokio::test]
async fn a_container_that_kills_its_own_init() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    // From inside the namespace its init can't be killed.
    assert_eq!(sh(&mut client, "c", "kill -9 1; kill -STOP 1; kill -TERM -1 2>/dev/null; echo here").await.0, "here");
    // Orphans are reaped by it.
    let script = "for i in 1 2 3 4 5 6 7 8 9; do (sleep 0.01 &) ; done; sleep 0.5; ps -o stat | grep -c Z";
    assert_eq!(sh(&mut client, "c", script).await.0, "0");
    let many = (0..50).map(|i| {
        let mut client = client.clone();
        tokio::spawn(async move { run(&mut client, "c", process(&format!("m{i}"), &["echo", "x"]), None).await })
    });
    for task in many.collect::<Vec<_>>() {
        assert_eq!(task.await.expect("joins").expect("runs").out(), "x\n");
    }
    remove(&mut client, "c").await;
}

#[tokio::test]
async fn init_and_everything_in_proc_look_right() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", r#"{"hostname":"box"}"#)).await.expect("created");
    let (out, _) = sh(&mut client, "c", "cat /proc/1/comm; wc -c < /proc/1/cmdline; grep -c . /proc/1/maps; cat /proc/self/cgroup; hostname; ls /proc/1/fd | wc -l; ls -l /proc/1/exe").await;
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(&lines[..2], ["init", "0"], "{out}");
    assert_eq!(out.matches("Permission denied").count(), 2, "{out}");
    assert!(lines.contains(&"0::/") && lines.contains(&"box"), "{out}");
}
