//! What a model makes of the validation documents: losses, experts, heads.
use std::collections::BTreeMap;
use std::path::Path;

use ernie_checkpoint::Checkpoint;
use ernie_kernels::scratch;
use ernie_model::Ernie;
use ernie_model::steering::NO_DOMAIN;

use crate::curriculum::LayerLosses;
use crate::data::encoding::Encoder;
use crate::data::{Corpus, Prepared};
use crate::error::TrainError;
use crate::experts::ExpertUse;
use crate::heads::{HeadSums, HeadUse};
use crate::recipe::{self, Precision, Recipe};
use crate::trainer::packed;

/// A model on the validation documents, which tell it nothing of their domains.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Validated {
    /// Mean loss of each source in nats per token.
    pub losses: Vec<(String, f64)>,
    /// Where the tokens of each domain went, in a model with experts.
    pub experts: Option<ExpertUse>,
    /// What the gates of each layer that has them did.
    pub active_heads: Vec<HeadUse>,
    /// What a curriculum remembers of the training's losses in each expert.
    pub expert_losses: Vec<LayerLosses>,
}

/// Mean loss per source of a model on the validation documents of the recipe's corpus, in nats per token.
///
/// # Errors
/// If the model cannot be loaded.
pub fn evaluate(recipe: &Recipe, checkpoint: &Checkpoint, corpus: &Corpus) -> Result<Vec<(String, f64)>, TrainError> {
    let mut model = Ernie::load(checkpoint, &ernie_model::training_device())?;
    model.reserve_positions(recipe.data.sequence_length);
    Ok(validate(&model, corpus, recipe).losses)
}

/// Loss of a reference model in each of the run's sources, on their validation text, in nats per token.
///
/// # Errors
/// If the reference cannot be loaded, or has another tokenizer than the run.
pub(crate) fn reached(recipe: &Recipe, reference: &Path, prepared: &Prepared, say: &mut dyn FnMut(&str)) -> Result<Vec<f64>, TrainError> {
    let checkpoint = Checkpoint::open(reference)?;
    let pieces = checkpoint.config().vocab_size;
    let encoder = Encoder::from_dir(reference)?;
    if encoder.fingerprint() != Encoder::from_dir(&prepared.tokenizer_dir)?.fingerprint() || pieces < encoder.vocab_size() {
        let problem = format!("{} has another tokenizer than the run", reference.display());
        let fix = "give a model that was trained with this tokenizer, or its directory as tokenizer.path".into();
        return Err(recipe::Error::Invalid { key: "data.priority.reference".into(), problem, fix }.into());
    }
    let (length, limit) = (recipe.data.sequence_length, checkpoint.config().max_position_embeddings);
    if length > limit {
        let problem = format!("{} was made for {limit} tokens, and rows have {length}", reference.display());
        let fix = "give a model for longer texts, or a shorter data.sequence_length".into();
        return Err(recipe::Error::Invalid { key: "data.priority.reference".into(), problem, fix }.into());
    }
    say(&format!("scoring validation text by {}", reference.display()));
    let mut model = Ernie::load(&checkpoint, &ernie_model::training_device())?;
    model.reserve_positions(length);
    let losses: BTreeMap<String, f64> = validate(&model, &prepared.corpus, recipe).losses.into_iter().collect();
    // A source without validation text is taken as it is.
    Ok(prepared.corpus.sources.iter().map(|source| losses.get(&source.name).copied().unwrap_or(0.0)).collect())
}

/// In f32 whatever the training's precision, so that the figures of runs compare.
pub(crate) fn validate(model: &Ernie, corpus: &Corpus, recipe: &Recipe) -> Validated {
    let mut model = model.without_tape();
    model.set_precision(Precision::F32.into());
    let (rows, length) = (recipe.data.batch_size, recipe.data.sequence_length);
    let per_source = recipe.run.validate_tokens as usize / corpus.sources.len();
    let mut losses = Vec::new();
    let mut counts: BTreeMap<usize, Vec<Vec<u64>>> = BTreeMap::new();
    let mut heads: BTreeMap<usize, HeadSums> = BTreeMap::new();
    for (index, source) in corpus.sources.iter().enumerate() {
        let (mut sum, mut scored) = (0.0, 0);
        for batch in corpus.validation_batches(index, rows, length, per_source) {
            let domains = batch.domains.clone();
            let batch = packed(batch, &[]);
            let targets = batch.scored();
            if targets > 0 {
                let hidden = model.forward(&batch);
                for (layer, routing) in hidden.routing() {
                    let counts = counts.entry(layer).or_insert_with(|| vec![vec![0; routing.experts()]; corpus.domains.len()]);
                    let top_k = routing.indices.len() / domains.len();
                    for (chosen, &domain) in routing.indices.chunks(top_k).zip(&domains).filter(|(_, domain)| **domain != NO_DOMAIN) {
                        chosen.iter().for_each(|&expert| counts[usize::from(domain)][expert as usize] += 1);
                    }
                }
                for (layer, gating) in hidden.gating() {
                    let text = domains.iter().map(|domain| *domain != NO_DOMAIN);
                    heads.entry(layer).or_default().add(&gating.density(), &gating.active(), text);
                }
                sum += ernie_model::ops::scalar(&model.cross_entropy(hidden.states_th, &batch.targets)) as f64 * targets as f64;
                scored += targets;
                // What Burn's operators drop is freed, not given back.
                scratch::end_step();
            }
        }
        if scored > 0 {
            losses.push((source.name.clone(), sum / scored as f64));
        }
    }
    let active_heads = heads.into_iter().filter_map(|(layer, sums)| sums.of_layer(layer)).collect();
    Validated { losses, experts: ExpertUse::new(&corpus.domains, counts), active_heads, expert_losses: Vec::new() }
}
