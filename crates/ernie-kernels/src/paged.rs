//! Attention over keys and values that lie in blocks: the cache of the inference engine.
//!
//! A block holds [`BLOCK`] positions of one sequence, for all layers and key heads; a sequence's blocks may lie anywhere and may be shared. Inside a
//! block keys stand by element (`[head_dim, 32]`), so that one register holds a word of sixteen positions, and values by position in tiles of 32
//! elements; in bf16 two elements of a key and two positions of a value share a word, as the instruction for their products wants them. Softmax runs block by block (arXiv 1805.02867), each row for itself in ascending order of absolute positions: a query's result is the
//! same bits whatever other queries are computed with it.
mod attention;
mod summaries;

use std::ops::Range;

pub use attention::{Layer, Past, attention};
pub use summaries::{Paragraphs, Summaries, summarise};

use half::bf16;

use crate::arch::isa::simd_fn;
use crate::arch::matrix::Mat;
use crate::arch::pool::Pool;
use crate::arch::tile::{COLS, ROWS};
use crate::arch::widen::widen_pairs;
use crate::memory::Memory;
use crate::rope::{self, RopeTable};
use crate::scratch::Scratch;

/// Positions of a block.
pub const BLOCK: usize = COLS;

/// Query rows of one task: one row is one query of one head.
const TASK_ROWS: usize = 8 * ROWS;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// 32 bits: nothing is rounded.
    #[default]
    F32,
    /// bfloat16: half of the memory.
    Bf16,
    /// 8 bits with a scale for each position and head: a quarter of the memory.
    Int8,
}

/// Keys and values of all layers in blocks.
#[derive(Debug)]
pub struct KvBlocks {
    memory: Memory,
    dtype: KvDtype,
    layers: usize,
    blocks: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl KvBlocks {
    /// Room for `blocks` blocks; memory is taken from the system as blocks are first written.
    ///
    /// # Errors
    /// What the system says when it has no more.
    pub fn new(layers: usize, blocks: usize, kv_heads: usize, head_dim: usize, dtype: KvDtype) -> std::io::Result<Self> {
        let bytes = Self::bytes_per_block(layers, kv_heads, head_dim, dtype).checked_mul(blocks).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(KvBlocks { memory: Memory::zeroed(bytes)?, dtype, layers, blocks, kv_heads, head_dim })
    }

    /// Memory of one block, all layers.
    pub fn bytes_per_block(layers: usize, kv_heads: usize, head_dim: usize, dtype: KvDtype) -> usize {
        layers * kv_heads * region_bytes(head_dim, dtype)
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Where the keys and values of a layer, block and head stand: all layers of a block together, so that few blocks take few pages.
    fn region(&self, layer: usize, block: u32, head: usize) -> Range<usize> {
        let size = region_bytes(self.head_dim, self.dtype);
        let index = (block as usize * self.layers + layer) * self.kv_heads + head;
        index * size..(index + 1) * size
    }

    /// Writes keys and values `[kv_heads · head_dim]` of one position, rotary embedding already applied to the keys.
    #[cfg(test)]
    fn store(&mut self, layer: usize, block: u32, offset: usize, keys: &[f32], values: &[f32]) {
        for (head, (keys, values)) in keys.chunks_exact(self.head_dim).zip(values.chunks_exact(self.head_dim)).enumerate() {
            let region = self.region(layer, block, head);
            store(&mut self.memory.bytes_mut()[region], self.dtype, offset, keys, values);
        }
    }

    /// Keys `[head_dim / 2, 32]` and values `[tiles, 16, 32]` as words of two bf16, where they are kept so.
    fn words(&self, layer: usize, block: u32, head: usize) -> (&[u32], &[u32]) {
        let region = &self.memory.bytes()[self.region(layer, block, head)];
        bytemuck::cast_slice(region).split_at(self.head_dim / 2 * BLOCK)
    }

    /// Keys `[head_dim, 32]` and values `[tiles, 32, 32]` in f32: borrowed where they are kept so, else widened into `scratch`.
    fn load<'a>(&'a self, layer: usize, block: u32, head: usize, scratch: &'a mut [f32]) -> (&'a [f32], &'a [f32]) {
        let region = &self.memory.bytes()[self.region(layer, block, head)];
        let elements = (self.head_dim + self.head_dim.next_multiple_of(COLS)) * BLOCK;
        let keys = self.head_dim * BLOCK;
        match self.dtype {
            KvDtype::F32 => bytemuck::cast_slice(region).split_at(keys),
            KvDtype::Bf16 => {
                widen_pairs(&mut scratch[..elements], bytemuck::cast_slice(region));
                scratch[..elements].split_at(keys)
            }
            KvDtype::Int8 => {
                let (bytes, scales) = region.split_at(elements);
                let scales: &[f32] = bytemuck::cast_slice(scales);
                let (k, v) = scratch[..elements].split_at_mut(keys);
                let (bytes_k, bytes_v) = bytemuck::cast_slice::<u8, i8>(bytes).split_at(keys);
                widen_keys(k, bytes_k, &scales[..BLOCK]);
                widen_values(v, bytes_v, &scales[BLOCK..]);
                (k, v)
            }
        }
    }
}

/// Writes a key and a value `[head_dim]` to position `offset` of the region of a layer, block and head.
fn store(region: &mut [u8], dtype: KvDtype, offset: usize, keys: &[f32], values: &[f32]) {
    let d = keys.len();
    match dtype {
        KvDtype::F32 => {
            let (k, v) = bytemuck::cast_slice_mut::<u8, f32>(region).split_at_mut(d * BLOCK);
            for (element, (&key, &value)) in keys.iter().zip(values).enumerate() {
                k[element * BLOCK + offset] = key;
                v[value_place(element, offset)] = value;
            }
        }
        KvDtype::Bf16 => {
            let (k, v) = bytemuck::cast_slice_mut::<u8, bf16>(region).split_at_mut(d * BLOCK);
            // What is added up stands in pairs: two elements of a key, a value's element at two positions.
            for (element, (&key, &value)) in keys.iter().zip(values).enumerate() {
                k[(element / 2 * BLOCK + offset) * 2 + element % 2] = bf16::from_f32(key);
                let word = (element / COLS * (BLOCK / 2) + offset / 2) * COLS + element % COLS;
                v[2 * word + offset % 2] = bf16::from_f32(value);
                if offset.is_multiple_of(2) {
                    // Multiplied by zero until its position comes: it must be a number.
                    v[2 * word + 1] = bf16::ZERO;
                }
            }
        }
        KvDtype::Int8 => {
            let (bytes, scales) = region.split_at_mut((d + d.next_multiple_of(COLS)) * BLOCK);
            let scales: &mut [f32] = bytemuck::cast_slice_mut(scales);
            let (k, v) = bytemuck::cast_slice_mut::<u8, i8>(bytes).split_at_mut(d * BLOCK);
            let (key_scale, value_scale) = (scale_of(keys), scale_of(values));
            (scales[offset], scales[BLOCK + offset]) = (key_scale, value_scale);
            let round = |scale: f32| if scale > 0.0 { scale.recip() } else { 0.0 };
            let (key_inverse, value_inverse) = (round(key_scale), round(value_scale));
            for (element, key) in keys.iter().enumerate() {
                k[element * BLOCK + offset] = (key * key_inverse).round_ties_even() as i8;
            }
            for (element, value) in values.iter().enumerate() {
                v[value_place(element, offset)] = (value * value_inverse).round_ties_even() as i8;
            }
        }
    }
}

/// Stores the keys and values of a step's rows in one pass: keys, columns `first..` of the rows of `qkv`, are turned by the angles of their positions on the way,
/// values follow them. Blocks that are written belong to one sequence.
///
/// # Panics
/// If sizes do not fit, or a block belongs to two sequences.
pub fn append(pool: &Pool, kv: &mut KvBlocks, layer: usize, qkv: Mat<'_>, first: usize, rope: &RopeTable, spans: &mut Spans) {
    let (d, width, dtype) = (kv.head_dim, kv.kv_heads * kv.head_dim, kv.dtype);
    assert!(
        layer < kv.layers && qkv.rows() == spans.rows() && qkv.cols() >= first + 2 * width,
        "keys and values for {} rows",
        spans.rows()
    );
    spans.find_writes();
    let (size, block_size) = (region_bytes(d, dtype), KvBlocks::bytes_per_block(kv.layers, kv.kv_heads, d, dtype));
    let writes = &spans.writes;
    let of_layer = layer * kv.kv_heads * size..(layer + 1) * kv.kv_heads * size;
    pool.for_each_chosen(kv.memory.bytes_mut(), block_size, &spans.written, |place, block| {
        let write = &writes[place];
        let block = &mut block[of_layer.clone()];
        let mut turned = Scratch::take(width);
        for (position, row) in (write.position..).zip(write.rows.clone()) {
            let row = &qkv.row(row)[first..first + 2 * width];
            turned.copy_from_slice(&row[..width]);
            rope::rotate_row(&mut turned, rope, position);
            for ((region, keys), values) in block.chunks_exact_mut(size).zip(turned.chunks_exact(d)).zip(row[width..].chunks_exact(d)) {
                store(region, dtype, position % BLOCK, keys, values);
            }
        }
    });
}

fn region_bytes(head_dim: usize, dtype: KvDtype) -> usize {
    let elements = (head_dim + head_dim.next_multiple_of(COLS)) * BLOCK;
    match dtype {
        KvDtype::F32 => elements * 4,
        KvDtype::Bf16 => elements * 2,
        KvDtype::Int8 => elements + 2 * BLOCK * 4,
    }
}

/// Where an element of a value stands: `[element / 32, position, element % 32]`.
fn value_place(element: usize, position: usize) -> usize {
    (element / COLS * BLOCK + position) * COLS + element % COLS
}

/// A row's largest magnitude / 127; NaN if there is something that is no number, so that it shows.
fn scale_of(x: &[f32]) -> f32 {
    if x.iter().any(|x| !x.is_finite()) { f32::NAN } else { x.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0 }
}

simd_fn! {
    fn widen_keys<FMA>(out: &mut [f32], bytes: &[i8], scales: &[f32]) {
        let scales: [f32; BLOCK] = *scales.first_chunk().expect("a scale for each position");
        for (out, bytes) in out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(bytes.as_chunks::<BLOCK>().0) {
            let values = bytes.map(f32::from);
            *out = std::array::from_fn(|i| values[i] * scales[i]);
        }
    }
}

simd_fn! {
    fn widen_values<FMA>(out: &mut [f32], bytes: &[i8], scales: &[f32]) {
        for (row, (out, bytes)) in out.as_chunks_mut::<COLS>().0.iter_mut().zip(bytes.as_chunks::<COLS>().0).enumerate() {
            let scale = scales[row % BLOCK];
            *out = bytes.map(|q| f32::from(q) * scale);
        }
    }
}

/// New tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Span {
    /// Rows of the queries.
    pub rows: Range<usize>,
    /// Position of the first row.
    pub start: usize,
    /// Where the sequence's blocks stand in the step's list of blocks.
    pub blocks: Range<usize>,
    /// How many of the sequence's blocks before those are gone.
    pub first_block: usize,
}

/// What one step attends to. Kept and refilled from step to step.
#[derive(Debug, Default)]
pub struct Spans {
    spans: Vec<Span>,
    blocks: Vec<u32>,
    /// Rows of each task of attention and the span they belong to.
    rows: Vec<Range<usize>>,
    span_of: Vec<usize>,
    /// What is stored where, by ascending number of the block, and those numbers; found once for a step.
    writes: Vec<Write>,
    written: Vec<u32>,
}

/// Rows whose keys and values go to one block.
#[derive(Clone, Debug)]
struct Write {
    block: u32,
    rows: Range<usize>,
    /// Of the first row, in its sequence.
    position: usize,
}

impl Spans {
    /// Forgets all spans.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.blocks.clear();
        self.rows.clear();
        self.span_of.clear();
        self.writes.clear();
        self.written.clear();
    }

    /// Takes memory for lists of so many blocks in all.
    pub fn reserve(&mut self, blocks: usize) {
        self.blocks.reserve(blocks);
    }

    /// Adds `tokens` rows after those of the spans before, the first at position `start` of a sequence whose positions are in `blocks`.
    pub fn push(&mut self, tokens: usize, start: usize, blocks: &[u32]) {
        self.push_from(tokens, start, 0, blocks);
    }

    /// The same for a sequence that has no longer its first `first_block` blocks.
    pub fn push_from(&mut self, tokens: usize, start: usize, first_block: usize, blocks: &[u32]) {
        let held = first_block + blocks.len();
        assert!(held * BLOCK >= start + tokens && first_block * BLOCK <= start, "{held} blocks for {} positions", start + tokens);
        let first = self.spans.last().map_or(0, |span| span.rows.end);
        let place = self.blocks.len();
        self.blocks.extend_from_slice(blocks);
        self.writes.clear();
        self.written.clear();
        self.spans.push(Span { rows: first..first + tokens, start, blocks: place..self.blocks.len(), first_block });
    }

    /// Rows of all spans.
    pub fn rows(&self) -> usize {
        self.spans.last().map_or(0, |span| span.rows.end)
    }

    /// The spans.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The blocks of a span.
    pub fn blocks_of(&self, span: &Span) -> &[u32] {
        &self.blocks[span.blocks.clone()]
    }

    fn find_writes(&mut self) {
        if !self.writes.is_empty() {
            return;
        }
        for span in &self.spans {
            let (blocks, end) = (&self.blocks[span.blocks.clone()], span.start + span.rows.len());
            let mut position = span.start;
            while position < end {
                let next = (position / BLOCK * BLOCK + BLOCK).min(end);
                let rows = span.rows.start + position - span.start..span.rows.start + next - span.start;
                self.writes.push(Write { block: blocks[position / BLOCK - span.first_block], rows, position });
                position = next;
            }
        }
        self.writes.sort_unstable_by_key(|write| write.block);
        self.written.extend(self.writes.iter().map(|write| write.block));
    }

    fn cut(&mut self, group: usize) {
        let step = (TASK_ROWS / group).max(1);
        self.rows.clear();
        self.span_of.clear();
        for (index, span) in self.spans.iter().enumerate() {
            for first in span.rows.clone().step_by(step) {
                self.rows.push(first..(first + step).min(span.rows.end));
                self.span_of.push(index);
            }
        }
    }
}

/// The same by plain loops in f64.
pub mod scalar {
    /// Attention of queries `[tokens, q_heads·d]` to the last `window` of the keys and values `[positions, kv_heads·d]` up to their own.
    pub fn attention(q: &[f32], k: &[f32], v: &[f32], window: usize, q_heads: usize, kv_heads: usize, d: usize) -> Vec<f64> {
        let mut out = Vec::with_capacity(q.len());
        for (token, q) in q.chunks_exact(q_heads * d).enumerate() {
            for (head, q) in q.chunks_exact(d).enumerate() {
                let at = |x: &[f32], p: usize, i: usize| f64::from(x[(p * kv_heads + head / (q_heads / kv_heads)) * d + i]);
                let first = (token + 1).saturating_sub(window);
                let scores: Vec<f64> = (first..=token)
                    .map(|p| q.iter().enumerate().map(|(i, q)| f64::from(*q) * at(k, p, i)).sum::<f64>() / (d as f64).sqrt())
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                out.extend((0..d).map(|i| scores.iter().zip(first..).map(|(s, p)| (s - max).exp() / sum * at(v, p, i)).sum::<f64>()));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests;
