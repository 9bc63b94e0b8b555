//! The header of a safetensors file: eight bytes of little-endian length, a JSON object, then the data.
//!
//! Written here rather than taken from the `safetensors` crate because every error must name its tensor, a name given
//! twice must be refused, and offsets near 2^64 must not overflow. The crate is the oracle in the tests, both ways.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// The format's own limit on the header.
const HEADER_LIMIT: u64 = 100_000_000;

/// One tensor of a file: type, shape and where its bytes lie, all checked against the file's length.
#[derive(Debug, Clone)]
pub(crate) struct HeaderEntry {
    /// Name as stored.
    pub(crate) name: String,
    /// Element type.
    pub(crate) dtype: Dtype,
    /// Shape as stored; its product times the element size is the length of `bytes`.
    pub(crate) shape: Vec<usize>,
    /// Byte range in the whole file.
    pub(crate) bytes: Range<usize>,
}

/// Reads and checks the header of `file`, whose whole content is `content`. Entries come in the order of their data.
pub(crate) fn read(file: &Path, content: &[u8]) -> Result<Vec<HeaderEntry>> {
    let available = content.len() as u64;
    let Some((length, rest)) = content.split_first_chunk::<8>() else {
        return Err(Error::HeaderLength { file: file.into(), needed: 8, available });
    };
    let claimed = u64::from_le_bytes(*length);
    if claimed > rest.len() as u64 {
        return Err(Error::HeaderLength { file: file.into(), needed: claimed.saturating_add(8), available });
    }
    if claimed > HEADER_LIMIT {
        return Err(Error::HeaderTooLarge { file: file.into(), claimed, limit: HEADER_LIMIT });
    }
    let (json, data) = rest.split_at(claimed as usize); // fits: claimed ≤ rest.len()
    let syntax = |reason: String| Error::HeaderSyntax { file: file.into(), reason };
    // Copied, so that parsing sees one text even if someone writes into the mapped file meanwhile.
    let json = String::from_utf8(json.to_vec()).map_err(|e| syntax(e.to_string()))?;
    let Members(members) = serde_json::from_str(&json).map_err(|e| syntax(e.to_string()))?;

    let mut names = HashSet::new();
    let mut entries = Vec::with_capacity(members.len());
    for (name, value) in members {
        if name == "__metadata__" {
            serde_json::from_value::<BTreeMap<String, String>>(value)
                .map_err(|e| syntax(format!("__metadata__ must map strings to strings: {e}")))?;
            continue;
        }
        if !names.insert(name.clone()) {
            return Err(Error::DuplicateTensor { file: file.into(), tensor: name, first: file.into() });
        }
        entries.push(entry(file, name, value, data.len())?);
    }
    let data_begin = 8 + claimed as usize;
    cover(file, &mut entries, data.len())?;
    for entry in &mut entries {
        entry.bytes = entry.bytes.start + data_begin..entry.bytes.end + data_begin;
    }
    Ok(entries)
}

/// What stands before the data of a safetensors file: the header's length, then the header, padded so that the data begin at a multiple of 8. `tensors` gives name,
/// element type, shape and length in bytes of each, in the order of their data; `metadata` may be empty.
pub fn safetensors_header<'a>(
    metadata: &[(&str, &str)],
    tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize], usize)>,
) -> Vec<u8> {
    let (mut header, mut begin) = (Map::new(), 0);
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), metadata.iter().map(|&(key, value)| (key.to_owned(), Value::from(value))).collect());
    }
    for (name, dtype, shape, bytes) in tensors {
        let end = begin + bytes;
        header.insert(name.to_owned(), json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [begin, end]}));
        begin = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header].concat()
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// One member of the header; the byte range is still relative to the data.
fn entry(file: &Path, name: String, value: Value, data_length: usize) -> Result<HeaderEntry> {
    let raw: RawEntry = match serde_json::from_value(value) {
        Ok(raw) => raw,
        Err(e) => return Err(Error::HeaderEntry { file: file.into(), tensor: name, reason: e.to_string() }),
    };
    let Some(dtype) = Dtype::from_name(&raw.dtype) else {
        let expected = "F32, BF16, F16 or I8";
        return Err(Error::UnsupportedDtype { file: file.into(), tensor: name, expected, got: raw.dtype });
    };
    let (begin, end) = raw.data_offsets;
    if end < begin {
        return Err(Error::OffsetsReversed { file: file.into(), tensor: name, begin, end });
    }
    let size = raw.shape.iter().try_fold(dtype.size() as u64, |size, &n| size.checked_mul(n));
    // A zero hides an overflow in front of or behind it, so every dimension must also fit by itself.
    let shape = raw.shape.iter().map(|&n| usize::try_from(n).ok()).collect::<Option<Vec<_>>>();
    let (Some(size), Some(shape)) = (size, shape) else {
        return Err(Error::ShapeOverflow { file: file.into(), tensor: name, shape: raw.shape });
    };
    if end > data_length as u64 {
        return Err(Error::OffsetsOutside { file: file.into(), tensor: name, end, available: data_length as u64 });
    }
    if end - begin != size {
        let dtype = dtype.to_string();
        let got = end - begin;
        return Err(Error::SizeMismatch { file: file.into(), tensor: name, shape, dtype, expected: size, got });
    }
    Ok(HeaderEntry { name, dtype, shape, bytes: begin as usize..end as usize })
}

/// Sorts by position and checks that the tensors cover the data exactly: no overlap, no hole.
fn cover(file: &Path, entries: &mut [HeaderEntry], data_length: usize) -> Result<()> {
    entries.sort_by_key(|e| (e.bytes.start, e.bytes.end));
    let mut position = 0;
    let mut before = "";
    for entry in entries.iter() {
        if entry.bytes.start < position {
            return Err(Error::Overlap {
                file: file.into(),
                tensor: entry.name.clone(),
                other: before.to_owned(),
                at: entry.bytes.start as u64,
            });
        }
        if entry.bytes.start > position {
            return Err(Error::Hole {
                file: file.into(),
                tensor: Some(entry.name.clone()),
                begin: position as u64,
                end: entry.bytes.start as u64,
            });
        }
        position = entry.bytes.end;
        before = &entry.name;
    }
    if position != data_length {
        let (begin, end) = (position as u64, data_length as u64);
        return Err(Error::Hole { file: file.into(), tensor: None, begin, end });
    }
    Ok(())
}

/// The members of a JSON object in order, duplicates included (a map type would drop them in silence).
pub(crate) struct Members(pub(crate) Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct MembersVisitor;
        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(MembersVisitor)
    }
}
