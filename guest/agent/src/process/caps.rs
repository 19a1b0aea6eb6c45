//! Capabilities of a process, from their names in the OCI specification to the thread's sets.

use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::errno::{Failed, Step};
use crate::oci;
use crate::sys;

const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Sets as bit masks by capability number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapSets {
    pub bounding: u64,
    pub effective: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub ambient: u64,
}

/// CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE
/// SETFCAP: what container engines give a container's root.
const USUAL: u64 = 0b1010_1000_0000_0100_0010_0101_1111_1011;

/// The mask of one capability by its name with "CAP_"; unknown ones have none.
pub fn bit(name: &str) -> u64 {
    let index = name.strip_prefix("CAP_").and_then(|name| NAMES.iter().position(|known| *known == name));
    index.map_or(0, |index| 1 << index)
}

impl CapSets {
    pub const DEFAULT: Self = Self { bounding: USUAL, effective: USUAL, inheritable: 0, permitted: USUAL, ambient: 0 };

    /// DAC_OVERRIDE DAC_READ_SEARCH SYS_ADMIN: to read everything, "trusted" attributes among it.
    pub const READER: Self = {
        let set = 1 << 1 | 1 << 2 | 1 << 21;
        Self { bounding: set, effective: set, inheritable: 0, permitted: set, ambient: 0 }
    };

    pub fn new(from: &oci::Capabilities) -> Self {
        let mask = |names: &[String]| names.iter().fold(0, |mask, name| mask | bit(name));
        Self {
            bounding: mask(&from.bounding),
            effective: mask(&from.effective),
            inheritable: mask(&from.inheritable),
            permitted: mask(&from.permitted),
            ambient: mask(&from.ambient),
        }
    }

    /// Drops the bounding set to ours. While one is still privileged.
    pub fn apply_bounding(&self) -> Result<(), Failed> {
        for (cap, name) in NAMES.iter().enumerate() {
            if self.bounding & (1 << cap) == 0 {
                sys::prctl(libc::PR_CAPBSET_DROP, cap as u64, 0).step("drop capability", *name)?;
            }
        }
        Ok(())
    }

    /// Sets the others. After the change of user, with capabilities kept over it.
    pub fn apply(&self) -> Result<(), Failed> {
        let set = CapabilitySet::from_bits_retain;
        let sets = CapabilitySets {
            effective: set(self.effective & self.permitted),
            permitted: set(self.permitted),
            inheritable: set(self.inheritable),
        };
        rustix::thread::set_capabilities(None, sets).step("capset", "capabilities")?;
        for cap in (0..NAMES.len()).filter(|cap| self.ambient & (1 << cap) != 0) {
            sys::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, cap as u64)
                .step("ambient capability", NAMES[cap])?;
        }
        Ok(())
    }

    /// Gives up all but the ambient ones, as exec does for a user who isn't root.
    pub fn keep_ambient(&self) -> Result<(), Failed> {
        let ambient = CapabilitySet::from_bits_retain(self.ambient & self.permitted & self.inheritable);
        let sets = CapabilitySets { effective: ambient, permitted: ambient, inheritable: ambient };
        rustix::thread::set_capabilities(None, sets).step("capset", "ambient")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_set_is_what_its_comment_says() {
        let names = "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT \
                     MKNOD AUDIT_WRITE SETFCAP";
        let mask = names.split(' ').map(|name| bit(&format!("CAP_{name}"))).fold(0, |a, b| a | b);
        assert_eq!(mask, USUAL, "{mask:#b}");
    }

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(bit("CAP_SYS_ADMIN"), 1 << 21);
        assert_eq!(bit("CAP_CHECKPOINT_RESTORE"), 1 << 40);
        assert_eq!(bit("CAP_NONE"), 0);
        assert_eq!(bit("CHOWN"), 0);
    }
}
