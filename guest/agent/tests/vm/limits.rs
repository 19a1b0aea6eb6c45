//! Limits of containers, and what happens at them.

use crate::harness::{Vm, create, process};
use crate::run::{run, sh, start};

#[tokio::test]
async fn out_of_memory_is_told() {
    let (_vm, mut client) = Vm::ready().await;
    let spec = r#"{"linux":{"resources":{"memory":{"limit":16777216},"pids":{"limit":20},"cpu":{"quota":50000,"period":100000,"shares":512}}}}"#;
    client.create_container(create("c", spec)).await.expect("created");
    let (out, _) =
        sh(&mut client, "c", "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight; echo 1 > memory.max")
            .await;
    assert_eq!(out, "16777216\n20\n50000 100000\n20\nsh: can't create memory.max: Read-only file system");

    let eat = process("p", &["sh", "-c", "exec tail -c 100000000 /dev/zero"]);
    let done = run(&mut client, "c", eat, None).await.expect("runs");
    assert_eq!((done.exited.signal, done.exited.oom_killed, done.code()), (9, true, 137));
    // A kill is no OOM kill.
    let done = run(&mut client, "c", process("p", &["sh", "-c", "kill -9 $$"]), None).await.expect("runs");
    assert_eq!((done.exited.signal, done.exited.oom_killed), (9, false));
    let stats = client.stats(pykata_agent::proto::StatsRequest {}).await.expect("stats").into_inner();
    let stats = &stats.containers["c"];
    assert_eq!(stats.oom_kills, 1);
    assert!(stats.memory_peak > 10 << 20 && stats.cpu_usec > 0 && stats.pids == 1, "{stats:?}");
    assert_eq!(sh(&mut client, "c", "echo alive").await.0, "alive");
}

#[tokio::test]
async fn the_guests_own_end_of_memory_is_survived() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    let done =
        run(&mut client, "c", process("p", &["tail", "-c", "230000000", "/dev/zero"]), None).await.expect("runs");
    assert_eq!((done.exited.signal, done.exited.oom_killed), (9, true));
    let (out, _) = sh(&mut client, "c", "dd if=/dev/zero of=/big bs=1M count=100; rm /big; echo then").await;
    assert!(out.contains("No space left on device") && out.ends_with("then"), "{out}");
}

#[tokio::test]
async fn a_fork_bomb_stays_in_its_container() {
    let (_vm, mut client) = Vm::ready().await;
    client
        .create_container(create("bomb", r#"{"linux":{"resources":{"pids":{"limit":200}}}}"#))
        .await
        .expect("created");
    client.create_container(create("c", "{}")).await.expect("created");
    let bomb = start(&mut client, "bomb", process("p", &["sh", "-c", "f() { f | f & }; f; sleep 1000"]), None)
        .await
        .expect("starts");
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(sh(&mut client, "c", "echo fine").await.0, "fine");
    let refused = start(&mut client, "bomb", process("q", &["true"]), None).await.map(|r| r.pid);
    if let Err(status) = refused {
        assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status:?}");
    }
    client.remove_container(pykata_agent::proto::RemoveContainerRequest { id: "bomb".into() }).await.expect("removed");
    drop(bomb);
    assert_eq!(sh(&mut client, "c", "cat /sys/fs/cgroup/pids.max").await.0.parse::<u64>().expect("a number") / 1000, 1);
}

#[tokio::test]
async fn the_rootfs_is_limited_or_read_only() {
    let (_vm, mut client) = Vm::ready().await;
    let mut small = create("small", "");
    let rootfs = small.rootfs.as_mut().expect("is there");
    (rootfs.writable_bytes, rootfs.writable_inodes) = (1 << 20, 40);
    client.create_container(small).await.expect("created");
    let (out, _) = sh(
        &mut client,
        "small",
        "head -c 2000000 /dev/zero > /f; i=0; rm /f; while touch /tmp/$i; do i=$((i+1)); done; echo $i",
    )
    .await;
    assert!(out.contains("No space left on device"), "{out}");
    assert!(out.lines().last().and_then(|n| n.parse::<u32>().ok()).is_some_and(|n| n < 40), "{out}");

    let mut fixed = create("fixed", r#"{"hostname":"rock"}"#);
    fixed.rootfs.as_mut().expect("is there").writable_bytes = 0;
    client.create_container(fixed).await.expect("created");
    let (out, _) = sh(&mut client, "fixed", "touch /x; echo y > /dev/shm/y && cat /dev/shm/y").await;
    assert_eq!(out, "touch: /x: Read-only file system\ny");
}

#[tokio::test]
async fn other_limits_reach_the_kernel() {
    let (_vm, mut client) = Vm::ready().await;
    let spec = r#"{"linux":{"resources":{"memory":{"limit":33554432,"reservation":1048576,"swap":33554432},
        "cpu":{"cpus":"0","idle":1},"blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":254,"minor":0,"rate":100000000}]},
        "unified":{"memory.high":"30000000","pids.max":"77"}}}}"#;
    client.create_container(create("c", spec)).await.expect("created");
    let (out, _) = sh(
        &mut client,
        "c",
        "cd /sys/fs/cgroup; cat memory.low memory.high memory.swap.max cpuset.cpus cpu.idle pids.max io.max",
    )
    .await;
    assert!(out.starts_with("1048576\n29999104\n0\n0\n1\n77\n"), "{out}");
    let refused = client
        .create_container(create("d", r#"{"linux":{"resources":{"cpu":{"cpus":"77"}}}}"#))
        .await
        .expect_err("no such CPU");
    assert!(refused.message().contains("cpuset.cpus"), "{refused:?}");
    client.create_container(create("d", "")).await.expect("nothing was left behind");
}

#[tokio::test]
async fn many_processes_come_and_go_at_once() {
    let vm = Vm::boot_with(512, &[], &[]).await;
    let mut client = vm.connect().await;
    client.setup(crate::harness::setup()).await.expect("setup");
    client.create_container(create("c", "")).await.expect("created");
    let script = "i=0; while [ $i -lt 1500 ]; do sleep 1000 & i=$((i+1)); done; echo ready; wait";
    let mut running = start(&mut client, "c", process("p", &["sh", "-c", script]), None).await.expect("starts");
    running.next().await.expect("ready");
    assert_eq!(sh(&mut client, "c", "cat /sys/fs/cgroup/pids.current").await.0, "1503");
    client.remove_container(pykata_agent::proto::RemoveContainerRequest { id: "c".into() }).await.expect("removed");
    assert_eq!(running.finish().await.expect("ends").exited.signal, 9);
    client.create_container(create("c", "")).await.expect("created again");
}
