//! Records: (kind, version, required, payload), one after the other.
//!
//! ```text
//! record  = payload length u32 | version u16 | flags u8 | kind length u8 | kind | payload
//! flags   = bit 0: required (a reader that does not know the kind must refuse the image)
//! payload = MessagePack with named fields
//! ```
//! All integers are little-endian.

use super::{FormatError, Kind};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// Largest payload in bytes. What is larger belongs into the page maps.
pub const MAX_PAYLOAD: usize = 256 << 20;

const WHAT: &str = "record";
const REQUIRED: u8 = 1;

/// Every kind that this version of ckpt understands, with its newest version. [`encode`] refuses
/// what is missing here, so that no dump can write what no restore will take.
pub const KNOWN: &[(&str, u16)] = &[
    (super::process::Process::KIND, super::process::Process::VERSION),
    (super::file::OpenFile::KIND, super::file::OpenFile::VERSION),
];

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    payload: U32,
    version: U16,
    flags: u8,
    kind: u8,
}

/// A record whose payload has not been looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRecord<'a> {
    /// Name of the kind.
    pub kind: &'a str,
    /// Version of the payload.
    pub version: u16,
    /// Must a reader understand it?
    pub required: bool,
    /// MessagePack with named fields.
    pub payload: &'a [u8],
}

impl<'a> RawRecord<'a> {
    /// Appends the record to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), FormatError> {
        let too_large = |why| FormatError::TooLarge { what: WHAT, why };
        if self.payload.len() > MAX_PAYLOAD {
            let size = self.payload.len();
            return Err(too_large(format!("{} has {size} bytes, the limit is {MAX_PAYLOAD}", self.kind)));
        }
        let kind = u8::try_from(self.kind.len()).ok().filter(|&length| length > 0);
        let kind = kind.ok_or_else(|| too_large(format!("name of kind has {} bytes", self.kind.len())))?;
        let header = Header {
            payload: (self.payload.len() as u32).into(),
            version: self.version.into(),
            flags: if self.required { REQUIRED } else { 0 },
            kind,
        };
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(self.kind.as_bytes());
        out.extend_from_slice(self.payload);
        Ok(())
    }

    /// Splits one record off the front of `bytes`.
    fn split(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), FormatError> {
        let damaged = |why: &str| FormatError::damaged(WHAT, why);
        let (header, rest) = Header::ref_from_prefix(bytes).map_err(|_| damaged("header is cut off"))?;
        if header.flags & !REQUIRED != 0 {
            return Err(damaged("unknown flags"));
        }
        if header.payload.get() as usize > MAX_PAYLOAD {
            return Err(damaged("payload is larger than allowed"));
        }
        let (kind, rest) =
            rest.split_at_checked(header.kind.into()).ok_or_else(|| damaged("kind is cut off"))?;
        let kind = str::from_utf8(kind).map_err(|_| damaged("kind is not text"))?;
        if kind.is_empty() {
            return Err(damaged("kind is empty"));
        }
        let (payload, rest) = rest
            .split_at_checked(header.payload.get() as usize)
            .ok_or_else(|| damaged("payload is cut off"))?;
        let required = header.flags & REQUIRED != 0;
        Ok((Self { kind, version: header.version.get(), required, payload }, rest))
    }

    /// Is the kind one of [`KNOWN`], in a version not newer than ours (or not required)?
    pub fn check_known(&self) -> Result<(), FormatError> {
        match KNOWN.iter().find(|(kind, _)| *kind == self.kind) {
            Some((_, newest)) if self.version <= *newest => Ok(()),
            _ if !self.required => Ok(()),
            Some((_, newest)) => Err(FormatError::Newer {
                what: format!("record `{}`", self.kind),
                found: self.version.into(),
                supported: (*newest).into(),
            }),
            None => Err(FormatError::UnknownKind(self.kind.to_owned())),
        }
    }

    /// Decodes the payload as a `K`, after a check of its version.
    pub fn decode<K: Kind>(&self) -> Result<K, FormatError> {
        if self.version > K::VERSION {
            let (found, supported) = (self.version.into(), K::VERSION.into());
            return Err(FormatError::Newer { what: format!("record `{}`", self.kind), found, supported });
        }
        rmp_serde::from_slice(self.payload)
            .map_err(|error| FormatError::damaged(WHAT, format!("`{}`: {error}", self.kind)))
    }
}

/// Appends `value` to `out`.
///
/// # Errors
/// [`FormatError::TooLarge`] above [`MAX_PAYLOAD`], [`FormatError::UnknownKind`] if the kind is not
/// in [`KNOWN`].
pub fn encode<K: Kind>(value: &K, out: &mut Vec<u8>) -> Result<(), FormatError> {
    let payload = rmp_serde::to_vec_named(value)
        .map_err(|error| FormatError::TooLarge { what: WHAT, why: error.to_string() })?;
    let record = RawRecord { kind: K::KIND, version: K::VERSION, required: K::REQUIRED, payload: &payload };
    if !KNOWN.contains(&(K::KIND, K::VERSION)) {
        return Err(FormatError::UnknownKind(K::KIND.to_owned()));
    }
    record.encode(out)
}

/// Takes a sequence of records apart.
pub fn parse(mut bytes: &[u8]) -> Result<Vec<RawRecord<'_>>, FormatError> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let (record, rest) = RawRecord::split(bytes)?;
        records.push(record);
        bytes = rest;
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::file::{FileId, OpenFile};
    use proptest::prelude::*;

    fn file(label: &str) -> OpenFile {
        OpenFile {
            id: FileId(7),
            flags: 2,
            owner: (0, 0, 0),
            label: label.into(),
            kind: "pipe".into(),
            version: 1,
            payload: vec![1, 2, 3],
        }
    }

    #[test]
    fn typed_records_round_trip() {
        let mut bytes = Vec::new();
        encode(&file("a"), &mut bytes).unwrap();
        encode(&file("b"), &mut bytes).unwrap();
        let records = parse(&bytes).unwrap();
        assert_eq!(records.len(), 2);
        assert_eq!(records[1].decode::<OpenFile>().unwrap(), file("b"));
        records.iter().for_each(|record| record.check_known().unwrap());
    }

    #[test]
    fn newer_versions_and_unknown_required_kinds_are_refused_by_name() {
        let mut record = RawRecord { kind: "file", version: 99, required: true, payload: &[] };
        let text = "record `file` has version 99, but this ckpt reads only up to version 1";
        assert_eq!(record.check_known().unwrap_err().to_string(), text);
        assert_eq!(record.decode::<OpenFile>().unwrap_err().to_string(), text);
        record.kind = "hologram";
        assert_eq!(record.check_known(), Err(FormatError::UnknownKind("hologram".into())));
        record.required = false;
        assert_eq!(record.check_known(), Ok(()));
    }

    proptest! {
        #[test]
        fn any_record_round_trips(
            kind in "[a-z]{1,20}", version: u16, required: bool,
            payload in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let record = RawRecord { kind: &kind, version, required, payload: &payload };
            let mut bytes = Vec::new();
            record.encode(&mut bytes).unwrap();
            record.encode(&mut bytes).unwrap();
            prop_assert_eq!(parse(&bytes).unwrap(), vec![record, record]);
            prop_assert!(parse(&bytes[..bytes.len() - 1]).is_err());
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for record in parse(&bytes).unwrap_or_default() {
                let _ = record.decode::<OpenFile>();
            }
        }
    }
}
