//! The expert curriculum: which text comes when, and how experts are brought to a part of it each.
//!
//! A run is cut into declared stages ([`Stage`]). A stage draws rows from a range of difficulties and a mixture of domains ([`sampler`]; a row's difficulty is
//! its mean loss under a small reference model, [`difficulty`]) and chooses experts in one of three ways:
//!
//! - *uniform*: every token's experts at random, so that each expert learns from a fair sample before any of them is preferred;
//! - *balanced*: by the router, its correction bias moved towards even use, as without a curriculum;
//! - *steered*: by the router with `steer` added to the scores of the domain's own experts, and with `pull · mean(KL(q_d ‖ p))` in the loss, q_d even over the
//!   domain's experts. `steer` fades to nothing over the stage, so that at its end routers choose as they will when nobody tells them the domain. The weights of the chosen are p over its sum, in which experts that were not chosen do not occur: without the second term the router
//!   would never learn to choose without being steered. The assignment of experts
//!   ([`assignment`], from the losses of each domain's tokens in each expert) is balanced by itself: the balance loss rests, and the correction bias is moved towards
//!   the loads that the assignment means.
//!
//! In every stage, the losses of tokens are gathered by domain and chosen expert, so that the first steered step has something to go by.
pub mod assignment;
pub mod difficulty;
pub mod sampler;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ernie_checkpoint::Config;
use ernie_model::steering::{Favoured, NO_DOMAIN};
use ernie_model::{LossWeights, PackedBatch, Steering};
use serde::{Deserialize, Serialize};

use crate::data::Corpus;
use crate::data::packing::IGNORE;
use crate::data::random::key;
use assignment::{Evidence, Wanted, assign, loads};

/// `[curriculum]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CurriculumConfig {
    /// What tells easy rows from hard ones; needed where a stage names a `difficulty`.
    pub reference: Option<Reference>,
    /// The stages in order (`[[curriculum.stage]]`).
    pub stage: Vec<Stage>,
}

/// `[curriculum.reference]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    /// Directory of a model with the run's tokenizer.
    pub model: PathBuf,
}

/// `[[curriculum.stage]]`: a part of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Share of the run's steps at which it ends; the last stage ends at 1.
    pub until: f64,
    /// How experts are chosen.
    #[serde(default)]
    pub routing: RoutingKind,
    /// Quantiles of difficulty between which rows are drawn, counted in each source; all rows when absent.
    pub difficulty: Option<[f64; 2]>,
    /// Quantiles at the end of the stage, to which those at its beginning move on straight lines.
    pub difficulty_to: Option<[f64; 2]>,
    /// Shares of the domains by name; by the sources' weights when empty. A domain that is not named is not drawn.
    #[serde(default)]
    pub mixture: BTreeMap<String, f64>,
    /// Steered: added at first to the scores of a domain's experts, which are probabilities; it falls on a straight line to 0 at the end of the stage.
    #[serde(default = "default_steer")]
    pub steer: f64,
    /// Steered: weight of the loss that teaches routers to choose so by themselves.
    #[serde(default = "default_pull")]
    pub pull: f64,
    /// Steered: steps after which experts are assigned anew. They are also assigned at the stage's first step, however large this is: a steered stage after a
    /// steered one begins with a new assignment.
    #[serde(default = "default_reassign_every")]
    pub reassign_every: u64,
}

/// How a stage chooses experts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RoutingKind {
    /// At random.
    Uniform,
    /// By the router, balanced by its correction bias.
    #[default]
    Balanced,
    /// By the router and the token's domain.
    Steered,
}

fn default_steer() -> f64 {
    0.5
}
fn default_pull() -> f64 {
    0.05
}
fn default_reassign_every() -> u64 {
    100
}

impl CurriculumConfig {
    /// The stage of step `step` (from 1) of `steps`, and how much of it is over, from 0 to less than 1.
    pub fn stage(&self, step: u64, steps: u64) -> (usize, f64) {
        let progress = step.saturating_sub(1) as f64 / steps.max(1) as f64;
        let index = self.stage.iter().position(|stage| progress < stage.until).unwrap_or(self.stage.len() - 1);
        let begins = index.checked_sub(1).map_or(0.0, |before| self.stage[before].until);
        (index, (progress - begins) / (self.stage[index].until - begins))
    }

    /// The first step of a stage of a run of `steps`; the stage must have one, which in a short trial not every stage has.
    fn first_step(&self, index: usize, steps: u64) -> u64 {
        let begins = index.checked_sub(1).map_or(0.0, |before| self.stage[before].until);
        // Below it by rounding at most.
        let near = (begins * steps as f64) as u64;
        (near..).find(|&step| step > 0 && self.stage(step, steps).0 == index).expect("the stage has steps")
    }

    /// Whether rows are told apart by difficulty.
    pub fn uses_difficulty(&self) -> bool {
        self.stage.iter().any(|stage| stage.difficulty.is_some())
    }
}

impl Stage {
    /// The quantiles when `part` of the stage is over.
    pub fn range(&self, part: f64) -> [f64; 2] {
        let from = self.difficulty.unwrap_or([0.0, 1.0]);
        let to = self.difficulty_to.unwrap_or(from);
        [0, 1].map(|end| from[end] + part * (to[end] - from[end]))
    }

    /// Share of each domain of a corpus, summing to 1.
    pub fn shares(&self, corpus: &Corpus) -> Vec<f64> {
        let weight = |domain: usize| {
            let sources = corpus.sources.iter().filter(|source| usize::from(source.domain) == domain);
            sources.map(|source| source.weight).sum::<f64>()
        };
        let weights: Vec<f64> = match self.mixture.is_empty() {
            true => (0..corpus.domains.len()).map(weight).collect(),
            false => corpus.domains.iter().map(|name| self.mixture.get(name).copied().unwrap_or(0.0)).collect(),
        };
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    }
}

/// What a curriculum has learned of the experts; saved with a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RoutingState {
    /// Losses by domain and expert, for each MoE layer.
    pub evidence: BTreeMap<usize, Evidence>,
    /// Experts of each domain, `[domains, experts]` row by row, for each MoE layer; empty until the first steered step.
    pub favoured: BTreeMap<usize, Vec<bool>>,
}

/// What a new assignment made of the experts of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    /// Index of the layer.
    pub layer: usize,
    /// Experts that have other domains than before; at first all.
    pub changed: usize,
    /// Names of each expert's domains.
    pub experts: Vec<Vec<String>>,
}

/// Mean losses of one layer's tokens as far as a curriculum remembers them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerLosses {
    /// Index of the layer.
    pub layer: usize,
    /// In nats, by domain (outer) and expert (inner); none where they never met.
    pub losses: Vec<Vec<Option<f64>>>,
}

/// The part of a curriculum that has to do with experts.
#[derive(Debug)]
pub struct Curriculum {
    config: CurriculumConfig,
    /// Names of the domains.
    domains: Vec<String>,
    seed: u64,
    steps: u64,
    /// Of the domains, stage by stage.
    shares: Vec<Vec<f64>>,
    experts: usize,
    top_k: usize,
    state: RoutingState,
    /// `state.favoured` as the model takes it.
    favoured: Arc<BTreeMap<usize, Favoured>>,
}

impl Curriculum {
    /// Of a run of `steps` steps, from a saved state or the beginning.
    pub fn new(config: CurriculumConfig, model: &Config, corpus: &Corpus, seed: u64, steps: u64, state: Option<RoutingState>) -> Self {
        let (experts, top_k) = model.moe.as_ref().map_or((1, 1), |moe| (moe.num_experts, moe.top_k));
        let shares = config.stage.iter().map(|stage| stage.shares(corpus)).collect();
        let layers = (0..model.num_hidden_layers).filter(|&layer| model.is_moe_layer(layer));
        let fresh = || RoutingState {
            evidence: layers.map(|layer| (layer, Evidence::new(corpus.domains.len(), experts))).collect(),
            favoured: BTreeMap::new(),
        };
        let (state, domains) = (state.unwrap_or_else(fresh), corpus.domains.clone());
        let mut made = Self { state, favoured: Arc::default(), config, domains, seed, steps, shares, experts, top_k };
        made.publish();
        made
    }

    /// What a resumed run needs.
    pub fn state(&self) -> &RoutingState {
        &self.state
    }

    fn publish(&mut self) {
        let favoured = self.state.favoured.iter().map(|(&layer, table)| (layer, Favoured { table: table.clone(), experts: self.experts }));
        self.favoured = Arc::new(favoured.collect());
    }

    /// How step `step` chooses experts.
    pub fn routing(&self, step: u64) -> RoutingKind {
        self.config.stage[self.config.stage(step, self.steps).0].routing
    }

    /// Before step `step`: assigns experts, if it is time, and tells what became of each layer's.
    pub fn begin(&mut self, step: u64) -> Vec<Assigned> {
        let (index, _) = self.config.stage(step, self.steps);
        let stage = &self.config.stage[index];
        let since = step - self.config.first_step(index, self.steps);
        let mut assigned = Vec::new();
        if stage.routing == RoutingKind::Steered && since.is_multiple_of(stage.reassign_every) {
            let layers: Vec<usize> = self.state.evidence.keys().copied().collect();
            for layer in layers {
                let holders = self.state.favoured.get(&layer).map(Vec::as_slice);
                let wanted = Wanted { shares: &self.shares[index], experts: self.experts, top_k: self.top_k, holders };
                let table = assign(&self.state.evidence[&layer].advantage(), &wanted);
                assigned.push(self.assigned(layer, holders, &table));
                self.state.favoured.insert(layer, table);
            }
            self.publish();
        }
        assigned
    }

    /// What an assignment made of a layer's experts.
    fn assigned(&self, layer: usize, before: Option<&[bool]>, table: &[bool]) -> Assigned {
        let has = |table: &[bool], domain: usize, expert: usize| table[domain * self.experts + expert];
        let domains = 0..self.domains.len();
        let changed = |expert: &usize| {
            before.is_none_or(|before| domains.clone().any(|domain| has(before, domain, *expert) != has(table, domain, *expert)))
        };
        let names = |expert: usize| {
            domains.clone().filter(|&domain| has(table, domain, expert)).map(|domain| self.domains[domain].clone()).collect()
        };
        Assigned { layer, changed: (0..self.experts).filter(changed).count(), experts: (0..self.experts).map(names).collect() }
    }

    /// Mean losses by domain and expert of every MoE layer.
    pub fn losses(&self) -> Vec<LayerLosses> {
        self.state.evidence.iter().map(|(&layer, evidence)| LayerLosses { layer, losses: evidence.means() }).collect()
    }

    /// Puts the steering of step `step` into its micro-batch number `micro`.
    pub fn steer(&self, step: u64, micro: usize, batch: &mut PackedBatch) {
        let (index, part) = self.config.stage(step, self.steps);
        let stage = &self.config.stage[index];
        batch.steering = match stage.routing {
            RoutingKind::Balanced => None,
            RoutingKind::Uniform => Some(Steering::Uniform { key: key(self.seed, "uniform routing", step << 16 | micro as u64) }),
            RoutingKind::Steered => batch.domains.clone().map(|domains| Steering::Favoured {
                domains,
                layers: self.favoured.clone(),
                strength: (stage.steer * (1.0 - part)) as f32,
            }),
        };
    }

    /// The shares of the tokens towards which step `step` moves the correction bias of each MoE layer: of no layer where experts are drawn at random; `None` where it
    /// is the router's turn and all experts are alike.
    pub fn loads(&self, step: u64) -> Option<BTreeMap<usize, Vec<f64>>> {
        let (index, _) = self.config.stage(step, self.steps);
        match self.config.stage[index].routing {
            RoutingKind::Balanced => None,
            RoutingKind::Uniform => Some(BTreeMap::new()),
            RoutingKind::Steered => {
                let of = |(&layer, table): (&usize, &Vec<bool>)| (layer, loads(table, &self.shares[index], self.experts));
                Some(self.state.favoured.iter().map(of).collect())
            }
        }
    }

    /// The weights of the loss in step `step`, from those of the recipe.
    pub fn weights(&self, step: u64, weights: LossWeights) -> LossWeights {
        let stage = &self.config.stage[self.config.stage(step, self.steps).0];
        match stage.routing {
            RoutingKind::Steered => LossWeights { balance: 0.0, pull: stage.pull, ..weights },
            _ => weights,
        }
    }

    /// Takes note of a step's losses: of each micro-batch, with the chosen experts `[t, k]` of each MoE layer and the tokens' losses `[t]`.
    pub fn observe<'b>(&mut self, seen: impl IntoIterator<Item = (&'b PackedBatch, &'b [(usize, Arc<[u32]>)], &'b [f32])>) {
        self.state.evidence.values_mut().for_each(Evidence::fade);
        for (batch, experts, losses) in seen {
            let Some(domains) = &batch.domains else { continue };
            for (layer, chosen) in experts {
                let Some(evidence) = self.state.evidence.get_mut(layer) else { continue };
                for (token, chosen) in chosen.chunks(self.top_k).enumerate() {
                    if batch.targets[token] != IGNORE && domains[token] != NO_DOMAIN {
                        chosen.iter().for_each(|&expert| evidence.add(domains[token].into(), expert as usize, losses[token].into()));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
