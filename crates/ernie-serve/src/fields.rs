//! Which fields a request may have: those that the description names, and some of OpenAI's that change no answer.
//!
//! A name that is none of these is a slip or asks for what is not done here; as at OpenAI, either is said rather than passed over.
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use axum::http::StatusCode;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::api_error::ApiError;
use crate::body::JsonBody;
use crate::description::DOCUMENT;

/// Fields that OpenAI has for its own books, caches and tiers.
pub const PASSED_OVER: [&str; 9] = [
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
];

/// The schemas of the description.
fn schemas() -> &'static Value {
    &DOCUMENT["components"]["schemas"]
}

/// Checks the names of a body's fields, and that no list stands where an object is expected: its items would be taken for the object's fields, by their places.
///
/// # Errors
/// 400 that names the first field that is unknown, or the place of the list; a body that is no object.
pub fn check(body: &JsonBody, known: &Known) -> Result<(), ApiError> {
    // Null, which is as good as absent, is `None`; values are not looked at.
    let given: BTreeMap<String, Option<IgnoredAny>> = body.parse()?;
    if let Some((name, _)) = given.iter().find(|(name, value)| value.is_some() && !known.allows(name)) {
        let message = format!("Unrecognized request argument supplied: {name}");
        return Err(ApiError::request(StatusCode::BAD_REQUEST, Some("unknown_parameter"), message).of(name));
    }
    body.parse_with(Shape::of(&schemas()[known.schema]))
}

/// The fields of one request.
#[derive(Debug)]
pub struct Known {
    schema: &'static str,
    /// Others are passed over, as vLLM does at its own routes.
    open: bool,
}

impl Known {
    /// Those of a schema of the description, and no others.
    pub const fn of(schema: &'static str) -> Self {
        Known { schema, open: false }
    }

    /// Those of a schema of the description, and whatever else comes.
    pub const fn at_least(schema: &'static str) -> Self {
        Known { schema, open: true }
    }

    fn allows(&self, name: &str) -> bool {
        self.open || !schemas()[self.schema]["properties"][name].is_null()
    }
}

/// What the description says of a place in a body: the schemas of which one holds there. None: anything may be there.
#[derive(Clone, Debug, Default)]
struct Shape(Vec<&'static Value>);

impl Shape {
    fn of(schema: &'static Value) -> Self {
        let (mut found, mut open) = (Vec::new(), vec![schema]);
        while let Some(schema) = open.pop() {
            open.extend(["anyOf", "oneOf", "allOf"].into_iter().flat_map(|of| schema[of].as_array().into_iter().flatten()));
            match schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
                Some(name) => open.push(&schemas()[name]),
                None => found.push(schema),
            }
        }
        Shape(found)
    }

    /// Of what stands inside, if all that is said of it is said by `inside`.
    fn inside(&self, inside: impl Fn(&'static Value) -> &'static Value) -> Self {
        Shape(
            self.0.iter().map(|schema| inside(schema)).filter(|schema| schema.is_object()).flat_map(|schema| Self::of(schema).0).collect(),
        )
    }

    /// Whether a value of a type is described, `None` where nothing is said of types.
    fn is(&self, kind: &str) -> bool {
        self.0.iter().any(|schema| match &schema["type"] {
            Value::Array(kinds) => kinds.iter().any(|one| one == kind),
            one => one == kind,
        })
    }
}

impl<'de> DeserializeSeed<'de> for Shape {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        // What nobody described further is only passed over.
        if self.0.is_empty() { IgnoredAny::deserialize(deserializer).map(drop) } else { deserializer.deserialize_any(self) }
    }
}

impl<'de> Visitor<'de> for Shape {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("what the description says")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        if self.is("object") && !self.is("array") {
            return Err(Error::custom("expected an object, got a list"));
        }
        let item = self.inside(|schema| &schema["items"]);
        while list.next_element_seed(item.clone())?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        while let Some(name) = fields.next_key::<Cow<'de, str>>()? {
            fields.next_value_seed(self.inside(|schema| &schema["properties"][&*name]))?;
        }
        Ok(())
    }

    // Values of other types are for those who read them.
    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
}
