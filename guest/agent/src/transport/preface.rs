//! Finds the start of a new HTTP/2 connection in the bytes of an old one.
//!
//! A virtio-serial port has no connections: when the host's program goes and another takes its place faster than the
//! guest looks (or a snapshot is restored for a new host program), the guest just reads on, in the middle of nowhere.
//! But a client's first bytes are "PRI * HTTP/2.0...", and at a frame boundary "PRI" can't be anything else: as a frame
//! header it would announce 5 MB, and the largest frame we allow has 16 KiB.

use super::outlet;

pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// With nothing behind it, it parks the connection: the host has ended, and another one will come.
pub const MARK: [u8; 3] = *b"PRI";
const HEADER_LEN: usize = 9;

/// Takes away what stands before a preface, which a connection before this one may have left over. False: there is none
/// yet; what may be the beginning of one is kept.
pub fn seek(data: &mut Vec<u8>) -> bool {
    let found = data.windows(PREFACE.len()).position(|window| window == PREFACE);
    let tail = data.len() - data.len().min(PREFACE.len() - 1);
    data.drain(..found.unwrap_or(tail));
    found.is_some()
}

/// Follows the frames of one direction of a connection.
#[derive(Debug)]
pub struct Frames {
    state: State,
}

#[derive(Debug)]
enum State {
    Preface { left: usize },
    Header { have: usize, bytes: [u8; HEADER_LEN] },
    Payload { left: usize },
}

/// What isn't of this connection's HTTP/2.
#[derive(Debug, PartialEq, Eq)]
pub enum Other {
    Restart(Restart),
    Bulk(Bulk),
}

/// A bulk frame's data begins.
#[derive(Debug, PartialEq, Eq)]
pub struct Bulk {
    pub call: u32,
    pub flag: u8,
    pub size: usize,
    /// Where in the data it begins, behind its header.
    pub at: usize,
}

/// A new connection begins in the data.
#[derive(Debug, PartialEq, Eq)]
pub struct Restart {
    /// Bytes of its preface that went by in earlier data.
    pub before: Vec<u8>,
    /// Where in the data it goes on.
    pub at: usize,
}

impl Frames {
    pub fn new() -> Self {
        Self { state: State::Preface { left: PREFACE.len() } }
    }

    /// How much of a header has come that isn't complete. The next data has to begin with it again.
    pub fn unread(&mut self) -> usize {
        match &mut self.state {
            State::Header { have, .. } => std::mem::take(have),
            _ => 0,
        }
    }

    /// Looks at data as it comes, up to the first that is something else. The data of a bulk frame isn't looked at.
    pub fn feed(&mut self, data: &[u8]) -> Option<Other> {
        let mut at = 0;
        while at < data.len() {
            let rest = &data[at..];
            match &mut self.state {
                State::Preface { left } | State::Payload { left } => {
                    let take = rest.len().min(*left);
                    *left -= take;
                    at += take;
                    if *left == 0 {
                        self.state = State::Header { have: 0, bytes: [0; HEADER_LEN] };
                    }
                }
                State::Header { have, bytes } => {
                    let take = rest.len().min(HEADER_LEN - *have);
                    bytes[*have..*have + take].copy_from_slice(&rest[..take]);
                    let known = *have + take;
                    if known >= MARK.len() && bytes[..MARK.len()] == MARK {
                        let before = bytes[..*have].to_vec();
                        *self = Self::new();
                        return Some(Other::Restart(Restart { before, at }));
                    }
                    *have = known;
                    at += take;
                    if known == HEADER_LEN {
                        let left = usize::from(bytes[0]) << 16 | usize::from(bytes[1]) << 8 | usize::from(bytes[2]);
                        if bytes[3] == outlet::KIND {
                            let call = u32::from_be_bytes([bytes[5], bytes[6], bytes[7], bytes[8]]);
                            let flag = bytes[4];
                            self.state = State::Header { have: 0, bytes: [0; HEADER_LEN] };
                            return Some(Other::Bulk(Bulk { call, flag, size: left, at }));
                        }
                        self.state = match left {
                            0 => State::Header { have: 0, bytes: [0; HEADER_LEN] },
                            left => State::Payload { left },
                        };
                    }
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(payload: &[u8]) -> Vec<u8> {
        let len = payload.len() as u32;
        let mut out = len.to_be_bytes()[1..].to_vec();
        out.extend([0, 0, 0, 0, 0, 1]);
        out.extend(payload);
        out
    }

    fn connection(payloads: &[Vec<u8>]) -> Vec<u8> {
        let mut out = PREFACE.to_vec();
        payloads.iter().for_each(|p| out.extend(frame(p)));
        out
    }

    proptest! {
        #[test]
        fn a_preface_is_found_behind_anything(before in prop::collection::vec(any::<u8>(), 0..60), cut in 1usize..30) {
            let all = [&before[..], PREFACE, b"rest"].concat();
            let mut data = Vec::new();
            let mut pieces = all.chunks(cut);
            while !seek(&mut data) {
                data.extend_from_slice(pieces.next().expect("found before the end"));
            }
            pieces.for_each(|piece| data.extend_from_slice(piece));
            prop_assert_eq!(data, [&PREFACE[..], b"rest"].concat());
        }

        #[test]
        fn payloads_never_look_like_a_restart(
            payloads in prop::collection::vec(prop_oneof![Just(PREFACE.to_vec()), prop::collection::vec(any::<u8>(), 0..40)], 0..8),
            cut in 1usize..30,
        ) {
            let mut frames = Frames::new();
            for piece in connection(&payloads).chunks(cut) {
                prop_assert_eq!(frames.feed(piece), None);
            }
        }

        #[test]
        fn a_second_connection_is_found_however_it_is_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
            cut in 1usize..30,
        ) {
            let first = connection(&payloads);
            let both = [first.clone(), PREFACE.to_vec()].concat();
            let mut frames = Frames::new();
            let mut seen = 0;
            let found = both.chunks(cut).find_map(|piece| {
                match frames.feed(piece) {
                    Some(Other::Restart(restart)) => Some(restart),
                    _ => {
                        seen += piece.len();
                        None
                    }
                }
            });
            let found = found.expect("the restart is found");
            prop_assert_eq!(seen + found.at - found.before.len(), first.len());
            prop_assert_eq!(&found.before[..], &PREFACE[..found.before.len()]);
        }
    }
}
