//! What each process of a container starts from: `process` of its OCI specification.

use super::caps::CapSets;
use super::rlimits::{self, Rlimit};
use crate::oci;
use crate::validate::{self, Invalid};

#[derive(Debug, Clone)]
pub struct Defaults {
    pub user: oci::User,
    pub env: Vec<String>,
    pub cwd: String,
    pub caps: CapSets,
    pub rlimits: Vec<Rlimit>,
    pub no_new_privileges: bool,
    pub oom_score_adj: i32,
}

impl Defaults {
    pub fn new(from: Option<oci::Process>) -> Result<Self, Invalid> {
        let from = from.unwrap_or_default();
        validate::list("oci_spec.process.env", &from.env, validate::MAX_LIST)?;
        validate::list("oci_spec.process.user.additionalGids", &from.user.additional_gids, validate::MAX_LIST)?;
        let cwd = if from.cwd.is_empty() { "/".to_owned() } else { from.cwd };
        validate::path("oci_spec.process.cwd", &cwd)?;
        let oom_score_adj = from.oom_score_adj.unwrap_or(0);
        if !(-1000..=1000).contains(&oom_score_adj) {
            return Err(Invalid::new("oci_spec.process.oomScoreAdj", format!("{oom_score_adj} is not in -1000..1000")));
        }
        Ok(Self {
            user: from.user,
            env: from.env,
            cwd,
            caps: from.capabilities.as_ref().map_or(CapSets::DEFAULT, CapSets::new),
            rlimits: rlimits::from_oci(&from.rlimits)?,
            no_new_privileges: from.no_new_privileges,
            oom_score_adj,
        })
    }
}
