//! The key/value cache of a model: layers that see everything in one set of blocks, layers that see a window or their paragraph in another, whose blocks
//! a sequence gives back as it goes on. Summaries of paragraphs go with the first set.
use ernie_checkpoint::Config;
use ernie_kernels::paged::{BLOCK, KvBlocks, KvDtype, Paragraphs, Past, Spans, Summaries};

use crate::error::{Error, Result};
use crate::gates::States;

/// Where each layer's keys and values are.
#[derive(Clone, Debug)]
pub(crate) struct CacheLayout {
    places: Vec<Place>,
    full: usize,
    windowed: usize,
    with_paragraphs: usize,
    /// How far back the layers with a window, or with paragraphs, see at most; `None` without such layers.
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
    sees: Sees,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Sees {
    All,
    Window(usize),
    /// Number among the layers with paragraphs.
    Paragraphs(usize),
}

/// What a layer needs to use its part of the cache.
pub(crate) struct LayerCache<'a> {
    pub kv: &'a mut KvBlocks,
    pub spans: &'a mut Spans,
    pub layer: usize,
    pub past: LayerPast<'a>,
}

/// What a layer's queries see.
pub(crate) enum LayerPast<'a> {
    All,
    Window(usize),
    Paragraphs { summaries: &'a mut Summaries, layer: usize, paragraphs: &'a Paragraphs },
}

impl LayerPast<'_> {
    pub fn as_past(&self) -> Past<'_> {
        match self {
            LayerPast::All => Past::All,
            LayerPast::Window(window) => Past::Window(*window),
            LayerPast::Paragraphs { summaries, layer, paragraphs } => Past::Paragraphs { summaries, layer: *layer, paragraphs },
        }
    }
}

impl CacheLayout {
    /// For the layers of a network, and `more` that see everything.
    pub fn new(config: &Config, more: usize, dtype: KvDtype) -> Self {
        let (mut full, mut windowed, mut with_paragraphs) = (0, 0, 0);
        let place = |layer| {
            let sees = match (config.window(layer), config.paragraphs(layer)) {
                (Some(window), _) => Sees::Window(window),
                (None, Some(_)) => {
                    with_paragraphs += 1;
                    Sees::Paragraphs(with_paragraphs - 1)
                }
                (None, None) => Sees::All,
            };
            let count = if sees == Sees::All { &mut full } else { &mut windowed };
            *count += 1;
            Place { index: *count - 1, sees }
        };
        let places: Vec<Place> = (0..config.num_hidden_layers + more).map(place).collect();
        let window = (0..config.num_hidden_layers).filter_map(|layer| config.reach(layer)).max();
        let gated = if config.mechanisms.context_gate.is_some() { config.num_hidden_layers } else { 0 };
        let (kv_heads, head_dim, state_bytes) = (config.num_key_value_heads, config.head_dim, gated * config.hidden_size * 4);
        CacheLayout { places, full, windowed, with_paragraphs, window, kv_heads, head_dim, dtype, state_bytes }
    }

    /// Memory of a block of the layers that see everything, and of what goes with it.
    pub fn block_bytes(&self) -> usize {
        KvBlocks::bytes_per_block(self.full, self.kv_heads, self.head_dim, self.dtype)
            + Summaries::bytes_per_block(self.with_paragraphs, self.kv_heads, self.head_dim)
            + self.state_bytes
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
    /// Beside the blocks of the layers that see everything.
    summaries: Summaries,
    /// By the blocks of the layers that see everything, which hold all positions.
    pub states: States,
}

/// Which tokens of a step stand where in either set of blocks.
#[derive(Debug, Default)]
pub(crate) struct CacheSpans {
    pub full: Spans,
    pub windowed: Spans,
    pub paragraphs: Paragraphs,
}

impl CacheSpans {
    pub fn clear(&mut self) {
        self.full.clear();
        self.windowed.clear();
        self.paragraphs.clear();
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
        let summaries = Summaries::new(layout.with_paragraphs, blocks, layout.kv_heads, layout.head_dim)
            .ok_or(Error::OutOfMemory { positions: blocks.saturating_mul(BLOCK), bytes: usize::MAX })?;
        Ok(Cache { states: States::new(config, blocks)?, layout, full, windowed, summaries })
    }

    /// The part of layer `layer`.
    pub fn of_layer<'a>(&'a mut self, layer: usize, spans: &'a mut CacheSpans) -> LayerCache<'a> {
        let Place { index, sees } = self.layout.places[layer];
        let (kv, of_kind) = match sees {
            Sees::All => (&mut self.full, &mut spans.full),
            Sees::Window(_) | Sees::Paragraphs(_) => (&mut self.windowed, &mut spans.windowed),
        };
        let past = match sees {
            Sees::All => LayerPast::All,
            Sees::Window(window) => LayerPast::Window(window),
            Sees::Paragraphs(layer) => LayerPast::Paragraphs { summaries: &mut self.summaries, layer, paragraphs: &spans.paragraphs },
        };
        LayerCache { kv, spans: of_kind, layer: index, past }
    }
}
