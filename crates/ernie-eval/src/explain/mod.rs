//! What a model did with one text: how much each token surprised it, which heads its gates left active, which experts its routers chose.
//!
//! The Burn model computes it in f32 from the weights as they are stored: the engine keeps nothing of what it chose. [`terminal`] and [`svg`] draw the same picture: tokens
//! are columns as wide as their text, so that the text can be read, and what is known of a token stands below it.
mod layout;
mod summary;
pub mod svg;
pub mod terminal;
#[cfg(test)]
mod tests;

use ernie_checkpoint::{Checkpoint, Config};
use ernie_model::{Ernie, LoadError, PackedBatch, context_gate::Gating, moe::Routing};
use serde::Serialize;

/// A text could not be explained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to look at.
    #[error("the text is empty; give at least one token")]
    Empty,
    /// More tokens than the model was made for.
    #[error("the text has {tokens} tokens and the model's longest context is {limit}; give a shorter text")]
    TooLong {
        /// Tokens of the text.
        tokens: usize,
        /// `max_position_embeddings` of config.json.
        limit: usize,
    },
    /// A token id that the model does not have.
    #[error("token {id} at position {position} is not in the vocabulary of {vocab_size} (ids 0 to {})", vocab_size - 1)]
    UnknownToken {
        /// Index in the ids given.
        position: usize,
        /// The id.
        id: u32,
        /// Size of the model's vocabulary.
        vocab_size: usize,
    },
    /// The checkpoint did not become a network.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The model's numbers are damaged.
    #[error("the loss of token {position} is {value}: the model's weights are damaged")]
    NotFinite {
        /// Position of the token in the text.
        position: usize,
        /// Its loss.
        value: f32,
    },
}

/// What a model did with `t` tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The tokens, `[t]`.
    pub ids: Vec<u32>,
    /// −ln p of each token after those before it, in nats, `[t]`; none of the first, which is given.
    pub losses: Vec<Option<f32>>,
    /// The layers that choose heads or experts, in order; none of a plain dense model.
    pub layers: Vec<Layer>,
}

/// What one layer chose.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Layer {
    /// Its index in the model.
    pub layer: usize,
    /// What its gates did, if it has them.
    pub heads: Option<Heads>,
    /// What its router did, if it has one.
    pub experts: Option<Experts>,
}

/// What one layer's gates did, n heads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Heads {
    /// Semantic density of each token, 0 to 2, `[t]`.
    pub density: Vec<f32>,
    /// How far each head is open, 0 to 1, `[t][n]`.
    pub gates: Vec<Vec<f32>>,
    /// Which heads are active, `[t][n]`.
    pub active: Vec<Vec<bool>>,
    /// Share of the heads that are active, over all tokens.
    pub active_share: f64,
    /// Pearson correlation of a token's density with the number of its active heads; none where one of them never changes.
    pub correlation: Option<f64>,
}

/// What one layer's router did, e experts, k of them for each token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Experts {
    /// The chosen, best first, `[t][k]`.
    pub choices: Vec<Vec<Choice>>,
    /// Tokens that chose each expert, `[e]`.
    pub tokens: Vec<u64>,
}

/// One expert of one token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Choice {
    /// Its index in the layer.
    pub expert: u32,
    /// What its output is multiplied by.
    pub weight: f32,
}

/// Runs the model of a checkpoint over a text, given as token ids.
///
/// # Errors
/// See [`Error`]; everything about the ids is checked before weights are read.
pub fn explain(checkpoint: &Checkpoint, ids: &[u32]) -> Result<Explanation, Error> {
    check(checkpoint.config(), ids)?;
    let mut model = Ernie::load(checkpoint, &ernie_model::inference_device())?;
    model.reserve_positions(ids.len());
    let batch = PackedBatch::from_documents([ids]);
    let hidden = model.forward(&batch);
    let layers = hidden.choices.iter().enumerate().map(|(layer, choices)| Layer {
        layer,
        heads: choices.gating.as_ref().map(Heads::of),
        experts: choices.routing.as_ref().map(Experts::of),
    });
    let layers = layers.filter(|layer| layer.heads.is_some() || layer.experts.is_some()).collect();
    let foretold = model.token_losses(hidden.states_th, &batch.targets);
    // Position i foretells token i + 1; what the last one foretells is not in the text.
    let losses: Vec<_> = std::iter::once(None).chain(foretold[..ids.len() - 1].iter().copied().map(Some)).collect();
    for (position, loss) in losses.iter().enumerate() {
        if let Some(value) = loss.filter(|loss| !loss.is_finite()) {
            return Err(Error::NotFinite { position, value });
        }
    }
    Ok(Explanation { ids: ids.to_vec(), losses, layers })
}

fn check(config: &Config, ids: &[u32]) -> Result<(), Error> {
    let (limit, vocab_size) = (config.max_position_embeddings, config.vocab_size);
    if ids.is_empty() {
        return Err(Error::Empty);
    }
    if ids.len() > limit {
        return Err(Error::TooLong { tokens: ids.len(), limit });
    }
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        Some(position) => Err(Error::UnknownToken { position, id: ids[position], vocab_size }),
        None => Ok(()),
    }
}

impl Heads {
    fn of(gating: &Gating) -> Self {
        let (density, gates, active) = (gating.density(), gating.gates(), gating.active());
        let heads = gates.len() / density.len();
        Self {
            gates: gates.chunks(heads).map(<[f32]>::to_vec).collect(),
            active: active.chunks(heads).map(<[bool]>::to_vec).collect(),
            active_share: gating.active_share(),
            correlation: gating.correlation(),
            density,
        }
    }
}

impl Experts {
    fn of(routing: &Routing) -> Self {
        let weights = routing.weights();
        let top_k = routing.weights_tk.dims()[1];
        let choices = routing.indices.iter().zip(&weights).map(|(&expert, &weight)| Choice { expert, weight }).collect::<Vec<_>>();
        Self { choices: choices.chunks(top_k).map(<[Choice]>::to_vec).collect(), tokens: routing.usage() }
    }
}

impl Explanation {
    /// Mean loss in nats of the tokens that have one; 0 without any.
    pub fn mean_loss(&self) -> f64 {
        let scored = self.losses.iter().flatten();
        let count = scored.clone().count();
        scored.map(|&loss| f64::from(loss)).sum::<f64>() / count.max(1) as f64
    }

    /// The top of the losses' bars: the largest, but at least 1 nat, so that a text which the model knows by heart looks calm.
    fn most_loss(&self) -> f32 {
        self.losses.iter().flatten().copied().fold(1.0, f32::max)
    }

    /// The largest density of any layer, the top of its bars; `None` without gates.
    fn most_density(&self) -> Option<f32> {
        self.layers.iter().filter_map(|layer| layer.heads.as_ref()).flat_map(|heads| &heads.density).copied().reduce(f32::max)
    }

    fn has_experts(&self) -> bool {
        self.layers.iter().any(|layer| layer.experts.is_some())
    }
}
