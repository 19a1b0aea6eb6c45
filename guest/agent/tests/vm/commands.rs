//! Which command runs, as whom, where, and with what environment.

use tonic::Code;

use crate::harness::{Vm, create, process};
use crate::run::{run, sh, start};

#[tokio::test]
async fn an_inline_container_says_hello_and_is_gone() {
    let (_vm, mut client) = Vm::ready().await;
    for round in ["first", "second"] {
        let create = create("c1", "");
        let done = run(&mut client, "c1", process("p1", &["echo", round]), Some(create)).await.expect("runs");
        assert_eq!((done.out(), done.err().as_str(), done.code()), (format!("{round}\n"), "", 0));
    }
    let stats = client.stats(pykata_agent::proto::StatsRequest {}).await.expect("stats").into_inner();
    assert!(stats.containers.is_empty());
}

#[tokio::test]
async fn failures_to_execute_read_like_a_shells() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    for (args, code, line) in [
        (&["no-such"][..], 127, "pykata: no-such: command not found\n"),
        (&["/no/such"], 127, "pykata: /no/such: no such file or directory\n"),
        (&["/etc/passwd"], 126, "pykata: /etc/passwd: permission denied\n"),
        (&["/etc"], 126, "pykata: /etc: is a directory\n"),
        (&["noexec"], 126, "pykata: noexec: exec format error\n"),
    ] {
        let done = run(&mut client, "c", process("p", args), None).await.expect("an exit, not an error");
        assert_eq!((done.code(), done.err().as_str(), done.exited.signal), (code, line, 0), "{args:?}");
    }
}

#[tokio::test]
async fn who_where_and_with_what() {
    let (_vm, mut client) = Vm::ready().await;
    let spec = r#"{"process":{"env":["A=1","B=2"],"cwd":"/tmp","user":{"uid":0,"gid":0}}}"#;
    client.create_container(create("c", spec)).await.expect("created");

    let mut p = process("p", &["sh", "-c", "echo $A $B $C; pwd; id; echo $HOME; echo $PATH; umask; ulimit -n"]);
    p.env = vec!["B=3".into(), "C=4".into()];
    let done = run(&mut client, "c", p.clone(), None).await.expect("runs");
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let who = "uid=0(root) gid=0(root) groups=0(root),10(wheel)";
    assert_eq!(done.out(), format!("1 3 4\n/tmp\n{who}\n/root\n{path}\n0022\n1024\n"));

    p.user = "web".into();
    p.cwd = "/made/for/it".into();
    p.rlimits = vec![pykata_agent::proto::Rlimit { r#type: "RLIMIT_NOFILE".into(), soft: 77, hard: 88 }];
    let done = run(&mut client, "c", p.clone(), None).await.expect("runs");
    let who = "uid=1000(web) gid=1001(web) groups=10(wheel),1001(web)";
    assert_eq!(done.out(), format!("1 3 4\n/made/for/it\n{who}\n/srv/web\n{path}\n0022\n77\n"));

    p.args = vec!["grep".into(), "Cap\\|NoNew\\|Seccomp:\\|Groups".into(), "/proc/self/status".into()];
    p.user = "5:6".into();
    let done = run(&mut client, "c", p.clone(), None).await.expect("runs");
    let usual = "CapInh:\t0000000000000000\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t00000000a80425fb\nCapAmb:\t0000000000000000";
    assert_eq!(done.out(), format!("Groups:\t6 \n{usual}\nNoNewPrivs:\t0\nSeccomp:\t2\n"));

    p.user = "nobody-here".into();
    let refused = start(&mut client, "c", p.clone(), None).await.map(|r| r.pid).expect_err("no such user");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(refused.message(), r#"process.user: no user "nobody-here" in the container's /etc/passwd"#);
    p.user = "4294967295".into();
    let refused = start(&mut client, "c", p, None).await.map(|r| r.pid).expect_err("too large");
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn capabilities_no_new_privileges_and_a_filter_of_ones_own() {
    let (_vm, mut client) = Vm::ready().await;
    let caps = r#"["CAP_NET_RAW","CAP_SYS_CHROOT"]"#;
    let spec = format!(
        r#"{{"process":{{"noNewPrivileges":true,"oomScoreAdj":123,"user":{{"uid":1000,"gid":1000,"umask":63,"additionalGids":[42]}},
            "capabilities":{{"bounding":{caps},"permitted":{caps},"effective":{caps},"inheritable":{caps},"ambient":["CAP_NET_RAW"]}}}},
            "linux":{{"seccomp":{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":28}}]}}}}}}"#
    );
    client.create_container(create("c", &spec)).await.expect("created");
    let script =
        "grep 'Cap\\|NoNew\\|Seccomp:' /proc/self/status; cat /proc/self/oom_score_adj; umask; id -G; mkdir /tmp/x";
    let (out, code) = sh(&mut client, "c", script).await;
    let sets = "CapInh:\t0000000000042000\nCapPrm:\t0000000000002000\nCapEff:\t0000000000002000\nCapBnd:\t0000000000042000\nCapAmb:\t0000000000002000";
    let want = format!(
        "{sets}\nNoNewPrivs:\t1\nSeccomp:\t2\n123\n0077\n1000 10 42\nmkdir: can't create directory '/tmp/x': No space left on device"
    );
    assert_eq!(out, want);
    assert_eq!(code, 1);
}

#[tokio::test]
async fn requests_that_cannot_be_right() {
    let (_vm, mut client) = Vm::ready().await;
    let code = |result: Result<tonic::Response<_>, tonic::Status>| {
        result.map(|_: tonic::Response<pykata_agent::proto::CreateContainerResponse>| ()).expect_err("refused").code()
    };
    assert_eq!(code(client.create_container(create("Bad_Id", "")).await), Code::InvalidArgument);
    assert_eq!(code(client.create_container(create("c", "{")).await), Code::InvalidArgument);
    let mut no_rootfs = create("c", "");
    no_rootfs.rootfs = None;
    assert_eq!(code(client.create_container(no_rootfs).await), Code::InvalidArgument);
    let mut bad_type = create("c", "");
    bad_type.rootfs.as_mut().expect("is there").lowers[0].r#type = "nofs".into();
    assert_eq!(code(client.create_container(bad_type).await), Code::Internal);
    client.create_container(create("c", "")).await.expect("the id is free again");
    assert_eq!(code(client.create_container(create("c", "")).await), Code::AlreadyExists);

    for args in [&[][..], &["a\0b"]] {
        let refused = start(&mut client, "c", process("p", args), None).await.map(|r| r.pid).expect_err("refused");
        assert_eq!(refused.code(), Code::InvalidArgument, "{args:?}");
    }
    let refused =
        start(&mut client, "nowhere", process("p", &["true"]), None).await.map(|r| r.pid).expect_err("refused");
    assert_eq!(refused.code(), Code::NotFound);
    let big = "x".repeat(5 << 20);
    let refused = start(&mut client, "c", process("p", &[&big]), None).await.map(|r| r.pid).expect_err("refused");
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    assert_eq!(sh(&mut client, "c", "echo still here").await.0, "still here");
}
