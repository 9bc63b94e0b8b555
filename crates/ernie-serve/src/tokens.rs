//! `POST /v1/tokenize` and `POST /v1/detokenize`, with the bodies of vLLM's.
use axum::extract::State as Extract;
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::accounts::Caller;
use crate::api_error::ApiError;
use crate::body::JsonBody;
use crate::chat::{self, ChatMessage};
use crate::fields::{self, Known};
use crate::numbers::wholes;
use crate::state::Shared;
use crate::tools::{Tool, Tools};

/// A text or a conversation.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct TokenizeRequest {
    /// The model's name.
    #[serde(default)]
    pub model: Option<String>,
    /// A text; this or `messages`.
    #[serde(default)]
    pub prompt: Option<String>,
    /// A conversation, which the chat template writes out.
    #[serde(default)]
    #[schema(min_items = 1)]
    pub messages: Option<Vec<ChatMessage>>,
    /// For a text: with the tokens that the tokenizer's own rules put around it; true if absent.
    #[serde(default)]
    pub add_special_tokens: Option<bool>,
    /// For a conversation: up to where the assistant speaks next; true if absent.
    #[serde(default)]
    pub add_generation_prompt: Option<bool>,
    /// Variables of the chat template.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// For a conversation: functions that the model may call.
    #[serde(default)]
    pub tools: Option<Vec<Tool>>,
    /// Also the tokens as the vocabulary spells them.
    #[serde(default)]
    pub return_token_strs: Option<bool>,
}

/// Its tokens.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// Most tokens of a request.
    pub max_model_len: usize,
    /// Their ids.
    pub tokens: Vec<u32>,
    /// As the vocabulary spells them, if asked for.
    pub token_strs: Option<Vec<String>>,
}

/// Tokens.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct DetokenizeRequest {
    /// The model's name.
    #[serde(default)]
    pub model: Option<String>,
    /// Their ids.
    #[serde(deserialize_with = "wholes")]
    pub tokens: Vec<u32>,
}

/// Their text.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DetokenizeResponse {
    /// With special tokens written out.
    pub prompt: String,
}

/// Text to tokens
#[utoipa::path(post, path = "/v1/tokenize", tag = "tokens", request_body = TokenizeRequest, responses(
    (status = 200, description = "The tokens", body = TokenizeResponse),
))]
pub async fn tokenize(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    body: JsonBody,
) -> Result<Json<TokenizeResponse>, ApiError> {
    fields::check(&body, &Known::at_least("TokenizeRequest"))?;
    let request: TokenizeRequest = body.parse()?;
    state.check_model(request.model.as_deref())?;
    // A request, but no tokens: the model computes nothing.
    let charge = state.accounts.admit(&caller, &state.name, 0, 0).await?;
    let response = state.compute(move |state| {
        let tokens = match (request.prompt, request.messages) {
            (Some(text), None) => {
                // They say nothing about a text; what is wrong with them is said all the same.
                Tools { tools: request.tools, ..Tools::default() }.check()?;
                let tokens = state.tokenizer.encode(&text, request.add_special_tokens.unwrap_or(true));
                tokens.map_err(|error| ApiError::field("prompt", error.to_string()))?
            }
            (None, Some(messages)) => {
                chat::encode(state, messages, request.tools, request.add_generation_prompt.unwrap_or(true), request.chat_template_kwargs)?
            }
            _ => return Err(ApiError::field("prompt", "expected one of `prompt` and `messages`")),
        };
        let spelling = |id: &u32| state.tokenizer.id_to_piece(*id).unwrap_or_default();
        let token_strs = request.return_token_strs.unwrap_or(false).then(|| tokens.iter().map(spelling).collect());
        Ok(TokenizeResponse { count: tokens.len(), max_model_len: state.max_len, tokens, token_strs })
    });
    let response = response.await?;
    charge.settle().await?;
    Ok(Json(response))
}

/// Tokens to text
#[utoipa::path(post, path = "/v1/detokenize", tag = "tokens", request_body = DetokenizeRequest, responses(
    (status = 200, description = "The text", body = DetokenizeResponse),
))]
pub async fn detokenize(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    body: JsonBody,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let request: DetokenizeRequest = body.parse()?;
    state.check_model(request.model.as_deref())?;
    let charge = state.accounts.admit(&caller, &state.name, 0, 0).await?;
    let response = state.compute(move |state| {
        let vocab = state.tokenizer.vocab_size();
        match request.tokens.iter().position(|id| *id as usize >= vocab) {
            Some(at) => {
                let message = format!("`tokens[{at}]`: token {} is not in the vocabulary of {vocab}", request.tokens[at]);
                Err(ApiError::field(format!("tokens[{at}]"), message))
            }
            None => Ok(DetokenizeResponse { prompt: state.tokenizer.decode(&request.tokens, false) }),
        }
    });
    let response = response.await?;
    charge.settle().await?;
    Ok(Json(response))
}
