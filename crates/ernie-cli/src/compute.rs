//! How a command keeps a model in memory and computes: `--weights`, `--kv-cache`, `--draft-tokens`.
use anyhow::Context;
use ernie_engine::{DraftOptions, KvDtype, LoadOptions, Model, WeightDtype};

use crate::model::ModelArgument;

/// Form of weights and cache.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ComputeArguments {
    /// Form of the weights in memory
    #[arg(long, value_enum, default_value_t = Weights::Stored, alias = "dtype")]
    weights: Weights,
    /// Form of the keys and values of past tokens
    #[arg(long, value_enum, default_value_t = KvCache::Auto)]
    kv_cache: KvCache,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Weights {
    /// 8-bit, bf16 or 32-bit, as the files have them
    Stored,
    /// 32-bit: exact, slow
    F32,
    /// 16-bit brain float
    Bf16,
    /// 8-bit, rounded while loading; activations too are rounded to 8 bits
    Int8,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum KvCache {
    /// bf16 with 8-bit weights, else 32-bit
    Auto,
    /// 32-bit: nothing is rounded
    F32,
    /// 16-bit brain float: half of the memory
    Bf16,
    /// 8-bit with a scale for each token and head: a quarter of the memory
    Int8,
}

impl ComputeArguments {
    /// Loads the model of `--model` in this form.
    pub fn load(self, model: &ModelArgument) -> anyhow::Result<Model> {
        let dtype = match self.weights {
            Weights::Stored => WeightDtype::Auto,
            Weights::F32 => WeightDtype::F32,
            Weights::Bf16 => WeightDtype::Bf16,
            Weights::Int8 => WeightDtype::Int8,
        };
        let kv_dtype = match self.kv_cache {
            KvCache::Auto => None,
            KvCache::F32 => Some(KvDtype::F32),
            KvCache::Bf16 => Some(KvDtype::Bf16),
            KvCache::Int8 => Some(KvDtype::Int8),
        };
        // The one number of threads, which `--threads` has set.
        let options = LoadOptions { dtype, threads: rayon::current_num_threads(), kv_dtype };
        Model::load_with(&model.checkpoint()?, options).with_context(|| format!("cannot load {}", model.name()))
    }
}

/// How much is guessed ahead.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct DraftArguments {
    /// Most tokens guessed ahead where text repeats itself, and checked together: the same text, sooner; 0 guesses nothing
    #[arg(long, value_name = "N", default_value_t = DraftOptions::default().max_tokens as u16)]
    draft_tokens: u16,
}

impl DraftArguments {
    /// For a session.
    pub fn options(self) -> DraftOptions {
        DraftOptions { max_tokens: self.draft_tokens.into() }
    }
}
