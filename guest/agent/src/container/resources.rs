//! A container's limits, from `linux.resources` of the OCI specification to the files of its cgroup.

use crate::cgroup::{self, Cgroup};
use crate::errno::Failed;
use crate::oci::{Resources, Throttle};

/// Writes all limits. `default_pids` holds where the specification says nothing: a fork bomb must not take the guest.
pub fn apply(cgroup: &Cgroup, resources: &Resources, default_pids: u64) -> Result<(), Failed> {
    let settings = settings(resources, default_pids);
    enable(&settings)?;
    for (file, value) in settings {
        cgroup.write(&file, value)?;
    }
    Ok(())
}

/// Controllers beyond those that are always on.
fn enable(settings: &[(String, String)]) -> Result<(), Failed> {
    for controller in ["cpu", "cpuset", "io", "hugetlb"] {
        if settings.iter().any(|(file, _)| file.split('.').next() == Some(controller)) {
            cgroup::enable(controller)?;
        }
    }
    Ok(())
}

fn settings(resources: &Resources, default_pids: u64) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut set = |file: &str, value: String| out.push((file.to_owned(), value));
    let limit = |value: i64| if value < 0 { "max".to_owned() } else { value.to_string() };

    let memory = &resources.memory;
    if let Some(value) = memory.limit.filter(|&v| v != 0) {
        set("memory.max", limit(value));
        // Swap in v1's terms is memory and swap together; without swap of the guest's own all this is moot.
        set("memory.swap.max", limit(memory.swap.map_or(0, |swap| if swap < 0 { -1 } else { (swap - value).max(0) })));
    }
    if let Some(value) = memory.reservation.filter(|&v| v != 0) {
        set("memory.low", limit(value));
    }
    match resources.pids.limit {
        Some(value) if value != 0 => set("pids.max", limit(value)),
        _ => set("pids.max", default_pids.to_string()),
    }
    let cpu = &resources.cpu;
    if cpu.quota.is_some() || cpu.period.is_some() {
        let quota = cpu.quota.filter(|&q| q > 0).map_or_else(|| "max".to_owned(), |q| q.to_string());
        set("cpu.max", format!("{quota} {}", cpu.period.filter(|&p| p > 0).unwrap_or(100_000)));
    }
    if let Some(shares) = cpu.shares.filter(|&s| s > 0) {
        set("cpu.weight", weight(shares).to_string());
    }
    if let Some(idle) = cpu.idle {
        set("cpu.idle", idle.to_string());
    }
    if let Some(cpus) = cpu.cpus.as_ref().filter(|c| !c.is_empty()) {
        set("cpuset.cpus", cpus.clone());
    }
    if let Some(mems) = cpu.mems.as_ref().filter(|m| !m.is_empty()) {
        set("cpuset.mems", mems.clone());
    }
    let io = &resources.block_io;
    if let Some(weight) = io.weight.filter(|&w| w != 0) {
        // 10..1000 in v1's terms, 1..10000 in v2's.
        set("io.weight", format!("default {}", 1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990));
    }
    let mut throttle = |list: &[Throttle], key: &str| {
        for item in list {
            set("io.max", format!("{}:{} {key}={}", item.major, item.minor, item.rate));
        }
    };
    throttle(&io.throttle_read_bps_device, "rbps");
    throttle(&io.throttle_write_bps_device, "wbps");
    throttle(&io.throttle_read_iops_device, "riops");
    throttle(&io.throttle_write_iops_device, "wiops");
    for (file, value) in &resources.unified {
        if file.contains('.') && !file.contains('/') && !file.starts_with("cgroup.") {
            out.push((file.clone(), value.clone()));
        }
    }
    out
}

/// From v1's shares (2..262144) to v2's weight (1..10000).
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// How many processes a container may have when its specification doesn't say: as many as a small guest can bear.
pub fn default_pids(memory_total: u64) -> u64 {
    (memory_total / (128 << 10)).clamp(256, 32_768)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Spec;

    fn of(json: &str) -> Vec<(String, String)> {
        let spec = Spec::parse(format!(r#"{{"linux":{{"resources":{json}}}}}"#).as_bytes()).expect("parses");
        settings(&spec.linux.resources, 1000)
    }

    fn pair(a: &str, b: &str) -> (String, String) {
        (a.to_owned(), b.to_owned())
    }

    #[test]
    fn pids_are_always_limited() {
        assert_eq!(of("{}"), [pair("pids.max", "1000")]);
        assert_eq!(of(r#"{"pids":{"limit":5}}"#), [pair("pids.max", "5")]);
        assert_eq!(of(r#"{"pids":{"limit":-1}}"#), [pair("pids.max", "max")]);
        assert_eq!(default_pids(256 << 20), 2048);
    }

    #[test]
    fn memory_and_swap() {
        let settings = of(r#"{"memory":{"limit":1000,"swap":1500,"reservation":10}}"#);
        assert!(settings.contains(&pair("memory.max", "1000")));
        assert!(settings.contains(&pair("memory.swap.max", "500")));
        assert!(settings.contains(&pair("memory.low", "10")));
    }

    #[test]
    fn cpu() {
        let settings = of(r#"{"cpu":{"quota":50000,"period":100000,"shares":1024,"cpus":"0-1"}}"#);
        assert!(settings.contains(&pair("cpu.max", "50000 100000")));
        assert!(settings.contains(&pair("cpu.weight", "39")));
        assert!(settings.contains(&pair("cpuset.cpus", "0-1")));
        assert_eq!((weight(2), weight(262_144)), (1, 10_000));
    }

    #[test]
    fn unified_cannot_leave_the_directory_or_move_processes() {
        let settings = of(r#"{"unified":{"memory.high":"1","../x.y":"1","cgroup.procs":"1"}}"#);
        assert!(settings.contains(&pair("memory.high", "1")));
        assert_eq!(settings.len(), 2);
    }
}
