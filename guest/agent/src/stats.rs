//! What the guest and its containers use.

use std::fs;

use crate::agent::Agent;
use crate::container::Container;
use crate::errno::{Failed, Step};
use crate::proto::{ContainerStats, StatsResponse};
use crate::sys;

pub fn collect(agent: &Agent) -> Result<StatsResponse, Failed> {
    let memory = Memory::read()?;
    let containers = agent.containers().iter().map(|c| (c.id.clone(), container(c))).collect();
    Ok(StatsResponse {
        memory_total: memory.total,
        memory_available: memory.available,
        agent_rss: own_rss()?,
        open_files: fs::read_dir("/proc/self/fd").step("read", "/proc/self/fd")?.count().saturating_sub(1) as u32,
        containers,
        now_ns: sys::now_ns(libc::CLOCK_BOOTTIME),
    })
}

fn container(container: &Container) -> ContainerStats {
    let cgroup = &container.cgroup;
    ContainerStats {
        memory_current: cgroup.number("memory.current").unwrap_or(0),
        memory_peak: cgroup.number("memory.peak").unwrap_or(0),
        cpu_usec: cgroup.value("cpu.stat", "usage_usec").unwrap_or(0),
        // What only makes its processes isn't one of them.
        pids: cgroup.number("pids.current").unwrap_or(0).saturating_sub(container.count_stems() as u64) as u32,
        oom_kills: container.oom_kills(),
    }
}

/// The guest's memory, bytes.
pub struct Memory {
    pub total: u64,
    pub available: u64,
}

impl Memory {
    pub fn read() -> Result<Self, Failed> {
        let text = fs::read_to_string("/proc/meminfo").step("read", "/proc/meminfo")?;
        let value = |key| meminfo(&text, key).unwrap_or(0);
        Ok(Self { total: value("MemTotal:"), available: value("MemAvailable:") })
    }
}

fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn own_rss() -> Result<u64, Failed> {
    let text = fs::read_to_string("/proc/self/statm").step("read", "/proc/self/statm")?;
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    Ok(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kib() {
        let text = "MemTotal:         251120 kB\nMemFree:          1 kB\nMemAvailable:     200000 kB\n";
        assert_eq!(meminfo(text, "MemTotal:"), Some(251_120 * 1024));
        assert_eq!(meminfo(text, "MemAvailable:"), Some(200_000 * 1024));
        assert_eq!(meminfo(text, "None:"), None);
    }

    #[test]
    fn the_process_has_a_size() {
        assert!(own_rss().expect("statm") > 100_000);
    }
}
