//! The key/value cache of a model: layers that see everything in one set of blocks, layers that see a window in another, whose blocks a sequence
//! gives back as it goes on.
use ernie_checkpoint::Config;
use ernie_kernels::paged::{BLOCK, KvBlocks, KvDtype, Spans};

use crate::error::{Error, Result};
use crate::gates::States;

/// Where each layer's keys and values are.
#[derive(Clone, Debug)]
pub(crate) struct CacheLayout {
    places: Vec<Place>,
    full: usize,
    windowed: usize,
    /// What the layers with a window see; `None` without such layers.
    pub window: Option<usize>,
    kv_heads: usize,
    head_dim: usize,
    dtype: KvDtype,
    /// Memory that gates keep in a block.
    state_bytes: usize,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    /// Number among the layers of its set.
    index: usize,
    window: Option<usize>,
}

/// What a layer needs to use its part of the cache.
pub(crate) struct LayerCache<'a> {
    pub kv: &'a mut KvBlocks,
    pub spans: &'a mut Spans,
    pub layer: usize,
    pub window: Option<usize>,
}

impl CacheLayout {
    /// For the layers of a network, and `more` that see everything.
    pub fn new(config: &Config, more: usize, dtype: KvDtype) -> Self {
        let (mut full, mut windowed) = (0, 0);
        let place = |layer| {
            let window = config.window(layer);
            let count = if window.is_some() { &mut windowed } else { &mut full };
            *count += 1;
            Place { index: *count - 1, window }
        };
        let places: Vec<Place> = (0..config.num_hidden_layers + more).map(place).collect();
        let window = places.iter().find_map(|place| place.window);
        let gated = if config.mechanisms.context_gate.is_some() { config.num_hidden_layers } else { 0 };
        let (kv_heads, head_dim, state_bytes) = (config.num_key_value_heads, config.head_dim, gated * config.hidden_size * 4);
        CacheLayout { places, full, windowed, window, kv_heads, head_dim, dtype, state_bytes }
    }

    /// Memory of a block of the layers that see everything.
    pub fn block_bytes(&self) -> usize {
        KvBlocks::bytes_per_block(self.full, self.kv_heads, self.head_dim, self.dtype) + self.state_bytes
    }

    /// Memory of a block of the layers with a window.
    pub fn window_block_bytes(&self) -> usize {
        KvBlocks::bytes_per_block(self.windowed, self.kv_heads, self.head_dim, self.dtype)
    }
}

/// The cache itself.
#[derive(Debug)]
pub(crate) struct Cache {
    layout: CacheLayout,
    full: KvBlocks,
    windowed: KvBlocks,
    /// By the blocks of the layers that see everything, which hold all positions.
    pub states: States,
}

/// Which tokens of a step stand where in either set of blocks.
#[derive(Debug, Default)]
pub(crate) struct CacheSpans {
    pub full: Spans,
    pub windowed: Spans,
}

impl CacheSpans {
    pub fn clear(&mut self) {
        self.full.clear();
        self.windowed.clear();
    }
}

impl Cache {
    /// With so many blocks of 32 positions of either kind.
    pub fn new(config: &Config, layout: CacheLayout, blocks: usize, window_blocks: usize) -> Result<Self> {
        let make = |layers: usize, blocks: usize| {
            KvBlocks::new(layers, blocks, layout.kv_heads, layout.head_dim, layout.dtype).map_err(|_| Error::OutOfMemory {
                positions: blocks * BLOCK,
                bytes: KvBlocks::bytes_per_block(layers, layout.kv_heads, layout.head_dim, layout.dtype).saturating_mul(blocks),
            })
        };
        let (full, windowed) = (make(layout.full, blocks)?, make(layout.windowed, window_blocks)?);
        Ok(Cache { states: States::new(config, blocks)?, layout, full, windowed })
    }

    /// The part of layer `layer`.
    pub fn of_layer<'a>(&'a mut self, layer: usize, spans: &'a mut CacheSpans) -> LayerCache<'a> {
        let Place { index, window } = self.layout.places[layer];
        let (kv, spans) = match window {
            None => (&mut self.full, &mut spans.full),
            Some(_) => (&mut self.windowed, &mut spans.windowed),
        };
        LayerCache { kv, spans, layer: index, window }
    }
}
