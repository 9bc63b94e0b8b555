//! Calls into the `tokenizers` crate. It panics on some files that it should refuse (`decoders/mod.rs` and `normalizers/mod.rs` of 0.23
//! expect parts to be readable) and on some texts; here that becomes an error. The program's panic hook still prints its line.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use tokenizers::Tokenizer;

/// Reads a `tokenizer.json`.
pub(super) fn read(bytes: &[u8]) -> Result<Tokenizer, String> {
    // First, so that a file that was cut off, the likeliest fault, is told by place and without a panic.
    serde_json::from_slice::<WellFormed>(bytes).map_err(|error| error.to_string())?;
    contained(|| Tokenizer::from_bytes(bytes))
}

/// Ids of a text.
pub(super) fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, String> {
    contained(|| Ok(tokenizer.encode_fast(text, add_special)?.get_ids().to_vec()))
}

/// Text of ids; none where the decoder fails, which it does on no token of a vocabulary that fits it.
pub(super) fn decode(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    contained(|| tokenizer.decode(ids, skip_special)).unwrap_or_default()
}

fn contained<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    // Unwinding leaves nothing behind: the calls only read, or make what they return.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            Err(format!("the tokenizer library cannot handle it: {}", message.unwrap_or("no reason given")))
        }
    }
}

/// Any JSON value whose strings are valid throughout; nothing of it is kept.
struct WellFormed;

impl<'de> Deserialize<'de> for WellFormed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for WellFormed {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Self, A::Error> {
        while values.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self, A::Error> {
        while entries.next_entry::<Self, Self>()?.is_some() {}
        Ok(self)
    }
}
