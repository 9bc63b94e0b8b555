//! What computing takes besides a model: the key/value cache, the angles, and working memory that is kept from step to step.
use std::sync::Arc;

use ernie_kernels::int8::{Groups, Rows8};
use ernie_kernels::rope::RopeTable;

use crate::cache::{Cache, CacheSpans};
use crate::error::Result;
use crate::gates::GateWorkspace;
use crate::load::Load;
use crate::model::Model;
use crate::profile::Profile;

/// Positions for which angles are computed at first; their number doubles when it is too small.
const FIRST_POSITIONS: usize = 512;

/// Cache and working memory of one user of a model.
#[derive(Debug)]
pub(crate) struct Runner {
    cache: Cache,
    rope: RopeTable,
    pub work: Workspace,
}

/// Values of one step, by name as in [`Model`]. Each keeps its largest size, so that a step like the one before allocates nothing.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    pub x_th: Vec<f32>,
    pub normed_th: Vec<f32>,
    pub qkv: Vec<f32>,
    pub attended_tq: Vec<f32>,
    pub inner_ti: Vec<f32>,
    pub both: Vec<f32>,
    pub rows: Rows8,
    pub moe: MoeWorkspace,
    pub spans: CacheSpans,
    pub gates: GateWorkspace,
    /// Counts what experts and heads have to do; of no layers where nobody asks.
    pub load: Arc<Load>,
    /// Rows whose logits are wanted.
    pub wanted: Vec<u32>,
    pub logits: Vec<f32>,
    pub profile: Profile,
}

/// Values of a routed layer: `n` = tokens × experts per token, in the order of the experts.
#[derive(Debug, Default)]
pub(crate) struct MoeWorkspace {
    pub p_te: Vec<f32>,
    pub scores: Vec<f32>,
    pub selected_ts: Vec<u32>,
    pub w_ts: Vec<f32>,
    /// Where each choice stands in the order of the experts.
    pub place_ts: Vec<u32>,
    /// The token of each place.
    pub token_n: Vec<u32>,
    /// Where each expert's choices start, and where the last one's end.
    pub starts_e: Vec<usize>,
    pub next_e: Vec<usize>,
    pub groups_up: Groups,
    pub groups_down: Groups,
    pub rows: Rows8,
    pub x_nh: Vec<f32>,
    pub inner_ni: Vec<f32>,
    pub both: Vec<f32>,
    pub y_nh: Vec<f32>,
}

impl Runner {
    /// With a cache of `blocks` blocks of 32 positions, and `window_blocks` of those layers that see a window only.
    pub fn new(model: &Model, blocks: usize, window_blocks: usize) -> Result<Self> {
        let config = model.config();
        let cache = Cache::new(config, model.cache_layout(), blocks, window_blocks)?;
        Ok(Runner { cache, rope: RopeTable::new(config.rope_theta, config.head_dim, 0), work: Workspace::default() })
    }

    /// Computes `ids`, whose positions and blocks are in `work.spans`; then `work.logits` are those of the rows in `work.wanted`, `[wanted, vocab]`.
    pub fn step(&mut self, model: &Model, ids: &[u32]) {
        let last = self.work.spans.full.spans().iter().map(|span| span.start + span.rows.len()).max().unwrap_or(0);
        if last > self.rope.positions() {
            let positions = last.max(2 * self.rope.positions()).max(FIRST_POSITIONS);
            self.rope = RopeTable::new(model.config().rope_theta, model.config().head_dim, positions);
        }
        model.forward(ids, &mut self.cache, &self.rope, &mut self.work);
        model.logits(&mut self.work);
    }

    /// After [`Runner::step`]: the first `accepted` guesses of span `index` are part of the text.
    pub fn accept(&mut self, index: usize, accepted: usize) {
        self.work.gates.accept(index, accepted, &self.work.spans.full, &mut self.cache.states);
    }

    /// Guesses after [`Runner::step`]: rows of that step, the tokens that followed them, and in `work.spans` where they stand. Then `work.logits` are those
    /// of the token after the next, for the rows in `work.wanted`, which count among these rows.
    pub fn predict(&mut self, model: &Model, rows: &[u32], next: &[u32]) {
        model.predict(rows, next, &mut self.cache, &self.rope, &mut self.work);
        model.logits(&mut self.work);
    }
}
