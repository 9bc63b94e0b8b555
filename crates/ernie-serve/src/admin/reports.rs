//! `GET /admin/api/usage` and `GET /admin/api/audit`.
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::accounts::calendar::Day;
use crate::accounts::usage::{AuditEntry, GroupBy, Period, UsageRow};
use crate::accounts::{away, store::StoreError};
use crate::api_error::{ApiError, ErrorBody};
use crate::state::{Shared, unix_seconds};

/// Most lines of the audit log in one answer.
const MAX_AUDIT: u32 = 1000;

/// What the report is about.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct UsageQuery {
    /// The first day, `YYYY-MM-DD`, UTC; 29 days before the last if absent.
    from: Option<String>,
    /// The last day; today if absent.
    to: Option<String>,
    /// What rows are for: `day`, `key`, `model`, or several with commas; `day` if absent.
    by: Option<String>,
}

/// A report.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct UsageReport {
    /// Its rows, by day, key and model.
    pub data: Vec<UsageRow>,
}

/// Which lines.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct AuditQuery {
    /// At most so many; 100 if absent, at most 1000.
    limit: Option<u32>,
    /// From before this id.
    before: Option<i64>,
}

/// The audit log.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AuditLog {
    /// Its lines, the latest first.
    pub data: Vec<AuditEntry>,
}

/// The query of a URL, in our own error if it is wrong.
fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ApiError> {
    query.map(|Query(query)| query).map_err(|error| ApiError::request(axum::http::StatusCode::BAD_REQUEST, None, error.body_text()))
}

/// What was used
#[utoipa::path(get, path = "/admin/api/usage", tag = "admin", params(UsageQuery), responses(
    (status = 200, description = "Sums of usage", body = UsageReport),
    (status = "4XX", description = "No key, one without the scope `admin`, or not a day", body = ErrorBody),
))]
pub async fn usage(
    Extract(state): Extract<Shared>,
    asked: Result<Query<UsageQuery>, QueryRejection>,
) -> Result<Json<UsageReport>, ApiError> {
    let UsageQuery { from, to, by } = query(asked)?;
    let refuse = |(field, reason): (&'static str, String)| ApiError::field(field, format!("`{field}`: {reason}"));
    let period = Period::named(from.as_deref(), to.as_deref(), Day::of(unix_seconds())).map_err(refuse)?;
    let by: GroupBy = by.as_deref().unwrap_or("day").parse().map_err(|reason| refuse(("by", reason)))?;
    let data = state.accounts.store.usage(period, by).await.map_err(|error: StoreError| away(&error))?;
    Ok(Json(UsageReport { data }))
}

/// What was changed, and by whom
#[utoipa::path(get, path = "/admin/api/audit", tag = "admin", params(AuditQuery), responses(
    (status = 200, description = "The latest lines first", body = AuditLog),
    (status = "4XX", description = "No key, or one without the scope `admin`", body = ErrorBody),
))]
pub async fn audit(Extract(state): Extract<Shared>, asked: Result<Query<AuditQuery>, QueryRejection>) -> Result<Json<AuditLog>, ApiError> {
    let AuditQuery { limit, before } = query(asked)?;
    let limit = limit.unwrap_or(100).min(MAX_AUDIT);
    let data = state.accounts.store.audit(limit, before).await.map_err(|error| away(&error))?;
    Ok(Json(AuditLog { data }))
}
