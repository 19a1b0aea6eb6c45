//! The format of a tar, as far as host and agent exchange it: ustar, pax records where that is too small, sparse files as
//! GNU tar's pax format 1.0.

use std::collections::HashMap;

pub const BLOCK: usize = 512;
/// As many parts of a sparse file as the host's reader takes.
pub const MAX_EXTENTS: usize = 65_536;
/// Largest extended header.
pub const MAX_RECORDS: usize = 1 << 20;

pub const FILE: u8 = b'0';
pub const HARDLINK: u8 = b'1';
pub const SYMLINK: u8 = b'2';
pub const CHAR: u8 = b'3';
pub const BLOCK_DEVICE: u8 = b'4';
pub const DIRECTORY: u8 = b'5';
pub const FIFO: u8 = b'6';
const EXTENDED: u8 = b'x';

const SECOND: i64 = 1_000_000_000;
const OCTAL7: u64 = 0o777_7777;
const OCTAL11: u64 = 0o777_7777_7777;
const XATTR: &str = "SCHILY.xattr.";

/// Offsets and lengths of the parts of a file that have data.
pub type Extents = Vec<(u64, u64)>;

/// Names and values of extended attributes.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// One file, directory, link or node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// Without a slash at either end; empty is the root.
    pub path: Vec<u8>,
    pub kind: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Of the file itself, holes included.
    pub size: u64,
    pub mtime_ns: i64,
    pub link: Vec<u8>,
    pub device: (u32, u32),
    pub xattrs: Xattrs,
    /// None: it has no holes.
    pub extents: Option<Extents>,
}

impl Entry {
    /// How many bytes of data follow.
    pub fn stored(&self) -> u64 {
        self.extents.as_ref().map_or(self.size, |extents| extents.iter().map(|extent| extent.1).sum())
    }

    /// The blocks before the data.
    pub fn encode(&self) -> Vec<u8> {
        let mut name = if self.path.is_empty() { b".".to_vec() } else { self.path.clone() };
        if self.kind == DIRECTORY {
            name.push(b'/');
        }
        let mut records = Vec::new();
        let mut size = self.stored();
        let mut map = Vec::new();
        if let Some(extents) = &self.extents {
            map = sparse_map(extents, self.size);
            size += map.len() as u64;
            record(&mut records, "GNU.sparse.major", b"1");
            record(&mut records, "GNU.sparse.minor", b"0");
            record(&mut records, "GNU.sparse.name", &name);
            record(&mut records, "GNU.sparse.realsize", self.size.to_string().as_bytes());
            name = b"GNUSparseFile.0".to_vec();
        }
        for (key, value) in [("path", &name), ("linkpath", &self.link)] {
            if value.len() > 100 {
                record(&mut records, key, value);
            }
        }
        let numbers = [("uid", self.uid.into(), OCTAL7), ("gid", self.gid.into(), OCTAL7), ("size", size, OCTAL11)];
        for (key, value, most) in numbers {
            if value > most {
                record(&mut records, key, value.to_string().as_bytes());
            }
        }
        let (seconds, fraction) = (self.mtime_ns.div_euclid(SECOND), self.mtime_ns.rem_euclid(SECOND));
        if fraction != 0 || seconds < 0 || seconds as u64 > OCTAL11 {
            record(&mut records, "mtime", time(self.mtime_ns).as_bytes());
        }
        for (key, value) in &self.xattrs {
            if let Ok(key) = std::str::from_utf8(key) {
                record(&mut records, &format!("{XATTR}{key}"), value);
            }
        }
        let mut out = Vec::with_capacity(3 * BLOCK + map.len() + records.len());
        if !records.is_empty() {
            let plain = Entry { kind: EXTENDED, mode: 0o644, ..Entry::default() };
            plain.block(&mut out, b"PaxHeader", records.len() as u64);
            out.extend_from_slice(&records);
            pad(&mut out);
        }
        self.block(&mut out, &name, size);
        out.extend_from_slice(&map);
        out
    }

    fn block(&self, out: &mut Vec<u8>, name: &[u8], size: u64) {
        let start = out.len();
        text(out, name, 100);
        octal(out, u64::from(self.mode & 0o7777), 8);
        octal(out, self.uid.into(), 8);
        octal(out, self.gid.into(), 8);
        octal(out, size, 12);
        octal(out, self.mtime_ns.div_euclid(SECOND).max(0) as u64, 12);
        out.extend_from_slice(b"        ");
        out.push(self.kind);
        text(out, &self.link, 100);
        out.extend_from_slice(b"ustar\x0000");
        out.resize(out.len() + 64, 0);
        octal(out, self.device.0.into(), 8);
        octal(out, self.device.1.into(), 8);
        out.resize(start + BLOCK, 0);
        let sum: u64 = out[start..].iter().map(|&byte| u64::from(byte)).sum();
        out[start + 148..start + 155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }

    /// From a header block and the records before it. None: it is no header that the host would send.
    pub fn decode(block: &[u8; BLOCK], records: &mut Records) -> Option<Self> {
        let sum: u64 = block[..148].iter().chain(&block[156..]).map(|&byte| u64::from(byte)).sum::<u64>() + 8 * 32;
        if number(&block[148..156])? != sum {
            return None;
        }
        let take = |records: &mut Records, key: &str, at: std::ops::Range<usize>| match records.remove(key.as_bytes()) {
            Some(value) => std::str::from_utf8(&value).ok()?.parse().ok(),
            None => number(&block[at]),
        };
        let name = records.remove(b"GNU.sparse.name".as_slice()).or_else(|| records.remove(b"path".as_slice()));
        let path = name.unwrap_or_else(|| until_nul(&block[..100]).to_vec());
        let link = records.remove(b"linkpath".as_slice()).unwrap_or_else(|| until_nul(&block[157..257]).to_vec());
        let mtime_ns = match records.remove(b"mtime".as_slice()) {
            Some(value) => parse_time(&value)?,
            None => (number(&block[136..148])? as i64).checked_mul(SECOND)?,
        };
        Some(Self {
            path: path
                .split(|&c| c == b'/')
                .filter(|part| !matches!(*part, b"" | b"."))
                .collect::<Vec<_>>()
                .join(&b'/'),
            kind: if block[156] == 0 { FILE } else { block[156] },
            mode: number(&block[100..108])? as u32,
            uid: take(records, "uid", 108..116)?.try_into().ok()?,
            gid: take(records, "gid", 116..124)?.try_into().ok()?,
            size: take(records, "size", 124..136)?,
            mtime_ns,
            link,
            ..Self::default()
        })
    }

    pub fn is_extended(&self) -> bool {
        self.kind == EXTENDED
    }
}

/// Keys and values of an extended header.
pub type Records = HashMap<Vec<u8>, Vec<u8>>;

/// None: they are malformed.
pub fn parse_records(mut raw: &[u8]) -> Option<Records> {
    let mut records = Records::new();
    while !raw.is_empty() {
        let space = raw.iter().position(|&c| c == b' ')?;
        let length: usize = std::str::from_utf8(&raw[..space]).ok()?.parse().ok()?;
        let (one, rest) = raw.split_at_checked(length)?;
        let body = one.get(space + 1..)?.strip_suffix(b"\n")?;
        let equals = body.iter().position(|&c| c == b'=')?;
        records.insert(body[..equals].to_vec(), body[equals + 1..].to_vec());
        raw = rest;
    }
    Some(records)
}

/// The end of an archive.
pub const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// How many zeros fill the last block.
pub fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn pad(out: &mut Vec<u8>) {
    let zeros = padding(out.len() as u64) as usize;
    out.resize(out.len() + zeros, 0);
}

fn text(out: &mut Vec<u8>, value: &[u8], width: usize) {
    let end = out.len() + width;
    out.extend_from_slice(&value[..value.len().min(width)]);
    out.resize(end, 0);
}

/// What doesn't fit is in a record, and the field means nothing.
fn octal(out: &mut Vec<u8>, value: u64, width: usize) {
    let digits = format!("{value:0w$o}\0", w = width - 1);
    match digits.len() == width {
        true => out.extend_from_slice(digits.as_bytes()),
        false => octal(out, 0, width),
    }
}

fn number(field: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(until_nul(field)).ok()?.trim();
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

fn until_nul(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|&c| c == 0).unwrap_or(field.len())]
}

/// The length of a record counts its own digits.
fn record(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + rest.to_string().len();
    length = rest + length.to_string().len();
    out.extend_from_slice(format!("{length} {key}=").as_bytes());
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn time(ns: i64) -> String {
    let (sign, ns) = if ns < 0 { ("-", ns.unsigned_abs()) } else { ("", ns as u64) };
    format!("{sign}{}.{:09}", ns / SECOND as u64, ns % SECOND as u64)
}

fn parse_time(value: &[u8]) -> Option<i64> {
    let value = std::str::from_utf8(value).ok()?;
    let (negative, value) = value.strip_prefix('-').map_or((false, value), |rest| (true, rest));
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    let fraction: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let ns = whole.parse::<i64>().ok()?.checked_mul(SECOND)?.checked_add(fraction.parse().ok()?)?;
    Some(if negative { -ns } else { ns })
}

/// The map, as decimal lines in whole blocks. An empty part marks the end of the file, as with GNU tar.
fn sparse_map(extents: &[(u64, u64)], size: u64) -> Vec<u8> {
    let mut map = format!("{}\n", extents.len() + 1).into_bytes();
    for (offset, length) in extents.iter().chain([&(size, 0)]) {
        map.extend_from_slice(format!("{offset}\n{length}\n").as_bytes());
    }
    pad(&mut map);
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(encoded: &[u8], at: usize) -> &[u8; BLOCK] {
        encoded[at..at + BLOCK].try_into().expect("a block")
    }

    /// The entry of headers without data.
    fn decoded(encoded: &[u8]) -> Entry {
        let first = Entry::decode(block(encoded, 0), &mut Records::new()).expect("a header");
        if !first.is_extended() {
            return first;
        }
        let size = first.size as usize;
        let mut records = parse_records(&encoded[BLOCK..BLOCK + size]).expect("records");
        Entry::decode(block(encoded, BLOCK + size.next_multiple_of(BLOCK)), &mut records).expect("a header")
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            path in "[a-z\u{e9}]{1,120}(/[a-z]{1,120}){0,2}", link in "[a-z/]{0,200}", uid in any::<u32>(),
            size in 0u64..1 << 62, mtime_ns in -(1i64 << 60)..1 << 60, mode in 0u32..0o10000,
        ) {
            let entry = Entry {
                path: path.into_bytes(), kind: FILE, mode, uid, gid: 7, size, mtime_ns, link: link.into_bytes(),
                ..Entry::default()
            };
            prop_assert_eq!(decoded(&entry.encode()), entry);
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), BLOCK), records in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut records = parse_records(&records).unwrap_or_default();
            let _ = Entry::decode(block(&bytes, 0), &mut records);
        }
    }

    #[test]
    fn a_sparse_file_says_where_its_data_is() {
        let entry = Entry {
            path: b"s".to_vec(),
            kind: FILE,
            size: 10_000,
            extents: Some(vec![(4096, 100)]),
            ..Entry::default()
        };
        let encoded = entry.encode();
        assert_eq!(encoded.len(), 4 * BLOCK);
        assert!(encoded[3 * BLOCK..].starts_with(b"2\n4096\n100\n10000\n0\n\0"));
        assert_eq!(decoded(&encoded).size, 100 + BLOCK as u64);
    }
}
