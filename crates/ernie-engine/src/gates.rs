//! Gates over the heads of attention, by what each token brings: `g = σ(W·x + u·d + b)`, heads below the threshold are not computed.
//!
//! The density d needs the moving sum of all states before a token. After every step it is kept beside the keys and values, in the block of the last
//! position it has seen: a text goes on from there, and so does another that shares the block. For guesses it is kept apart until they are
//! accepted.
use ernie_checkpoint::{Config, ContextGate};
use ernie_kernels::arch::pool::Pool;
use ernie_kernels::density;
use ernie_kernels::float::{self, WeightsRef};
use ernie_kernels::head_gates;
use ernie_kernels::paged::{BLOCK, Spans};

use crate::error::{Error, Result};
use crate::weights::Loader;

/// The gates of one layer.
#[derive(Debug)]
pub(crate) struct Gates {
    weight_nh: Vec<f32>,
    bias_n: Vec<f32>,
    density_n: Vec<f32>,
    decay: f32,
    threshold: f32,
    /// Number of the layer among those with gates.
    index: usize,
}

/// Moving sums: `[blocks, layers with gates, h]`, each as it was after the last position of its block that is computed.
#[derive(Debug)]
pub(crate) struct States {
    values: Vec<f32>,
    layers: usize,
    h: usize,
}

/// Values of one step.
#[derive(Debug, Default)]
pub(crate) struct GateWorkspace {
    /// How many of the rows of each span are guesses; they come last.
    pub drafts: Vec<usize>,
    /// The moving sums after each guess: `[layers with gates, guesses, h]`.
    draft_states: Vec<f32>,
    density_t: Vec<f32>,
    state_h: Vec<f32>,
    /// `[t, n_q]`: factors of the heads, 0 for those that are not computed.
    pub gates_tn: Vec<f32>,
}

impl States {
    /// For so many blocks; memory is taken from the system as it is written.
    pub fn new(config: &Config, blocks: usize) -> Result<Self> {
        let layers = if config.mechanisms.context_gate.is_some() { config.num_hidden_layers } else { 0 };
        let h = config.hidden_size;
        let too_much = || Error::OutOfMemory { positions: blocks.saturating_mul(BLOCK), bytes: usize::MAX };
        let len = blocks.checked_mul(layers * h).filter(|len| *len < isize::MAX as usize / 4).ok_or_else(too_much)?;
        Ok(States { values: vec![0.0; len], layers, h })
    }

    fn of(&mut self, block: u32, layer: usize) -> &mut [f32] {
        let place = (block as usize * self.layers + layer) * self.h;
        &mut self.values[place..place + self.h]
    }
}

impl Gates {
    pub fn load(load: &Loader<'_>, config: &Config, prefix: &str, settings: &ContextGate, index: usize) -> Result<Self> {
        let (n, h) = (config.num_attention_heads, config.hidden_size);
        let decay = load.f32(&format!("{prefix}.decay"), &[1])?[0];
        Ok(Gates {
            weight_nh: load.f32(&format!("{prefix}.weight"), &[n, h])?,
            bias_n: load.f32(&format!("{prefix}.bias"), &[n])?,
            density_n: load.f32(&format!("{prefix}.density"), &[n])?,
            decay: head_gates::gate(decay),
            threshold: settings.threshold as f32,
            index,
        })
    }

    /// The gates of a step's rows, from their normed states `[t, h]`, into `work.gates_tn`; moving sums are read and written on the way.
    pub fn forward(&self, pool: &Pool, normed_th: &[f32], spans: &Spans, states: &mut States, work: &mut GateWorkspace) {
        let (h, n) = (states.h, self.bias_n.len());
        let t = normed_th.len() / h;
        work.gates_tn.resize(t * n, 0.0);
        float::linear(pool, &mut work.gates_tn, normed_th, WeightsRef::F32(&self.weight_nh), Some(&self.bias_n), t, n, h, false);
        work.density_t.resize(t, 0.0);
        work.state_h.resize(h, 0.0);
        let guesses: usize = work.drafts.iter().sum();
        work.draft_states.resize(states.layers * guesses * h, 0.0);
        let mut draft = self.index * guesses;
        for (index, span) in spans.spans().iter().enumerate() {
            let (blocks, state) = (spans.blocks_of(span), &mut work.state_h);
            match span.start {
                0 => state.fill(0.0),
                start => state.copy_from_slice(states.of(blocks[(start - 1) / BLOCK], self.index)),
            }
            let known = span.rows.end - work.drafts.get(index).copied().unwrap_or(0);
            // Up to the end of each block, and of what is known: there the sum is kept.
            let mut row = span.rows.start;
            while row < known {
                let position = span.start + row - span.rows.start;
                let next = (row + BLOCK - position % BLOCK).min(known);
                density::follow(&mut work.density_t[row..next], state, &normed_th[row * h..next * h], self.decay);
                states.of(blocks[position / BLOCK], self.index).copy_from_slice(state);
                row = next;
            }
            for row in known..span.rows.end {
                density::follow(&mut work.density_t[row..row + 1], state, &normed_th[row * h..(row + 1) * h], self.decay);
                work.draft_states[draft * h..(draft + 1) * h].copy_from_slice(state);
                draft += 1;
            }
        }
        for (gates_n, &d) in work.gates_tn.chunks_exact_mut(n).zip(&work.density_t) {
            for (gate, &u) in gates_n.iter_mut().zip(&self.density_n) {
                let open = head_gates::gate(*gate + u * d);
                *gate = if open >= self.threshold { open } else { 0.0 };
            }
        }
    }
}

impl GateWorkspace {
    /// The first `accepted` guesses of span `index` are part of the text: its moving sums go on with them.
    pub fn accept(&self, index: usize, accepted: usize, spans: &Spans, states: &mut States) {
        let (h, span) = (states.h, &spans.spans()[index]);
        let guesses: usize = self.drafts.iter().sum();
        let first: usize = self.drafts[..index].iter().sum();
        let known = span.start + span.rows.len() - self.drafts[index];
        for guess in 0..accepted {
            let block = spans.blocks_of(span)[(known + guess) / BLOCK];
            for layer in 0..states.layers {
                let place = (layer * guesses + first + guess) * h;
                states.of(block, layer).copy_from_slice(&self.draft_states[place..place + h]);
            }
        }
    }
}
