//! `GET` and `PATCH /admin/api/settings`: what of the engine can be changed while it runs.
use std::sync::{Mutex, MutexGuard, PoisonError};

use axum::extract::State as Extract;
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::accounts::usage::Audit;
use crate::accounts::{Caller, away};
use crate::api_error::ApiError;
use crate::body::JsonBody;
use crate::numbers::whole;
use crate::state::{Shared, unix_seconds};

/// How requests are put together. In force until the server ends: the next start reads the configuration again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Settings {
    /// Requests join and leave the batch at any step.
    pub dynamic_batching: bool,
    /// Most requests computed together.
    pub max_batch_size: usize,
}

/// What is to change; absent fields stay as they are.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingsPatch {
    /// Requests join and leave the batch at any step.
    #[serde(default)]
    pub dynamic_batching: Option<bool>,
    /// Most requests computed together, at least 1. Those that run are not interrupted.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1, maximum = 4294967295_u32)]
    pub max_batch_size: Option<usize>,
}

impl SettingsPatch {
    /// Settings with these changes.
    fn over(self, before: Settings) -> Settings {
        Settings {
            dynamic_batching: self.dynamic_batching.unwrap_or(before.dynamic_batching),
            // Without a place nothing would ever be computed.
            max_batch_size: self.max_batch_size.unwrap_or(before.max_batch_size).max(1),
        }
    }
}

/// The settings in force, shared with the engine's thread, which looks before each step.
#[derive(Debug)]
pub(crate) struct Current(Mutex<Settings>);

impl Current {
    pub fn new(settings: Settings) -> Self {
        Current(Mutex::new(settings))
    }

    pub fn get(&self) -> Settings {
        *self.lock()
    }

    /// Returns what is then.
    pub fn change(&self, patch: SettingsPatch) -> Settings {
        let mut settings = self.lock();
        *settings = patch.over(*settings);
        *settings
    }

    fn lock(&self) -> MutexGuard<'_, Settings> {
        // Settings are never half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The settings in force
#[utoipa::path(get, path = "/admin/api/settings", tag = "admin", responses((status = 200, description = "The settings", body = Settings)))]
pub async fn settings(Extract(state): Extract<Shared>) -> Json<Settings> {
    Json(state.worker.settings())
}

/// Change settings from the engine's next step on
#[utoipa::path(patch, path = "/admin/api/settings", tag = "admin", request_body = SettingsPatch, responses(
    (status = 200, description = "The settings now in force", body = Settings),
))]
pub async fn change_settings(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    body: JsonBody,
) -> Result<Json<Settings>, ApiError> {
    let patch: SettingsPatch = body.parse()?;
    // As the configuration has it.
    let most = u32::MAX as usize;
    if let Some(size) = patch.max_batch_size.filter(|size| !(1..=most).contains(size)) {
        let message = format!("`max_batch_size`: expected a number from 1 to {most}, got {size}");
        return Err(ApiError::field("max_batch_size", message));
    }
    let _alone = state.accounts.changes.lock().await;
    let before = state.worker.settings();
    let wanted = patch.over(before);
    if wanted != before {
        // Nothing is changed that the audit log does not tell of.
        let detail = serde_json::json!({"before": before, "after": wanted}).to_string();
        let audit = Audit { at: unix_seconds(), actor: caller.actor(), action: "settings.change", target: state.name.clone(), detail };
        state.accounts.store.log(&audit).await.map_err(|error| away(&error))?;
    }
    let after = state.worker.change_settings(patch);
    tracing::info!(model = %state.name, ?before, ?after, "settings");
    Ok(Json(after))
}
