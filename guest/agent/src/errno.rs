//! Failed system calls as values that say which step failed on what, in the form the protocol promises:
//! "step: what: errno name".

use std::fmt::Display;

use rustix::io::Errno;
use tonic::{Code, Status};

/// A system call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {what}: {}", name(*errno))]
pub struct Failed {
    pub step: &'static str,
    pub what: String,
    pub errno: Errno,
}

impl Failed {
    pub fn new(step: &'static str, what: impl Display, errno: Errno) -> Self {
        Self { step, what: what.to_string(), errno }
    }

    /// True when the guest ran out of something, as opposed to a step that can't work.
    pub fn is_exhaustion(&self) -> bool {
        matches!(self.errno, Errno::NOMEM | Errno::NOSPC | Errno::AGAIN | Errno::MFILE | Errno::NFILE | Errno::DQUOT)
    }
}

impl From<Failed> for Status {
    fn from(failed: Failed) -> Self {
        let code = if failed.is_exhaustion() { Code::ResourceExhausted } else { Code::Internal };
        Status::new(code, failed.to_string())
    }
}

/// Names the step of a result that only carries an errno. `what` is formatted on failure only.
pub trait Step<T> {
    fn step(self, step: &'static str, what: impl Display) -> Result<T, Failed>;
}

impl<T> Step<T> for Result<T, Errno> {
    fn step(self, step: &'static str, what: impl Display) -> Result<T, Failed> {
        self.map_err(|errno| Failed::new(step, what, errno))
    }
}

impl<T> Step<T> for std::io::Result<T> {
    fn step(self, step: &'static str, what: impl Display) -> Result<T, Failed> {
        self.map_err(|err| Failed::new(step, what, Errno::from_io_error(&err).unwrap_or(Errno::IO)))
    }
}

/// The errno of the C library's last failed call.
pub fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

macro_rules! names {
    ($errno:expr, $($name:ident = $variant:ident),* $(,)?) => {
        match $errno {
            $(Errno::$variant => stringify!($name).to_owned(),)*
            other => format!("errno {}", other.raw_os_error()),
        }
    };
}

/// The symbolic name of an errno, such as "ENOENT".
pub fn name(errno: Errno) -> String {
    names!(
        errno,
        EPERM = PERM,
        ENOENT = NOENT,
        ESRCH = SRCH,
        EINTR = INTR,
        EIO = IO,
        ENXIO = NXIO,
        E2BIG = TOOBIG,
        ENOEXEC = NOEXEC,
        EBADF = BADF,
        ECHILD = CHILD,
        EAGAIN = AGAIN,
        ENOMEM = NOMEM,
        EACCES = ACCESS,
        EFAULT = FAULT,
        ENOTBLK = NOTBLK,
        EBUSY = BUSY,
        EEXIST = EXIST,
        EXDEV = XDEV,
        ENODEV = NODEV,
        ENOTDIR = NOTDIR,
        EISDIR = ISDIR,
        EINVAL = INVAL,
        ENFILE = NFILE,
        EMFILE = MFILE,
        ENOTTY = NOTTY,
        ETXTBSY = TXTBSY,
        EFBIG = FBIG,
        ENOSPC = NOSPC,
        ESPIPE = SPIPE,
        EROFS = ROFS,
        EMLINK = MLINK,
        EPIPE = PIPE,
        ERANGE = RANGE,
        EDEADLK = DEADLK,
        ENAMETOOLONG = NAMETOOLONG,
        ENOSYS = NOSYS,
        ENOTEMPTY = NOTEMPTY,
        ELOOP = LOOP,
        EOVERFLOW = OVERFLOW,
        EUCLEAN = UCLEAN,
        EUSERS = USERS,
        EOPNOTSUPP = OPNOTSUPP,
        EAFNOSUPPORT = AFNOSUPPORT,
        EADDRINUSE = ADDRINUSE,
        ENETDOWN = NETDOWN,
        EADDRNOTAVAIL = ADDRNOTAVAIL,
        ENETUNREACH = NETUNREACH,
        EHOSTUNREACH = HOSTUNREACH,
        ECONNREFUSED = CONNREFUSED,
        ECONNRESET = CONNRESET,
        ENOTCONN = NOTCONN,
        ETIMEDOUT = TIMEDOUT,
        EALREADY = ALREADY,
        EINPROGRESS = INPROGRESS,
        ESTALE = STALE,
        EDQUOT = DQUOT,
        ENOMEDIUM = NOMEDIUM,
        ENODATA = NODATA,
        ELIBBAD = LIBBAD,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_the_protocol_promises() {
        let failed = Failed::new("mount", "/proc", Errno::BUSY);
        assert_eq!(failed.to_string(), "mount: /proc: EBUSY");
        assert_eq!(Status::from(failed).code(), Code::Internal);
    }

    #[test]
    fn exhaustion_has_its_own_code() {
        let failed = Failed::new("clone", "process", Errno::AGAIN);
        assert_eq!(Status::from(failed).code(), Code::ResourceExhausted);
    }

    #[test]
    fn unknown_numbers_still_say_which() {
        assert_eq!(name(Errno::from_raw_os_error(133)), "errno 133");
    }
}
