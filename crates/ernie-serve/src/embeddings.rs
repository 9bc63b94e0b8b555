//! `POST /v1/embeddings`: texts as vectors of length 1.
//!
//! A vector is the mean of the model's final states over the text. The models are trained to tell the next token, so the last state alone would speak of
//! what follows; the mean speaks of the whole text, and needs no training of its own.
use std::time::Duration;

use axum::extract::State as Extract;
use axum::{Extension, Json};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use utoipa::ToSchema;

use crate::accounts::Caller;
use crate::answer::Usage;
use crate::api_error::ApiError;
use crate::body::JsonBody;
use crate::exchange::Notes;
use crate::fields::{self, Known};
use crate::numbers::whole;
use crate::prompt::Prompt;
use crate::state::{Shared, State};
use crate::worker::{Event, Job, Places, Refused, Task};

/// Most texts of a request, as OpenAI has it.
const MAX_TEXTS: usize = 2048;
/// Between two looks for places in a full queue.
const PLACES_PAUSE: Duration = Duration::from_millis(10);

/// Texts.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct EmbeddingRequest {
    /// The model's name.
    #[serde(default)]
    pub model: Option<String>,
    /// Text or token ids, one or several.
    pub input: Prompt,
    /// How vectors are written.
    #[serde(default)]
    pub encoding_format: Option<Encoding>,
    /// Only the model's own number is supported.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub dimensions: Option<usize>,
}

/// How vectors are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// A list of numbers.
    #[default]
    Float,
    /// 32-bit numbers, little endian, as base64.
    Base64,
}

/// Their vectors.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EmbeddingResponse {
    /// `list`.
    pub object: &'static str,
    /// One for each text.
    pub data: Vec<Embedding>,
    /// The model's name.
    pub model: String,
    /// Tokens of the texts.
    pub usage: Usage,
}

/// A vector.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Embedding {
    /// `embedding`.
    pub object: &'static str,
    /// Which text's.
    pub index: usize,
    /// As many numbers as the model's states have.
    pub embedding: Vector,
}

/// A vector as it is written.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Vector {
    /// Numbers.
    Float(Vec<f32>),
    /// base64.
    Base64(String),
}

impl Vector {
    fn new(values: Vec<f32>, encoding: Encoding) -> Self {
        match encoding {
            Encoding::Float => Vector::Float(values),
            Encoding::Base64 => Vector::Base64(STANDARD.encode(values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())),
        }
    }
}

/// Places in the queue for a request that is under way: it does not give up because others came meanwhile.
async fn wait_for_places(state: &State, count: usize) -> Result<Places, ApiError> {
    loop {
        match state.worker.reserve(count) {
            Err(Refused::Full) => tokio::time::sleep(PLACES_PAUSE).await,
            reserved => return reserved.map_err(ApiError::refused),
        }
    }
}

/// Texts to vectors
#[utoipa::path(post, path = "/v1/embeddings", tag = "openai", request_body = EmbeddingRequest, responses(
    (status = 200, description = "The vectors", body = EmbeddingResponse),
))]
pub async fn embeddings(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    Extension(notes): Extension<Notes>,
    body: JsonBody,
) -> Result<Json<EmbeddingResponse>, ApiError> {
    fields::check(&body, &Known::of("EmbeddingRequest"))?;
    let request: EmbeddingRequest = body.parse()?;
    state.check_model(request.model.as_deref())?;
    let hidden = state.model.config().hidden_size;
    if request.dimensions.is_some_and(|dimensions| dimensions != hidden) {
        return Err(ApiError::unsupported("dimensions", &format!("this model's vectors have {hidden}")));
    }
    let input = request.input;
    let texts = state.compute(|state| input.encode(state, "input")).await?;
    if texts.len() > MAX_TEXTS {
        return Err(ApiError::field("input", format!("`input`: expected at most {MAX_TEXTS} texts, got {}", texts.len())));
    }
    let (count, tokens) = (texts.len(), texts.iter().map(Vec::len).sum());
    // A part of the queue at a time, so that many texts are no reason to refuse them, nor keep all places from others.
    let part = (state.config.max_queue / 4).max(1);
    let mut places = Some(state.reserve(count.min(part))?);
    let charge = state.accounts.admit(&caller, &state.name, tokens, 0).await?;
    notes.begin("embeddings", &state.name, tokens, || texts.iter().map(|ids| state.tokenizer.decode(ids, false)).collect());
    let (mut term, mut vectors) = (state.term(&charge), vec![None; count]);
    let mut texts = texts.into_iter().enumerate().peekable();
    while texts.peek().is_some() {
        let of_part: Vec<_> = texts.by_ref().take(part).collect();
        let mut places = match places.take() {
            Some(places) => places,
            None => term.within(wait_for_places(&state, of_part.len())).await??,
        };
        let (sender, mut events) = mpsc::channel(of_part.len());
        for (index, prompt) in of_part {
            places.send(Job { task: Task::Embed { prompt }, index, events: sender.clone(), charge: Some(charge.clone()) });
        }
        drop(sender);
        while let Some((index, event)) = term.within(events.recv()).await? {
            match event {
                Event::Embedding(values) => vectors[index] = Some(values),
                Event::Failed(error) => return Err(ApiError::engine(&error, "input")),
                other => unreachable!("embeddings were asked for, not {other:?}"),
            }
        }
    }
    let encoding = request.encoding_format.unwrap_or_default();
    let embedding = |(index, values): (usize, Option<Vec<f32>>)| {
        let values = values.ok_or_else(|| ApiError::unavailable("The server is stopping."))?;
        Ok(Embedding { object: "embedding", index, embedding: Vector::new(values, encoding) })
    };
    let data = vectors.into_iter().enumerate().map(embedding).collect::<Result<_, ApiError>>()?;
    charge.settle().await?;
    Ok(Json(EmbeddingResponse { object: "list", data, model: state.name.clone(), usage: Usage::new(tokens, 0) }))
}
