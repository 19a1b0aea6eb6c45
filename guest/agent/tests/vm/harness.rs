//! A guest in QEMU, without KVM: the agent under test as its init, busybox as its image, and a gRPC client to it.

use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use pykata_agent::proto::agent_client::AgentClient;
use pykata_agent::proto::{self, mount::Source};
use tokio::net::UnixStream;
use tonic::body::Body;

pub type Client = AgentClient<Connection>;

/// Environment: PYKATA_KERNEL (a vmlinux), PYKATA_AGENT (the binary to test), PYKATA_TEST_CONSOLE=1 to see the console.
fn from_env(name: &str, default: &str) -> PathBuf {
    std::env::var_os(name).map_or_else(|| default.into(), PathBuf::from)
}

/// One connection as tonic's client wants it.
#[derive(Clone)]
pub struct Connection(SendRequest<Body>);

impl tower_service::Service<hyper::Request<Body>> for Connection {
    type Response = hyper::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: hyper::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// Files that all tests share: image and initrd.
struct Artifacts {
    image: PathBuf,
    initrd: PathBuf,
}

static ARTIFACTS: OnceLock<Artifacts> = OnceLock::new();
static SERIAL: AtomicU32 = AtomicU32::new(0);

fn artifacts() -> &'static Artifacts {
    ARTIFACTS.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("pykata-agent-vm-{}", std::process::id()));
        let (root, boot) = (dir.join("root"), dir.join("boot"));
        for part in ["bin", "etc", "proc", "sys", "dev", "tmp", "root", "run"] {
            std::fs::create_dir_all(root.join(part)).expect("mkdir");
        }
        std::fs::copy("/usr/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
        let applets = Command::new("/usr/bin/busybox").arg("--list").output().expect("busybox runs").stdout;
        for applet in String::from_utf8_lossy(&applets).lines().filter(|name| *name != "busybox") {
            symlink("busybox", root.join("bin").join(applet)).expect("symlink");
        }
        std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001::/srv/web:/bin/sh\n")
            .expect("write");
        std::fs::write(root.join("etc/group"), "root:x:0:\nweb:x:1001:\nwheel:x:10:root,web\ntty:x:5:\n")
            .expect("write");
        std::fs::write(root.join("bin/noexec"), "just data").expect("write");
        std::fs::set_permissions(root.join("bin/noexec"), std::fs::Permissions::from_mode(0o755)).expect("chmod");
        let image = dir.join("image.sqfs");
        run(Command::new("mksquashfs").args([&root, &image]).args(["-noappend", "-quiet", "-comp", "lz4"]));

        for part in ["proc", "sys", "dev", "run", "mnt"] {
            std::fs::create_dir_all(boot.join(part)).expect("mkdir");
        }
        let agent = from_env("PYKATA_AGENT", "/tmp/pykata-agent-target/x86_64-unknown-linux-gnu/release/pykata-agent");
        std::fs::copy(agent, boot.join("init")).expect("the agent is built");
        let initrd = dir.join("initrd.cpio");
        let script = format!("find . | cpio --quiet -o -H newc > {}", initrd.display());
        run(Command::new("sh").args(["-c", &script]).current_dir(&boot));
        Artifacts { image, initrd }
    })
}

fn run(command: &mut Command) {
    let status = command.stdout(Stdio::null()).status().expect("the tool is installed");
    assert!(status.success(), "{command:?}: {status}");
}

/// A running guest; dropped, it is gone.
pub struct Vm {
    qemu: Child,
    dir: PathBuf,
}

impl Vm {
    /// Boots. `disks` are further images with their serials; `extra` further arguments for QEMU.
    pub async fn boot_with(memory_mib: u32, disks: &[(&str, &Path)], extra: &[&str]) -> Self {
        let artifacts = artifacts();
        let dir = std::env::temp_dir().join(format!(
            "pykata-vm-{}-{}",
            std::process::id(),
            SERIAL.fetch_add(1, Ordering::Relaxed)
        ));
        std::fs::create_dir_all(&dir).expect("mkdir");
        let socket = dir.join("agent.sock");
        // Listening before QEMU runs: nobody has to wait for it to.
        let listener = UnixListener::bind(&socket).expect("bind");
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).expect("fcntl");
        let mut qemu = Command::new("qemu-system-x86_64");
        let khz = bogomips_khz();
        qemu.args(["-M", "microvm,accel=tcg", "-cpu", "max", "-m", &memory_mib.to_string()])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-serial", &format!("file:{}", dir.join("console").display())])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .arg("-kernel")
            .arg(from_env("PYKATA_KERNEL", "/tmp/pykata-kernel/vmlinux"))
            .arg("-initrd")
            .arg(&artifacts.initrd)
            .args(["-append", &format!("console=ttyS0 panic=-1 reboot=t tsc=reliable tsc_early_khz={khz}")])
            .args(["-chardev", &format!("socket,id=ag,fd={},server=on,wait=off", listener.as_raw_fd())])
            .args(["-device", "virtio-serial-device,max_ports=2,id=vs0"])
            .args(["-device", "virtserialport,chardev=ag,name=pykata.agent.0,bus=vs0.0,nr=1"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", dir.join("qmp.sock").display())]);
        let all = [("image", artifacts.image.as_path())];
        for (index, (serial, path)) in all.iter().chain(disks).enumerate() {
            qemu.args(["-blockdev", &format!(r#"{{"driver":"raw","node-name":"d{index}","read-only":true,"file":{{"driver":"file","filename":"{}"}}}}"#, path.display())]);
            qemu.args(["-device", &format!("virtio-blk-device,drive=d{index},serial={serial}")]);
        }
        let qemu = qemu.args(extra).stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("QEMU is installed");
        Self { qemu, dir }
    }

    /// Boots and connects, and calls Setup.
    pub async fn ready() -> (Self, Client) {
        let vm = Self::boot_with(256, &[], &[]).await;
        let mut client = vm.connect().await;
        client.setup(setup()).await.expect("setup");
        (vm, client)
    }

    pub async fn connect(&self) -> Client {
        let stream = UnixStream::connect(self.dir.join("agent.sock")).await.expect("connect");
        let (send, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(256 * 1024)
            .initial_connection_window_size((1 << 31) - 1)
            .handshake(TokioIo::new(stream))
            .await
            .expect("handshake");
        tokio::spawn(connection);
        AgentClient::with_origin(Connection(send), hyper::Uri::from_static("http://agent"))
    }

    pub fn console(&self) -> String {
        std::fs::read_to_string(self.dir.join("console")).unwrap_or_default()
    }

    /// Bytes on a connection of their own, which ends with them.
    pub async fn send_raw(&self, bytes: &[u8]) {
        let mut stream = UnixStream::connect(self.dir.join("agent.sock")).await.expect("connect");
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, bytes).await;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() || std::env::var_os("PYKATA_TEST_CONSOLE").is_some() {
            eprintln!("--- console ---\n{}", self.console());
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn bogomips_khz() -> u64 {
    let text = std::fs::read_to_string("/proc/cpuinfo").expect("cpuinfo");
    let line = text.lines().find(|line| line.starts_with("bogomips")).expect("bogomips");
    let value: f64 = line.split(':').nth(1).and_then(|v| v.trim().parse().ok()).expect("a number");
    (value / 2.0 * 1000.0) as u64
}

pub fn setup() -> proto::SetupRequest {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    proto::SetupRequest {
        hostname: "sandbox".into(),
        unix_time_ns: now.as_nanos() as i64,
        entropy: vec![7; 64].into(),
        nameservers: vec!["10.0.2.3".into()],
        ..Default::default()
    }
}

pub fn create(id: &str, spec: &str) -> proto::CreateContainerRequest {
    let lower = proto::Mount {
        source: Some(Source::DiskSerial("image".into())),
        r#type: "squashfs".into(),
        ..Default::default()
    };
    proto::CreateContainerRequest {
        id: id.into(),
        rootfs: Some(proto::Rootfs { lowers: vec![lower], writable_bytes: 32 << 20, ..Default::default() }),
        oci_spec: spec.as_bytes().to_vec().into(),
        usual: None,
        seccomp_unconfined: false,
        ..Default::default()
    }
}

pub fn process(id: &str, args: &[&str]) -> proto::Process {
    proto::Process { id: id.into(), args: args.iter().map(|&a| a.to_owned()).collect(), ..Default::default() }
}
