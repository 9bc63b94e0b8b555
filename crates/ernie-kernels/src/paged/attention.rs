//! Attention of queries to keys and values in blocks.
use std::ops::Range;

use super::{BLOCK, KvBlocks, KvDtype, Paragraphs, Spans, Summaries, region_bytes, store};
use crate::arch::dot_bf16;
use crate::arch::exp::exp;
use crate::arch::isa::simd_fn;
use crate::arch::matrix::{Mat, MatMut};
use crate::arch::pool::Pool;
use crate::arch::tile::{COLS, ROWS, Update, tile};
use crate::arch::widen::narrow_pairs;
use crate::rope::{self, RopeTable};
use crate::scratch::Scratch;

/// The keys and values of a layer, and how they are read.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// The cache it is in.
    pub kv: &'a KvBlocks,
    /// Its number there.
    pub layer: usize,
    /// Query heads, a multiple of the key heads. Query head h reads key head `h / (q_heads / kv_heads)`.
    pub q_heads: usize,
    /// What a query sees of the positions up to its own.
    pub past: Past<'a>,
    /// Factors of the heads' outputs, `[rows, q_heads]`, without which all are 1; a head whose factor is 0 is not computed.
    pub gates: Option<&'a [f32]>,
}

/// What a query sees of the positions up to its own.
#[derive(Clone, Copy, Debug)]
pub enum Past<'a> {
    /// All of them.
    All,
    /// So many, its own included.
    Window(usize),
    /// Those of its own paragraph, and the summaries of the paragraphs before, which are those of layer `layer` of `summaries`.
    Paragraphs {
        /// Where the summaries are.
        summaries: &'a Summaries,
        /// The layer's number there.
        layer: usize,
        /// Where the paragraphs of the step's sequences end.
        paragraphs: &'a Paragraphs,
    },
}

/// Causal attention of each row to the positions of its sequence up to its own, as far as it sees them, which must have been stored:
/// `out` `[rows, q_heads·head_dim]`; queries are the first `q_heads·head_dim` columns of the rows of `q`, to be turned by the angles of their positions if
/// there is a `rope`. Scores are scaled by 1/√head_dim.
///
/// # Panics
/// If sizes do not fit.
pub fn attention(pool: &Pool, out: &mut [f32], q: Mat<'_>, rope: Option<&RopeTable>, of: Layer<'_>, spans: &mut Spans) {
    let Layer { kv, layer, q_heads, past, gates } = of;
    assert!(gates.is_none_or(|gates| gates.len() == q.rows() * q_heads), "a gate for each head of {} rows", q.rows());
    assert!(!matches!(past, Past::Window(0)), "a window of no positions");
    assert!(kv.kv_heads > 0 && q_heads.is_multiple_of(kv.kv_heads), "{q_heads} query heads over {} key heads", kv.kv_heads);
    let (d, group) = (kv.head_dim, q_heads / kv.kv_heads);
    assert!(q.rows() == spans.rows() && q.cols() >= q_heads * d, "queries for {} rows", spans.rows());
    spans.cut(group);
    let spans = &*spans;
    pool.for_each_block(MatMut::new(out, q.rows(), q_heads * d), &spans.rows, group * d, |task, col, mut out| {
        let span = &spans.spans[spans.span_of[task]];
        let rows = spans.rows[task].clone();
        let start = span.start + rows.start - span.rows.start;
        let gates = gates.map(|gates| Mat::new(gates, q.rows(), q_heads).rows_of(rows.clone()).columns(col / d..col / d + group));
        let queries = q.rows_of(rows).columns(col..col + group * d);
        let seen = match past {
            Past::All => Seen::From(0),
            Past::Window(window) => Seen::Window(window),
            Past::Paragraphs { summaries, layer, paragraphs } => {
                let (ends, blocks) = paragraphs.of(spans.span_of[task]);
                Seen::Paragraphs { summaries, layer, ends, blocks }
            }
        };
        let keys = Keys { kv, layer, head: col / (group * d), blocks: spans.blocks_of(span), first_block: span.first_block, seen };
        attend(&mut out, queries, gates, rope, keys, start, group);
    });
}

#[derive(Clone, Copy)]
struct Keys<'a> {
    kv: &'a KvBlocks,
    layer: usize,
    head: usize,
    blocks: &'a [u32],
    /// Positions of `blocks` count from this block on.
    first_block: usize,
    seen: Seen<'a>,
}

/// [`Past`] of one sequence.
#[derive(Clone, Copy)]
enum Seen<'a> {
    From(usize),
    Window(usize),
    Paragraphs { summaries: &'a Summaries, layer: usize, ends: &'a [u32], blocks: &'a [u32] },
}

impl Seen<'_> {
    /// The first position that the query at a position sees.
    fn first(&self, position: usize) -> usize {
        match *self {
            Seen::From(first) => first,
            Seen::Window(window) => (position + 1).saturating_sub(window),
            Seen::Paragraphs { ends, .. } => match self.summaries(position) {
                0 => 0,
                earlier => ends[earlier - 1] as usize,
            },
        }
    }

    /// How many summaries it sees.
    fn summaries(&self, position: usize) -> usize {
        match self {
            Seen::Paragraphs { ends, .. } => ends.partition_point(|&end| end as usize <= position),
            _ => 0,
        }
    }
}

impl Keys<'_> {
    /// Keys and values of the summaries from number `first` on as a block of their own, for as many as there are up to `end`: in f32, or in words of two
    /// bf16.
    fn gather(&self, panel: &mut [f32], first: usize, end: usize, dtype: KvDtype) {
        let Seen::Paragraphs { summaries, layer, blocks, .. } = self.seen else { return };
        let region: &mut [u8] = bytemuck::cast_slice_mut(panel);
        for (offset, &block) in blocks[first..end.min(first + BLOCK)].iter().enumerate() {
            let (key, value) = summaries.of(block, layer, self.head);
            store(region, dtype, offset, key, value);
        }
    }
}

/// One key head: queries `[tokens, group·d]`, the first token at position `start`.
#[allow(clippy::too_many_arguments)] // A block of queries, and what they see.
fn attend(out: &mut MatMut<'_>, q: Mat<'_>, gates: Option<Mat<'_>>, rope: Option<&RopeTable>, keys: Keys<'_>, start: usize, group: usize) {
    let (d, tokens) = (keys.kv.head_dim, q.rows());
    let gate = |token: usize, member: usize| gates.map_or(1.0, |gates| gates.row(token)[member]);
    // Row r is head r % group of token r / group; those that are computed stand side by side, by which no row's bits change.
    let all = tokens * group;
    let mut listed = Scratch::take(all);
    let listed: &mut [u32] = bytemuck::cast_slice_mut(&mut listed);
    let mut rows = 0;
    for row in 0..all {
        if gate(row / group, row % group) != 0.0 {
            listed[rows] = row as u32;
            rows += 1;
        } else {
            out.row_mut(row / group)[row % group * d..][..d].fill(0.0);
        }
    }
    if rows == 0 {
        return;
    }
    let token_of = |row: usize| listed[row] as usize / group;
    let width = d.next_multiple_of(COLS);
    // Sizes by all rows: how many are computed changes from step to step.
    let mut packed = Scratch::take(all.div_ceil(ROWS) * ROWS * d);
    packed.fill(0.0);
    let scale = 1.0 / (d as f32).sqrt();
    // Where the processor multiplies bf16 and the cache holds it, queries and probabilities are rounded to it too, for twice the speed.
    let native = keys.kv.dtype == KvDtype::Bf16 && dot_bf16::is_available();
    let (mut turned, mut words) = (Scratch::take(group * d), Scratch::take(d / 2));
    let mut row = 0;
    for token in 0..tokens {
        if row == rows || token_of(row) > token {
            continue;
        }
        turned.copy_from_slice(&q.row(token)[..group * d]);
        if let Some(rope) = rope {
            rope::rotate_row(&mut turned, rope, start + token);
        }
        turned.iter_mut().for_each(|x| *x *= scale);
        while row < rows && token_of(row) == token {
            let query = &turned[listed[row] as usize % group * d..][..d];
            if native {
                narrow_pairs(bytemuck::cast_slice_mut(&mut words), query);
                let words: &[u32] = bytemuck::cast_slice(&words);
                let place = &mut bytemuck::cast_slice_mut(&mut packed)[row / ROWS * ROWS * words.len()..][..ROWS * words.len()];
                column_of(place, row % ROWS, words);
            } else {
                column_of(&mut packed[row / ROWS * ROWS * d..][..ROWS * d], row % ROWS, query);
            }
            row += 1;
        }
    }
    let (mut values, mut state) = (Scratch::take(all * width), Scratch::take(2 * all));
    values.fill(0.0);
    let (maxima, sums) = state.split_at_mut(all);
    maxima.fill(f32::NEG_INFINITY);
    sums.fill(0.0);
    let mut wide = Scratch::take((d + width) * BLOCK);
    let mut sum = Sum { rows, d, width, native, packed: &packed, maxima, sums, values: &mut values };

    let (first, last) = (keys.seen.first(start + token_of(0)), start + token_of(rows - 1));
    let earlier = keys.seen.summaries(last);
    if earlier > 0 {
        let dtype = if native { KvDtype::Bf16 } else { KvDtype::F32 };
        let mut panel = Scratch::take(region_bytes(d, dtype) / 4);
        for from in (0..earlier).step_by(BLOCK) {
            keys.gather(&mut panel, from, earlier, dtype);
            let seen = |row: usize| 0..keys.seen.summaries(start + token_of(row)).saturating_sub(from).min(BLOCK);
            if native {
                let (k_words, v_words) = bytemuck::cast_slice(&panel).split_at(d / 2 * BLOCK);
                sum.add(&[], &[], k_words, v_words, seen);
            } else {
                let (k, v) = panel.split_at(d * BLOCK);
                sum.add(k, v, &[], &[], seen);
            }
        }
    }
    assert!(first / BLOCK >= keys.first_block, "position {first} is no longer in the cache");
    for index in first / BLOCK..=last / BLOCK {
        let (first_key, block) = (index * BLOCK, keys.blocks[index - keys.first_block]);
        let (k, v) = if native { (&[][..], &[][..]) } else { keys.kv.load(keys.layer, block, keys.head, &mut wide) };
        let (k_words, v_words) = if native { keys.kv.words(keys.layer, block, keys.head) } else { (&[][..], &[][..]) };
        let seen = |row: usize| {
            let position = start + token_of(row);
            let from = keys.seen.first(position).saturating_sub(first_key).min(BLOCK);
            from..(position + 1).saturating_sub(first_key).min(BLOCK)
        };
        sum.add(k, v, k_words, v_words, seen);
    }
    for (row, &total) in sum.sums[..rows].iter().enumerate() {
        let (token, member) = (token_of(row), listed[row] as usize % group);
        let out = &mut out.row_mut(token)[member * d..][..d];
        let inverse = gate(token, member) / total;
        for (out, value) in out.iter_mut().zip(&sum.values[row * width..]) {
            *out = value * inverse;
        }
    }
}

/// Weighted sums of values in the making, row by row: softmax block after block.
struct Sum<'a> {
    rows: usize,
    d: usize,
    /// d rounded up to whole tiles.
    width: usize,
    /// Whether keys and values come as words of two bf16.
    native: bool,
    /// Queries by element, `[rows / 12, d, 12]`.
    packed: &'a [f32],
    /// Each row's largest score so far, and the sum of the exponentials of the scores less it.
    maxima: &'a mut [f32],
    sums: &'a mut [f32],
    /// `[rows, width]`.
    values: &'a mut [f32],
}

impl Sum<'_> {
    /// Takes a block of keys and values in, of which a row sees `seen`: nothing beyond what the last row of its tile sees, or before what the first
    /// sees.
    #[inline(always)]
    fn add(&mut self, k: &[f32], v: &[f32], k_words: &[u32], v_words: &[u32], seen: impl Fn(usize) -> Range<usize>) {
        let Sum { rows, d, width, native, .. } = *self;
        let packed_words: &[u32] = bytemuck::cast_slice(self.packed);
        let mut scores = [0.0f32; ROWS * BLOCK];
        let mut rounded = [0u32; ROWS * BLOCK / 2];
        for first in (0..rows).step_by(ROWS) {
            let range = first..(first + ROWS).min(rows);
            let most = seen(range.end - 1).end;
            if most == 0 || seen(first).start == BLOCK {
                continue;
            }
            let height = range.len();
            let mut corner = MatMut::corner(&mut scores, BLOCK, height, BLOCK);
            if native {
                scores_of_words(&mut corner, &packed_words[first * (d / 2)..][..ROWS * (d / 2)], k_words, d / 2);
            } else {
                scores_of(&mut corner, &self.packed[first * d..][..ROWS * d], k, d);
            }
            let seen_by: [Range<usize>; ROWS] = std::array::from_fn(|i| seen((first + i).min(range.end - 1)));
            let values = &mut self.values[first * width..range.end * width];
            softmax(&mut scores, &seen_by, &mut self.maxima[range.clone()], &mut self.sums[range], values, width);
            if native {
                narrow_pairs(&mut rounded[..height * BLOCK / 2], &scores[..height * BLOCK]);
            }
            for column in 0..width / COLS {
                let mut c = MatMut::new(values, height, width);
                let mut c = c.block(0..height, column * COLS..(column + 1) * COLS);
                if native {
                    weighted_words(&mut c, &rounded, &v_words[column * BLOCK / 2 * COLS..][..BLOCK / 2 * COLS], most.div_ceil(2));
                } else {
                    weighted(&mut c, &scores, &v[column * BLOCK * COLS..][..BLOCK * COLS], most);
                }
            }
        }
    }
}

/// Puts a row's elements into column `row` of `[elements, 12]`.
fn column_of<T: Copy>(place: &mut [T], row: usize, elements: &[T]) {
    for (column, &element) in place.chunks_exact_mut(ROWS).zip(elements) {
        column[row] = element;
    }
}

/// [`scores_of`] of words of two bf16: `[pairs, 12]` and `[pairs, 32]`.
fn scores_of_words(c: &mut MatMut<'_>, q: &[u32], k: &[u32], pairs: usize) {
    match c.rows() {
        1 => dot_bf16::tile::<1, 1, ROWS>(c, q, k, pairs, Update::Set),
        2 => dot_bf16::tile::<2, 1, ROWS>(c, q, k, pairs, Update::Set),
        3 | 4 => dot_bf16::tile::<4, 1, ROWS>(c, q, k, pairs, Update::Set),
        5..=8 => dot_bf16::tile::<8, 1, ROWS>(c, q, k, pairs, Update::Set),
        _ => dot_bf16::tile::<ROWS, 1, ROWS>(c, q, k, pairs, Update::Set),
    }
}

/// [`weighted`] of words of two bf16: `[12, 16]` and `[16, 32]`, of which the first `pairs` count.
fn weighted_words(c: &mut MatMut<'_>, p: &[u32], v: &[u32], pairs: usize) {
    match c.rows() {
        1 => dot_bf16::tile::<1, { BLOCK / 2 }, 1>(c, p, v, pairs, Update::Add),
        2 => dot_bf16::tile::<2, { BLOCK / 2 }, 1>(c, p, v, pairs, Update::Add),
        3 | 4 => dot_bf16::tile::<4, { BLOCK / 2 }, 1>(c, p, v, pairs, Update::Add),
        5..=8 => dot_bf16::tile::<8, { BLOCK / 2 }, 1>(c, p, v, pairs, Update::Add),
        _ => dot_bf16::tile::<ROWS, { BLOCK / 2 }, 1>(c, p, v, pairs, Update::Add),
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
    fn softmax<FMA>(scores: &mut [f32], seen: &[Range<usize>; ROWS], maxima: &mut [f32], sums: &mut [f32], values: &mut [f32], width: usize) {
        let add = |a: f32, b: f32| a + b;
        let rows = scores.chunks_exact_mut(BLOCK).zip(maxima).zip(sums).zip(values.chunks_exact_mut(width)).zip(seen);
        for ((((scores, max), sum), values), seen) in rows {
            let scores: &mut [f32; BLOCK] = scores.try_into().expect("a block of scores");
            let (from, to) = (seen.start, seen.end);
            let whole = from == 0 && to == BLOCK;
            if !whole {
                for (i, score) in scores.iter_mut().enumerate() {
                    *score = if i >= from && i < to { *score } else { f32::NEG_INFINITY };
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
            // A row that has seen nothing yet has no largest score, and what was computed with it is no number.
            if !whole {
                for (i, score) in scores.iter_mut().enumerate() {
                    *score = if i >= from && i < to { *score } else { 0.0 };
                }
            }
            *sum += halve::<2, 1>(halve::<4, 2>(halve::<8, 4>(halve::<16, 8>(halve(*scores, add), add), add), add), add)[0];
        }
    }
}
