//! What a container shall be: the request and its OCI specification, checked and in the form that the steps need.

use crate::oci;
use crate::process::defaults::Defaults;
use crate::proto;
use crate::seccomp::{self, Filter};
use crate::validate::{self, Invalid, shown};

use super::device_filter::DeviceFilter;
use super::filesystems::{self, GuestMount};
use super::usual;

/// Where Setup mounts volumes, and the only place a bind mount may come from.
pub const VOLUMES: &str = "/run/pykata/volumes";

pub struct Config {
    pub id: String,
    pub rootfs: Rootfs,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    pub namespaces: Namespaces,
    pub mounts: Vec<ContainerMount>,
    pub devices: Vec<oci::Device>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    pub sysctl: Vec<(String, String)>,
    pub resources: oci::Resources,
    /// None: the container's devices are those that are mounted for it, and it can mount no file system of its own.
    pub device_filter: Option<DeviceFilter>,
    pub seccomp: Option<Filter>,
    pub process: Defaults,
    /// It came without a specification.
    pub usual: bool,
}

pub struct Rootfs {
    pub lowers: Vec<GuestMount>,
    /// Where the content of files is that the lowers don't have; paths below [`VOLUMES`], relative to it.
    pub data: Vec<String>,
    pub writable_bytes: u64,
    pub writable_inodes: u64,
    pub readonly: bool,
    /// `MS_PRIVATE`, `MS_SHARED`, ... for the root mount; 0: private.
    pub propagation: u64,
}

/// Which namespaces are the container's own beside PID, mount and cgroup, which always are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespaces {
    pub uts: bool,
    pub ipc: bool,
    pub net: bool,
    pub user: Option<IdMaps>,
}

impl Namespaces {
    /// `CLONE_NEW*` for those that may be the guest's.
    pub fn flags(&self) -> i32 {
        let all = [(self.uts, libc::CLONE_NEWUTS), (self.ipc, libc::CLONE_NEWIPC), (self.net, libc::CLONE_NEWNET)];
        all.iter().fold(0, |flags, (own, flag)| flags | if *own { *flag } else { 0 })
    }
}

/// Which ids of a container are which of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMaps {
    pub uids: Vec<oci::IdMapping>,
    pub gids: Vec<oci::IdMapping>,
}

pub struct ContainerMount {
    pub destination: String,
    pub options: crate::mounts::Options,
    pub what: MountKind,
}

pub enum MountKind {
    /// A path below [`VOLUMES`], relative to it.
    Bind(String),
    /// A file system of the kernel's own, such as proc.
    Kernel(String),
    /// A file system on a disk or with a tag.
    Device(GuestMount),
}

/// Which filter a container's processes get.
pub enum SeccompChoice {
    Default,
    Unconfined,
    Spec(oci::Seccomp),
}

impl Config {
    /// Whether it may limit processes of its own, as a container engine in it does.
    pub fn may_make_cgroups(&self) -> bool {
        self.mounts.iter().any(|mount| {
            matches!(&mount.what, MountKind::Kernel(kind) if kind == "cgroup2")
                && mount.options.set & crate::mounts::RDONLY == 0
        })
    }

    pub fn new(mut request: proto::CreateContainerRequest) -> Result<Self, Invalid> {
        validate::id("id", &request.id)?;
        let usual = request.oci_spec.is_empty();
        let spec = match usual {
            true => usual::spec(request.usual.take().unwrap_or_default())?,
            false => oci::Spec::parse(&request.oci_spec)
                .map_err(|err| Invalid::new("oci_spec", format!("no OCI runtime specification: {err}")))?,
        };
        if let Some((name, _)) = spec.hooks.iter().find(|(_, list)| list.as_ref().is_some_and(|l| !l.is_empty())) {
            return Err(Invalid::new("oci_spec.hooks", format!("{} can't run in the guest", shown(name))));
        }
        if let Some(name) = &spec.hostname {
            validate::hostname("oci_spec.hostname", name)?;
        }
        let linux = spec.linux;
        validate::list("oci_spec.linux.devices", &linux.devices, 256)?;
        let masked = or_default(linux.masked_paths, &usual::MASKED);
        let readonly = or_default(linux.readonly_paths, &usual::READONLY);
        for path in masked.iter().chain(&readonly) {
            validate::path("oci_spec.linux.maskedPaths", path)?;
        }
        let choice = match (request.seccomp_unconfined, linux.seccomp) {
            (true, _) => SeccompChoice::Unconfined,
            (false, Some(spec)) => SeccompChoice::Spec(spec),
            (false, None) => SeccompChoice::Default,
        };
        let process = Defaults::new(spec.process)?;
        // The usual container can neither open a device node that it makes (its file systems have none) nor mount a
        // file system that has; to load a program into the kernel would double the time of its start.
        let filter = if usual { None } else { Some(DeviceFilter::new(&linux.resources.devices)?) };
        Ok(Self {
            id: request.id,
            rootfs: rootfs(request.rootfs, spec.root.unwrap_or_default().readonly, linux.rootfs_propagation)?,
            hostname: spec.hostname.filter(|name| !name.is_empty()),
            domainname: spec.domainname.filter(|name| !name.is_empty()),
            namespaces: namespaces(linux.namespaces, IdMaps { uids: linux.uid_mappings, gids: linux.gid_mappings })?,
            mounts: spec.mounts.unwrap_or_else(usual::mounts).into_iter().map(mount).collect::<Result<_, _>>()?,
            devices: linux.devices,
            masked_paths: masked,
            readonly_paths: readonly,
            sysctl: linux.sysctl.into_iter().map(sysctl).collect::<Result<_, _>>()?,
            device_filter: filter,
            resources: linux.resources,
            seccomp: seccomp::filter(choice, process.caps.bounding)?,
            process,
            usual,
        })
    }
}

fn or_default(given: Option<Vec<String>>, default: &[&str]) -> Vec<String> {
    given.unwrap_or_else(|| default.iter().map(|&path| path.to_owned()).collect())
}

fn rootfs(from: Option<proto::Rootfs>, readonly: bool, propagation: Option<String>) -> Result<Rootfs, Invalid> {
    let from = from.ok_or_else(|| Invalid::new("rootfs", "is missing"))?;
    validate::list("rootfs.lowers", &from.lowers, validate::MAX_LOWERS)?;
    if from.lowers.is_empty() {
        return Err(Invalid::new("rootfs.lowers", "at least one is needed"));
    }
    let mut lowers = Vec::with_capacity(from.lowers.len());
    for lower in from.lowers {
        let mut lower = filesystems::check("rootfs.lowers", lower)?;
        lower.options.set |= crate::mounts::RDONLY;
        lowers.push(lower);
    }
    validate::list("rootfs.data", &from.data, validate::MAX_LOWERS)?;
    let data = from.data.iter().map(|path| volume_path("rootfs.data", path)).collect::<Result<_, _>>()?;
    let propagation = match propagation.as_deref() {
        None | Some("" | "private" | "rprivate") => 0,
        Some("shared" | "rshared") => libc::MS_SHARED,
        Some("slave" | "rslave") => libc::MS_SLAVE,
        Some("unbindable" | "runbindable") => libc::MS_UNBINDABLE,
        Some(other) => return Err(Invalid::new("oci_spec.linux.rootfsPropagation", shown(other))),
    };
    let (writable_bytes, writable_inodes) = (from.writable_bytes, from.writable_inodes);
    Ok(Rootfs { lowers, data, writable_bytes, writable_inodes, readonly: readonly || writable_bytes == 0, propagation })
}

fn namespaces(from: Option<Vec<oci::Namespace>>, maps: IdMaps) -> Result<Namespaces, Invalid> {
    const FIELD: &str = "oci_spec.linux.namespaces";
    let Some(list) = from else { return Ok(Namespaces { uts: true, ipc: true, net: false, user: None }) };
    let mut out = Namespaces { uts: false, ipc: false, net: false, user: None };
    let (mut pid, mut mount) = (false, false);
    for namespace in list {
        if !namespace.path.is_empty() {
            return Err(Invalid::new(FIELD, format!("{}: a path means nothing in the guest", shown(&namespace.kind))));
        }
        match namespace.kind.as_str() {
            "pid" => pid = true,
            "mount" => mount = true,
            "cgroup" => {}
            "uts" => out.uts = true,
            "ipc" => out.ipc = true,
            "network" => out.net = true,
            "user" => out.user = Some(checked(maps.clone())?),
            other => return Err(Invalid::new(FIELD, format!("{} isn't supported", shown(other)))),
        }
    }
    if !pid || !mount {
        return Err(Invalid::new(FIELD, "pid and mount are needed: a container never shares those of the guest"));
    }
    Ok(out)
}

fn checked(maps: IdMaps) -> Result<IdMaps, Invalid> {
    for (field, map) in [("oci_spec.linux.uidMappings", &maps.uids), ("oci_spec.linux.gidMappings", &maps.gids)] {
        validate::list(field, map, 340)?; // as the kernel
        let has_root = map.iter().any(|m| m.container_id == 0 && m.size > 0);
        let fits = |m: &oci::IdMapping| {
            m.container_id.checked_add(m.size).is_some() && m.host_id.checked_add(m.size).is_some()
        };
        if !has_root || !map.iter().all(fits) {
            return Err(Invalid::new(field, "a user namespace needs maps, with the container's 0 in them"));
        }
    }
    Ok(maps)
}

fn mount(from: oci::Mount) -> Result<ContainerMount, Invalid> {
    const FIELD: &str = "oci_spec.mounts";
    validate::path("oci_spec.mounts.destination", &from.destination)?;
    validate::list("oci_spec.mounts.options", &from.options, 64)?;
    let options = crate::mounts::Options::parse(&from.options);
    let what = match from.kind.as_str() {
        kind if kind == "bind" || options.bind.is_some() => {
            MountKind::Bind(volume_path("oci_spec.mounts.source", &from.source)?)
        }
        "proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue" | "cgroup2" => MountKind::Kernel(from.kind),
        "cgroup" => MountKind::Kernel("cgroup2".to_owned()),
        "" | "none" => return Err(Invalid::new(FIELD, format!("{} has no type", shown(&from.destination)))),
        _ => MountKind::Device(filesystems::from_oci(&from)?),
    };
    Ok(ContainerMount { destination: from.destination, options, what })
}

/// The part of a path below [`VOLUMES`].
fn volume_path(field: &'static str, source: &str) -> Result<String, Invalid> {
    validate::path(field, source)?;
    match source.strip_prefix(VOLUMES).and_then(|rest| rest.strip_prefix('/')) {
        Some(rest) if !rest.is_empty() => Ok(rest.to_owned()),
        _ => Err(Invalid::new(field, format!("{} is not below {VOLUMES}", shown(source)))),
    }
}

fn sysctl((key, value): (String, String)) -> Result<(String, String), Invalid> {
    let good = |c: u8| c.is_ascii_alphanumeric() || b"_-./".contains(&c);
    if key.is_empty() || key.len() > 200 || !key.bytes().all(good) || key.contains("..") {
        return Err(Invalid::new("oci_spec.linux.sysctl", format!("{} is no name", shown(&key))));
    }
    // "net.ipv4.conf.eth0/1.x": as sysctl(8), a slash in dotted form stands for a dot in a name.
    let path = match key.contains('/') && !key.contains('.') {
        true => key,
        false => key
            .bytes()
            .map(|c| match c {
                b'.' => '/',
                b'/' => '.',
                c => c as char,
            })
            .collect(),
    };
    Ok((path, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(spec: &str) -> proto::CreateContainerRequest {
        let lower = proto::Mount {
            source: Some(proto::mount::Source::DiskSerial("root".into())),
            r#type: "squashfs".into(),
            ..Default::default()
        };
        let rootfs = proto::Rootfs { lowers: vec![lower], writable_bytes: 1 << 20, ..Default::default() };
        proto::CreateContainerRequest {
            id: "c1".into(),
            rootfs: Some(rootfs),
            oci_spec: spec.as_bytes().to_vec().into(),
            seccomp_unconfined: false,
            usual: None,
            ..Default::default()
        }
    }

    fn problem(spec: &str) -> String {
        Config::new(request(spec)).err().map(|err| err.to_string()).expect("is refused")
    }

    #[test]
    fn an_empty_spec_is_a_safe_container() {
        let config = Config::new(request("")).expect("works");
        let namespaces = &config.namespaces;
        assert!(namespaces.ipc && !namespaces.net && namespaces.user.is_none());
        assert!(!namespaces.uts, "the guest's name is its own");
        assert_eq!(config.mounts.len(), 7);
        assert_eq!(config.masked_paths.len(), usual::MASKED.len());
        assert!(config.seccomp.is_some());
        assert_eq!(config.rootfs.lowers[0].options.set & crate::mounts::RDONLY, crate::mounts::RDONLY);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(problem(r#"{"hooks":{"prestart":[{"path":"/x"}]}}"#).starts_with("oci_spec.hooks"));
        assert!(problem(r#"{"linux":{"namespaces":[{"type":"mount"}]}}"#).contains("pid and mount"));
        assert!(problem(r#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#).contains("path"));
        assert!(problem(r#"{"linux":{"namespaces":[{"type":"user"}]}}"#).contains("uidMappings"));
        assert!(problem(r#"{"mounts":[{"destination":"x","type":"tmpfs"}]}"#).contains("not absolute"));
        assert!(problem(r#"{"mounts":[{"destination":"/x","type":"bind","source":"/etc"}]}"#).contains("not below"));
        assert!(
            problem(r#"{"mounts":[{"destination":"/x","type":"bind","source":"/run/pykata/volumes/../x"}]}"#)
                .contains("..")
        );
        assert!(problem(r#"{"linux":{"sysctl":{"../x":"1"}}}"#).contains("no name"));
        assert!(problem("{").contains("oci_spec"));
    }

    #[test]
    fn content_lies_in_volumes() {
        let mut request = request("");
        request.rootfs.as_mut().expect("some").data = vec!["/run/pykata/volumes/rootfs/1".into()];
        assert_eq!(Config::new(request.clone()).expect("good").rootfs.data, ["rootfs/1"]);
        request.rootfs.as_mut().expect("some").data = vec!["/etc".into()];
        assert!(Config::new(request).err().expect("is refused").to_string().starts_with("rootfs.data"));
    }

    #[test]
    fn sysctl_names_become_paths() {
        let path = |key: &str| sysctl((key.into(), String::new())).expect("good").0;
        assert_eq!(path("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(path("net/ipv4/ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(path("net.ipv4.conf.eth0/1.forwarding"), "net/ipv4/conf/eth0.1/forwarding");
    }
}
