//! `GET /admin/api/usage` and `GET /admin/api/audit`.
use axum::Json;
use axum::extract::State as Extract;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::accounts::calendar::Day;
use crate::accounts::usage::{AuditEntry, GroupBy, Period, UsageRow};
use crate::accounts::{away, store::StoreError};
use crate::api_error::ApiError;
use crate::parameters::Asked;
use crate::state::{Shared, unix_seconds};

/// Most lines of the audit log in one answer.
const MAX_AUDIT: u32 = 1000;

/// What the report is about.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct UsageQuery {
    /// The first day, `YYYY-MM-DD`, UTC; 29 days before the last if absent.
    #[param(format = Date)]
    from: Option<String>,
    /// The last day; today if absent.
    #[param(format = Date)]
    to: Option<String>,
    /// What rows are for: `day`, `key`, `model`, or several with commas; `day` if absent.
    #[param(pattern = "^(day|key|model)(,(day|key|model))*$")]
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
    /// At most so many; 100 if absent.
    #[param(minimum = 1, maximum = 1000)]
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

/// What was used
#[utoipa::path(get, path = "/admin/api/usage", tag = "admin", params(UsageQuery), responses(
    (status = 200, description = "Sums of usage", body = UsageReport),
))]
pub async fn usage(Extract(state): Extract<Shared>, Asked(asked): Asked<UsageQuery>) -> Result<Json<UsageReport>, ApiError> {
    let UsageQuery { from, to, by } = asked;
    let refuse = |(field, reason): (&'static str, String)| ApiError::field(field, format!("`{field}`: {reason}"));
    let period = Period::named(from.as_deref(), to.as_deref(), Day::of(unix_seconds())).map_err(refuse)?;
    let by: GroupBy = by.as_deref().unwrap_or("day").parse().map_err(|reason| refuse(("by", reason)))?;
    let data = state.accounts.store.usage(period, by).await.map_err(|error: StoreError| away(&error))?;
    Ok(Json(UsageReport { data }))
}

/// What was changed, and by whom
#[utoipa::path(get, path = "/admin/api/audit", tag = "admin", params(AuditQuery), responses(
    (status = 200, description = "The latest lines first", body = AuditLog),
))]
pub async fn audit(Extract(state): Extract<Shared>, Asked(asked): Asked<AuditQuery>) -> Result<Json<AuditLog>, ApiError> {
    let AuditQuery { limit, before } = asked;
    let limit = limit.unwrap_or(100);
    if !(1..=MAX_AUDIT).contains(&limit) {
        return Err(ApiError::field("limit", format!("`limit`: expected a number from 1 to {MAX_AUDIT}, got {limit}")));
    }
    let data = state.accounts.store.audit(limit, before).await.map_err(|error| away(&error))?;
    Ok(Json(AuditLog { data }))
}
