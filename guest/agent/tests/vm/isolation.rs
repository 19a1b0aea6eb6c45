//! What a container can't reach, and what it can't do to the agent.

use std::time::Duration;

use crate::harness::{Client, Vm, create, process};
use crate::run::{sh, start, until};

const ROOT_ALL: &str = r#"["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FOWNER","CAP_KILL","CAP_SETGID","CAP_SETUID","CAP_MKNOD","CAP_SYS_ADMIN","CAP_SYS_PTRACE","CAP_SYS_CHROOT","CAP_NET_ADMIN","CAP_SYS_MODULE","CAP_SYS_RAWIO"]"#;

#[tokio::test]
async fn the_world_inside() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", r#"{"hostname":"box"}"#)).await.expect("created");
    let (out, _) = sh(
        &mut client,
        "c",
        "ls /dev; ls -l /dev/fd /dev/ptmx | sed 's/.*-> //'; cat /etc/hostname /etc/resolv.conf; grep box /etc/hosts",
    )
    .await;
    assert_eq!(
        out,
        "fd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n\
         /proc/self/fd\npts/ptmx\nbox\nnameserver 10.0.2.3\n127.0.1.1\tbox"
    );
    let (out, _) = sh(&mut client, "c", "ls -A /run; ls /init; ls /mnt; ls -A /sys/firmware /proc/acpi; head -c 1 /proc/interrupts | wc -c; echo 1 > /proc/sys/kernel/pid_max; echo 1 > /proc/irq/default_smp_affinity").await;
    let want = "ls: /init: No such file or directory\nls: /mnt: No such file or directory\n/proc/acpi:\n\n/sys/firmware:\n0\n\
                sh: can't create /proc/sys/kernel/pid_max: Read-only file system\nsh: can't create /proc/irq/default_smp_affinity: Read-only file system";
    assert_eq!(out.lines().filter(|l| !l.contains("/proc/acpi: No")).collect::<Vec<_>>().join("\n"), want);
    let (out, _) = sh(&mut client, "c", "cat /proc/mounts").await;
    assert!(!out.contains("vport"), "{out}");
    // The root mount comes from our own overlay, without devices.
    assert!(out.lines().any(|l| l.starts_with("overlay / overlay rw,nodev,")), "{out}");
}

#[tokio::test]
async fn devices_are_out_of_reach() {
    let (_vm, mut client) = Vm::ready().await;
    let caps = format!(
        r#""process":{{"capabilities":{{"bounding":{ROOT_ALL},"permitted":{ROOT_ALL},"effective":{ROOT_ALL}}}}}"#
    );
    // Even where the rootfs's nodev is got round by a mount of one's own.
    client.create_container(create("c", &format!("{{{caps}}}"))).await.expect("created");
    let script = "cat /sys/class/virtio-ports/*/dev; mkdir /tmp/d; mount -t tmpfs none /tmp/d; \
                  mknod /tmp/d/port c $(cat /sys/class/virtio-ports/vport*/dev | tr : ' '); mknod /tmp/d/disk b $(cat /sys/block/vda/dev | tr : ' '); mknod /tmp/d/kmsg c 1 11; \
                  cat /tmp/d/port; head -c 1 /tmp/d/disk; head -c 1 /tmp/d/kmsg; mount -t devtmpfs none /tmp/d && head -c 1 /tmp/d/vda; echo x > /dev/null && echo good";
    let (out, _) = sh(&mut client, "c", script).await;
    assert!(out.matches("Operation not permitted").count() >= 4 && out.ends_with("good"), "{out}");
    // And the agent is out of reach for who may trace.
    let (out, _) = sh(&mut client, "c", "kill -0 -1 && ls /proc | grep -x '[0-9]*' | head -1; cat /proc/1/environ | wc -c; mount -t proc none /tmp/d && ls /tmp/d | grep -cx '[0-9]*'").await;
    assert!(!out.contains("init"), "{out}");
}

#[tokio::test]
async fn an_allowed_device_works() {
    let (_vm, mut client) = Vm::ready().await;
    let spec = r#"{"linux":{"devices":[{"path":"/dev/my/kmsg","type":"c","major":1,"minor":11,"fileMode":420,"uid":1000,"gid":5}],
                   "resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":11,"access":"r"}]}}}"#;
    client.create_container(create("c", spec)).await.expect("created");
    let (out, _) =
        sh(&mut client, "c", "ls -ln /dev/my/kmsg | cut -c1-30; head -c 1 /dev/my/kmsg | wc -c; echo x > /dev/my/kmsg")
            .await;
    assert!(out.starts_with("crw-r--r--    1 1000     5") && out.contains("Operation not permitted"), "{out}");
}

#[tokio::test]
async fn a_hostile_rootfs_does_not_hurt_the_agent() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    for trick in [
        "rm /etc/passwd; mkfifo /etc/passwd",
        "rm /etc/group; ln -s /dev/zero /etc/group",
        "rm /etc/passwd; ln -s /proc/1/root/etc/passwd /etc/passwd",
        "rm /etc/passwd; ln -s /dev/tty /etc/passwd",
        "rm /etc/passwd; truncate -s 200M /etc/passwd",
        "rm /etc/passwd /etc/group; ln -s passwd /etc/passwd; mkdir /etc/group",
    ] {
        sh(&mut client, "c", trick).await;
        assert_eq!(sh(&mut client, "c", "echo 0").await.0, "0", "{trick}");
    }
    // A working directory through links of all kinds ends inside.
    sh(&mut client, "c", "ln -s ../../../../.. /tmp/up; ln -s /proc/1/cwd /tmp/magic; ln -s loop /tmp/loop").await;
    for (cwd, want) in [("/tmp/up/new/dir", Some("/new/dir")), ("/tmp/loop/x", None), ("/tmp/magic/x", None)] {
        let mut p = process("p", &["pwd"]);
        p.cwd = cwd.into();
        let done = crate::run::run(&mut client, "c", p, None).await.map(|done| done.out().trim().to_owned());
        if let Some(want) = want {
            assert_eq!(done.expect("runs"), want);
        }
    }
    assert!(crate::run::run(&mut client, "c", process("p", &["ls", "/new/dir"]), None).await.is_ok());

    // Stopping everything that appears, over and over, stops nothing but the container.
    let stopper = start(&mut client, "c", process("stopper", &["sh", "-c", "while :; do kill -STOP -1; done"]), None)
        .await
        .expect("starts");
    let mut victims = Vec::new();
    for i in 0..20 {
        let mut client = client.clone();
        victims.push(tokio::spawn(async move {
            start(&mut client, "c", process(&format!("v{i}"), &["sleep", "1000"]), None).await.map(|r| r.pid)
        }));
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    client.create_container(create("other", "")).await.expect("created");
    assert_eq!(sh(&mut client, "other", "echo fine").await.0, "fine");
    client.remove_container(pykata_agent::proto::RemoveContainerRequest { id: "c".into() }).await.expect("removed");
    drop(stopper);
}

#[tokio::test]
async fn a_user_namespace_and_a_network_of_its_own() {
    let (_vm, mut client) = Vm::ready().await;
    let map = r#"[{"containerID":0,"hostID":100000,"size":65536}]"#;
    let spaces =
        r#"[{"type":"pid"},{"type":"mount"},{"type":"uts"},{"type":"ipc"},{"type":"user"},{"type":"network"}]"#;
    let spec = format!(
        r#"{{"hostname":"box","linux":{{"namespaces":{spaces},"uidMappings":{map},"gidMappings":{map},"sysctl":{{"net.ipv4.ip_forward":"1"}}}}}}"#
    );
    client.create_container(create("c", &spec)).await.expect("created");
    client.create_container(create("plain", "")).await.expect("created");
    let (out, _) = sh(&mut client, "c", "id -u; cat /proc/self/uid_map | tr -s ' '; hostname; touch /etc/new && ls -ln /etc/new | tr -s ' ' | cut -d' ' -f3; ls -ln /bin/busybox | tr -s ' ' | cut -d' ' -f3; rm /bin/busybox.x /etc/group; ls /etc/group; cat /proc/sys/net/ipv4/ip_forward; ip link | grep -c UP; echo x > /dev/null && echo y > /etc/hosts && echo good").await;
    assert_eq!(
        out,
        "0\n 0 100000 65536\nbox\n0\n0\nrm: can't remove '/bin/busybox.x': No such file or directory\nls: /etc/group: No such file or directory\n1\n1\ngood"
    );
    let mut p = process(
        "p",
        &["sh", "-c", "id -u; touch /dev/shm/mine && ls -ln /dev/shm/mine | tr -s ' ' | cut -d' ' -f3; pwd"],
    );
    p.user = "web".into();
    p.cwd = "/made/here".into();
    p.rlimits = vec![pykata_agent::proto::Rlimit { r#type: "RLIMIT_NOFILE".into(), soft: 900_000, hard: 900_000 }];
    let done = crate::run::run(&mut client, "c", p.clone(), None).await.expect("runs");
    assert_eq!((done.out().as_str(), done.err().as_str()), ("1000\n1000\n/made/here\n", ""));
    p.user = "70000:70000".into();
    assert!(crate::run::run(&mut client, "c", p, None).await.is_err(), "not in the map");
    // The others do not notice.
    assert_eq!(sh(&mut client, "plain", "ip link | grep -c UP; cat /proc/sys/net/ipv4/ip_forward").await.0, "1\n0");
    // Without a network of its own, too.
    let spec = spec
        .replace(r#",{"type":"network"}"#, "")
        .replace("net.ipv4.ip_forward", "kernel.msgmax")
        .replace(":\"1\"", ":\"9000\"");
    client.create_container(create("d", &spec)).await.expect("created");
    assert_eq!(
        sh(&mut client, "d", "ls /sys/class/net; cat /proc/sys/kernel/msgmax; ls /sys/fs/cgroup | grep -c pids.max")
            .await
            .0,
        "lo\n9000\n1"
    );
    for id in ["c", "d"] {
        client.remove_container(pykata_agent::proto::RemoveContainerRequest { id: id.into() }).await.expect("removed");
    }
    let refused = client
        .create_container(create("e", r#"{"linux":{"namespaces":[{"type":"pid"},{"type":"mount"},{"type":"user"}]}}"#))
        .await;
    assert_eq!(refused.expect_err("no maps").code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn frozen_and_nested_cgroups_are_no_hiding_place() {
    let (_vm, mut client) = Vm::ready().await;
    let spec = format!(
        r#"{{"process":{{"capabilities":{{"bounding":{ROOT_ALL},"permitted":{ROOT_ALL},"effective":{ROOT_ALL}}}}}}}"#
    );
    client.create_container(create("c", &spec)).await.expect("created");
    let script = "mkdir /tmp/cg; mount -t cgroup2 none /tmp/cg; mkdir -p /tmp/cg/x/y; sleep 1000 & until grep -q sleep /proc/$!/comm; do :; done; echo $! > /tmp/cg/x/y/cgroup.procs; \
                  echo 1 > /tmp/cg/x/cgroup.freeze; sleep 0.1; cat /tmp/cg/x/cgroup.events; cat /tmp/cg/cgroup.procs | wc -l; echo max > /tmp/cg/pids.max";
    let (out, _) = sh(&mut client, "c", script).await;
    assert!(out.starts_with("populated 1\nfrozen 1\n"), "{out}");
    // A reset call takes its frozen descendants, too.
    let script = format!("exec 2>&1; umount /tmp/cg; {script}; echo ready; sleep 1000");
    let mut running = start(&mut client, "c", process("p", &["sh", "-c", &script]), None).await.expect("starts");
    while !matches!(running.next().await, Ok(Some(pykata_agent::proto::run_response::Response::Stdout(data))) if data.ends_with(b"ready\n"))
    {
    }
    let sleeps = async |client: &Client| sh(&mut client.clone(), "c", "ps -o args | grep -c '^sleep 1000'").await.0;
    until("three sleeps", async || sleeps(&client).await == "3").await;
    drop(running);
    until("one sleep", async || sleeps(&client).await == "1").await;
    client.remove_container(pykata_agent::proto::RemoveContainerRequest { id: "c".into() }).await.expect("removed");
    client.create_container(create("c", "")).await.expect("nothing is left of it");
}
