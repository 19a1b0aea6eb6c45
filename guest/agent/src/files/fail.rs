//! Failed system calls, as the host is told of them.

use bytes::Bytes;
use rustix::io::Errno;

use super::proto::Failure;

pub type Answer<T> = Result<T, Failure>;

/// `path` is what it was about, where that isn't the path of the request.
pub fn failure(errno: Errno, step: &str, path: &[u8]) -> Failure {
    Failure { errno: errno.raw_os_error(), path: Bytes::copy_from_slice(path), step: step.to_owned() }
}

/// Names the step of a result that only carries an errno.
pub trait At<T> {
    fn at(self, step: &str) -> Answer<T>;
    /// The same where it is about another path than the request's.
    fn of(self, step: &str, path: &[u8]) -> Answer<T>;
}

impl<T> At<T> for Result<T, Errno> {
    fn at(self, step: &str) -> Answer<T> {
        self.of(step, b"")
    }

    fn of(self, step: &str, path: &[u8]) -> Answer<T> {
        self.map_err(|errno| failure(errno, step, path))
    }
}
