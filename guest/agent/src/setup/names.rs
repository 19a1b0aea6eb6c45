//! Host name, name servers and /etc/hosts.

use std::collections::HashMap;
use std::fmt::Write;
use std::net::IpAddr;

use super::identity::{self, Random};
use crate::errno::{Failed, Step};
use crate::validate::{self, Invalid, shown};

/// The files of a container with names in them, in the order of [`Names::files`].
pub const PATHS: [&str; 4] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/machine-id"];

/// What the containers' files in /etc are made of.
#[derive(Debug, Clone)]
pub struct Names {
    hostname: String,
    /// The guest's address, for its own name.
    address: Option<IpAddr>,
    resolv_conf: String,
    hosts: String,
    machine_id: Random,
}

impl Names {
    pub fn new(
        hostname: &str,
        address: Option<IpAddr>,
        nameservers: &[String],
        search: &[String],
        hosts: &HashMap<String, String>,
    ) -> Result<Self, Invalid> {
        validate::list("nameservers", nameservers, 16)?;
        if hosts.len() > 4096 {
            return Err(Invalid::new("hosts", format!("{} names; at most 4096", hosts.len())));
        }
        let mut resolv_conf = String::new();
        for server in nameservers {
            let _ = writeln!(resolv_conf, "nameserver {}", ip("nameservers", server)?);
        }
        validate::list("search", search, 32)?;
        for domain in search {
            validate::domain("search", domain)?;
        }
        if !search.is_empty() {
            let _ = writeln!(resolv_conf, "search {}", search.join(" "));
        }
        let mut lines = Vec::with_capacity(hosts.len());
        for (name, address) in hosts {
            validate::domain("hosts", name)?;
            lines.push(format!("{}\t{name}\n", ip("hosts", address)?));
        }
        lines.sort();
        let hosts = lines.concat();
        Ok(Self { hostname: hostname.to_owned(), address, resolv_conf, hosts, machine_id: Random::default() })
    }

    pub fn hostname(&self) -> &str {
        &self.hostname
    }

    /// The same for a guest with another name, if there is one, and another machine-id.
    pub fn of_another(&self, hostname: &str, machine_id: Random) -> Self {
        let hostname = if hostname.is_empty() { &self.hostname } else { hostname };
        Self { hostname: hostname.to_owned(), machine_id, ..self.clone() }
    }

    /// Paths and contents of the files for a container that may have a host name of its own.
    pub fn files(&self, hostname: Option<&str>) -> [(&'static str, String); 4] {
        let hostname = hostname.unwrap_or(&self.hostname);
        let own = self.address.unwrap_or(IpAddr::from([127, 0, 1, 1]));
        let localhost = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
        let [hosts, name, resolv, machine] = PATHS;
        [
            (hosts, format!("{localhost}{own}\t{hostname}\n{}", self.hosts)),
            (name, format!("{hostname}\n")),
            (resolv, self.resolv_conf.clone()),
            (machine, format!("{}\n", identity::machine_id(self.machine_id))),
        ]
    }
}

fn ip(field: &'static str, text: &str) -> Result<IpAddr, Invalid> {
    text.parse().map_err(|_| Invalid::new(field, format!("{} is no IP address", shown(text))))
}

/// Sets the guest's own name.
pub fn set_hostname(name: &str) -> Result<(), Failed> {
    rustix::system::sethostname(name.as_bytes()).step("sethostname", name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_container() {
        let hosts = HashMap::from([("db".to_owned(), "10.0.0.3".to_owned())]);
        let servers = ["10.0.0.1".into(), "::1".into()];
        let search = ["a.example".into(), "b_c.example".into()];
        let names = Names::new("box", "10.0.0.2".parse().ok(), &servers, &search, &hosts).expect("good");
        let [(_, hosts), (_, hostname), (_, resolv), _] = names.files(Some("web"));
        assert!(hosts.ends_with("10.0.0.2\tweb\n10.0.0.3\tdb\n"), "{hosts}");
        assert_eq!(hostname, "web\n");
        assert_eq!(resolv, "nameserver 10.0.0.1\nnameserver ::1\nsearch a.example b_c.example\n");
    }

    #[test]
    fn no_line_can_be_smuggled_in() {
        let bad = HashMap::from([("a\n1.2.3.4 b".to_owned(), "1.2.3.4".to_owned())]);
        assert!(Names::new("box", None, &[], &[], &bad).is_err());
        let none = HashMap::new();
        assert!(Names::new("box", None, &["1.1.1.1\nsearch x".into()], &[], &none).is_err());
        assert!(Names::new("box", None, &[], &["a\nnameserver 1.1.1.1".into()], &none).is_err());
        assert!(Names::new("box", None, &[], &["a b".into()], &none).is_err());
    }
}
