//! Setup, and what comes before it.

use pykata_agent::proto::{self, mount::Source};
use tonic::Code;

use crate::harness::{Vm, create, process, setup};
use crate::run::{sh, start};

#[tokio::test]
async fn nothing_goes_before_setup() {
    let vm = Vm::boot_with(256, &[], &[]).await;
    let mut client = vm.connect().await;
    assert_eq!(client.create_container(create("c", "")).await.expect_err("refused").code(), Code::FailedPrecondition);
    let refused = start(&mut client, "c", process("p", &["true"]), None).await.map(|r| r.pid).expect_err("refused");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let mut bad = setup();
    bad.entropy = vec![1; 8].into();
    assert_eq!(client.setup(bad).await.expect_err("refused").code(), Code::InvalidArgument);

    let mut request = setup();
    request.unix_time_ns = 1_234_567_890_000_000_000;
    let answer = client.setup(request).await.expect("a refused one may be repeated").into_inner();
    assert!(answer.kernel_release.starts_with("6."), "{answer:?}");
    assert!(answer.agent_ns > answer.kernel_ns && answer.kernel_ns > 0);
    assert!(answer.memory_total > 200 << 20 && answer.memory_available < answer.memory_total);
    client.create_container(create("c", "")).await.expect("created");
    assert_eq!(sh(&mut client, "c", "date -u +%Y-%m-%d; hostname").await.0, "2009-02-13\nsandbox");
}

#[tokio::test]
async fn interfaces_and_volumes() {
    let disk = std::env::temp_dir().join(format!("pykata-volume-{}.ext4", std::process::id()));
    std::fs::File::create(&disk).and_then(|f| f.set_len(8 << 20)).expect("create");
    let made = std::process::Command::new("mkfs.ext4").arg("-q").arg(&disk).status().expect("mkfs.ext4 is installed");
    assert!(made.success());
    let drive =
        format!(r#"{{"driver":"raw","node-name":"vol","file":{{"driver":"file","filename":"{}"}}}}"#, disk.display());
    let extra = [
        "-blockdev",
        &drive,
        "-device",
        "virtio-blk-device,drive=vol,serial=vol-1",
        "-netdev",
        "user,id=n0,ipv4=on,ipv6=on",
        "-device",
        "virtio-net-device,netdev=n0,mac=52:54:00:12:34:56",
    ];
    let vm = Vm::boot_with(256, &[], &extra).await;
    let mut client = vm.connect().await;
    let mut request = setup();
    request.interfaces = vec![proto::Interface {
        mac: "52:54:00:12:34:56".into(),
        name: "net0".into(),
        mtu: 1400,
        addresses: vec!["10.0.2.15/24".into(), "fec0::99/64".into()],
        routes: vec![
            proto::Route { destination: "0.0.0.0/0".into(), gateway: "10.0.2.2".into() },
            proto::Route { destination: "::/0".into(), gateway: "fec0::2".into() },
            proto::Route { destination: "192.168.7.0/24".into(), gateway: String::new() },
        ],
        ..Default::default()
    }];
    request.mounts = vec![
        proto::Mount {
            source: Some(Source::DiskSerial("vol-1".into())),
            r#type: "ext4".into(),
            target: "/run/pykata/volumes/data".into(),
            options: vec!["nosuid".into()],
        },
        proto::Mount {
            source: Some(Source::Tag("scratch".into())),
            r#type: "tmpfs".into(),
            target: "/run/pykata/volumes/scratch".into(),
            options: vec!["size=1m".into()],
        },
    ];
    request.hosts = [("db".to_owned(), "10.9.8.7".to_owned())].into();
    client.setup(request).await.expect("setup");
    let spec = r#"{"mounts":[{"destination":"/proc","type":"proc"},
        {"destination":"/data","type":"bind","source":"/run/pykata/volumes/data","options":["rbind","rw"]},
        {"destination":"/look","type":"bind","source":"/run/pykata/volumes/data","options":["bind","ro"]},
        {"destination":"/scratch","type":"bind","source":"/run/pykata/volumes/scratch","options":["bind"]}]}"#;
    client.create_container(create("c", spec)).await.expect("created");
    let (out, _) = sh(
        &mut client,
        "c",
        "ip -o addr show net0; ip route; ip -6 route; ip link show net0 | head -1; grep 'db\\|sandbox' /etc/hosts",
    )
    .await;
    for part in [
        "inet 10.0.2.15/24 brd 10.0.2.255",
        "inet6 fec0::99/64",
        "default via 10.0.2.2",
        "default via fec0::2",
        "192.168.7.0/24",
        "mtu 1400",
        "10.0.2.15\tsandbox",
        "10.9.8.7\tdb",
    ] {
        assert!(out.contains(part), "{part} in {out}");
    }
    let (out, _) = sh(&mut client, "c", "ping -c 1 -W 2 10.0.2.2 > /dev/null && echo pong; echo x > /data/f; cat /look/f; echo y > /look/f; touch /scratch/z && echo good; grep ' /data ' /proc/mounts").await;
    assert!(
        out.starts_with(
            "pong\nx\nsh: can't create /look/f: Read-only file system\ngood\n/dev/vdb /data ext4 rw,nosuid"
        ),
        "{out}"
    );
    // A link in a volume leads nowhere.
    sh(&mut client, "c", "ln -s / /data/link").await;
    let spec = r#"{"mounts":[{"destination":"/x","type":"bind","source":"/run/pykata/volumes/data/link"}]}"#;
    assert!(client.create_container(create("d", spec)).await.expect_err("refused").message().contains("ELOOP"));
    std::fs::remove_file(disk).expect("rm");
}

#[tokio::test]
async fn what_does_not_come_is_an_error() {
    let (_vm, mut client) = Vm::ready().await;
    let mut request = create("c", "");
    request.rootfs.as_mut().expect("is there").lowers[0].source = Some(Source::DiskSerial("absent".into()));
    let began = std::time::Instant::now();
    let refused = client.create_container(request).await.expect_err("no such disk");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!((5..30).contains(&began.elapsed().as_secs()));
    client.create_container(create("c", "")).await.expect("the id is free again");
}

/// A removed container's disk is not in use any more: the kernel refuses to mount a disk both writable and read-only at
/// the same time, so one after the other only works if the one is really gone.
#[tokio::test]
async fn a_removed_container_lets_go_of_its_disks() {
    let disk = std::env::temp_dir().join(format!("pykata-letgo-{}.ext4", std::process::id()));
    std::fs::File::create(&disk).and_then(|f| f.set_len(8 << 20)).expect("create");
    let made = std::process::Command::new("mkfs.ext4").arg("-q").arg(&disk).status().expect("mkfs.ext4 is installed");
    assert!(made.success());
    let drive =
        format!(r#"{{"driver":"raw","node-name":"vol","file":{{"driver":"file","filename":"{}"}}}}"#, disk.display());
    let vm =
        Vm::boot_with(256, &[], &["-blockdev", &drive, "-device", "virtio-blk-device,drive=vol,serial=vol-1"]).await;
    let mut client = vm.connect().await;
    client.setup(setup()).await.expect("setup");
    for round in 0..10 {
        let mode = if round % 2 == 0 { "rw" } else { "ro" };
        let spec = format!(
            r#"{{"mounts":[{{"destination":"/proc","type":"proc"}},{{"destination":"/data","type":"ext4","source":"vol-1","options":["{mode}"]}}]}}"#
        );
        client.create_container(create("c", &spec)).await.expect("created");
        let _ = start(&mut client, "c", process("p", &["sh", "-c", "cd /data; exec sleep 1000 < lost+found"]), None)
            .await
            .expect("starts");
        let (out, _) = sh(&mut client, "c", "grep -c ' /data ext4' /proc/mounts").await;
        assert_eq!(out, "1", "{mode}");
        client.remove_container(proto::RemoveContainerRequest { id: "c".into() }).await.expect("removed");
    }
    std::fs::remove_file(disk).expect("rm");
}

#[tokio::test]
async fn layers_lie_on_top_of_each_other() {
    let dir = std::env::temp_dir().join(format!("pykata-layers-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("top/etc")).expect("mkdir");
    std::fs::write(dir.join("top/etc/passwd"), "top:x:7:7::/:\n").expect("write");
    let image = dir.join("top.sqfs");
    let made = std::process::Command::new("mksquashfs")
        .arg(dir.join("top"))
        .arg(&image)
        .args(["-quiet", "-comp", "lz4"])
        .output();
    assert!(made.expect("mksquashfs is installed").status.success());
    let vm = Vm::boot_with(256, &[("top", &image)], &[]).await;
    let mut client = vm.connect().await;
    client.setup(setup()).await.expect("setup");
    for bytes in [0, 1 << 20] {
        let mut request = create("c", "");
        let rootfs = request.rootfs.as_mut().expect("is there");
        let mut top = rootfs.lowers[0].clone();
        top.source = Some(Source::DiskSerial("top".into()));
        rootfs.lowers.insert(0, top);
        rootfs.writable_bytes = bytes;
        client.create_container(request).await.expect("created");
        assert_eq!(sh(&mut client, "c", "cat /etc/passwd; ls /etc/group").await.0, "top:x:7:7::/:\n/etc/group");
        client.remove_container(proto::RemoveContainerRequest { id: "c".into() }).await.expect("removed");
    }
    std::fs::remove_dir_all(dir).expect("rm");
}
