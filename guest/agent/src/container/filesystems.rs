//! File systems on disks and behind tags, which the host names in requests.

use std::os::fd::OwnedFd;

use tonic::Status;

use crate::disk::{self, DiskError};
use crate::errno::Failed;
use crate::mounts::{self, Options};
use crate::oci;
use crate::proto;
use crate::validate::{self, Invalid, shown};

/// A file system of the guest that a request names.
#[derive(Debug)]
pub struct GuestMount {
    pub source: Source,
    pub kind: String,
    pub options: Options,
}

#[derive(Debug)]
pub enum Source {
    Disk(String),
    Tag(String),
}

/// The same once its device is there: can be mounted at once.
#[derive(Debug)]
pub struct Found {
    device: String,
    kind: String,
    options: Options,
}

/// Checks a mount of a request. Its target isn't looked at.
pub fn check(field: &'static str, from: proto::Mount) -> Result<GuestMount, Invalid> {
    validate::list(field, &from.options, 64)?;
    let source = match from.source {
        Some(proto::mount::Source::DiskSerial(serial)) => Source::Disk(serial),
        Some(proto::mount::Source::Tag(tag)) => Source::Tag(tag),
        None => return Err(Invalid::new(field, "has no source")),
    };
    GuestMount { source, kind: from.r#type, options: Options::parse(&from.options) }.checked(field)
}

/// A mount of an OCI specification: its source is a tag for virtiofs and 9p, else a disk's serial.
pub fn from_oci(from: &oci::Mount) -> Result<GuestMount, Invalid> {
    let source = match from.kind.as_str() {
        "virtiofs" | "9p" => Source::Tag(from.source.clone()),
        _ => Source::Disk(from.source.clone()),
    };
    GuestMount { source, kind: from.kind.clone(), options: Options::parse(&from.options) }.checked("oci_spec.mounts")
}

impl GuestMount {
    fn checked(mut self, field: &'static str) -> Result<Self, Invalid> {
        let word = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
        let (Source::Disk(name) | Source::Tag(name)) = &self.source;
        if name.is_empty() || name.len() > 64 || !name.bytes().all(word) {
            return Err(Invalid::new(field, format!("{} is no disk serial or tag", shown(name))));
        }
        if self.kind.is_empty() || self.kind.len() > 32 || !self.kind.bytes().all(word) {
            return Err(Invalid::new(field, format!("{} is no file system type", shown(&self.kind))));
        }
        if self.kind == "9p" {
            for (key, value) in [("trans", "virtio"), ("version", "9p2000.L")] {
                if !self.options.data.iter().any(|(given, _)| given == key) {
                    self.options.data.push((key.to_owned(), Some(value.to_owned())));
                }
            }
        }
        Ok(self)
    }

    /// Moves the value out from behind a reference, which is not to be used again.
    pub fn take(&mut self) -> Self {
        let source = std::mem::replace(&mut self.source, Source::Tag(String::new()));
        Self { source, kind: std::mem::take(&mut self.kind), options: std::mem::take(&mut self.options) }
    }

    /// Is it on a disk, and not read-only?
    pub fn is_writable_disk(&self) -> bool {
        matches!(self.source, Source::Disk(_)) && self.options.set & mounts::RDONLY == 0
    }

    /// Waits for the disk.
    pub async fn find(self) -> Result<Found, DiskError> {
        let device = match self.source {
            Source::Disk(serial) => disk::find(&serial).await?.to_string_lossy().into_owned(),
            Source::Tag(tag) => tag,
        };
        Ok(Found { device, kind: self.kind, options: self.options })
    }
}

impl Found {
    /// A detached mount of it.
    pub fn mount(&self) -> Result<OwnedFd, Failed> {
        mounts::filesystem(&self.kind, &self.device, &self.options)
    }

    pub fn name(&self) -> &str {
        &self.device
    }
}

/// Finds all in order.
pub async fn find_all(list: Vec<GuestMount>) -> Result<Vec<Found>, Status> {
    let mut found = Vec::with_capacity(list.len());
    for mount in list {
        found.push(mount.find().await?);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: proto::mount::Source) -> Result<GuestMount, Invalid> {
        check("m", proto::Mount { source: Some(source), r#type: kind.into(), ..Default::default() })
    }

    #[test]
    fn names_are_words() {
        use proto::mount::Source::{DiskSerial, Tag};
        assert!(mount("squashfs", DiskSerial("img-0a1b".into())).is_ok());
        assert!(mount("squashfs", DiskSerial(String::new())).is_err());
        assert!(mount("squashfs", DiskSerial("../x".into())).is_err());
        assert!(mount("a/b", Tag("t".into())).is_err());
        assert!(check("m", proto::Mount::default()).is_err());
    }

    #[test]
    fn virtio_is_the_transport_of_9p() {
        let mount = mount("9p", proto::mount::Source::Tag("share".into())).expect("good");
        assert!(mount.options.data.contains(&("trans".into(), Some("virtio".into()))));
    }
}
