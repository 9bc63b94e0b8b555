//! JSON schemas to ask for, and a checker for what they use.
use serde_json::{Value, json};

/// Schemas of many kinds, each with an end: a model that knows no JSON must come to it too.
pub fn all() -> Vec<Value> {
    let word = json!({"type": "string", "maxLength": 12});
    vec![
        json!({"type": "boolean"}),
        json!({"type": "null"}),
        json!({"type": "integer", "minimum": -5, "maximum": 1000}),
        json!({"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}),
        json!({"type": "string", "minLength": 3, "maxLength": 8}),
        json!({"type": "string", "enum": ["red", "green", "a \"quoted\" one", "back\\slash", "春眠"]}),
        json!({"enum": [1, "two", null, [3], {"four": 4}]}),
        json!({"const": {"fixed": [true, "as it is"]}}),
        json!({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 5}),
        json!({"type": "array", "items": word, "maxItems": 3}),
        json!({"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": false, "minItems": 2}),
        json!({"type": "object", "properties": {"name": word, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
            "required": ["name", "age"], "additionalProperties": false}),
        json!({"type": "object", "properties": {"maybe": word, "perhaps": {"type": "boolean"}}, "additionalProperties": false}),
        json!({"type": "object", "properties": {"nested": {"type": "object", "properties": {"deep": {"type": "object",
            "properties": {"value": {"type": "boolean"}}, "required": ["value"], "additionalProperties": false}},
            "required": ["deep"], "additionalProperties": false}}, "required": ["nested"], "additionalProperties": false}),
        json!({"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 10, "maximum": 20}, word]}),
        json!({"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}, "lives": {"anyOf": [{"type": "null"}, {"const": 9}]}},
            "required": ["kind", "lives"], "additionalProperties": false}),
        json!({"$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9},
            "y": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["x", "y"], "additionalProperties": false}},
            "type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 3}),
        json!({"type": ["boolean", "null"]}),
        json!({"type": "object", "properties": {"日本": {"type": "boolean"}, "with space": {"type": "null"}},
            "required": ["日本", "with space"], "additionalProperties": false}),
        json!({"type": "string", "pattern": "^[a-f]{2}-[0-9]{3}$"}),
        json!({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false,
            "patternProperties": {"^k[0-9]$": {"type": "integer", "minimum": 0, "maximum": 3}}, "maxProperties": 2}),
        json!({"type": "array", "items": {"type": "array", "items": {"enum": ["o", "x", " "]}, "minItems": 3, "maxItems": 3},
            "minItems": 3, "maxItems": 3}),
        json!({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}),
        json!({"type": "object", "properties": {"steps": {"type": "array", "maxItems": 2, "items": {"type": "object",
            "properties": {"explanation": word, "output": word}, "required": ["explanation", "output"], "additionalProperties": false}},
            "final_answer": word}, "required": ["steps", "final_answer"], "additionalProperties": false}),
    ]
}

/// What of the schema a value breaks.
pub fn fault(schema: &Value, value: &Value) -> Option<String> {
    let root = schema.clone();
    check(&root, schema, value).err()
}

fn check(root: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let Some(schema) = schema.as_object() else {
        return if schema == &json!(false) { Err(format!("{value} where nothing may be")) } else { Ok(()) };
    };
    let ensure = |ok: bool, what: &str| if ok { Ok(()) } else { Err(format!("{value} breaks {what} of {}", json!(schema))) };
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    for (key, rule) in schema {
        let count = || rule.as_u64().unwrap() as usize;
        match (key.as_str(), value) {
            ("type", _) => {
                let is = |kind: &Value| match kind.as_str().unwrap() {
                    "null" => value.is_null(),
                    "boolean" => value.is_boolean(),
                    // A number without a fraction, however it is written: -0 too.
                    "integer" => number(value).fract() == 0.0,
                    "number" => value.is_number(),
                    "string" => value.is_string(),
                    "array" => value.is_array(),
                    "object" => value.is_object(),
                    other => panic!("{other}"),
                };
                ensure(rule.as_array().map_or_else(|| is(rule), |kinds| kinds.iter().any(is)), key)?;
            }
            ("enum", _) => ensure(rule.as_array().unwrap().contains(value), key)?,
            ("const", _) => ensure(rule == value, key)?,
            ("anyOf", _) => ensure(rule.as_array().unwrap().iter().any(|s| check(root, s, value).is_ok()), key)?,
            ("allOf", _) => rule.as_array().unwrap().iter().try_for_each(|s| check(root, s, value))?,
            ("$ref", _) => check(root, root.pointer(rule.as_str().unwrap().strip_prefix('#').unwrap()).unwrap(), value)?,
            ("minimum", Value::Number(_)) => ensure(number(value) >= number(rule), key)?,
            ("maximum", Value::Number(_)) => ensure(number(value) <= number(rule), key)?,
            ("multipleOf", Value::Number(_)) => ensure((number(value) / number(rule)).fract() == 0.0, key)?,
            ("minLength", Value::String(text)) => ensure(text.chars().count() >= count(), key)?,
            ("maxLength", Value::String(text)) => ensure(text.chars().count() <= count(), key)?,
            ("pattern", Value::String(text)) => {
                assert_eq!(rule, "^[a-f]{2}-[0-9]{3}$", "the one pattern there is");
                let bytes = text.as_bytes();
                let fits = bytes.len() == 6
                    && bytes[..2].iter().all(|b| (b'a'..=b'f').contains(b))
                    && bytes[2] == b'-'
                    && bytes[3..].iter().all(u8::is_ascii_digit);
                ensure(fits, key)?;
            }
            ("minItems", Value::Array(items)) => ensure(items.len() >= count(), key)?,
            ("maxItems", Value::Array(items)) => ensure(items.len() <= count(), key)?,
            ("prefixItems", Value::Array(items)) => {
                items.iter().zip(rule.as_array().unwrap()).try_for_each(|(item, s)| check(root, s, item))?;
            }
            ("items", Value::Array(items)) => {
                let first = schema.get("prefixItems").and_then(Value::as_array).map_or(0, Vec::len);
                items.iter().skip(first).try_for_each(|item| check(root, rule, item))?;
            }
            ("maxProperties", Value::Object(fields)) => ensure(fields.len() <= count(), key)?,
            ("required", Value::Object(fields)) => {
                ensure(rule.as_array().unwrap().iter().all(|name| fields.contains_key(name.as_str().unwrap())), key)?;
            }
            ("properties", Value::Object(fields)) => {
                fields
                    .iter()
                    .filter_map(|(name, field)| Some((rule.get(name)?, field)))
                    .try_for_each(|(s, field)| check(root, s, field))?;
            }
            ("patternProperties", Value::Object(fields)) => {
                let of_pattern = fields.iter().filter(|(name, _)| numbered(name));
                of_pattern.into_iter().try_for_each(|(_, field)| check(root, &rule["^k[0-9]$"], field))?;
            }
            ("additionalProperties", Value::Object(fields)) => {
                let known = |name: &String| {
                    schema.get("properties").is_some_and(|properties| properties.get(name).is_some())
                        || (schema.contains_key("patternProperties") && numbered(name))
                };
                fields.iter().filter(|(name, _)| !known(name)).try_for_each(|(_, field)| check(root, rule, field))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// `^k[0-9]$`, the one pattern of names there is.
fn numbered(name: &str) -> bool {
    matches!(name.as_bytes(), [b'k', b'0'..=b'9'])
}

#[test]
fn the_checker_finds_faults() {
    let bad = [
        json!("x"),
        json!(0),
        json!(1001),
        json!(0.3),
        json!("ab"),
        json!("blue"),
        json!(2),
        json!({"fixed": [false, "as it is"]}),
        json!([1]),
        json!([1]),
        json!([true, "x", 1]),
        json!({"name": "a"}),
        json!({"other": 1}),
        json!({"nested": {"deep": {"value": 1}}}),
        json!(9),
        json!({"kind": "cat", "lives": 7}),
        json!([{"x": 1, "y": 10}]),
        json!(1),
        json!({"日本": true}),
        json!("ag-123"),
        json!({"a": true, "b": 4}),
        json!([["o", "x", " "], ["o", "x", "y"], ["o", "x", " "]]),
        json!(6),
        json!({"steps": [{"explanation": "a"}], "final_answer": "b"}),
    ];
    let schemas = all();
    assert_eq!(schemas.len(), bad.len());
    for (schema, bad) in schemas.iter().zip(&bad) {
        assert!(fault(schema, bad).is_some(), "{bad} should break {schema}");
    }
    assert_eq!(fault(&schemas[11], &json!({"name": "Ann", "age": 3})), None);
    assert_eq!(fault(&schemas[16], &json!([{"x": 0, "y": 9}])), None);
}
