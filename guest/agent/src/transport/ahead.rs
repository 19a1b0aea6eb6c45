//! Calls that come ahead of HTTP/2, where a connection begins: the host's first to a guest that goes on from a saved one.
//! There all code is run for the first time, and under emulation the way of a call through HTTP/2 and gRPC takes much
//! longer than what it asks for.
//!
//! One begins as a preface does, so that it is found behind whatever the connection before this one has left over. Then
//! come a byte that says which it is, the size of the request, three bytes, and the request. What Clone is answered with
//! is a bulk frame of stream 0; Run goes on as [`crate::early`] says.

use super::outlet::{Flag, frame, prefix};
use super::preface::PREFACE;

pub const MAGIC: &[u8; PREFACE.len()] = b"PRI * PYKATA/1\r\n\r\nCALL\r\n";
/// Bytes between that and the request.
const HEADER: usize = 4;

/// Which call it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Clone = 0,
    Run = 1,
}

/// Takes a request, and gives what is to be written at once.
pub type Answerer = Box<dyn Fn(Kind, &[u8]) -> Vec<u8> + Send>;

/// What data begins with, apart from what a connection before this one has left over.
#[derive(Debug, PartialEq, Eq)]
pub enum Begin {
    Call(Kind, Vec<u8>),
    /// More of it has to come.
    PartOfCall,
    Other,
}

/// Takes a call away, and what stands before it.
pub fn take(data: &mut Vec<u8>) -> Begin {
    let find = |what: &[u8]| data.windows(what.len()).position(|window| window == what);
    let Some(at) = find(MAGIC) else { return Begin::Other };
    if find(PREFACE).is_some_and(|preface| preface < at) {
        return Begin::Other; // what comes after that belongs to HTTP/2
    }
    data.drain(..at);
    let Some((&[kind, size @ ..], rest)) = data[MAGIC.len()..].split_first_chunk::<HEADER>() else {
        return Begin::PartOfCall;
    };
    let size = size.iter().fold(0, |all, byte| all << 8 | usize::from(*byte));
    let kind = match kind {
        0 => Kind::Clone,
        1 => Kind::Run,
        _ => {
            data.drain(..MAGIC.len());
            return take(data);
        }
    };
    let Some(request) = rest.get(..size).map(<[u8]>::to_vec) else { return Begin::PartOfCall };
    data.drain(..MAGIC.len() + HEADER + size);
    Begin::Call(kind, request)
}

/// The frame that answers: stdout's flag for an answer, stderr's for why there is none. The message is as in gRPC.
pub fn answer(made: Result<Vec<u8>, String>) -> Vec<u8> {
    let (flag, message) = match made {
        Ok(message) => (Flag::Stdout, message),
        Err(why) => (Flag::Stderr, why.into_bytes()),
    };
    frame(0, flag, &[&prefix(0, message.len())[..], &message].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn call(request: &[u8]) -> Vec<u8> {
        [&MAGIC[..], &[Kind::Run as u8, 0, 0, request.len() as u8], request].concat()
    }

    proptest! {
        #[test]
        fn a_call_is_found_behind_anything(
            before in prop::collection::vec(any::<u8>(), 0..60),
            request in prop::collection::vec(any::<u8>(), 0..60),
            cut in 1usize..30,
        ) {
            let all = [&before[..], &call(&request), PREFACE].concat();
            let (mut data, mut found) = (Vec::new(), None);
            for piece in all.chunks(cut) {
                data.extend_from_slice(piece);
                if let Begin::Call(Kind::Run, request) = take(&mut data) {
                    prop_assert!(found.replace(request).is_none());
                }
            }
            prop_assert_eq!(found, Some(request));
            prop_assert_eq!(&data[..], &PREFACE[..]);
        }
    }

    #[test]
    fn what_is_behind_a_preface_is_no_call() {
        let mut data = [&PREFACE[..], &call(b"x")].concat();
        assert_eq!(take(&mut data), Begin::Other);
        assert!(data.starts_with(PREFACE));
    }

    #[test]
    fn one_that_nobody_knows_is_none() {
        let mut data = [&MAGIC[..], &[0xff; 4], &call(b"x")].concat();
        assert_eq!(take(&mut data), Begin::Call(Kind::Run, b"x".to_vec()));
    }

    #[test]
    fn answers_are_frames() {
        assert_eq!(answer(Ok(b"yes".to_vec())), b"\0\0\x08\xb0\0\0\0\0\0\0\0\0\0\x03yes");
        assert_eq!(answer(Err("no".into())), b"\0\0\x07\xb0\x01\0\0\0\0\0\0\0\0\x02no");
    }
}
