//! The usual container: what one gets that brings no OCI specification, and whatever a specification leaves open.

use crate::oci;
use crate::proto;
use crate::validate::{self, Invalid};

/// Processes and threads of the usual container.
const PIDS: i64 = 4096;
/// Open files of each of its processes.
const FILES: u64 = 65_536;

/// Files through which a container could read or change what belongs to the guest's kernel.
pub const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
pub const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The specification of the usual container. Made here and not read: JSON takes a cold agent 10 ms under emulation.
pub fn spec(from: proto::Usual) -> Result<oci::Spec, Invalid> {
    let limit = i64::try_from(from.memory_limit)
        .map_err(|_| Invalid::new("usual.memory_limit", format!("{} is too much", from.memory_limit)))?;
    validate::list("usual.volumes", &from.volumes, 256)?;
    let volumes = match from.volumes.is_empty() {
        true => None,
        false => Some(mounts().into_iter().chain(from.volumes.into_iter().map(volume)).collect()),
    };
    // Without a name of its own it shares the guest's: no program in there may change that.
    let namespace = |kind: &str| oci::Namespace { kind: kind.to_owned(), path: String::new() };
    let namespaces = from.hostname.is_empty().then(|| ["pid", "mount", "ipc"].map(namespace).into());
    Ok(oci::Spec {
        mounts: volumes,
        hostname: Some(from.hostname).filter(|name| !name.is_empty()),
        process: Some(oci::Process {
            env: from.env,
            cwd: from.cwd,
            rlimits: vec![oci::Rlimit { kind: "RLIMIT_NOFILE".to_owned(), soft: FILES, hard: FILES }],
            ..Default::default()
        }),
        linux: oci::Linux {
            namespaces,
            resources: oci::Resources {
                memory: oci::Memory { limit: Some(limit), ..Default::default() },
                pids: oci::Pids { limit: Some(PIDS) },
                ..Default::default()
            },
            ..Default::default()
        },
        ..Default::default()
    })
}

/// A volume as a mount. No program looks at which devices this container opens: a node in a volume must not be one.
fn volume(from: proto::Volume) -> oci::Mount {
    let mode = if from.readonly { "ro" } else { "rw" };
    oci::Mount {
        destination: from.destination,
        kind: "bind".to_owned(),
        source: from.source,
        options: ["bind", "nosuid", "nodev", mode].map(str::to_owned).to_vec(),
    }
}

/// Its mounts. None of them but `/dev/pts`, where nobody can make a node, has devices.
pub fn mounts() -> Vec<oci::Mount> {
    let mount = |destination: &str, kind: &str, options: &[&str]| oci::Mount {
        destination: destination.to_owned(),
        kind: kind.to_owned(),
        source: kind.to_owned(),
        options: options.iter().map(|&o| o.to_owned()).collect(),
    };
    vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "nodev", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount("/sys/fs/cgroup", "cgroup2", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_have_no_devices() {
        let volume =
            proto::Volume { source: "/run/pykata/volumes/v".into(), destination: "/v".into(), readonly: false };
        let spec = spec(proto::Usual { volumes: vec![volume], ..Default::default() }).expect("good");
        let list = spec.mounts.expect("some");
        assert_eq!(list.len(), mounts().len() + 1);
        assert!(["nodev", "nosuid"].iter().all(|&word| list[list.len() - 1].options.iter().any(|o| o == word)));
    }
}
