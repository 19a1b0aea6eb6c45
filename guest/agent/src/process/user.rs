//! Who a process runs as: looked up in the container's own /etc/passwd and /etc/group, which nobody trusts. They are
//! read as streams with bounded lines and a bounded total.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::container::inside;
use crate::oci;
use crate::validate::{self, Invalid, shown};

/// Largest id; the kernel's "no change" and old 32-bit sign bits lie above.
const MAX_ID: u32 = i32::MAX as u32;
/// Longest line that is looked at; longer ones are passed over.
const MAX_LINE: usize = 32 * 1024;
/// How much of a file is looked at.
const MAX_FILE: usize = 8 << 20;
/// Most supplementary groups, as the kernel allows.
const MAX_GROUPS: usize = 65_536;

const FIELD: &str = "process.user";

/// What a request says: "", "name", "uid", "name:group", "uid:gid".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserRequest {
    user: Option<String>,
    group: Option<String>,
}

/// What a process gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

impl UserRequest {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let good = |part: &str| part.len() <= 256 && !part.contains(['\0', '\n', ':']);
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        if !good(user) || !good(group.unwrap_or_default()) || group == Some("") || (user.is_empty() && group.is_some())
        {
            return Err(Invalid::new(FIELD, format!("{} is neither name, uid, name:group nor uid:gid", shown(text))));
        }
        Ok(Self { user: (!user.is_empty()).then(|| user.to_owned()), group: group.map(str::to_owned) })
    }

    /// Looks it up in the container whose root is `root`. `default` is the OCI specification's user.
    pub fn resolve(&self, root: BorrowedFd<'_>, default: &oci::User) -> Result<Identity, Invalid> {
        let passwd = inside::open_regular(root, "/etc/passwd");
        let group = inside::open_regular(root, "/etc/group");
        self.resolve_in(passwd, group, default)
    }

    fn resolve_in(
        &self,
        passwd: Option<OwnedFd>,
        group: Option<OwnedFd>,
        default: &oci::User,
    ) -> Result<Identity, Invalid> {
        let known = match &self.user {
            Some(user) => find_user(passwd.as_ref(), user),
            None => find_user(passwd.as_ref(), &default.uid.to_string()),
        };
        let (uid, gid) = match (&self.user, &known) {
            (None, _) => (default.uid, default.gid),
            (Some(_), Some(known)) => (known.uid, known.gid),
            (Some(user), None) => (number(user)?.ok_or_else(|| unknown("user", user, "passwd"))?, 0),
        };
        let extra = if self.user.is_none() { default.additional_gids.as_slice() } else { &[] };
        let mut identity = Identity {
            uid,
            gid,
            groups: Vec::new(),
            home: known
                .as_ref()
                .map(|known| known.home.clone())
                .filter(|home| home.starts_with('/'))
                .unwrap_or("/".into()),
        };
        match &self.group {
            Some(wanted) => {
                let found = find_group(group.as_ref(), wanted);
                identity.gid = match found {
                    Some(gid) => gid,
                    None => number(wanted)?.ok_or_else(|| unknown("group", wanted, "group"))?,
                };
            }
            None => {
                identity.groups.extend(extra);
                if let Some(known) = &known {
                    add_memberships(group.as_ref(), &known.name, &mut identity.groups);
                }
            }
        }
        // The primary group is among them: a file whose group has fewer rights than others must not open by its absence.
        identity.groups.retain(|group| *group != identity.gid);
        identity.groups.insert(0, identity.gid);
        for id in [identity.uid, identity.gid].iter().chain(&identity.groups) {
            if *id > MAX_ID {
                return Err(Invalid::new(FIELD, format!("id {id} is above {MAX_ID}")));
            }
        }
        Ok(identity)
    }
}

fn unknown(what: &str, name: &str, file: &str) -> Invalid {
    Invalid::new(FIELD, format!("no {what} {} in the container's /etc/{file}", shown(name)))
}

/// A string that is a number is an id. None: it isn't one.
fn number(text: &str) -> Result<Option<u32>, Invalid> {
    if text.is_empty() || !text.bytes().all(|c| c.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(id) if id <= MAX_ID => Ok(Some(id)),
        _ => Err(Invalid::new(FIELD, format!("id {} is above {MAX_ID}", shown(text)))),
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

fn parse_user(line: &str) -> Option<Known> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
    let home = fields.nth(1).unwrap_or_default();
    Some(Known { name: name.to_owned(), uid, gid, home: home.to_owned() })
}

/// By name, or else by number. The first entry wins, as with getpwnam.
fn find_user(file: Option<&OwnedFd>, wanted: &str) -> Option<Known> {
    let id: Option<u32> = wanted.parse().ok();
    let mut by_id = None;
    let by_name = each_line(file?, |line| {
        let user = parse_user(line)?;
        if by_id.is_none() && id == Some(user.uid) {
            by_id = Some(user.clone());
        }
        (user.name == wanted).then_some(user)
    });
    by_name.or(by_id)
}

/// Name, id and members of a line of /etc/group.
fn parse_group(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let gid = fields.nth(1)?.parse().ok()?;
    Some((name, gid, fields.next().unwrap_or_default()))
}

fn find_group(file: Option<&OwnedFd>, wanted: &str) -> Option<u32> {
    each_line(file?, |line| {
        let (name, gid, _) = parse_group(line)?;
        (name == wanted).then_some(gid)
    })
}

fn add_memberships(file: Option<&OwnedFd>, user: &str, groups: &mut Vec<u32>) {
    let Some(file) = file else { return };
    each_line(file, |line| {
        let (_, gid, members) = parse_group(line)?;
        if members.split(',').any(|member| member == user) && !groups.contains(&gid) && groups.len() < MAX_GROUPS {
            groups.push(gid);
        }
        None::<()>
    });
}

/// Calls `look` with each line until it finds something. Lines that are too long or not UTF-8 are passed over.
fn each_line<T>(file: &OwnedFd, mut look: impl FnMut(&str) -> Option<T>) -> Option<T> {
    let mut buffer = vec![0u8; 2048];
    let (mut have, mut offset, mut skipping) = (0, 0u64, false);
    loop {
        let n = match rustix::io::pread(file.as_fd(), &mut buffer[have..], offset) {
            Ok(n) => n,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => 0,
        };
        offset += n as u64;
        let mut start = 0;
        let end = have + n;
        while let Some(length) = buffer[start..end].iter().position(|&c| c == b'\n') {
            let line = &buffer[start..start + length];
            start += length + 1;
            if !std::mem::take(&mut skipping)
                && let Some(found) = std::str::from_utf8(line).ok().and_then(&mut look)
            {
                return Some(found);
            }
        }
        if n == 0 || offset > MAX_FILE as u64 {
            let rest = if skipping { &[] } else { &buffer[start..end] };
            return std::str::from_utf8(rest).ok().filter(|line| !line.is_empty()).and_then(&mut look);
        }
        buffer.copy_within(start..end, 0);
        have = end - start;
        if have == buffer.len() {
            match have < MAX_LINE {
                true => buffer.resize(have * 4, 0),
                false => (have, skipping) = (0, true),
            }
        }
    }
}

/// The HOME to add to the environment, unless it is there.
pub fn home_variable(env: &[std::ffi::CString], identity: &Identity) -> Option<std::ffi::CString> {
    if env.iter().any(|entry| entry.to_bytes().starts_with(b"HOME=")) {
        return None;
    }
    validate::c_string(FIELD, &format!("HOME={}", identity.home)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken\nweb:x:1000:1001::/srv/web:\n1000:x:5:6::/five:\nbig:x:4294967295:1:::\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,web\nweb:x:1001:\nwww:x:33:web,\n";

    fn file(text: &[u8]) -> OwnedFd {
        let fd = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        let mut rest = text;
        while !rest.is_empty() {
            let n = rustix::io::write(&fd, rest).expect("write");
            rest = &rest[n..];
        }
        fd
    }

    fn resolve(user: &str) -> Result<Identity, Invalid> {
        let default = oci::User { uid: 7, gid: 8, additional_gids: vec![9], umask: None };
        let request = UserRequest::parse(user)?;
        request.resolve_in(Some(file(PASSWD.as_bytes())), Some(file(GROUP.as_bytes())), &default)
    }

    fn identity(uid: u32, gid: u32, groups: &[u32], home: &str) -> Identity {
        Identity { uid, gid, groups: groups.to_vec(), home: home.to_owned() }
    }

    #[test]
    fn all_forms() {
        assert_eq!(resolve(""), Ok(identity(7, 8, &[8, 9], "/")));
        assert_eq!(resolve("web"), Ok(identity(1000, 1001, &[1001, 10, 33], "/srv/web")));
        assert_eq!(resolve("0"), Ok(identity(0, 0, &[0, 10], "/root")));
        assert_eq!(resolve("web:wheel"), Ok(identity(1000, 10, &[10], "/srv/web")));
        assert_eq!(resolve("12:34"), Ok(identity(12, 34, &[34], "/")));
        assert_eq!(resolve("12"), Ok(identity(12, 0, &[0], "/")));
    }

    #[test]
    fn a_name_that_is_a_number_wins_over_the_number() {
        assert_eq!(resolve("1000"), Ok(identity(5, 6, &[6], "/five")));
    }

    #[test]
    fn refusals_are_clean() {
        for bad in ["nobody", "web:nogroup", "4294967295", "99999999999999999999", "big", "a:b:c", ":", ":0", "a\0"] {
            assert!(resolve(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn works_without_files() {
        let request = UserRequest::parse("5:6").expect("good");
        let found = request.resolve_in(None, None, &oci::User::default());
        assert_eq!(found, Ok(identity(5, 6, &[6], "/")));
    }

    #[test]
    fn a_huge_file_costs_little() {
        let big = file(b"");
        rustix::fs::ftruncate(&big, 200 << 20).expect("truncate");
        rustix::io::pwrite(&big, b"\nroot:x:0:0::/:/bin/sh\n", 2 * MAX_FILE as u64).expect("write");
        assert_eq!(find_user(Some(&big), "root"), None, "only its beginning is read");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2000), user in "[a-z0-9:]{0,6}") {
            if let Ok(request) = UserRequest::parse(&user) {
                let found = request.resolve_in(Some(file(&bytes)), Some(file(&bytes)), &oci::User::default());
                if let Ok(found) = found {
                    prop_assert!(found.uid <= MAX_ID && found.gid <= MAX_ID);
                }
            }
        }

        #[test]
        fn an_entry_is_found_behind_any_line(noise in 0usize..100_000, uid in 0u32..=MAX_ID) {
            let text = format!("{}\nwanted:x:{uid}:3::/h:\n", "x".repeat(noise));
            let found = find_user(Some(&file(text.as_bytes())), "wanted").map(|user| user.uid);
            prop_assert_eq!(found, Some(uid));
        }
    }
}
