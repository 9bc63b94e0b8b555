//! `POST /v1/chat/completions`: the next turn of a conversation.
use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use ernie_checkpoint::{ChatTemplate, ChatTemplateOptions, Message, Tokenizer, encode_conversation, end_of_turn_ids};
use ernie_engine::FinishReason;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use utoipa::ToSchema;

use crate::accounts::Caller;
use crate::answer::{Answers, Shape, Usage, Wanted, finish_reason, frame, room};
use crate::api_error::ApiError;
use crate::body::JsonBody;
use crate::completions::finite;
use crate::config::ReasoningParser;
use crate::exchange::Notes;
use crate::fields::{self, Known};
use crate::grammar::Form;
use crate::numbers::whole;
use crate::prompt;
use crate::request_id::RequestId;
use crate::sampling::{MAX_TOP_LOGPROBS, Sampling};
use crate::state::{Shared, State, unix_seconds};
use crate::structured::Structured;
use crate::token_text::token_bytes;
use crate::tools::{self, Called, Tool, ToolCall, Toolbox, Tools, past_calls};
use crate::turn::{Piece, Reading, TurnReader};
use crate::worker::Token;

/// The conversation, and what is to be reported.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct Chat {
    /// Its turns.
    #[schema(min_items = 1)]
    pub messages: Vec<ChatMessage>,
    /// Report each token's log-probability.
    #[serde(default)]
    pub logprobs: Option<bool>,
    /// With `logprobs`: as many of the likeliest tokens in its place, at most 20.
    #[serde(default, deserialize_with = "whole")]
    #[schema(maximum = 20)]
    pub top_logprobs: Option<u32>,
    /// Variables of the chat template, by name.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
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
    /// In what form.
    #[serde(flatten)]
    pub structured: Structured,
    /// What may be called.
    #[serde(flatten)]
    pub tools: Tools,
}

/// A turn.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct ChatMessage {
    /// `system` (or `developer`), `user`, `assistant`, `tool`, or what the template knows besides.
    pub role: String,
    /// Its text; only the assistant's turns with calls may do without.
    #[serde(default)]
    pub content: Option<Content>,
    /// Of the assistant: what it called.
    #[serde(default)]
    pub tool_calls: Option<Vec<ToolCall>>,
    /// Of a tool: the call whose result this is.
    #[serde(default)]
    pub tool_call_id: Option<String>,
    /// Of the assistant: its thoughts, for templates that read them.
    #[serde(default)]
    pub reasoning_content: Option<String>,
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
    #[schema(pattern = "^text$")]
    pub kind: String,
    /// The text.
    #[serde(default)]
    #[schema(required = true, value_type = String)]
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
    /// In a stream, if asked for, in its last event, and null in those before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
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
    /// `stop`, `length` or `tool_calls`; null while it goes on.
    pub finish_reason: Option<&'static str>,
}

/// A turn or a piece of one.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct Turn {
    /// `assistant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Its text; null in a turn that only calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub content: Option<Option<String>>,
    /// Its thoughts, if the server was told to look for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// What it calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
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
        let calls = turn.tool_calls.filter(|calls| !calls.is_empty());
        let content = match turn.content {
            // Who only calls says nothing.
            None if turn.role == "assistant" && calls.is_some() => String::new(),
            None => {
                let field = format!("messages[{index}].content");
                return Err(ApiError::field(&field, format!("`{field}`: expected a string or a list of parts")));
            }
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
        let mut message = Message::new(role, content);
        if let Some(calls) = calls {
            message.fields.push(("tool_calls".to_owned(), past_calls(calls, &format!("messages[{index}]"))?));
        }
        message.fields.extend(turn.tool_call_id.map(|id| ("tool_call_id".to_owned(), Value::String(id))));
        message.fields.extend(turn.reasoning_content.map(|text| ("reasoning_content".to_owned(), Value::String(text))));
        Ok(message)
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
    tools: Option<Vec<Tool>>,
    add_generation_prompt: bool,
    variables: Option<Map<String, Value>>,
) -> Result<Vec<u32>, ApiError> {
    let toolbox = Tools { tools, ..Tools::default() }.check()?;
    let messages = tools::write_out(&state.template, toolbox.as_ref(), messages(turns)?);
    encode_messages(state, &messages, add_generation_prompt, &template_options(variables, toolbox.as_ref()))
}

fn encode_messages(
    state: &State,
    messages: &[Message],
    add_generation_prompt: bool,
    options: &ChatTemplateOptions,
) -> Result<Vec<u32>, ApiError> {
    let ids = encode_conversation(&state.tokenizer, &state.template, messages, add_generation_prompt, options);
    let ids = ids.map_err(|error| ApiError::field("messages", error.to_string()))?;
    prompt::check(state, &ids, "messages")?;
    Ok(ids)
}

fn template_options(variables: Option<Map<String, Value>>, toolbox: Option<&Toolbox>) -> ChatTemplateOptions {
    let tools = toolbox.map(|toolbox| ("tools".to_owned(), toolbox.for_template()));
    ChatTemplateOptions { variables: variables.unwrap_or_default().into_iter().chain(tools).collect(), ..ChatTemplateOptions::default() }
}

/// Whether the prompt has the assistant's thoughts begun and not ended. Only what the template adds for the assistant counts, not what others said.
fn has_begun_to_think(template: &ChatTemplate, messages: &[Message], options: &ChatTemplateOptions) -> Result<bool, ApiError> {
    let render = |add: bool| template.render(messages, add, options).map_err(|error| ApiError::field("messages", error.to_string()));
    let (whole, before) = (render(true)?, render(false)?);
    let added = whole.strip_prefix(before.as_str()).unwrap_or(&whole);
    Ok(added.rfind("<think>") > added.rfind("</think>"))
}

fn prepare(state: &State, request: ChatRequest) -> Result<(Vec<u32>, Wanted, Reading), ApiError> {
    let ChatRequest { chat, sampling, structured, tools } = request;
    state.check_model(sampling.model.as_deref())?;
    let n = sampling.n()?;
    let toolbox = tools.check()?;
    let logprobs = match (chat.logprobs.unwrap_or(false), chat.top_logprobs) {
        (_, Some(top)) if top > MAX_TOP_LOGPROBS => {
            return Err(ApiError::field("top_logprobs", format!("`top_logprobs`: expected at most {MAX_TOP_LOGPROBS}, got {top}")));
        }
        (false, Some(1..)) => return Err(ApiError::field("top_logprobs", "`top_logprobs` needs `logprobs` to be true")),
        (wanted, top) => wanted.then_some(top.unwrap_or(0) as usize),
    };
    let options = template_options(chat.chat_template_kwargs, toolbox.as_ref());
    let messages = tools::write_out(&state.template, toolbox.as_ref(), messages(chat.messages)?);
    let ids = encode_messages(state, &messages, true, &options)?;
    let thoughts = match state.config.reasoning_parser {
        ReasoningParser::None => None,
        ReasoningParser::Ernie => Some(has_begun_to_think(&state.template, &messages, &options)?),
    };
    let most = room(state, &ids, "messages", sampling.max_tokens(), usize::MAX)?;
    let mut params = sampling.params(state.random(), most)?;
    params.stop_ids.extend(end_of_turn_ids(&state.tokenizer));
    params.stop.extend(toolbox.as_ref().and_then(Toolbox::stop));
    // Where there must be calls there is no text that could have a form.
    let asked = structured.rule()?.filter(|_| !toolbox.as_ref().is_some_and(Toolbox::must));
    let calls = toolbox.as_ref().and_then(|toolbox| toolbox.calls(asked.is_some()));
    let constraint = state.constraint(Form { rule: None, calls, thinks: thoughts == Some(true) }, asked, &params)?;
    let only_calls = toolbox.as_ref().is_some_and(Toolbox::must);
    let reading = Reading { thoughts, functions: toolbox.map(|toolbox| toolbox.names()), only_calls };
    Ok((ids, Wanted { n, params, logprobs, constraint }, reading))
}

/// Answer a conversation
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai", request_body = ChatRequest, responses(
    (status = 200, description = "The answers; with `stream` as server-sent events, each a ChatResponse with `delta` for `message`", content(
        (ChatResponse = "application/json"), (String = "text/event-stream"),
    )),
))]
pub async fn chat_completions(
    Extract(state): Extract<Shared>,
    Extension(RequestId(id)): Extension<RequestId>,
    Extension(caller): Extension<Caller>,
    Extension(notes): Extension<Notes>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    fields::check(&body, &Known::of("ChatRequest"))?;
    let request = ChatRequest { chat: body.parse()?, sampling: body.parse()?, structured: body.parse()?, tools: body.parse()? };
    let (streams, usage_wanted) = (request.sampling.streams()?, request.sampling.includes_usage());
    let (ids, wanted, reading) = state.compute(|state| prepare(state, request)).await?;
    let permit = if streams { Some(state.stream()?) } else { None };
    let mut places = state.reserve(wanted.n)?;
    let most = wanted.n.saturating_mul(wanted.params.max_tokens);
    let charge = state.accounts.admit(&caller, &state.name, ids.len(), most).await?;
    notes.begin("chat", &state.name, ids.len(), || vec![state.tokenizer.decode(&ids, false)]);
    let shape = ChatShape {
        head: ChatResponse {
            id: format!("chatcmpl-{id}"),
            object: if streams { "chat.completion.chunk" } else { "chat.completion" },
            created: unix_seconds(),
            model: state.name.clone(),
            choices: Vec::new(),
            usage: (streams && usage_wanted).then_some(None),
        },
        tokenizer: Arc::clone(&state.tokenizer),
        logprobs: wanted.logprobs.is_some(),
        usage_wanted,
        readers: vec![TurnReader::new(&reading); wanted.n],
        names: state.random.clone(),
    };
    let answers = Answers::start(&state, &mut places, vec![ids], &wanted, (charge, notes.clone()));
    match permit {
        Some(permit) => Ok(answers.stream(&state, permit, shape)),
        None => {
            let response = shape.whole(answers.gather().await?);
            response.choices.iter().filter_map(|choice| choice.finish_reason).for_each(|reason| notes.finished(reason));
            Ok(Json(response).into_response())
        }
    }
}

/// How answers are written.
struct ChatShape {
    head: ChatResponse,
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    usage_wanted: bool,
    /// Of each answer.
    readers: Vec<TurnReader>,
    /// Where names of calls come from.
    names: RandomState,
}

impl ChatShape {
    fn whole(mut self, (answers, usage): (Vec<crate::answer::Answer>, Usage)) -> ChatResponse {
        for (index, answer) in answers.into_iter().enumerate() {
            let logprobs = self.report(&answer.tokens);
            let mut pieces = self.readers[index].push(&answer.text);
            pieces.extend(self.readers[index].finish());
            let (mut content, mut reasoning, mut calls) = (String::new(), None::<String>, Vec::<ToolCall>::new());
            for piece in pieces {
                match piece {
                    Piece::Content(text) => content.push_str(&text),
                    Piece::Reasoning(text) => reasoning.get_or_insert_default().push_str(&text),
                    Piece::Call { index: number, name } => calls.push(ToolCall { index: None, ..self.call(index, number, name) }),
                    Piece::Arguments { index, text } => calls[index].function.arguments.push_str(&text),
                }
            }
            let content = Some(Some(content).filter(|content| !content.is_empty() || calls.is_empty()));
            let tool_calls = Some(calls).filter(|calls| !calls.is_empty());
            let message = Some(Turn { role: Some("assistant"), content, reasoning_content: reasoning, tool_calls });
            let finish_reason = answer.reason.map(|reason| self.reason(index, reason));
            self.head.choices.push(ChatChoice { index, message, delta: None, logprobs, finish_reason });
        }
        self.head.usage = Some(Some(usage));
        self.head
    }

    /// A call that begins, with an id that no other has.
    fn call(&self, answer: usize, number: usize, name: String) -> ToolCall {
        let id = format!("call_{:016x}", self.names.hash_one((&self.head.id, answer, number)));
        let function = Called { name: Some(name), arguments: String::new() };
        ToolCall { index: Some(number), id: Some(id), kind: Some("function".to_owned()), function }
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

    /// An event for each piece; the first has the log-probabilities, if there are any.
    fn events(&self, answer: usize, mut pieces: Vec<Piece>, mut logprobs: Option<ChatLogprobs>) -> Vec<u8> {
        if pieces.is_empty() && logprobs.is_some() {
            pieces.push(Piece::Content(String::new()));
        }
        let mut events = Vec::new();
        for piece in pieces {
            let delta = match piece {
                Piece::Content(text) => Turn { content: Some(Some(text)), ..Turn::default() },
                Piece::Reasoning(text) => Turn { reasoning_content: Some(text), ..Turn::default() },
                Piece::Call { index, name } => Turn { tool_calls: Some(vec![self.call(answer, index, name)]), ..Turn::default() },
                Piece::Arguments { index, text } => {
                    let function = Called { name: None, arguments: text };
                    let call = ToolCall { index: Some(index), id: None, kind: None, function };
                    Turn { tool_calls: Some(vec![call]), ..Turn::default() }
                }
            };
            events.extend_from_slice(&self.event(answer, delta, logprobs.take(), None));
        }
        events
    }
}

impl Shape for ChatShape {
    fn open(&mut self, index: usize) -> Option<Bytes> {
        let delta = Turn { role: Some("assistant"), content: Some(Some(String::new())), ..Turn::default() };
        Some(self.event(index, delta, None, None))
    }

    fn token(&mut self, index: usize, token: &Token) -> Option<Bytes> {
        let logprobs = token.id.and_then(|_| self.report(std::slice::from_ref(token)));
        let pieces = self.readers[index].push(&token.text);
        let events = self.events(index, pieces, logprobs);
        (!events.is_empty()).then(|| events.into())
    }

    fn end(&mut self, index: usize, text: &str, reason: FinishReason) -> Bytes {
        let mut pieces = self.readers[index].push(text);
        pieces.extend(self.readers[index].finish());
        let mut events = self.events(index, pieces, None);
        events.extend_from_slice(&self.event(index, Turn::default(), None, Some(self.reason(index, reason))));
        events.into()
    }

    fn reason(&self, index: usize, reason: FinishReason) -> &'static str {
        match finish_reason(reason) {
            "stop" if self.readers[index].calls() > 0 => "tool_calls",
            reason => reason,
        }
    }

    fn usage(&mut self, usage: Usage) -> Option<Bytes> {
        self.usage_wanted.then(|| frame(&ChatResponse { usage: Some(Some(usage)), ..self.head.clone() }))
    }
}
