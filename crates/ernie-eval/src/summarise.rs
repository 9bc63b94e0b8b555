//! Summaries by a model: prompts continued greedily, many together, and scored against what people wrote.
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use ernie_checkpoint::{Tokenizer, TokenizerError};
use ernie_engine::{Engine, EngineEvent, EngineOptions, FinishReason, Model, Request, RequestId, SamplingParams};

use crate::bootstrap::Estimate;
use crate::examples::Example;
use crate::prompt::{Prompt, PromptTemplate};
use crate::rouge::{Rouge, Units, best_rouge};

/// Summaries could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SummariseError {
    /// A prompt could not be tokenised.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model could not be run.
    #[error(transparent)]
    Engine(#[from] ernie_engine::Error),
    /// A context without room for a prompt and a summary.
    #[error(
        "a context of {context} tokens with {max_tokens} for the summary; give a context of at most {limit}, and some of it for the prompt"
    )]
    Context {
        /// Tokens of prompt and summary together.
        context: usize,
        /// Of these, for the summary.
        max_tokens: usize,
        /// What the model, or the memory of its cache, has room for.
        limit: usize,
    },
    /// A prompt of which nothing but the template fits.
    #[error(
        "{id}: {room} tokens for the prompt, and {needed} are needed for any of the document to be in it; give a longer context or a shorter template"
    )]
    NoRoom {
        /// The example.
        id: String,
        /// Tokens there are.
        room: usize,
        /// Tokens needed.
        needed: usize,
    },
}

/// How summaries are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SummariseOptions {
    /// Tokens of a prompt and its summary together.
    pub context: usize,
    /// Most tokens of a summary.
    pub max_tokens: usize,
    /// Summaries made together. It changes none of them.
    pub batch: usize,
}

/// What a model wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Its text, as it came: usually with a space at the beginning.
    pub text: String,
    /// Tokens chosen, the one that ended it included.
    pub tokens: usize,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// The prompts of examples, each with room for its summary.
///
/// # Errors
/// [`SummariseError::Context`] for a context that `model` was not made for or in which no prompt fits; [`SummariseError::NoRoom`].
pub fn prompts(
    model: &Model,
    tokenizer: &Tokenizer,
    template: &PromptTemplate,
    examples: &[Example],
    options: SummariseOptions,
) -> Result<Vec<Prompt>, SummariseError> {
    let SummariseOptions { context, max_tokens, .. } = options;
    let limit = model.config().max_position_embeddings;
    if context > limit || max_tokens == 0 || max_tokens >= context {
        return Err(SummariseError::Context { context, max_tokens, limit });
    }
    examples.iter().map(|example| template.prompt(tokenizer, example, context - max_tokens)).collect()
}

/// Continues each prompt with the likeliest tokens until the model ends the text or `max_tokens` is reached. `progress` is told after each step how many are
/// finished, and may end the work: then those that are not finished are `None`. A summary has the same tokens in any batch.
///
/// # Errors
/// [`SummariseError::Context`] for a context that the cache has no memory for, [`ernie_engine::Error`] for a prompt longer than the context or a damaged
/// model.
pub fn summarise(
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    options: SummariseOptions,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Option<Summary>>, SummariseError> {
    let SummariseOptions { context, max_tokens, batch } = options;
    let mut engine = Engine::new(Arc::clone(model), EngineOptions { max_batch_size: batch, max_len: context, ..EngineOptions::default() })?;
    if engine.max_len() < context {
        return Err(SummariseError::Context { context, max_tokens, limit: engine.max_len() });
    }
    let params = SamplingParams { max_tokens, ..SamplingParams::greedy() };
    let mut summaries: Vec<Option<Summary>> = vec![None; prompts.len()];
    let mut running: HashMap<RequestId, (usize, Vec<u32>)> = HashMap::new();
    let (mut waiting, mut finished) = (prompts.iter().enumerate(), 0);
    loop {
        for (index, prompt) in waiting.by_ref().take(batch - running.len()) {
            let id = engine.submit(Request { prompt: prompt.ids.clone(), params: params.clone(), logprobs: None })?;
            running.insert(id, (index, Vec::new()));
        }
        if running.is_empty() {
            return Ok(summaries);
        }
        for event in engine.step() {
            match *event {
                EngineEvent::Token { id, token, .. } => {
                    if let Some((_, tokens)) = running.get_mut(&id) {
                        tokens.push(token);
                    }
                }
                EngineEvent::Finished { id, reason, .. } => {
                    if let Some((index, tokens)) = running.remove(&id) {
                        // The token that ends a text is no part of it.
                        let visible = tokens.len() - usize::from(reason == FinishReason::Stop);
                        let text = tokenizer.decode(&tokens[..visible], true);
                        summaries[index] = Some(Summary { text, tokens: tokens.len(), finish_reason: reason });
                        finished += 1;
                    }
                }
                EngineEvent::Failed { token, value, .. } => return Err(ernie_engine::Error::BadLogit { id: token, value }.into()),
                EngineEvent::Stuck { ref reason, .. } => return Err(ernie_engine::Error::Constraint { reason: reason.clone() }.into()),
            }
        }
        if progress(finished).is_break() {
            return Ok(summaries);
        }
    }
}

/// The scores of summaries: F1 against the best of several references, as [`best_rouge`] chooses it.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct SummaryScores {
    /// Summaries that were scored.
    pub examples: usize,
    /// ROUGE-1.
    pub rouge1: Estimate,
    /// ROUGE-2.
    pub rouge2: Estimate,
    /// ROUGE-L.
    pub rouge_l: Estimate,
}

impl SummaryScores {
    /// Means with their intervals.
    pub fn of(scores: &[Rouge]) -> Self {
        let estimate = |f1: fn(&Rouge) -> f64| Estimate::of(&scores.iter().map(f1).collect::<Vec<_>>());
        SummaryScores {
            examples: scores.len(),
            rouge1: estimate(|score| score.rouge1.f1),
            rouge2: estimate(|score| score.rouge2.f1),
            rouge_l: estimate(|score| score.rouge_l.f1),
        }
    }
}

/// The score of a summary of an example.
pub fn score_summary(example: &Example, summary: &Summary, units: Units) -> Rouge {
    best_rouge(example.references.iter().map(String::as_str), &summary.text, units)
}
