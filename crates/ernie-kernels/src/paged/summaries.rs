//! Summaries of paragraphs beside a cache in blocks: `ernie_kernels::attention::paragraphs` for the inference engine.
//!
//! A paragraph has at least as many tokens as a block, so that of the positions of a block at most one ends a paragraph: its summary has its place with
//! that block, and whoever has the block has the summary.

use std::ops::Range;

use super::{BLOCK, COLS, KvBlocks, Spans, value_place};
use crate::arch::pool::Pool;
use crate::rope::RopeTable;
use crate::row;
use crate::scratch::Scratch;

/// Keys, turned by the positions of their paragraphs' last tokens, and values: `[blocks, layers, kv_heads, 2·head_dim]`.
#[derive(Debug)]
pub struct Summaries {
    values: Vec<f32>,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Summaries {
    /// Room beside `blocks` blocks for `layers` layers; memory is taken from the system as it is written. `None` if that is more than can be
    /// addressed.
    pub fn new(layers: usize, blocks: usize, kv_heads: usize, head_dim: usize) -> Option<Self> {
        let bytes = Self::bytes_per_block(layers, kv_heads, head_dim).checked_mul(blocks).filter(|&bytes| bytes < isize::MAX as usize)?;
        Some(Summaries { values: vec![0.0; bytes / 4], layers, kv_heads, head_dim })
    }

    /// Memory beside one block.
    pub fn bytes_per_block(layers: usize, kv_heads: usize, head_dim: usize) -> usize {
        layers * kv_heads * 2 * head_dim * 4
    }

    /// Key and value of one head.
    pub(super) fn of(&self, block: u32, layer: usize, head: usize) -> (&[f32], &[f32]) {
        let place = ((block as usize * self.layers + layer) * self.kv_heads + head) * 2 * self.head_dim;
        self.values[place..place + 2 * self.head_dim].split_at(self.head_dim)
    }
}

/// The paragraphs of a step's sequences, span by span as in [`Spans`]. Kept and refilled from step to step.
#[derive(Debug, Default)]
pub struct Paragraphs {
    /// Where paragraphs end: the position after their last token.
    ends: Vec<u32>,
    /// The block with which the summary is.
    blocks: Vec<u32>,
    /// For each span, where its paragraphs start in these lists; and where the last one's end.
    first: Vec<usize>,
    /// Numbers, in these lists, of those that end in this step, in the order of their blocks; those blocks; and their spans.
    ended: Vec<usize>,
    ended_blocks: Vec<u32>,
}

impl Paragraphs {
    /// Takes memory for lists of `spans` spans with `paragraphs` paragraphs in all.
    pub fn reserve(&mut self, spans: usize, paragraphs: usize) {
        self.first.reserve(spans);
        for list in [&mut self.ends, &mut self.blocks, &mut self.ended_blocks] {
            list.reserve(paragraphs);
        }
        self.ended.reserve(paragraphs);
    }

    /// Forgets all spans.
    pub fn clear(&mut self) {
        self.ends.clear();
        self.blocks.clear();
        self.first.clear();
        self.ended.clear();
        self.ended_blocks.clear();
    }

    /// The paragraphs of the next span: those of its sequence that end at the positions `ends` (ascending; such beyond the span change nothing), whose
    /// blocks are `blocks`. `rows` are the span's positions.
    pub fn push(&mut self, ends: impl IntoIterator<Item = u32>, rows: Range<usize>, blocks: &[u32]) {
        self.first.push(self.ends.len());
        for end in ends {
            if end as usize > rows.end {
                break;
            }
            let block = blocks[(end as usize - 1) / BLOCK];
            if end as usize > rows.start {
                self.ended.push(self.ends.len());
            }
            self.ends.push(end);
            self.blocks.push(block);
        }
        self.ended.sort_unstable_by_key(|&index| self.blocks[index]);
        self.ended_blocks.clear();
        self.ended_blocks.extend(self.ended.iter().map(|&index| self.blocks[index]));
    }

    /// Ends and blocks of the paragraphs of a span.
    pub(super) fn of(&self, span: usize) -> (&[u32], &[u32]) {
        let end = self.first.get(span + 1).copied().unwrap_or(self.ends.len());
        (&self.ends[self.first[span]..end], &self.blocks[self.first[span]..end])
    }
}

/// Sums up the paragraphs that end in a step, whose keys and values are stored: see `ernie_kernels::attention::paragraphs` for the formula. `layer` is the
/// layer's number in `kv`, `index` that among those with summaries, `pool_vectors` `[kv_heads, head_dim]`.
///
/// # Panics
/// If sizes do not fit, or keys of a paragraph that ends are no longer in the cache.
#[allow(clippy::too_many_arguments)] // Where keys and values are, and where summaries go.
pub fn summarise(
    pool: &Pool,
    summaries: &mut Summaries,
    index: usize,
    pool_vectors: &[f32],
    kv: &KvBlocks,
    layer: usize,
    rope: &RopeTable,
    spans: &Spans,
    paragraphs: &Paragraphs,
) {
    let (d, heads) = (kv.head_dim, kv.kv_heads);
    assert!(pool_vectors.len() == heads * d && summaries.head_dim == d && summaries.kv_heads == heads && index < summaries.layers);
    if paragraphs.ended.is_empty() {
        return;
    }
    let stride = summaries.layers * heads * 2 * d;
    let of_layer = index * heads * 2 * d..(index + 1) * heads * 2 * d;
    let (ended, blocks) = (&paragraphs.ended, &paragraphs.ended_blocks);
    pool.for_each_chosen(&mut summaries.values, stride, blocks, |place, block| {
        let number = ended[place];
        let span = paragraphs.first.partition_point(|&first| first <= number) - 1;
        let start = if number > paragraphs.first[span] { paragraphs.ends[number - 1] as usize } else { 0 };
        let rows = start..paragraphs.ends[number] as usize;
        let span = &spans.spans[span];
        assert!(start / BLOCK >= span.first_block, "position {start} is no longer in the cache");
        let blocks = spans.blocks_of(span);
        for (head, (summary, u)) in block[of_layer.clone()].chunks_exact_mut(2 * d).zip(pool_vectors.chunks_exact(d)).enumerate() {
            let (mut keys, mut values) = (Scratch::take(rows.len() * d), Scratch::take(rows.len() * d));
            for first in (rows.start / BLOCK * BLOCK..rows.end).step_by(BLOCK) {
                let mut wide = Scratch::take((d + d.next_multiple_of(COLS)) * BLOCK);
                let (k, v) = kv.load(layer, blocks[first / BLOCK - span.first_block], head, &mut wide);
                for position in first.max(rows.start)..(first + BLOCK).min(rows.end) {
                    let (offset, place) = (position - first, (position - rows.start) * d);
                    for element in 0..d {
                        keys[place + element] = k[element * BLOCK + offset];
                        values[place + element] = v[value_place(element, offset)];
                    }
                    // As it was before it was turned.
                    rope.rotate_row(&mut keys[place..place + d], position, true);
                }
            }
            let scale = 1.0 / (d as f32).sqrt();
            let mut weights = Scratch::take(rows.len());
            for (weight, key) in weights.iter_mut().zip(keys.chunks_exact(d)) {
                *weight = row::dot(u, key) * scale;
            }
            let (_, sum) = row::exponentials(&mut weights);
            row::scale(&mut weights, 1.0 / sum);
            summary.fill(0.0);
            let (key, value) = summary.split_at_mut(d);
            for ((k, v), &weight) in keys.chunks_exact(d).zip(values.chunks_exact(d)).zip(weights.iter()) {
                row::add_scaled(key, k, weight);
                row::add_scaled(value, v, weight);
            }
            rope.rotate_row(key, rows.end - 1, false);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::{KvDtype, Layer, Past, append, attention};
    use super::*;
    use crate::arch::matrix::Mat;
    use crate::attention::paragraphs::Bounds;
    use crate::attention::{Shape, scalar};
    use crate::testing::{Random, wide};

    const ENDS: [u32; 6] = [32, 70, 103, 140, 172, 220];
    const POSITIONS: usize = 261;
    /// No paragraph is longer.
    const LONGEST: usize = 48;

    struct Case {
        shape: Shape,
        rows: Vec<f32>,
        vectors: Vec<f32>,
        rope: RopeTable,
    }

    impl Case {
        fn new(q_heads: usize, kv_heads: usize, head_dim: usize) -> Self {
            let shape = Shape { q_heads, kv_heads, head_dim };
            let mut random = Random::new(21);
            let rows = random.vec(POSITIONS * shape.qkv_width(), 1.5);
            Case { shape, rows, vectors: random.vec(kv_heads * head_dim, 2.0), rope: RopeTable::new(10_000.0, head_dim, POSITIONS) }
        }

        /// Attention's output with the text computed in these pieces; another layer and another sequence's blocks stand beside its own.
        fn in_pieces(&self, cuts: &[usize], dtype: KvDtype, threads: usize) -> Vec<f32> {
            let Shape { q_heads, kv_heads, head_dim: d } = self.shape;
            let (width, q) = (self.shape.qkv_width(), q_heads * d);
            let blocks: Vec<u32> = (0..POSITIONS.div_ceil(BLOCK) as u32).map(|index| (index * 7 + 3) % 20).collect();
            let mut kv = KvBlocks::new(2, 20, kv_heads, d, dtype).unwrap();
            let mut summaries = Summaries::new(2, 20, kv_heads, d).unwrap();
            summaries.values.fill(f32::NAN);
            let pool = Pool::new(threads);
            let (mut spans, mut paragraphs, mut out) = (Spans::default(), Paragraphs::default(), Vec::new());
            for cut in cuts.windows(2) {
                let count = cut[1] - cut[0];
                spans.clear();
                paragraphs.clear();
                let gone = (cut[0] + 1).saturating_sub(LONGEST) / BLOCK;
                spans.push_from(count, cut[0], gone, &blocks[gone..cut[1].div_ceil(BLOCK)]);
                paragraphs.push(ENDS, cut[0]..cut[1], &blocks);
                let rows = Mat::new(&self.rows[cut[0] * width..cut[1] * width], count, width);
                append(&pool, &mut kv, 1, rows, q, &self.rope, &mut spans);
                summarise(&pool, &mut summaries, 1, &self.vectors, &kv, 1, &self.rope, &spans, &paragraphs);
                let past = Past::Paragraphs { summaries: &summaries, layer: 1, paragraphs: &paragraphs };
                let first = out.len();
                out.resize(first + count * q, f32::NAN);
                let layer = Layer { kv: &kv, layer: 1, q_heads, past, gates: None };
                attention(&pool, &mut out[first..], rows, Some(&self.rope), layer, &mut spans);
            }
            out
        }
    }

    #[test]
    fn equals_its_twin_however_the_text_is_cut() {
        for (q_heads, kv_heads, d) in [(1, 1, 4), (4, 2, 16), (3, 1, 6), (2, 2, 72)] {
            let case = Case::new(q_heads, kv_heads, d);
            let paragraphs: Vec<u32> = [0].into_iter().chain(ENDS).chain([POSITIONS as u32]).collect();
            let bounds = Bounds { cu_seqlens: &[0, POSITIONS as u32], paragraphs: &paragraphs };
            let expected = scalar::paragraphs(&wide(&case.rows), &wide(&case.vectors), bounds, &case.rope, case.shape).out;
            for (dtype, tolerance) in [(KvDtype::F32, 5e-6), (KvDtype::Bf16, 3e-2), (KvDtype::Int8, 6e-2)] {
                let whole = case.in_pieces(&[0, POSITIONS], dtype, 2);
                for (got, expected) in whole.iter().zip(&expected) {
                    assert!((f64::from(*got) - expected).abs() < tolerance, "{:?}, {dtype:?}: {got} for {expected}", case.shape);
                }
                let one_by_one: Vec<usize> = (0..=POSITIONS).collect();
                for cuts in [&[0, 31, 32, 33, 103, 104, 260, 261][..], &[0, 140, 221, 261], &one_by_one] {
                    assert_eq!(case.in_pieces(cuts, dtype, 1), whole, "{:?}, {dtype:?}, cut at {cuts:?}", case.shape);
                }
            }
        }
    }
}
