//! Resource limits of a process.

use rustix::io::Errno;

use super::child::Refused;
use crate::errno::{self, Failed};
use crate::oci;
use crate::proto;
use crate::validate::{Invalid, shown};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rlimit {
    resource: u32,
    soft: u64,
    hard: u64,
}

const NAMES: [(&str, u32); 16] = [
    ("RLIMIT_CPU", libc::RLIMIT_CPU),
    ("RLIMIT_FSIZE", libc::RLIMIT_FSIZE),
    ("RLIMIT_DATA", libc::RLIMIT_DATA),
    ("RLIMIT_STACK", libc::RLIMIT_STACK),
    ("RLIMIT_CORE", libc::RLIMIT_CORE),
    ("RLIMIT_RSS", libc::RLIMIT_RSS),
    ("RLIMIT_NPROC", libc::RLIMIT_NPROC),
    ("RLIMIT_NOFILE", libc::RLIMIT_NOFILE),
    ("RLIMIT_MEMLOCK", libc::RLIMIT_MEMLOCK),
    ("RLIMIT_AS", libc::RLIMIT_AS),
    ("RLIMIT_LOCKS", libc::RLIMIT_LOCKS),
    ("RLIMIT_SIGPENDING", libc::RLIMIT_SIGPENDING),
    ("RLIMIT_MSGQUEUE", libc::RLIMIT_MSGQUEUE),
    ("RLIMIT_NICE", libc::RLIMIT_NICE),
    ("RLIMIT_RTPRIO", libc::RLIMIT_RTPRIO),
    ("RLIMIT_RTTIME", libc::RLIMIT_RTTIME),
];

/// What a process has where nobody says otherwise; the agent's own limits are no measure.
const DEFAULT: [Rlimit; 1] = [Rlimit { resource: libc::RLIMIT_NOFILE, soft: 1024, hard: 524_288 }];

fn parse(field: &'static str, name: &str, soft: u64, hard: u64) -> Result<Rlimit, Invalid> {
    let known = NAMES.iter().find(|(known, _)| *known == name);
    let &(_, resource) = known.ok_or_else(|| Invalid::new(field, format!("{} is unknown", shown(name))))?;
    if soft > hard {
        return Err(Invalid::new(field, format!("{name}: soft {soft} is above hard {hard}")));
    }
    Ok(Rlimit { resource, soft, hard })
}

pub fn from_oci(list: &[oci::Rlimit]) -> Result<Vec<Rlimit>, Invalid> {
    let mut out = DEFAULT.to_vec();
    for limit in list {
        replace(&mut out, parse("oci_spec.process.rlimits", &limit.kind, limit.soft, limit.hard)?);
    }
    Ok(out)
}

/// The container's limits with those of a process in their place.
pub fn merge(base: &[Rlimit], own: &[proto::Rlimit]) -> Result<Vec<Rlimit>, Invalid> {
    let mut out = base.to_vec();
    for limit in own {
        replace(&mut out, parse("process.rlimits", &limit.r#type, limit.soft, limit.hard)?);
    }
    Ok(out)
}

fn replace(list: &mut Vec<Rlimit>, limit: Rlimit) {
    list.retain(|known| known.resource != limit.resource);
    list.push(limit);
}

/// Sets the limits of this process.
pub fn apply(list: &[Rlimit]) -> Result<(), Refused> {
    for limit in list {
        let value = libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard };
        // SAFETY: the kernel reads the value during the call and writes none.
        let ret = unsafe {
            libc::syscall(libc::SYS_prlimit64, 0, limit.resource, &raw const value, std::ptr::null_mut::<u8>())
        };
        if ret != 0 {
            let name = NAMES.iter().find(|(_, known)| *known == limit.resource).map_or("?", |(name, _)| *name);
            return Err(match errno::last() {
                Errno::PERM => {
                    let problem = format!("{name}: {} is more than a process here may have", limit.hard);
                    Invalid::new("process.rlimits", problem).into()
                }
                errno => Failed::new("setrlimit", name, errno).into(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(kind: &str, soft: u64, hard: u64) -> proto::Rlimit {
        proto::Rlimit { r#type: kind.into(), soft, hard }
    }

    #[test]
    fn replaces_by_type() {
        let base = from_oci(&[]).expect("good");
        let merged = merge(&base, &[own("RLIMIT_NOFILE", 5, 6), own("RLIMIT_CORE", 0, 0)]).expect("good");
        assert_eq!(merged.len(), 2);
        assert!(merged.contains(&Rlimit { resource: libc::RLIMIT_NOFILE, soft: 5, hard: 6 }));
    }

    #[test]
    fn refuses_nonsense() {
        assert!(merge(&[], &[own("RLIMIT_X", 1, 1)]).is_err());
        assert!(merge(&[], &[own("RLIMIT_CORE", 2, 1)]).is_err());
    }
}
