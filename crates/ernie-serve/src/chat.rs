//! `POST /v1/chat/completions`: the next turn of a conversation.
use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use ernie_checkpoint::{ChatTemplateOptions, Message, Tokenizer, encode_conversation, end_of_turn_ids};
use ernie_engine::FinishReason;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::sync::Arc;
use utoipa::ToSchema;

use crate::accounts::Caller;
use crate::answer::{Answers, Shape, Usage, Wanted, finish_reason, frame, room};
use crate::api_error::{ApiError, ErrorBody};
use crate::body::JsonBody;
use crate::completions::finite;
use crate::prompt;
use crate::request_id::RequestId;
use crate::sampling::{MAX_TOP_LOGPROBS, Sampling};
use crate::state::{Shared, State, unix_seconds};
use crate::token_text::token_bytes;
use crate::worker::Token;

/// The conversation, and what is to be reported.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct Chat {
    /// Its turns.
    pub messages: Vec<ChatMessage>,
    /// Report each token's log-probability.
    #[serde(default)]
    pub logprobs: Option<bool>,
    /// With `logprobs`: as many of the likeliest tokens in its place, at most 20.
    #[serde(default)]
    pub top_logprobs: Option<u32>,
    /// Variables of the chat template, by name.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Only text is supported.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub response_format: Option<Value>,
    /// Not supported.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
    /// Not supported.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    pub functions: Option<Vec<Value>>,
}

/// The body of a request.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatRequest {
    /// The conversation.
    #[serde(flatten)]
    pub chat: Chat,
    /// How it is continued.
    #[serde(flatten)]
    pub sampling: Sampling,
}

/// A turn.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct ChatMessage {
    /// `system` (or `developer`), `user`, `assistant`, or what the template knows besides.
    pub role: String,
    /// Its text.
    #[serde(default)]
    pub content: Option<Content>,
}

/// A text, whole or in parts.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of parts")]
pub enum Content {
    /// Whole.
    Text(String),
    /// In parts, which are put together.
    Parts(Vec<Part>),
}

/// A part of a turn.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct Part {
    /// `text`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text.
    #[serde(default)]
    pub text: Option<String>,
}

/// The answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatResponse {
    /// `chatcmpl-` and the request's id.
    pub id: String,
    /// `chat.completion`; `chat.completion.chunk` in a stream.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// `n` answers; in a stream one answer's next piece.
    pub choices: Vec<ChatChoice>,
    /// In a stream only in its last event, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Its number.
    pub index: usize,
    /// The turn; not in a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<Turn>,
    /// The next piece of the turn; in a stream only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<Turn>,
    /// If they were asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`; null while it goes on.
    pub finish_reason: Option<&'static str>,
}

/// A turn or a piece of one.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct Turn {
    /// `assistant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Its text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// The tokens of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One by one.
    pub content: Vec<ChatToken>,
}

/// A token and how likely it was.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ChatToken {
    /// As text.
    pub token: String,
    /// ln of the probability under the model.
    pub logprob: f32,
    /// As UTF-8; a token may end within a character.
    pub bytes: Vec<u8>,
    /// The likeliest tokens in its place.
    pub top_logprobs: Vec<ChatAlternative>,
}

/// A token that could have been chosen.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ChatAlternative {
    /// As text.
    pub token: String,
    /// ln of the probability under the model.
    pub logprob: f32,
    /// As UTF-8.
    pub bytes: Vec<u8>,
}

impl ChatAlternative {
    fn new(tokenizer: &Tokenizer, id: u32, logprob: f32) -> Self {
        let bytes = token_bytes(tokenizer, id);
        ChatAlternative { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: finite(logprob), bytes }
    }
}

/// The conversation's messages as the template takes them.
///
/// # Errors
/// 400 for a turn that is not text.
pub fn messages(turns: Vec<ChatMessage>) -> Result<Vec<Message>, ApiError> {
    let message = |(index, turn): (usize, ChatMessage)| {
        let content = match turn.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let text = |part: Part| match (part.kind.as_str(), part.text) {
                    ("text", Some(text)) => Ok(text),
                    (kind, _) => {
                        let message = format!("`messages[{index}].content`: expected parts of type `text` with a `text`, got `{kind}`");
                        Err(ApiError::field(format!("messages[{index}].content"), message))
                    }
                };
                parts.into_iter().map(text).collect::<Result<String, _>>()?
            }
        };
        // OpenAI's newer name for the same.
        let role = if turn.role == "developer" { "system".to_owned() } else { turn.role };
        Ok(Message { role, content })
    };
    if turns.is_empty() {
        return Err(ApiError::field("messages", "`messages`: expected at least one message"));
    }
    turns.into_iter().enumerate().map(message).collect()
}

/// The token ids of a conversation.
///
/// # Errors
/// 400 for turns that are not text, that the template refuses, or that are too long.
pub fn encode(
    state: &State,
    turns: Vec<ChatMessage>,
    add_generation_prompt: bool,
    variables: Option<Map<String, Value>>,
) -> Result<Vec<u32>, ApiError> {
    let messages = messages(turns)?;
    let variables = variables.unwrap_or_default().into_iter().collect();
    let options = ChatTemplateOptions { variables, ..ChatTemplateOptions::default() };
    let ids = encode_conversation(&state.tokenizer, &state.template, &messages, add_generation_prompt, &options);
    let ids = ids.map_err(|error| ApiError::field("messages", error.to_string()))?;
    prompt::check(state, &ids, "messages")?;
    Ok(ids)
}

fn prepare(state: &State, request: ChatRequest) -> Result<(Vec<u32>, Wanted), ApiError> {
    let ChatRequest { chat, sampling } = request;
    state.check_model(sampling.model.as_deref())?;
    let n = sampling.n()?;
    for (name, given) in [("tools", &chat.tools), ("functions", &chat.functions)] {
        if given.as_ref().is_some_and(|given| !given.is_empty()) {
            return Err(ApiError::unsupported(name, "is not supported"));
        }
    }
    if let Some(format) = chat.response_format.filter(|format| format["type"] != "text") {
        return Err(ApiError::unsupported("response_format", &format!("expected {{\"type\": \"text\"}}, got {format}")));
    }
    let logprobs = match (chat.logprobs.unwrap_or(false), chat.top_logprobs) {
        (_, Some(top)) if top > MAX_TOP_LOGPROBS => {
            return Err(ApiError::field("top_logprobs", format!("`top_logprobs`: expected at most {MAX_TOP_LOGPROBS}, got {top}")));
        }
        (false, Some(1..)) => return Err(ApiError::field("top_logprobs", "`top_logprobs` needs `logprobs` to be true")),
        (wanted, top) => wanted.then_some(top.unwrap_or(0) as usize),
    };
    let ids = encode(state, chat.messages, true, chat.chat_template_kwargs)?;
    let most = room(state, &ids, "messages", sampling.max_tokens(), usize::MAX)?;
    let mut params = sampling.params(state.random(), most)?;
    params.stop_ids.extend(end_of_turn_ids(&state.tokenizer));
    Ok((ids, Wanted { n, params, logprobs }))
}

/// Answer a conversation
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai", request_body = ChatRequest, responses(
    (status = 200, description = "The answers; with `stream` as server-sent events with `delta` for `message`", body = ChatResponse),
    (status = "4XX", description = "The request is at fault, or the queue is full (429)", body = ErrorBody),
    (status = "5XX", description = "The server is at fault, or shutting down (503)", body = ErrorBody),
))]
pub async fn chat_completions(
    Extract(state): Extract<Shared>,
    Extension(RequestId(id)): Extension<RequestId>,
    Extension(caller): Extension<Caller>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let request = ChatRequest { chat: body.parse()?, sampling: body.parse()? };
    let (streams, usage_wanted) = (request.sampling.streams()?, request.sampling.includes_usage());
    let (ids, wanted) = state.compute(|state| prepare(state, request)).await?;
    let permit = if streams { Some(state.stream()?) } else { None };
    let mut places = state.reserve(wanted.n)?;
    let most = wanted.n.saturating_mul(wanted.params.max_tokens);
    let charge = state.accounts.admit(&caller, &state.name, ids.len(), most).await?;
    let shape = ChatShape {
        head: ChatResponse {
            id: format!("chatcmpl-{id}"),
            object: if streams { "chat.completion.chunk" } else { "chat.completion" },
            created: unix_seconds(),
            model: state.name.clone(),
            choices: Vec::new(),
            usage: None,
        },
        tokenizer: Arc::clone(&state.tokenizer),
        logprobs: wanted.logprobs.is_some(),
        usage_wanted,
    };
    let answers = Answers::start(&state, &mut places, vec![ids], &wanted, charge);
    match permit {
        Some(permit) => Ok(answers.stream(&state, permit, shape)),
        None => Ok(Json(shape.whole(answers.gather().await?)).into_response()),
    }
}

/// How answers are written.
struct ChatShape {
    head: ChatResponse,
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    usage_wanted: bool,
}

impl ChatShape {
    fn whole(mut self, (answers, usage): (Vec<crate::answer::Answer>, Usage)) -> ChatResponse {
        for (index, answer) in answers.into_iter().enumerate() {
            let logprobs = self.report(&answer.tokens);
            let message = Some(Turn { role: Some("assistant"), content: Some(answer.text) });
            let finish_reason = answer.reason.map(finish_reason);
            self.head.choices.push(ChatChoice { index, message, delta: None, logprobs, finish_reason });
        }
        self.head.usage = Some(usage);
        self.head
    }

    fn report(&self, tokens: &[Token]) -> Option<ChatLogprobs> {
        let tokenizer = &self.tokenizer;
        let report = |token: &Token| {
            let ChatAlternative { token: text, logprob, bytes } = ChatAlternative::new(tokenizer, token.id?, token.logprob?);
            let top_logprobs = token.top.iter().map(|&(id, logprob)| ChatAlternative::new(tokenizer, id, logprob)).collect();
            Some(ChatToken { token: text, logprob, bytes, top_logprobs })
        };
        self.logprobs.then(|| ChatLogprobs { content: tokens.iter().filter_map(report).collect() })
    }

    fn event(&self, index: usize, delta: Turn, logprobs: Option<ChatLogprobs>, finish_reason: Option<&'static str>) -> Bytes {
        let choice = ChatChoice { index, message: None, delta: Some(delta), logprobs, finish_reason };
        frame(&ChatResponse { choices: vec![choice], ..self.head.clone() })
    }
}

impl Shape for ChatShape {
    fn open(&mut self, index: usize) -> Option<Bytes> {
        let delta = Turn { role: Some("assistant"), content: Some(String::new()) };
        Some(self.event(index, delta, None, None))
    }

    fn token(&mut self, index: usize, token: &Token) -> Option<Bytes> {
        let logprobs = token.id.and_then(|_| self.report(std::slice::from_ref(token)));
        let some = !token.text.is_empty() || logprobs.is_some();
        some.then(|| self.event(index, Turn { role: None, content: Some(token.text.clone()) }, logprobs, None))
    }

    fn end(&mut self, index: usize, text: &str, reason: FinishReason) -> Bytes {
        let content = Some(text.to_owned()).filter(|text| !text.is_empty());
        self.event(index, Turn { role: None, content }, None, Some(finish_reason(reason)))
    }

    fn usage(&mut self, usage: Usage) -> Option<Bytes> {
        self.usage_wanted.then(|| frame(&ChatResponse { usage: Some(usage), ..self.head.clone() }))
    }
}
