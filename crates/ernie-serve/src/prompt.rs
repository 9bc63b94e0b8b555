//! Prompts as clients send them: text or token ids, one or several.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api_error::ApiError;
use crate::state::State;

/// A prompt or several.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged, expecting = "expected a string, a list of strings, a list of token ids, or a list of lists of token ids")]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// Token ids.
    Ids(Vec<u32>),
    /// Token ids of several texts.
    IdLists(Vec<Vec<u32>>),
}

impl Prompt {
    /// The token ids of each, at least one and each of the vocabulary. `field`: where the prompt stands in the request.
    ///
    /// # Errors
    /// 400 that names the field.
    pub fn encode(self, state: &State, field: &str) -> Result<Vec<Vec<u32>>, ApiError> {
        let encode = |text: String| encode(state, &text, field);
        let prompts = match self {
            Prompt::Text(text) => vec![encode(text)?],
            Prompt::Texts(texts) => texts.into_iter().map(encode).collect::<Result<_, _>>()?,
            Prompt::Ids(ids) => vec![ids],
            Prompt::IdLists(lists) => lists,
        };
        if prompts.is_empty() {
            return Err(ApiError::field(field, format!("`{field}`: expected at least one text")));
        }
        prompts.iter().try_for_each(|ids| check(state, ids, field))?;
        Ok(prompts)
    }
}

/// The ids of a text, with the tokens that the tokenizer's own rules put around it.
fn encode(state: &State, text: &str, field: &str) -> Result<Vec<u32>, ApiError> {
    state.tokenizer.encode(text, true).map_err(|error| ApiError::field(field, error.to_string()))
}

/// Whether ids can be computed at all.
pub fn check(state: &State, ids: &[u32], field: &str) -> Result<(), ApiError> {
    let vocab = state.model.config().vocab_size;
    if ids.is_empty() {
        return Err(ApiError::field(field, format!("`{field}`: the text has no tokens")));
    }
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
        return Err(ApiError::field(field, format!("`{field}`: token {id} is not in the vocabulary of {vocab}")));
    }
    if ids.len() > state.max_len {
        return Err(ApiError::too_long(field, ids.len(), state.max_len));
    }
    Ok(())
}
