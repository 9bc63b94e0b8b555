//! `/admin/api/keys`: made, listed, changed, revoked.
use std::collections::HashMap;

use axum::extract::{Path, State as Extract};
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::accounts::calendar::Day;
use crate::accounts::keys::{Grant, Key, Limits, Scope};
use crate::accounts::usage::{Audit, GroupBy, Period};
use crate::accounts::{Caller, away, create_key, revoke_key};
use crate::api_error::{ApiError, ErrorBody};
use crate::body::JsonBody;
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

/// What is said about a key: a field that is absent stays as it is, null lifts a limit. For a new key `name` and `scopes` are needed.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KeyFields {
    /// For people: 1 to 100 characters, none of them a control character.
    name: Option<String>,
    /// What it may be used for.
    scopes: Option<Vec<Scope>>,
    /// Which models; null for all.
    #[serde(deserialize_with = "given")]
    #[schema(value_type = Option<Vec<String>>)]
    models: Option<Option<Vec<String>>>,
    /// Unix seconds from which on it is refused.
    #[serde(deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    expires: Option<Option<u64>>,
    /// Requests in any minute.
    #[serde(deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    requests_per_minute: Option<Option<u64>>,
    /// Tokens in any minute.
    #[serde(deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    tokens_per_minute: Option<Option<u64>>,
    /// Tokens in a month of UTC.
    #[serde(deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    tokens_per_month: Option<Option<u64>>,
    /// Money in a month of UTC.
    #[serde(deserialize_with = "given")]
    #[schema(value_type = Option<f64>)]
    money_per_month: Option<Option<f64>>,
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
        changed.checked().map_err(|(field, reason)| ApiError::field(field, format!("`{field}`: {reason}")))
    }
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

/// The keys
#[utoipa::path(get, path = "/admin/api/keys", tag = "admin", responses(
    (status = 200, description = "The keys, without their secrets", body = KeyList),
    (status = "4XX", description = "No key, or one without the scope `admin`", body = ErrorBody),
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
#[utoipa::path(post, path = "/admin/api/keys", tag = "admin", request_body = KeyFields, responses(
    (status = 201, description = "The key, for once with its secret", body = KeyEntry),
    (status = "4XX", description = "A field is at fault; no key, or one without the scope `admin`", body = ErrorBody),
))]
pub async fn create(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    body: JsonBody,
) -> Result<(StatusCode, Json<KeyEntry>), ApiError> {
    let fields: KeyFields = body.parse()?;
    for (field, missing) in [("name", fields.name.is_none()), ("scopes", fields.scopes.is_none())] {
        if missing {
            return Err(ApiError::field(field, format!("`{field}`: a new key needs it")));
        }
    }
    let grant = fields.over(Grant::new(""))?;
    let (key, presented) = create_key(&state.accounts.store, grant, caller.actor()).await.map_err(|error| away(&error))?;
    Ok((StatusCode::CREATED, Json(KeyEntry { key: Some(presented), ..entry(key, Month::default()) })))
}

/// Change a key
#[utoipa::path(patch, path = "/admin/api/keys/{id}", tag = "admin", request_body = KeyFields, params(("id" = String, Path, description = "Its id")), responses(
    (status = 200, description = "The key as it is now", body = KeyEntry),
    (status = "4XX", description = "A field is at fault, there is no such key; no key, or one without the scope `admin`", body = ErrorBody),
))]
pub async fn change(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<KeyEntry>, ApiError> {
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
#[utoipa::path(post, path = "/admin/api/keys/{id}/revoke", tag = "admin", params(("id" = String, Path, description = "Its id")), responses(
    (status = 200, description = "The key, which is refused from now on", body = KeyEntry),
    (status = "4XX", description = "There is no such key; no key, or one without the scope `admin`", body = ErrorBody),
))]
pub async fn revoke(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<KeyEntry>, ApiError> {
    let key = revoke_key(&state.accounts.store, &id, caller.actor()).await.map_err(|error| away(&error))?.ok_or_else(no_key)?;
    state.accounts.in_use.end(&key.id);
    Ok(Json(with_month(&state, key).await?))
}
