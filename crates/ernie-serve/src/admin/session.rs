//! `GET /admin/api/session`: who asks, and in what units the rest is.
use axum::extract::State as Extract;
use axum::{Extension, Json};
use serde::Serialize;
use utoipa::ToSchema;

use crate::accounts::Caller;
use crate::accounts::keys::Scope;
use crate::state::Shared;

/// Who asks, and in what units the rest is.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Session {
    /// Whether nobody needs a key, for there is none.
    pub open: bool,
    /// The key that was sent.
    pub key: Option<SessionKey>,
    /// What money is counted in.
    pub currency: String,
    /// Whether joules are `measured` or `modelled`.
    pub energy: &'static str,
}

/// The key that was sent.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SessionKey {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What it may be used for.
    pub scopes: Vec<Scope>,
}

/// Who asks
#[utoipa::path(get, path = "/admin/api/session", tag = "admin", responses(
    (status = 200, description = "Who asks, and in what units the rest is", body = Session),
))]
pub async fn session(Extract(state): Extract<Shared>, Extension(caller): Extension<Caller>) -> Json<Session> {
    let key = caller.0.map(|key| SessionKey { id: key.id.clone(), name: key.grant.name.clone(), scopes: key.grant.scopes.clone() });
    Json(Session { open: key.is_none(), key, currency: state.config.currency.clone(), energy: state.accounts.energy().as_str() })
}
