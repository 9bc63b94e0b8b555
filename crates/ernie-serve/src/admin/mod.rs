//! `/admin/api`: keys, usage and the audit log, for the page and for programs.
pub mod keys;
pub mod reports;
pub mod session;

use axum::Router;
use axum::routing::{get, patch, post};

use crate::state::Shared;

/// Its routes.
pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/admin/api/session", get(session::session))
        .route("/admin/api/keys", get(keys::list).post(keys::create))
        .route("/admin/api/keys/{id}", patch(keys::change))
        .route("/admin/api/keys/{id}/revoke", post(keys::revoke))
        .route("/admin/api/usage", get(reports::usage))
        .route("/admin/api/audit", get(reports::audit))
}
