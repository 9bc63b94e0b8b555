//! Typed access to one section of a config: other spellings, defaults, and errors that name the field.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// One JSON object of a config with the place it came from.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    pub(super) origin: &'a Path,
    /// Path of the section in messages: empty, or like `vision_config.`.
    pub(super) section: &'static str,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn error(&self, field: &str, expected: impl Into<String>, got: &Value) -> Error {
        let mut got = got.to_string();
        if let Some((end, _)) = got.char_indices().nth(80) {
            got.truncate(end);
            got.push('…');
        }
        let field = format!("{}{field}", self.section);
        Error::ConfigField { file: self.origin.into(), field, expected: expected.into(), got }
    }

    /// The value under the first of its spellings that is present and not null; two that disagree are refused.
    pub(super) fn get<'n>(&self, spellings: &[&'n str]) -> Result<Option<(&'n str, &'a Value)>> {
        let mut found: Option<(&str, &Value)> = None;
        for &name in spellings {
            match (self.map.get(name), found) {
                (None | Some(Value::Null), _) => {}
                (Some(value), None) => found = Some((name, value)),
                (Some(value), Some((first, other))) if value != other => {
                    return Err(self.error(name, format!("{other}, as its other spelling `{first}` says"), value));
                }
                _ => {}
            }
        }
        Ok(found)
    }

    pub(super) fn size(&self, spellings: &[&str]) -> Result<Option<usize>> {
        let Some((name, value)) = self.get(spellings)? else { return Ok(None) };
        self.as_size(name, value).map(Some)
    }

    pub(super) fn as_size(&self, name: &str, value: &Value) -> Result<usize> {
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        number.ok_or_else(|| self.error(name, "a non-negative integer", value))
    }

    /// One integer or a list of them, as the vision-language configs write; never empty.
    pub(super) fn integers(&self, spellings: &[&str]) -> Result<Option<(String, Vec<i64>)>> {
        let Some((name, value)) = self.get(spellings)? else { return Ok(None) };
        let integers = match value {
            Value::Array(items) => items.iter().map(Value::as_i64).collect::<Option<Vec<_>>>(),
            single => single.as_i64().map(|n| vec![n]),
        };
        match integers {
            Some(integers) if !integers.is_empty() => Ok(Some((name.to_owned(), integers))),
            _ => Err(self.error(name, "an integer or a list of integers", value)),
        }
    }

    /// As [`Fields::integers`], for values that cannot be negative.
    pub(super) fn sizes(&self, spellings: &[&str]) -> Result<Option<(String, Vec<usize>)>> {
        let Some((name, integers)) = self.integers(spellings)? else { return Ok(None) };
        let sizes = integers.iter().map(|&n| usize::try_from(n).ok()).collect::<Option<Vec<_>>>();
        match sizes {
            Some(sizes) => Ok(Some((name, sizes))),
            None => Err(self.error(&name, "non-negative integers", &Value::from(integers))),
        }
    }

    pub(super) fn float(&self, spellings: &[&str]) -> Result<Option<f64>> {
        let Some((name, value)) = self.get(spellings)? else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.error(name, "a number", value)),
        }
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>> {
        let Some((name, value)) = self.get(&[name])? else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(name, "true or false", value))
    }

    pub(super) fn id(&self, spellings: &[&str]) -> Result<Option<u32>> {
        let Some((name, value)) = self.get(spellings)? else { return Ok(None) };
        let id = value.as_u64().and_then(|n| u32::try_from(n).ok());
        id.map(Some).ok_or_else(|| self.error(name, "a token id", value))
    }

    /// A nested object.
    pub(super) fn section(&self, name: &str, section: &'static str) -> Result<Option<Fields<'a>>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { origin: self.origin, section, map })),
            Some(other) => Err(self.error(name, "an object", other)),
        }
    }

    /// Refuses every value but the given ones; an absent or null field is the released code's only behaviour anyway.
    pub(super) fn only(&self, name: &str, allowed: &[Value]) -> Result<()> {
        let Some((name, value)) = self.get(&[name])? else { return Ok(()) };
        let same = |a: &Value| match (a.as_f64(), value.as_f64()) {
            (Some(a), Some(b)) => a == b, // 1 and 1.0 mean the same
            _ => a == value,
        };
        if allowed.iter().any(same) {
            return Ok(());
        }
        let list = allowed.iter().map(Value::to_string).collect::<Vec<_>>().join(" or ");
        Err(self.error(name, list, value))
    }
}
