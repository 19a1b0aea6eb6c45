//! Works on a container's files for the host, as `files.proto` says. This runs in a forked child of the agent that is a
//! process of the container: whatever blocks, blocks only it, and what it may do is what the container's processes may.
//!
//! Nothing here trusts the container: every path is resolved by the kernel within the container's root, step by step
//! where a tree is walked, and never through the magic links of /proc, which lead to what the agent has.

mod attributes;
mod changes;
mod content;
mod fail;
mod layers;
mod pack;
mod paths;
#[allow(clippy::all, missing_docs)]
#[rustfmt::skip] // generated
pub mod proto;
mod tar;
mod transfer;
mod tree;
mod unpack;
mod watch;
mod wire;

use rustix::io::Errno;

use crate::sys;
use fail::Answer;
pub use layers::Layers;
use proto::request::Operation;
use proto::response::Result as Reply;

/// The life of such a process: one request after the other, until the host has no more. With `layers` it is about these
/// alone.
pub fn serve(layers: Option<Layers>) -> ! {
    // A limit on the size of files is an error, as it is where there is no limit but no space.
    sys::ignore_signal(libc::SIGXFSZ);
    let _ = rustix::thread::set_name(c"pykata-files");
    loop {
        match wire::receive() {
            Ok(Some(operation)) => {
                let reply = perform(operation, layers.as_ref()).unwrap_or_else(Reply::Failure);
                wire::send(reply);
            }
            Ok(None) => sys::exit_now(0),
            Err(_) => sys::exit_now(wire::BROKEN),
        }
    }
}

/// What the last answer of an operation is.
fn perform(operation: Operation, layers: Option<&Layers>) -> Answer<Reply> {
    match (operation, layers) {
        (Operation::Changes(request), Some(layers)) => changes::changes(&request, layers),
        (Operation::Changes(_), None) | (_, Some(_)) => Err(fail::failure(Errno::PERM, "request", b"")),
        (operation, None) => work(operation),
    }
}

fn work(operation: Operation) -> Answer<Reply> {
    let done = |()| Reply::Done(proto::Done {});
    match operation {
        Operation::Stat(request) => attributes::stat(&request).map(Reply::Attributes),
        Operation::List(request) => attributes::list(&request).map(Reply::Entries),
        Operation::Read(request) if request.bulk => content::read_bulk(&request),
        Operation::Read(request) => content::read(&request).map(Reply::Content),
        Operation::Write(request) => content::write(&request).map(done),
        Operation::MakeDirectory(request) => tree::make_directory(&request).map(done),
        Operation::Remove(request) => tree::remove(&request).map(done),
        Operation::Rename(request) => tree::rename(&request).map(done),
        Operation::SetAttributes(request) => attributes::set(&request).map(done),
        Operation::MakeSymlink(request) => tree::make_link(&request).map(done),
        Operation::Pack(request) => pack::pack(&request),
        Operation::Unpack(request) => unpack::unpack(&request).map(done),
        Operation::Watch(request) => watch::watch(&request),
        Operation::Changes(_) => Err(fail::failure(Errno::PERM, "request", b"")),
    }
}
