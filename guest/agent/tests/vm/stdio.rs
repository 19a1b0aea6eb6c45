//! stdin, stdout, stderr, and the promise that nothing is lost.

use std::time::Duration;

use pykata_agent::proto::run_response::Response;
use tokio::time::{Instant, timeout};

use crate::harness::{Vm, create, process};
use crate::run::{run, sh, start};

#[tokio::test]
async fn every_byte_comes_before_the_exit() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    let script = "head -c 3000000 /dev/zero | tr '\\0' x; echo oops >&2; exit 3";
    let done = run(&mut client, "c", process("p", &["sh", "-c", script]), None).await.expect("runs");
    assert_eq!((done.stdout.len(), done.err().as_str(), done.code()), (3_000_000, "oops\n", 3));
    assert!(done.stdout.iter().all(|&c| c == b'x'));

    for _ in 0..10 {
        let done =
            run(&mut client, "c", process("p", &["sh", "-c", "echo out; echo err >&2"]), None).await.expect("runs");
        assert_eq!((done.out().as_str(), done.err().as_str()), ("out\n", "err\n"));
    }

    let running = start(&mut client, "c", process("p", &["cat"]), None).await.expect("starts");
    let data: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
    let input = running.input();
    let pieces = data.clone();
    // The other side has to be read meanwhile.
    let feed = tokio::spawn(async move {
        for piece in pieces.chunks(64 * 1024) {
            input.stdin(piece).await;
        }
        input.close_stdin().await;
    });
    let done = running.finish().await.expect("runs");
    feed.await.expect("fed");
    assert!(done.stdout == data, "{} of {} bytes", done.stdout.len(), data.len());
    assert_eq!(sh(&mut client, "c", "echo fine").await.0, "fine");
}

#[tokio::test]
async fn who_does_not_read_stops_only_himself() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    let mut stuck = start(&mut client, "c", process("flood", &["yes"]), None).await.expect("starts");
    let starved = start(&mut client, "c", process("deaf", &["sleep", "1000"]), None).await.expect("starts");
    let input = starved.input();
    let feeding = async {
        loop {
            input.stdin(&[0; 65536]).await;
        }
    };
    assert!(timeout(Duration::from_secs(2), feeding).await.is_err(), "stdin has back-pressure");
    for _ in 0..3 {
        assert_eq!(sh(&mut client, "c", "echo hi").await.0, "hi");
    }
    let rss = client.stats(pykata_agent::proto::StatsRequest {}).await.expect("stats").into_inner().agent_rss;
    assert!(rss < 16 << 20, "the agent holds {rss} bytes");
    // A signal gets through to both.
    for id in ["flood", "deaf"] {
        let request = pykata_agent::proto::SignalRequest {
            container_id: "c".into(),
            process_id: id.into(),
            signal: libc::SIGTERM,
            scope: 0,
        };
        client.signal(request).await.expect("signalled");
    }
    let mut bytes = 0;
    loop {
        match stuck.next().await.expect("goes on").expect("ends with the exit") {
            Response::Stdout(data) => bytes += data.len(),
            Response::Ended(_) => {}
            Response::Exited(exited) => {
                assert_eq!((exited.exit_code, exited.signal, exited.oom_killed), (143, 15, false));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(bytes > 0);
    drop(input);
    assert_eq!(starved.finish().await.expect("ends").exited.signal, 15);
}

#[tokio::test]
async fn a_child_in_the_background_does_not_hold_the_result() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    let began = Instant::now();
    let script = "sleep 1000 & head -c 50000 /dev/zero; echo; exit 7";
    let done = run(&mut client, "c", process("p", &["sh", "-c", script]), None).await.expect("runs");
    assert_eq!((done.stdout.len(), done.code()), (50_001, 7));
    assert_eq!(sh(&mut client, "c", "ps -o args | grep -c '^sleep'").await.0, "1", "it lives on");

    let script = "(sleep 1000; echo never) & echo before";
    let create = create("inline", "");
    let done = run(&mut client, "inline", process("p", &["sh", "-c", script]), Some(create)).await.expect("runs");
    assert_eq!(done.out(), "before\n");
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn stdin_may_stay_open_and_unread() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    let running = start(&mut client, "c", process("p", &["true"]), None).await.expect("starts");
    running.stdin(&[1; 1000]).await;
    assert_eq!(running.finish().await.expect("runs").code(), 0);
    let running = start(&mut client, "c", process("p", &["cat"]), None).await.expect("starts");
    running.stdin(b"abc").await;
    running.close_stdin().await;
    assert_eq!(running.finish().await.expect("runs").out(), "abc");
}
