//! The fields that say what an answer must look like: OpenAI's `response_format`, and vLLM's `structured_outputs` and, its older form, `guided_…`.
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa::openapi::schema::{Object, ObjectBuilder, SchemaType, Type};

use crate::api_error::ApiError;
use crate::grammar::Rule;

/// What an answer must look like; at most one of these. Every token is checked, so the answer has the form unless it is cut off by `max_tokens`, a stop
/// string or one of `stop_token_ids`. Log-probabilities stay the model's own, as if there were no form.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct Structured {
    /// OpenAI's: text, any JSON object, or JSON that obeys a schema.
    pub response_format: Option<ResponseFormat>,
    /// vLLM's.
    pub structured_outputs: Option<StructuredOutputs>,
    /// A JSON schema, or one written out as text.
    #[schema(schema_with = schema_or_text)]
    pub guided_json: Option<Value>,
    /// A regular expression for the whole answer.
    pub guided_regex: Option<String>,
    /// The answer is one of these.
    #[schema(min_items = 1)]
    pub guided_choice: Option<Vec<String>>,
    /// A grammar in Lark's notation, as the crate llguidance reads it.
    pub guided_grammar: Option<String>,
}

/// The form of an answer.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    #[serde(rename = "type")]
    #[schema(pattern = "^(text|json_object|json_schema)$")]
    pub kind: String,
    /// For `json_schema`.
    #[serde(default)]
    pub json_schema: Option<JsonSchema>,
}

/// A schema with its name.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct JsonSchema {
    /// What it is called.
    #[serde(default)]
    pub name: Option<String>,
    /// What it is for.
    #[serde(default)]
    pub description: Option<String>,
    /// The schema; any JSON object if absent.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub schema: Option<Value>,
    /// The schema is obeyed either way.
    #[serde(default)]
    pub strict: Option<bool>,
}

/// The form of an answer; one of `json`, `regex`, `choice`, `grammar` and `json_object`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct StructuredOutputs {
    /// A JSON schema, or one written out as text.
    #[schema(schema_with = schema_or_text)]
    pub json: Option<Value>,
    /// A regular expression for the whole answer.
    pub regex: Option<String>,
    /// The answer is one of these.
    #[schema(min_items = 1)]
    pub choice: Option<Vec<String>>,
    /// A grammar in Lark's notation, as the crate llguidance reads it.
    pub grammar: Option<String>,
    /// Any JSON object.
    pub json_object: Option<bool>,
    /// JSON without spaces and line breaks between its parts.
    pub disable_any_whitespace: Option<bool>,
    /// What may stand between the parts of JSON, as a regular expression.
    pub whitespace_pattern: Option<String>,
    /// Not supported.
    #[schema(schema_with = nothing)]
    pub structural_tag: Option<Value>,
}

/// How a JSON schema is described that may come as text.
fn schema_or_text() -> Object {
    let types = SchemaType::from_iter([Type::Object, Type::String, Type::Null]);
    ObjectBuilder::new().schema_type(types).description(Some("A JSON schema, or one written out as text.")).build()
}

/// How a field is described that is not supported.
fn nothing() -> Object {
    ObjectBuilder::new().schema_type(Type::Null).description(Some("Not supported.")).build()
}

/// A rule and the field it came from.
pub type Asked = (Rule, &'static str);

impl Structured {
    /// The rule that was asked for, if any.
    ///
    /// # Errors
    /// 400 that names the field: more than one rule, a field of the wrong kind, a schema that is no JSON.
    pub fn rule(self) -> Result<Option<Asked>, ApiError> {
        let mut asked: Vec<Asked> = Vec::new();
        asked.extend(self.response_format.map(ResponseFormat::rule).transpose()?.flatten());
        if let Some(schema) = self.guided_json {
            asked.push((Rule::Json(schema_of(schema, "guided_json")?), "guided_json"));
        }
        asked.extend(self.guided_regex.map(|regex| (Rule::Regex(regex), "guided_regex")));
        asked.extend(self.guided_choice.map(|texts| (Rule::Choice(texts), "guided_choice")));
        asked.extend(self.guided_grammar.map(|grammar| (Rule::Lark(grammar), "guided_grammar")));
        if let Some(outputs) = self.structured_outputs {
            asked.extend(outputs.rules()?);
        }
        if let [(_, first), (_, second), ..] = asked[..] {
            return Err(ApiError::field(second, format!("`{second}`: the answer already has its form from `{first}`; give one of them")));
        }
        if let Some((Rule::Choice(texts), field)) = asked.first()
            && (texts.is_empty() || texts.iter().any(String::is_empty))
        {
            return Err(ApiError::field(*field, format!("`{field}`: expected texts of at least one character, at least one")));
        }
        Ok(asked.pop())
    }
}

impl ResponseFormat {
    fn rule(self) -> Result<Option<Asked>, ApiError> {
        match (self.kind.as_str(), self.json_schema) {
            ("text", _) => Ok(None),
            ("json_object", _) => Ok(Some((any_object(), "response_format"))),
            ("json_schema", Some(JsonSchema { schema, .. })) => {
                const FIELD: &str = "response_format.json_schema.schema";
                let rule = schema.map(|schema| object(schema, FIELD)).transpose()?;
                Ok(Some((rule.map_or_else(any_object, Rule::Json), FIELD)))
            }
            ("json_schema", None) => {
                let message = "`response_format.json_schema`: expected an object with a `schema`";
                Err(ApiError::field("response_format.json_schema", message))
            }
            (kind, _) => {
                let message = format!("`response_format.type`: expected text, json_object or json_schema, got {kind:?}");
                Err(ApiError::field("response_format.type", message))
            }
        }
    }
}

impl StructuredOutputs {
    fn rules(self) -> Result<Vec<Asked>, ApiError> {
        if self.structural_tag.is_some() {
            return Err(ApiError::unsupported("structured_outputs.structural_tag", "is not supported"));
        }
        let mut rules: Vec<Asked> = Vec::new();
        if let Some(schema) = self.json {
            rules.push((Rule::Json(schema_of(schema, "structured_outputs.json")?), "structured_outputs.json"));
        }
        if self.json_object == Some(true) {
            rules.push((any_object(), "structured_outputs.json_object"));
        }
        for (rule, _) in &mut rules {
            if let Rule::Json(Value::Object(schema)) = rule {
                let options = match (&self.whitespace_pattern, self.disable_any_whitespace) {
                    (Some(pattern), _) => json!({ "whitespace_pattern": pattern }),
                    (None, Some(true)) => json!({ "whitespace_flexible": false }),
                    (None, _) => continue,
                };
                schema.insert("x-guidance".to_owned(), options);
            }
        }
        rules.extend(self.regex.map(|regex| (Rule::Regex(regex), "structured_outputs.regex")));
        rules.extend(self.choice.map(|texts| (Rule::Choice(texts), "structured_outputs.choice")));
        rules.extend(self.grammar.map(|grammar| (Rule::Lark(grammar), "structured_outputs.grammar")));
        if rules.is_empty() {
            let message = "`structured_outputs`: expected one of json, regex, choice, grammar and json_object";
            return Err(ApiError::field("structured_outputs", message));
        }
        Ok(rules)
    }
}

fn any_object() -> Rule {
    Rule::Json(no_schema())
}

/// A schema, which some clients send as text.
fn schema_of(schema: Value, field: &str) -> Result<Value, ApiError> {
    match schema {
        Value::String(text) => {
            let schema = serde_json::from_str(&text).map_err(|error| ApiError::field(field, format!("`{field}`: {error}")))?;
            object(schema, field)
        }
        schema => object(schema, field),
    }
}

/// A schema is an object here: `true` and `false`, which JSON Schema has besides, say too much and too little.
fn object(schema: Value, field: &str) -> Result<Value, ApiError> {
    match schema {
        Value::Object(_) => Ok(schema),
        other => {
            let kind = match other {
                Value::Array(_) => "a list".to_owned(),
                other => other.to_string(),
            };
            Err(ApiError::field(field, format!("`{field}`: expected a JSON schema, an object, got {kind}")))
        }
    }
}

/// The schema of any object: of an answer that may be any, and of the arguments of a function that says nothing of them.
pub fn no_schema() -> Value {
    json!({"type": "object"})
}
