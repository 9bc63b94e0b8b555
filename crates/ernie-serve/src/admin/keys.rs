//! `/admin/api/keys`: made, listed, changed, revoked.
use std::collections::HashMap;

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{Array, ArrayBuilder, Object, ObjectBuilder, SchemaType, Type};

use crate::accounts::calendar::Day;
use crate::accounts::keys::{Grant, Key, Limits, Scope};
use crate::accounts::usage::{Audit, GroupBy, Period};
use crate::accounts::{Caller, away, create_key, revoke_key};
use crate::api_error::ApiError;
use crate::body::JsonBody;
use crate::numbers::{given_whole, whole};
use crate::parameters::Segment;
use crate::state::{Shared, State, unix_seconds};

/// A key without its secret.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct KeyEntry {
    /// What finds it.
    pub id: String,
    /// For people.
    pub name: String,
    /// What it may be used for.
    pub scopes: Vec<Scope>,
    /// Which models; null for all.
    pub models: Option<Vec<String>>,
    /// Unix seconds, as all times here.
    pub created: u64,
    /// From when on it is refused.
    pub expires: Option<u64>,
    /// Since when it is refused for good.
    pub revoked: Option<u64>,
    /// A use at most a minute before the last.
    pub last_used: Option<u64>,
    /// What it may use up; null for no limit.
    #[serde(flatten)]
    pub limits: Limits,
    /// What it used in this month of UTC.
    pub month: Month,
    /// The key itself, in the answer to its making only: nobody can show it again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// What was used in a month.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct Month {
    /// Requests.
    pub requests: i64,
    /// Tokens of prompts.
    pub prompt_tokens: i64,
    /// Tokens chosen.
    pub completion_tokens: i64,
    /// In the configured currency.
    pub money: f64,
}

/// All keys.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct KeyList {
    /// The oldest first.
    pub data: Vec<KeyEntry>,
}

/// A new key. What is absent or null has no limit.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    /// For people: 1 to 100 characters, none of them a control character.
    #[schema(schema_with = name)]
    name: String,
    /// What it may be used for.
    #[schema(min_items = 1)]
    scopes: Vec<Scope>,
    /// Which models; null for all.
    #[schema(schema_with = models)]
    models: Option<Vec<String>>,
    /// Unix seconds from which on it is refused.
    #[schema(maximum = 253_402_300_799_u64)]
    #[serde(default, deserialize_with = "whole")]
    expires: Option<u64>,
    /// Requests in any minute.
    #[schema(minimum = 1, maximum = 1_000_000_000_000_u64)]
    #[serde(default, deserialize_with = "whole")]
    requests_per_minute: Option<u64>,
    /// Tokens in any minute.
    #[schema(minimum = 1, maximum = 1_000_000_000_000_u64)]
    #[serde(default, deserialize_with = "whole")]
    tokens_per_minute: Option<u64>,
    /// Tokens in a month of UTC.
    #[schema(minimum = 0, maximum = 1_000_000_000_000_u64)]
    #[serde(default, deserialize_with = "whole")]
    tokens_per_month: Option<u64>,
    /// Money in a month of UTC.
    #[schema(minimum = 0, maximum = 1e9)]
    money_per_month: Option<f64>,
}

/// What changes about a key: a field that is absent stays as it is, null lifts a limit.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KeyFields {
    /// For people: 1 to 100 characters, none of them a control character.
    #[schema(schema_with = new_name)]
    name: Option<String>,
    /// What it may be used for.
    #[schema(min_items = 1)]
    scopes: Option<Vec<Scope>>,
    /// Which models; null for all.
    #[serde(deserialize_with = "given")]
    #[schema(schema_with = models)]
    models: Option<Option<Vec<String>>>,
    /// Unix seconds from which on it is refused.
    #[serde(deserialize_with = "given_whole")]
    #[schema(value_type = Option<u64>, maximum = 253_402_300_799_u64)]
    expires: Option<Option<u64>>,
    /// Requests in any minute.
    #[serde(deserialize_with = "given_whole")]
    #[schema(value_type = Option<u64>, minimum = 1, maximum = 1_000_000_000_000_u64)]
    requests_per_minute: Option<Option<u64>>,
    /// Tokens in any minute.
    #[serde(deserialize_with = "given_whole")]
    #[schema(value_type = Option<u64>, minimum = 1, maximum = 1_000_000_000_000_u64)]
    tokens_per_minute: Option<Option<u64>>,
    /// Tokens in a month of UTC.
    #[serde(deserialize_with = "given_whole")]
    #[schema(value_type = Option<u64>, minimum = 0, maximum = 1_000_000_000_000_u64)]
    tokens_per_month: Option<Option<u64>>,
    /// Money in a month of UTC.
    #[serde(deserialize_with = "given")]
    #[schema(value_type = Option<f64>, minimum = 0, maximum = 1e9)]
    money_per_month: Option<Option<f64>>,
}

/// Of names: no control characters and nothing that turns the direction of text, and not only blanks.
const NAME: &str = r"^[^\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]*[^\s\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069][^\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]*$";

fn described_name(types: impl Into<SchemaType>, description: &str) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(types).max_length(Some(100)).pattern(Some(NAME)).description(Some(description))
}

/// How names are described.
fn name() -> Object {
    described_name(Type::String, "For people: 1 to 100 characters, none of them a control character.").build()
}

/// How names are described that may be absent.
fn new_name() -> Object {
    let types = SchemaType::from_iter([Type::String, Type::Null]);
    described_name(types, "For people: 1 to 100 characters, none of them a control character.").build()
}

/// How lists of models are described.
fn models() -> Array {
    let list = ArrayBuilder::new().items(described_name(Type::String, "A name.")).min_items(Some(1)).max_items(Some(100));
    list.schema_type(SchemaType::from_iter([Type::Array, Type::Null])).description(Some("Which models; null for all.")).build()
}

/// A field that is there, be it null.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl KeyFields {
    /// A grant with these fields changed.
    fn over(self, grant: Grant) -> Result<Grant, ApiError> {
        let before = grant.limits;
        let limits = Limits {
            requests_per_minute: self.requests_per_minute.unwrap_or(before.requests_per_minute),
            tokens_per_minute: self.tokens_per_minute.unwrap_or(before.tokens_per_minute),
            tokens_per_month: self.tokens_per_month.unwrap_or(before.tokens_per_month),
            money_per_month: self.money_per_month.unwrap_or(before.money_per_month),
        };
        let changed = Grant {
            name: self.name.unwrap_or(grant.name),
            scopes: self.scopes.unwrap_or(grant.scopes),
            models: self.models.unwrap_or(grant.models),
            expires: self.expires.unwrap_or(grant.expires),
            limits,
        };
        checked(changed)
    }
}

impl NewKey {
    fn grant(self) -> Result<Grant, ApiError> {
        let NewKey { name, scopes, models, expires, requests_per_minute, tokens_per_minute, tokens_per_month, money_per_month } = self;
        let limits = Limits { requests_per_minute, tokens_per_minute, tokens_per_month, money_per_month };
        checked(Grant { name, scopes, models, expires, limits })
    }
}

fn checked(grant: Grant) -> Result<Grant, ApiError> {
    grant.checked().map_err(|(field, reason)| ApiError::field(field, format!("`{field}`: {reason}")))
}

fn entry(key: Key, month: Month) -> KeyEntry {
    let Key { id, grant: Grant { name, scopes, models, expires, limits }, created, revoked, last_used } = key;
    KeyEntry { id, name, scopes, models, created, expires, revoked, last_used, limits, month, key: None }
}

/// With what it used this month.
async fn with_month(state: &State, key: Key) -> Result<KeyEntry, ApiError> {
    let start = Day::of(unix_seconds()).month_start();
    let used = state.accounts.store.usage_since(&key.id, start).await.map_err(|error| away(&error))?;
    let month = Month {
        requests: used.requests,
        prompt_tokens: used.prompt_tokens,
        completion_tokens: used.completion_tokens,
        money: used.money as f64 / crate::accounts::keys::NANOS,
    };
    Ok(entry(key, month))
}

fn no_key() -> ApiError {
    ApiError::request(StatusCode::NOT_FOUND, Some("key_not_found"), "There is no key of that id; see /admin/api/keys.")
}

/// An id as they are made. Others are nobody's, and may hold what a database does not take.
fn checked_id(id: String) -> Result<String, ApiError> {
    let is_id = id.len() == 16 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if is_id { Ok(id) } else { Err(no_key()) }
}

/// The keys
#[utoipa::path(get, path = "/admin/api/keys", tag = "admin", responses(
    (status = 200, description = "The keys, without their secrets", body = KeyList),
))]
pub async fn list(Extract(state): Extract<Shared>) -> Result<Json<KeyList>, ApiError> {
    let store = &state.accounts.store;
    let keys = store.keys().await.map_err(|error| away(&error))?;
    let today = Day::of(unix_seconds());
    let period = Period { from: today.month_start(), to: today };
    let rows = store.usage(period, GroupBy { key: true, ..GroupBy::default() }).await.map_err(|error| away(&error))?;
    let used: HashMap<_, _> = rows
        .into_iter()
        .filter_map(|row| {
            let month = Month {
                requests: row.requests,
                prompt_tokens: row.prompt_tokens,
                completion_tokens: row.completion_tokens,
                money: row.money,
            };
            Some((row.key_id?, month))
        })
        .collect();
    let entry = |key: Key| {
        let month = used.get(&key.id).copied().unwrap_or_default();
        entry(key, month)
    };
    Ok(Json(KeyList { data: keys.into_iter().map(entry).collect() }))
}

/// Make a key
#[utoipa::path(post, path = "/admin/api/keys", tag = "admin", request_body = NewKey, responses(
    (status = 201, description = "The key, for once with its secret", body = KeyEntry),
))]
pub async fn create(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    body: JsonBody,
) -> Result<(StatusCode, Json<KeyEntry>), ApiError> {
    let grant = body.parse::<NewKey>()?.grant()?;
    let (key, presented) = create_key(&state.accounts.store, grant, caller.actor()).await.map_err(|error| away(&error))?;
    Ok((StatusCode::CREATED, Json(KeyEntry { key: Some(presented), ..entry(key, Month::default()) })))
}

/// Change a key
#[utoipa::path(patch, path = "/admin/api/keys/{id}", tag = "admin", request_body = KeyFields, params(("id" = String, Path, description = "Its id", pattern = "^[0-9a-f]{16}$")), responses(
    (status = 200, description = "The key as it is now", body = KeyEntry),
))]
pub async fn change(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
    body: JsonBody,
) -> Result<Json<KeyEntry>, ApiError> {
    let id = checked_id(id)?;
    let fields: KeyFields = body.parse()?;
    let store = &state.accounts.store;
    let _alone = state.accounts.changes.lock().await;
    let (mut key, _) = store.key(&id).await.map_err(|error| away(&error))?.ok_or_else(no_key)?;
    key.grant = fields.over(key.grant)?;
    let detail = serde_json::json!(key.grant).to_string();
    let audit = Audit { at: unix_seconds(), actor: caller.actor(), action: "keys.change", target: key.id.clone(), detail };
    store.update_key(&key.id, &key.grant, &audit).await.map_err(|error| away(&error))?;
    Ok(Json(with_month(&state, key).await?))
}

/// Revoke a key
#[utoipa::path(post, path = "/admin/api/keys/{id}/revoke", tag = "admin", params(("id" = String, Path, description = "Its id", pattern = "^[0-9a-f]{16}$")), responses(
    (status = 200, description = "The key, which is refused from now on", body = KeyEntry),
))]
pub async fn revoke(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Result<Json<KeyEntry>, ApiError> {
    let key =
        revoke_key(&state.accounts.store, &checked_id(id)?, caller.actor()).await.map_err(|error| away(&error))?.ok_or_else(no_key)?;
    state.accounts.in_use.end(&key.id);
    Ok(Json(with_month(&state, key).await?))
}
