//! What a request may contain, checked before anything is done with it.

use std::ffi::CString;

use tonic::Status;

/// Longest string the protocol allows: what execve(2) takes of an argument, less its NUL.
pub const MAX_STRING: usize = 128 * 1024 - 1;
/// Most elements of any list in a request.
pub const MAX_LIST: usize = 16 * 1024;
/// Most arguments, and most variables; how much they may be in all is for execve(2) to say.
pub const MAX_WORDS: usize = 256 * 1024;
/// Most lower file systems of one rootfs; an image has at most 127 layers.
pub const MAX_LOWERS: usize = 128;
/// Most data in one message of stdin.
pub const MAX_PIECE: usize = 64 * 1024;

/// A request that can't be right. `field` is its path in the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    pub field: &'static str,
    pub problem: String,
}

impl Invalid {
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self { field, problem: problem.into() }
    }
}

impl From<Invalid> for Status {
    fn from(err: Invalid) -> Self {
        Status::invalid_argument(err.to_string())
    }
}

/// A value as it may stand in an error message: quoted, escaped, not longer than a line.
pub fn shown(value: &str) -> String {
    const LONGEST: usize = 80;
    let mut text: String = value.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if value.chars().nth(LONGEST).is_some() {
        text.push('…');
    }
    format!("{text:?}").replace("\\\\", "\\")
}

/// An id: `[a-z0-9-]{1,64}`. It becomes the name of a cgroup.
pub fn id(field: &'static str, value: &str) -> Result<(), Invalid> {
    let good = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    match value.len() {
        1..=64 if value.bytes().all(good) => Ok(()),
        _ => Err(Invalid::new(field, format!("{} is no id: [a-z0-9-]{{1,64}}", shown(value)))),
    }
}

/// A string without NUL, of bounded length, as the kernel takes it.
pub fn c_string(field: &'static str, value: &str) -> Result<CString, Invalid> {
    if value.len() > MAX_STRING {
        return Err(Invalid::new(field, format!("{} bytes long; at most {MAX_STRING}", value.len())));
    }
    CString::new(value).map_err(|_| Invalid::new(field, format!("{} contains a NUL", shown(value))))
}

/// An absolute path without "..".
pub fn path(field: &'static str, value: &str) -> Result<(), Invalid> {
    c_string(field, value)?;
    if !value.starts_with('/') {
        return Err(Invalid::new(field, format!("{} is not absolute", shown(value))));
    }
    if value.len() >= 4096 {
        return Err(Invalid::new(field, "longer than the kernel's PATH_MAX"));
    }
    if value.split('/').any(|part| part == "..") {
        return Err(Invalid::new(field, format!("{} contains \"..\"", shown(value))));
    }
    Ok(())
}

/// A list of bounded length.
pub fn list<T>(field: &'static str, values: &[T], most: usize) -> Result<(), Invalid> {
    match values.len() {
        n if n <= most => Ok(()),
        n => Err(Invalid::new(field, format!("{n} elements; at most {most}"))),
    }
}

/// A domain name as resolvers take it: like a host name, but longer, and with the underscores that private names have.
pub fn domain(field: &'static str, value: &str) -> Result<(), Invalid> {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_".contains(&c))
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if value.len() <= 253 && value.split('.').all(label) {
        return Ok(());
    }
    Err(Invalid::new(field, format!("{} is no domain name", shown(value))))
}

/// A host name per RFC 1123: labels of letters, digits and inner hyphens, at most 64 bytes for Linux.
pub fn hostname(field: &'static str, value: &str) -> Result<(), Invalid> {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if value.len() <= 64 && value.split('.').all(label) {
        return Ok(());
    }
    Err(Invalid::new(field, format!("{} is no host name", shown(value))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ids_are_safe_names(value in any::<String>()) {
            if id("id", &value).is_ok() {
                prop_assert!(!value.contains(['/', '.', '\0']));
                prop_assert!(!value.is_empty() && value.len() <= 64);
            }
        }

        #[test]
        fn good_ids_pass(value in "[a-z0-9-]{1,64}") {
            prop_assert!(id("id", &value).is_ok());
        }

        #[test]
        fn paths_never_climb(value in "[./a\0]{0,12}") {
            if path("p", &value).is_ok() {
                prop_assert!(value.starts_with('/'));
                prop_assert!(!value.contains('\0') && !value.split('/').any(|p| p == ".."));
            }
        }

        #[test]
        fn messages_are_one_short_line(value in any::<String>()) {
            let text = shown(&value);
            prop_assert!(!text.contains('\n') && text.chars().count() < 80 * 10 + 8);
        }
    }

    #[test]
    fn hostnames() {
        for good in ["a", "sandbox-1", "a.b.c", &"a".repeat(63)] {
            assert!(hostname("h", good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a..b", "a_b", "a b", &"a".repeat(64), "é"] {
            assert!(hostname("h", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn domains() {
        for good in ["a", "a_b.c", "_dmarc.example", &["a"; 127].join(".")] {
            assert!(domain("d", good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a..b", "a b", "a.", "a\nb", &["a"; 128].join("."), "é"] {
            assert!(domain("d", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn says_which_field() {
        assert_eq!(id("process.id", "A").unwrap_err().to_string(), r#"process.id: "A" is no id: [a-z0-9-]{1,64}"#);
    }
}
