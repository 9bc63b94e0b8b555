//! SentencePiece's text normalisation: the precompiled character map, whitespace rules and user-defined symbols.
//!
//! Works on bytes, as SentencePiece does: each byte that is not part of valid UTF-8 becomes U+FFFD.

use super::SentencePieceError as Error;
use super::proto::NormalizerSpec;
use super::trie::Trie;

/// What a space becomes, U+2581.
pub const SPACE_SYMBOL: &str = "\u{2581}";
const REPLACEMENT: &[u8] = "\u{FFFD}".as_bytes();
/// SentencePiece looks at no more than this many rules that start at one position.
const MAX_RULES_AT_A_POSITION: usize = 32;

/// Length in bytes that a character has by its first byte, never more than `text` holds; 1 for stray continuation bytes.
pub fn char_length(text: &[u8]) -> usize {
    let by_first_byte = match text[0] {
        0xc0..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xff => 4,
        _ => 1,
    };
    by_first_byte.min(text.len())
}

/// Length of the valid UTF-8 character at the start of `text`, `None` where there is none.
pub fn valid_char_length(text: &[u8]) -> Option<usize> {
    let length = char_length(text);
    std::str::from_utf8(&text[..length]).is_ok().then_some(length)
}

/// User-defined symbols: found longest first, never touched by normalisation or merging.
#[derive(Clone, Debug, Default)]
pub struct PrefixMatcher(Trie);

impl PrefixMatcher {
    pub fn new<'a>(symbols: impl IntoIterator<Item = &'a str>) -> Self {
        Self(Trie::new(symbols.into_iter().map(|symbol| (symbol.as_bytes(), 0))))
    }

    /// Length of the longest symbol that `text` starts with.
    pub fn longest(&self, text: &[u8]) -> Option<usize> {
        self.0.longest(text).map(|(length, _)| length)
    }
}

/// Rewrites text before segmentation.
#[derive(Clone, Debug)]
pub struct Normalizer {
    charsmap: Option<CharsMap>,
    symbols: PrefixMatcher,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
    treat_whitespace_as_suffix: bool,
}

impl Normalizer {
    pub fn new(spec: &NormalizerSpec, symbols: PrefixMatcher, treat_whitespace_as_suffix: bool) -> Result<Self, Error> {
        let charsmap = match spec.precompiled_charsmap.as_slice() {
            [] => None,
            blob => Some(CharsMap::new(blob)?),
        };
        Ok(Self {
            charsmap,
            symbols,
            add_dummy_prefix: spec.add_dummy_prefix,
            remove_extra_whitespaces: spec.remove_extra_whitespaces,
            escape_whitespaces: spec.escape_whitespaces,
            treat_whitespace_as_suffix,
        })
    }

    /// The normalised text. It is valid UTF-8 unless the model's own character map is not.
    pub fn normalize(&self, mut text: &[u8]) -> Vec<u8> {
        if self.remove_extra_whitespaces {
            while !text.is_empty() {
                let (b" ", consumed) = self.rewrite_first(text) else { break };
                text = &text[consumed..];
            }
        }
        if text.is_empty() {
            return Vec::new();
        }

        let space = if self.escape_whitespaces { SPACE_SYMBOL.as_bytes() } else { b" " };
        let mut out = Vec::with_capacity(text.len() + text.len() / 2);
        if !self.treat_whitespace_as_suffix && self.add_dummy_prefix {
            out.extend_from_slice(space);
        }
        let mut after_space = self.remove_extra_whitespaces;
        while !text.is_empty() {
            let (mut rewritten, consumed) = self.rewrite_first(text);
            while after_space && let Some(rest) = rewritten.strip_prefix(b" ") {
                rewritten = rest;
            }
            if let Some(&last) = rewritten.last() {
                for byte in rewritten {
                    match byte {
                        b' ' => out.extend_from_slice(space),
                        _ => out.push(*byte),
                    }
                }
                after_space = last == b' ';
            }
            text = &text[consumed..];
            after_space &= self.remove_extra_whitespaces;
        }
        if self.remove_extra_whitespaces {
            while out.ends_with(space) {
                out.truncate(out.len() - space.len());
            }
        }
        if self.treat_whitespace_as_suffix && self.add_dummy_prefix {
            out.extend_from_slice(space);
        }
        out
    }

    /// What the start of `text` (not empty) becomes, and how many bytes of it that replaces (at least 1).
    fn rewrite_first<'a>(&'a self, text: &'a [u8]) -> (&'a [u8], usize) {
        if let Some(length) = self.symbols.longest(text) {
            return (&text[..length], length);
        }
        if let Some(rule) = self.charsmap.as_ref().and_then(|map| map.longest_rule(text)) {
            return rule;
        }
        match valid_char_length(text) {
            Some(length) => (&text[..length], length),
            None => (REPLACEMENT, 1),
        }
    }
}

/// `precompiled_charsmap`: `u32` trie size in bytes, a Darts-clone double array of that size, then NUL-terminated replacements.
/// A leaf's value is the offset of its replacement.
#[derive(Clone, Debug)]
struct CharsMap {
    units: Vec<u32>,
    replacements: Vec<u8>,
}

impl CharsMap {
    fn new(blob: &[u8]) -> Result<Self, Error> {
        let (size, rest) = blob.split_first_chunk::<4>().ok_or(Error::CharsMap("it is shorter than 4 bytes"))?;
        let size = u32::from_le_bytes(*size) as usize;
        if size >= rest.len() {
            return Err(Error::CharsMap("its trie is larger than the map"));
        }
        if size == 0 || !size.is_multiple_of(1024) {
            return Err(Error::CharsMap("its trie size is not a multiple of 1024"));
        }
        let (trie, replacements) = rest.split_at(size);
        let units = trie.chunks_exact(4).map(|unit| u32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]])).collect();
        Ok(Self { units, replacements: replacements.to_vec() })
    }

    /// The longest rule that `text` starts with: its replacement and the bytes it consumes.
    ///
    /// Units of the double array: bits 0-7 label, 8 "has a leaf", 9 "offset is shifted by 8", 10-30 offset, 31 "is a leaf";
    /// a leaf's bits 0-30 are its value. A position outside the array ends the search.
    fn longest_rule<'a>(&'a self, text: &[u8]) -> Option<(&'a [u8], usize)> {
        let offset = |unit: u32| (unit >> 10) << ((unit & (1 << 9)) >> 6);
        let mut best = None;
        let mut rules = 0;
        let mut position = offset(*self.units.first()?);
        for (i, byte) in text.iter().enumerate() {
            position ^= u32::from(*byte);
            let Some(&unit) = self.units.get(position as usize) else { break };
            if unit & (1 << 31 | 0xff) != u32::from(*byte) {
                break;
            }
            position ^= offset(unit);
            if unit & (1 << 8) != 0 {
                let Some(leaf) = self.units.get(position as usize) else { break };
                best = Some(((leaf & !(1 << 31)) as usize, i + 1));
                rules += 1;
                if rules == MAX_RULES_AT_A_POSITION {
                    break;
                }
            }
        }
        let (start, consumed) = best?;
        let replacement = self.replacements.get(start..).filter(|tail| !tail.is_empty())?;
        let end = replacement.iter().position(|byte| *byte == 0).unwrap_or(replacement.len());
        Some((&replacement[..end], consumed))
    }
}
