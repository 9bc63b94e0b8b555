//! Attention over keys and values that lie in blocks: the cache of the inference engine.
//!
//! A block holds [`BLOCK`] positions of one sequence, for all layers and key heads; a sequence's blocks may lie anywhere and may be shared. Inside a
//! block keys stand by element (`[head_dim, 32]`), so that one register holds a word of sixteen positions, and values by position in tiles of 32
//! elements. Softmax runs block by block (arXiv 1805.02867), each row for itself in ascending order of absolute positions: a query's result is the
//! same bits whatever other queries are computed with it.
use std::ops::Range;

use half::bf16;

use crate::arch::exp::exp;
use crate::arch::isa::simd_fn;
use crate::arch::matrix::{Mat, MatMut};
use crate::arch::pool::Pool;
use crate::arch::tile::{COLS, ROWS, Update, tile};
use crate::arch::widen::widen_pairs;
use crate::memory::Memory;
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
    pub fn store(&mut self, layer: usize, block: u32, offset: usize, keys: &[f32], values: &[f32]) {
        assert!(offset < BLOCK && (block as usize) < self.blocks, "position {offset} of block {block}");
        let (d, dtype) = (self.head_dim, self.dtype);
        for (head, (keys, values)) in keys.chunks_exact(d).zip(values.chunks_exact(d)).enumerate() {
            let region = self.region(layer, block, head);
            let region = &mut self.memory.bytes_mut()[region];
            match dtype {
                KvDtype::F32 => {
                    let (k, v) = bytemuck::cast_slice_mut::<u8, f32>(region).split_at_mut(d * BLOCK);
                    scatter(k, v, offset, offset, keys, values, |x| x);
                }
                KvDtype::Bf16 => {
                    let (k, v) = bytemuck::cast_slice_mut::<u8, bf16>(region).split_at_mut(d * BLOCK);
                    // Position j shares a word with position j + 16, so that both halves of a word widen to neighbours.
                    scatter(k, v, interleaved(offset), offset, keys, values, bf16::from_f32);
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
                        v[value_place(element, offset, element % COLS)] = (value * value_inverse).round_ties_even() as i8;
                    }
                }
            }
        }
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

fn region_bytes(head_dim: usize, dtype: KvDtype) -> usize {
    let elements = (head_dim + head_dim.next_multiple_of(COLS)) * BLOCK;
    match dtype {
        KvDtype::F32 => elements * 4,
        KvDtype::Bf16 => elements * 2,
        KvDtype::Int8 => elements + 2 * BLOCK * 4,
    }
}

/// Place of position (or element) j < 32 among bf16 words.
fn interleaved(j: usize) -> usize {
    j % 16 * 2 + j / 16
}

/// Where an element of a value stands: `[element / 32, position, place in the run of 32]`.
fn value_place(element: usize, position: usize, place: usize) -> usize {
    (element / COLS * BLOCK + position) * COLS + place
}

fn scatter<T>(k: &mut [T], v: &mut [T], key_offset: usize, offset: usize, keys: &[f32], values: &[f32], convert: impl Fn(f32) -> T) {
    let plain = key_offset == offset && size_of::<T>() == 4;
    for (element, &key) in keys.iter().enumerate() {
        k[element * BLOCK + key_offset] = convert(key);
    }
    for (element, &value) in values.iter().enumerate() {
        let place = if plain { element % COLS } else { interleaved(element % COLS) };
        v[value_place(element, offset, place)] = convert(value);
    }
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
}

/// What one step attends to. Kept and refilled from step to step.
#[derive(Debug, Default)]
pub struct Spans {
    spans: Vec<Span>,
    blocks: Vec<u32>,
    /// Rows of each task and the span they belong to.
    rows: Vec<Range<usize>>,
    span_of: Vec<usize>,
}

impl Spans {
    /// Forgets all spans.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.blocks.clear();
        self.rows.clear();
        self.span_of.clear();
    }

    /// Takes memory for lists of so many blocks in all.
    pub fn reserve(&mut self, blocks: usize) {
        self.blocks.reserve(blocks);
    }

    /// Adds `tokens` rows after those of the spans before, the first at position `start` of a sequence whose positions are in `blocks`.
    pub fn push(&mut self, tokens: usize, start: usize, blocks: &[u32]) {
        assert!(blocks.len() * BLOCK >= start + tokens, "{} blocks for {} positions", blocks.len(), start + tokens);
        let first = self.spans.last().map_or(0, |span| span.rows.end);
        let place = self.blocks.len();
        self.blocks.extend_from_slice(blocks);
        self.spans.push(Span { rows: first..first + tokens, start, blocks: place..self.blocks.len() });
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

/// Causal attention of each row to the positions of its sequence up to its own, which must have been stored: `out` `[rows, q_heads·head_dim]`;
/// queries are the first `q_heads·head_dim` columns of the rows of `q`. Query head h reads key head `h / (q_heads / kv_heads)`; scores are
/// scaled by 1/√head_dim.
///
/// # Panics
/// If sizes do not fit.
pub fn attention(pool: &Pool, out: &mut [f32], q: Mat<'_>, kv: &KvBlocks, layer: usize, q_heads: usize, spans: &mut Spans) {
    assert!(kv.kv_heads > 0 && q_heads.is_multiple_of(kv.kv_heads), "{q_heads} query heads over {} key heads", kv.kv_heads);
    let (d, group) = (kv.head_dim, q_heads / kv.kv_heads);
    assert!(q.rows() == spans.rows() && q.cols() >= q_heads * d, "queries for {} rows", spans.rows());
    spans.cut(group);
    let spans = &*spans;
    pool.for_each_block(MatMut::new(out, q.rows(), q_heads * d), &spans.rows, group * d, |task, col, mut out| {
        let span = &spans.spans[spans.span_of[task]];
        let rows = spans.rows[task].clone();
        let start = span.start + rows.start - span.rows.start;
        let queries = q.rows_of(rows).columns(col..col + group * d);
        attend(&mut out, queries, Keys { kv, layer, head: col / (group * d), blocks: spans.blocks_of(span) }, start, group);
    });
}

#[derive(Clone, Copy)]
struct Keys<'a> {
    kv: &'a KvBlocks,
    layer: usize,
    head: usize,
    blocks: &'a [u32],
}

/// One key head: queries `[tokens, group·d]`, the first token at position `start`.
fn attend(out: &mut MatMut<'_>, q: Mat<'_>, keys: Keys<'_>, start: usize, group: usize) {
    let (d, tokens) = (keys.kv.head_dim, q.rows());
    let (rows, width) = (tokens * group, d.next_multiple_of(COLS));
    let tiles = rows.div_ceil(ROWS);
    // Row r is query head r % group of token r / group.
    let mut packed = Scratch::take(tiles * ROWS * d);
    packed.fill(0.0);
    let scale = 1.0 / (d as f32).sqrt();
    for row in 0..rows {
        let query = &q.row(row / group)[row % group * d..][..d];
        let place = &mut packed[row / ROWS * ROWS * d..][..ROWS * d];
        for (column, &value) in place.chunks_exact_mut(ROWS).zip(query) {
            column[row % ROWS] = value * scale;
        }
    }
    let mut values = Scratch::take(rows * width);
    values.fill(0.0);
    let mut state = Scratch::take(2 * rows);
    let (maxima, sums) = state.split_at_mut(rows);
    maxima.fill(f32::NEG_INFINITY);
    sums.fill(0.0);
    let mut wide = Scratch::take((d + width) * BLOCK);
    let mut scores = [0.0f32; ROWS * BLOCK];

    let last = start + tokens - 1;
    for (index, &block) in keys.blocks[..=last / BLOCK].iter().enumerate() {
        let first_key = index * BLOCK;
        let (k, v) = keys.kv.load(keys.layer, block, keys.head, &mut wide);
        for tile_index in 0..tiles {
            let range = tile_index * ROWS..(tile_index * ROWS + ROWS).min(rows);
            // Positions of this block that a row sees: at most those its tile's last row sees.
            let seen = |row: usize| (start + row / group + 1).saturating_sub(first_key).min(BLOCK);
            let most = seen(range.end - 1);
            if most == 0 {
                continue;
            }
            let height = range.len();
            let panel = &packed[tile_index * ROWS * d..][..ROWS * d];
            scores_of(&mut MatMut::corner(&mut scores, BLOCK, height, BLOCK), panel, k, d);
            let seen_by: [usize; ROWS] = std::array::from_fn(|i| seen((range.start + i).min(range.end - 1)));
            let values = &mut values[range.start * width..range.end * width];
            softmax(&mut scores, &seen_by, &mut maxima[range.clone()], &mut sums[range.clone()], values, width);
            for (column, v) in v.chunks_exact(BLOCK * COLS).enumerate() {
                let mut c = MatMut::new(values, height, width);
                let mut c = c.block(0..height, column * COLS..(column + 1) * COLS);
                weighted(&mut c, &scores, v, most);
            }
        }
    }
    for row in 0..rows {
        let out = &mut out.row_mut(row / group)[row % group * d..][..d];
        let inverse = 1.0 / sums[row];
        for (out, value) in out.iter_mut().zip(&values[row * width..]) {
            *out = value * inverse;
        }
    }
}

/// c = q·kᵀ: queries by element, `[d, 12]`; the tile as high as there are rows.
fn scores_of(c: &mut MatMut<'_>, q: &[f32], k: &[f32], d: usize) {
    match c.rows() {
        1 => tile::<1, 1, ROWS>(c, q, k, d, Update::Set),
        2 => tile::<2, 1, ROWS>(c, q, k, d, Update::Set),
        3 | 4 => tile::<4, 1, ROWS>(c, q, k, d, Update::Set),
        5..=8 => tile::<8, 1, ROWS>(c, q, k, d, Update::Set),
        _ => tile::<ROWS, 1, ROWS>(c, q, k, d, Update::Set),
    }
}

/// c += p·v: probabilities `[12, 32]`, values `[32, 32]` of which the first `seen` positions count.
fn weighted(c: &mut MatMut<'_>, p: &[f32], v: &[f32], seen: usize) {
    match c.rows() {
        1 => tile::<1, BLOCK, 1>(c, p, v, seen, Update::Add),
        2 => tile::<2, BLOCK, 1>(c, p, v, seen, Update::Add),
        3 | 4 => tile::<4, BLOCK, 1>(c, p, v, seen, Update::Add),
        5..=8 => tile::<8, BLOCK, 1>(c, p, v, seen, Update::Add),
        _ => tile::<ROWS, BLOCK, 1>(c, p, v, seen, Update::Add),
    }
}

/// The two halves of an array, combined element by element.
#[inline(always)]
fn halve<const N: usize, const HALF: usize>(values: [f32; N], combine: impl Fn(f32, f32) -> f32) -> [f32; HALF] {
    const { assert!(N == 2 * HALF) };
    let mut halves = [0.0; HALF];
    for i in 0..HALF {
        halves[i] = combine(values[i], values[i + HALF]);
    }
    halves
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

simd_fn! {
    /// The scores of a tile's rows become weights against each row's largest score so far; what was summed before is brought to the same base. Row by row
    /// for itself, all in one call: a call for each took twice as long.
    fn softmax<FMA>(scores: &mut [f32], seen: &[usize; ROWS], maxima: &mut [f32], sums: &mut [f32], values: &mut [f32], width: usize) {
        let add = |a: f32, b: f32| a + b;
        let rows = scores.chunks_exact_mut(BLOCK).zip(maxima).zip(sums).zip(values.chunks_exact_mut(width)).zip(seen);
        for ((((scores, max), sum), values), &seen) in rows {
            let scores: &mut [f32; BLOCK] = scores.try_into().expect("a block of scores");
            if seen < BLOCK {
                for (i, score) in scores.iter_mut().enumerate() {
                    *score = if i < seen { *score } else { f32::NEG_INFINITY };
                }
            }
            let most = halve::<2, 1>(halve::<4, 2>(halve::<8, 4>(halve::<16, 8>(halve(*scores, larger), larger), larger), larger), larger)[0];
            if most > *max {
                let shrink = exp::<FMA>(*max - most);
                *sum *= shrink;
                for value in values.iter_mut() {
                    *value *= shrink;
                }
                *max = most;
            }
            for score in scores.iter_mut() {
                *score = exp::<FMA>(*score - *max);
            }
            if seen < BLOCK {
                for (i, score) in scores.iter_mut().enumerate() {
                    *score = if i < seen { *score } else { 0.0 };
                }
            }
            *sum += halve::<2, 1>(halve::<4, 2>(halve::<8, 4>(halve::<16, 8>(halve(*scores, add), add), add), add), add)[0];
        }
    }
}

/// The same by plain loops in f64.
pub mod scalar {
    /// Attention of queries `[tokens, q_heads·d]`, the first at position `start`, to keys and values `[positions, kv_heads·d]`.
    pub fn attention(q: &[f32], k: &[f32], v: &[f32], start: usize, q_heads: usize, kv_heads: usize, d: usize) -> Vec<f64> {
        let mut out = Vec::with_capacity(q.len());
        for (token, q) in q.chunks_exact(q_heads * d).enumerate() {
            for (head, q) in q.chunks_exact(d).enumerate() {
                let at = |x: &[f32], p: usize, i: usize| f64::from(x[(p * kv_heads + head / (q_heads / kv_heads)) * d + i]);
                let scores: Vec<f64> = (0..=start + token)
                    .map(|p| q.iter().enumerate().map(|(i, q)| f64::from(*q) * at(k, p, i)).sum::<f64>() / (d as f64).sqrt())
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                out.extend((0..d).map(|i| scores.iter().enumerate().map(|(p, s)| (s - max).exp() / sum * at(v, p, i)).sum::<f64>()));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    const SHAPES: [(usize, usize, usize); 5] = [(1, 1, 4), (4, 2, 16), (3, 1, 6), (16, 2, 128), (2, 2, 72)];

    /// Two layers and scattered blocks; the other layer holds other values.
    fn filled(k: &[f32], v: &[f32], blocks: &[u32], kv_heads: usize, d: usize, dtype: KvDtype) -> KvBlocks {
        let mut kv = KvBlocks::new(2, 40, kv_heads, d, dtype).unwrap();
        for (position, (k, v)) in k.chunks_exact(kv_heads * d).zip(v.chunks_exact(kv_heads * d)).enumerate() {
            let (block, offset) = (blocks[position / BLOCK], position % BLOCK);
            kv.store(1, block, offset, k, v);
            kv.store(0, block, offset, v, k);
        }
        kv
    }

    #[test]
    fn equals_its_twin_and_never_depends_on_what_is_computed_together() {
        let pool = Pool::new(2);
        let blocks = [7, 3, 39, 0, 12];
        for (q_heads, kv_heads, d) in SHAPES {
            for (dtype, tolerance) in [(KvDtype::F32, 2e-6), (KvDtype::Bf16, 6e-3), (KvDtype::Int8, 1.5e-2)] {
                let positions = 131;
                let q = Random::new(1).vec(positions * q_heads * d, 4.0);
                let (k, v) = (Random::new(2).vec(positions * kv_heads * d, 1.0), Random::new(3).vec(positions * kv_heads * d, 1.0));
                let kv = filled(&k, &v, &blocks, kv_heads, d, dtype);
                let expected = scalar::attention(&q, &k, &v, 0, q_heads, kv_heads, d);
                let mut all = vec![0.0; q.len()];
                let mut spans = Spans::default();
                spans.push(positions, 0, &blocks);
                attention(&pool, &mut all, Mat::new(&q, positions, q_heads * d), &kv, 1, q_heads, &mut spans);
                for (g, e) in all.iter().zip(&expected) {
                    assert!((f64::from(*g) - e).abs() < tolerance, "{q_heads}/{kv_heads} heads of {d}, {dtype:?}: {g} for {e}");
                }
                // The same queries in pieces, several of them in one step and on one thread.
                for cuts in [&[0, 1, 2, 40, 131][..], &[0, 33, 64, 65, 131], &[0, 130, 131]] {
                    let mut pieces = vec![0.0; q.len()];
                    let mut spans = Spans::default();
                    for cut in cuts.windows(2) {
                        spans.push(cut[1] - cut[0], cut[0], &blocks[..cut[1].div_ceil(BLOCK)]);
                    }
                    attention(&Pool::new(1), &mut pieces, Mat::new(&q, positions, q_heads * d), &kv, 1, q_heads, &mut spans);
                    assert_eq!(pieces, all, "{q_heads}/{kv_heads} heads of {d}, {dtype:?}, cut at {cuts:?}");
                }
            }
        }
    }

    #[test]
    fn queries_may_stand_among_other_columns() {
        let (q_heads, kv_heads, d, positions) = (2, 1, 8, 5);
        let wide = Random::new(4).vec(positions * 40, 1.0);
        let q: Vec<f32> = wide.chunks_exact(40).flat_map(|row| row[..16].to_vec()).collect();
        let (k, v) = (Random::new(5).vec(positions * d, 1.0), Random::new(6).vec(positions * d, 1.0));
        let kv = filled(&k, &v, &[9], kv_heads, d, KvDtype::F32);
        let (mut a, mut b) = (vec![0.0; q.len()], vec![0.0; q.len()]);
        let mut spans = Spans::default();
        spans.push(positions, 0, &[9]);
        attention(&Pool::new(1), &mut a, Mat::new(&q, positions, 16), &kv, 1, q_heads, &mut spans);
        attention(&Pool::new(1), &mut b, Mat::new(&wide, positions, 40), &kv, 1, q_heads, &mut spans);
        assert_eq!(a, b);
    }

    #[test]
    fn what_another_sequence_left_in_a_block_is_never_seen() {
        let (d, positions) = (8, 3);
        let (k, v) = (Random::new(7).vec(positions * d, 1.0), Random::new(8).vec(positions * d, 1.0));
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
            let mut kv = KvBlocks::new(1, 1, 1, d, dtype).unwrap();
            for offset in 0..BLOCK {
                kv.store(0, 0, offset, &[f32::NAN; 8], &[f32::NAN; 8]);
            }
            for (offset, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
                kv.store(0, 0, offset, k, v);
            }
            let q = Random::new(9).vec(positions * d, 1.0);
            let mut out = vec![0.0; q.len()];
            let mut spans = Spans::default();
            spans.push(positions, 0, &[0]);
            attention(&Pool::new(1), &mut out, Mat::new(&q, positions, d), &kv, 0, 1, &mut spans);
            assert!(out.iter().all(|x| x.is_finite()), "{dtype:?}");
        }
    }
}
