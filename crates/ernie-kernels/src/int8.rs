//! Linear layers with 8-bit weights and 8-bit activations, for inference.
//!
//! Weights are symmetric with one scale per output row: w ≈ q·s, q in −127..=127. Activations are quantised per token as they come:
//! x ≈ q·max|x|/127. So y\[t, n\] = s_x(t) · s_w(n) · Σ_k q_x q_w (+ bias), where the sum is a whole number: a token's result never depends on what is
//! computed beside it, nor on the instruction set.
mod rows;

use std::ops::Range;

pub(crate) use rows::OfRow;
pub use rows::{Rows8, norm, quantise_row};

use crate::arch::dot_i8::{self, Fetch, PANEL, SUMS, TOKENS, panels_at_once};
use crate::arch::exp::exp;
use crate::arch::isa::simd_fn;
use crate::arch::matrix::MatMut;
use crate::arch::pack::transpose;
use crate::arch::pool::Pool;
use crate::memory::Memory;
use crate::scratch::Scratch;

/// Largest k for which sums stay below 2³¹.
pub const MAX_K: usize = (1 << 31) / (255 * 127) - 1;

/// Activations that stay in the second-level cache while a task's weights go by, in bytes.
const BLOCK_BYTES: usize = 192 << 10;
/// Rows up to which waiting for weights takes longer than computing: lower tiles then take more panels at once, for the processor reads several streams
/// ahead of time better than two.
const FEW: usize = 24;
/// Blocks that rows are cut into at most.
const MOST_BLOCKS: usize = 32;
/// Weights of one task, in bytes.
const TASK_BYTES: usize = 128 << 10;

/// Weights `[n, k]` packed for the products, with a scale and perhaps a bias for each row.
#[derive(Debug)]
pub struct Matrix8 {
    memory: Memory,
    /// `[panels · 16]`.
    scales: Vec<f32>,
    /// `[panels · 16]`, or empty.
    bias: Vec<f32>,
    n: usize,
    k: usize,
    words: usize,
}

impl Matrix8 {
    /// Packs n rows of k weights; `fill` writes the bytes of one row and returns its scale. Rows beyond a caller's own matrix may be left zero.
    ///
    /// # Errors
    /// What the system says when there is no memory.
    ///
    /// # Panics
    /// If k is 0 or larger than [`MAX_K`].
    pub fn pack(pool: &Pool, n: usize, k: usize, fill: impl Fn(usize, &mut [i8]) -> f32 + Sync) -> std::io::Result<Self> {
        assert!(k > 0 && k <= MAX_K, "rows of {k} weights; 1 to {MAX_K} are possible");
        let (panels, words) = (n.div_ceil(PANEL), k.div_ceil(4));
        let mut memory = Memory::zeroed(panels * words * 4 * PANEL)?;
        let mut scales = vec![0.0; panels * PANEL];
        let bytes = &mut memory.bytes_mut()[..panels * words * 4 * PANEL];
        pool.for_each_pieces(bytes, words * 4 * PANEL, (&mut scales, PANEL), (&mut [0u8; 0], 1), |panel, out, scales, _| {
            let mut rows = Scratch::take(PANEL * words);
            rows.fill(0.0);
            for (r, row) in rows.chunks_exact_mut(words).enumerate().take(n - panel * PANEL) {
                scales[r] = fill(panel * PANEL + r, &mut bytemuck::cast_slice_mut(row)[..k]);
            }
            let rows: [&[f32]; PANEL] = std::array::from_fn(|r| &rows[r * words..][..words]);
            transpose::<PANEL>(bytemuck::cast_slice_mut(out), &rows, words);
            for word in bytemuck::cast_slice_mut::<u8, u32>(out) {
                *word ^= 0x8080_8080;
            }
        });
        Ok(Matrix8 { memory, scales, bias: Vec::new(), n, k, words })
    }

    /// Adds a bias for each row, `[n]`.
    #[must_use]
    pub fn with_bias(mut self, bias: &[f32]) -> Self {
        assert_eq!(bias.len(), self.n, "one bias for each row");
        self.bias = bias.to_vec();
        self.bias.resize(self.scales.len(), 0.0);
        self
    }

    /// Rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Whether all scales are numbers.
    pub fn is_finite(&self) -> bool {
        self.scales.iter().all(|scale| scale.is_finite())
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        self.scales.len() * self.words * 4
    }

    /// Row `row`, widened: `[k]`.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        let panel = &self.memory.bytes()[row / PANEL * self.words * 4 * PANEL..][..self.words * 4 * PANEL];
        let (lane, scale) = (row % PANEL * 4, self.scales[row]);
        for (out, word) in out[..self.k].chunks_mut(4).zip(panel.chunks_exact(4 * PANEL)) {
            for (out, &q) in out.iter_mut().zip(&word[lane..]) {
                *out = (i32::from(q) - 128) as f32 * scale;
            }
        }
    }
}

/// What happens to a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// y = W x + b.
    Set,
    /// y += W x + b.
    Add,
    /// Panels of 16 rows alternate between those of a gate and those of an up projection: y = silu(gate) · up.
    SwiGlu,
}

/// y = x·wᵀ for all rows of x and all of w: y `[rows, n]`, for [`Into::SwiGlu`] `[rows, n / 2]`.
pub fn linear(pool: &Pool, y: &mut [f32], x: &Rows8, w: &Matrix8, into: Into) {
    // On the stack: a decoding step comes here a hundred times.
    let (mut rows, mut count) = ([const { 0..0 }; MOST_BLOCKS], 0);
    let height = (BLOCK_BYTES / x.stride.max(1)).max(x.rows.div_ceil(MOST_BLOCKS)).max(4 * TOKENS).next_multiple_of(TOKENS);
    for start in (0..x.rows).step_by(height) {
        rows[count] = start..(start + height).min(x.rows);
        count += 1;
    }
    product(pool, y, x, w, w.n, &rows[..count], &[0; MOST_BLOCKS][..count], into);
}

/// Groups of rows, each for the part of a matrix that starts at one of its rows. Kept and refilled from step to step.
#[derive(Debug, Default)]
pub struct Groups {
    rows: Vec<Range<usize>>,
    firsts: Vec<usize>,
}

impl Groups {
    /// Forgets all groups.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.firsts.clear();
    }

    /// Rows of each group, and the first of its rows of weights.
    pub(crate) fn parts(&self) -> (&[Range<usize>], &[usize]) {
        (&self.rows, &self.firsts)
    }

    /// Adds rows `rows` of x, after those of the groups before, for the part of the matrix that starts at row `first`, a multiple of 16.
    pub fn push(&mut self, rows: Range<usize>, first: usize) {
        assert!(first.is_multiple_of(PANEL), "parts start at a panel");
        self.rows.push(rows);
        self.firsts.push(first);
    }
}

/// y = x·wᵀ, each group of rows with its own n rows of w: y `[rows, n]`, for [`Into::SwiGlu`] `[rows, n / 2]`.
///
/// # Panics
/// If sizes do not fit, or groups overlap.
pub fn grouped(pool: &Pool, y: &mut [f32], x: &Rows8, w: &Matrix8, n: usize, groups: &Groups, into: Into) {
    product(pool, y, x, w, n, &groups.rows, &groups.firsts, into);
}

#[allow(clippy::too_many_arguments)] // A product's operands, its parts, and what becomes of it.
fn product(pool: &Pool, y: &mut [f32], x: &Rows8, w: &Matrix8, n: usize, rows: &[Range<usize>], firsts: &[usize], into: Into) {
    assert!(x.k == w.k, "rows of {} elements times a matrix of {} columns", x.k, w.k);
    assert!(firsts.iter().all(|first| first + n <= w.scales.len()), "a group's part of the matrix");
    let y = MatMut::new(y, x.rows, if into == Into::SwiGlu { n / 2 } else { n });
    blocks(pool, y, w.words * 4 * PANEL, n, (rows, firsts), into, |y, rows, panels| task(y, x, rows, w, panels, into));
}

/// Cuts a product of `groups` (their rows, and the first of the n rows of weights of each) into tasks of [`TASK_BYTES`] of weights, which are packed in panels
/// of `panel_bytes`: `task` gets a block of y, its rows and its panels.
pub(crate) fn blocks(
    pool: &Pool,
    y: MatMut<'_>,
    panel_bytes: usize,
    n: usize,
    (rows, firsts): (&[Range<usize>], &[usize]),
    into: Into,
    task: impl Fn(&mut MatMut<'_>, Range<usize>, Range<usize>) + Sync,
) {
    let paired = into == Into::SwiGlu;
    assert!(!paired || n.is_multiple_of(2 * PANEL), "gate and up alternate by whole panels");
    let panels = n.div_ceil(PANEL);
    let at_least = (panels * rows.len()).div_ceil(8 * pool.threads());
    let per_task = (TASK_BYTES / panel_bytes).clamp(8, at_least.max(8)).next_multiple_of(8);
    let width = if paired { per_task / 2 * PANEL } else { per_task * PANEL };
    pool.for_each_block(y, rows, width, |group, col, mut block| {
        let first = firsts[group] / PANEL + if paired { 2 * col / PANEL } else { col / PANEL };
        let count = if paired { 2 * block.cols() / PANEL } else { block.cols().div_ceil(PANEL) };
        task(&mut block, rows[group].clone(), first..first + count);
    });
}

/// One block of y: `rows` of x times the panels `panels`.
fn task(y: &mut MatMut<'_>, x: &Rows8, rows: Range<usize>, w: &Matrix8, panels: Range<usize>, into: Into) {
    let mut sums = [0i32; SUMS];
    let tiles = rows.len().div_ceil(if rows.len() <= FEW { TOKENS / 2 } else { TOKENS });
    let paired = into == Into::SwiGlu;
    // The panels that the lowest tile takes at once stay in the first-level cache, or the second, while all tiles of tokens go by.
    let step = token_tiles(rows.clone(), tiles).last().map_or(1, |lowest| panels_at_once(lowest.len()));
    let bytes = w.words * 4 * PANEL;
    for first in panels.clone().step_by(step) {
        let end = (first + step).min(panels.end);
        for (tile, tokens) in token_tiles(rows.clone(), tiles).enumerate() {
            let own = panels_at_once(tokens.len());
            let at_once = if (end - first).is_multiple_of(own) { own } else { 1 };
            let unit = if paired { at_once.max(2) } else { at_once };
            for start in (first..end).step_by(unit) {
                for panel in (start..start + unit).step_by(at_once) {
                    let part = &mut sums[(panel - start) * PANEL * TOKENS..];
                    let weights = &w.memory.bytes()[panel * bytes..];
                    // Memory is read all the time, not only while the first tile of tokens goes by: the others fetch what comes next.
                    let fetch = match w.memory.bytes().get((end + tile) * bytes..) {
                        _ if tiles == 1 || (first == panels.start && tile == 0) => Fetch::Own,
                        Some(later) if tile < step && step == 2 => Fetch::Later(later),
                        _ => Fetch::Nothing,
                    };
                    dot_i8::tile(part, x.tokens(tokens.clone()), weights, at_once, w.words, fetch);
                }
                let tile = Finish { sums: &sums, at_once, unit, tokens: tokens.clone(), panel: start };
                finish(&tile, y, x, w, rows.start, panels.start, into);
            }
        }
    }
}

/// Cuts rows into tiles of nearly equal height, the higher ones first.
pub(crate) fn token_tiles(rows: Range<usize>, tiles: usize) -> impl Iterator<Item = Range<usize>> {
    let (height, higher) = (rows.len() / tiles.max(1), rows.len() % tiles.max(1));
    (0..tiles).map(move |tile| {
        let start = rows.start + tile * height + tile.min(higher);
        start..start + height + usize::from(tile < higher)
    })
}

/// A tile's sums on their way to y.
struct Finish<'a> {
    sums: &'a [i32],
    /// Panels side by side in a row of `sums`.
    at_once: usize,
    /// Panels in `sums`.
    unit: usize,
    tokens: Range<usize>,
    panel: usize,
}

/// What turns the sums of a panel into numbers: its scales, and its biases or zeros.
#[derive(Clone, Copy)]
struct PanelScales {
    scales: [f32; PANEL],
    bias: [f32; PANEL],
}

impl PanelScales {
    #[inline(always)]
    fn of(w: &Matrix8, panel: usize) -> Self {
        let row = panel * PANEL;
        let bias = w.bias.get(row..).and_then(<[f32]>::first_chunk::<PANEL>).copied().unwrap_or([0.0; PANEL]);
        PanelScales { scales: *w.scales[row..].first_chunk().expect("a panel"), bias }
    }

    /// (sums − excess) · scale · scales + bias.
    #[inline(always)]
    fn apply(&self, sums: &[i32], excess: i32, scale: f32) -> [f32; PANEL] {
        let sums: &[i32; PANEL] = sums.first_chunk().expect("a panel");
        let mut values = [0.0; PANEL];
        for i in 0..PANEL {
            values[i] = (sums[i] - excess) as f32 * (scale * self.scales[i]) + self.bias[i];
        }
        values
    }
}

simd_fn! {
    /// Scales a tile's sums and brings them to y, a block whose first row and panel are given. One call for a tile, and the panels outside: a call for
    /// each sixteen sums took a tenth of the time. (Everything it calls is inlined, or it would be compiled without the wide registers.)
    fn finish<FMA>(tile: &Finish<'_>, y: &mut MatMut<'_>, x: &Rows8, w: &Matrix8, first_row: usize, first_panel: usize, into: Into) {
        let Finish { sums, at_once, unit, ref tokens, panel } = *tile;
        let of = &x.of[tokens.clone()];
        let (count, row) = (tokens.len(), tokens.start - first_row);
        // Where the sums of panel p of token t stand.
        let place = |p: usize, t: usize| p / at_once * PANEL * TOKENS + (t * at_once + p % at_once) * PANEL;
        if into == Into::SwiGlu {
            for p in (0..unit).step_by(2) {
                let (gates, ups) = (PanelScales::of(w, panel + p), PanelScales::of(w, panel + p + 1));
                let col = (panel + p - first_panel) / 2 * PANEL;
                for t in 0..count {
                    let gate = gates.apply(&sums[place(p, t)..], of[t].excess, of[t].scale);
                    let up = ups.apply(&sums[place(p + 1, t)..], of[t].excess, of[t].scale);
                    let y: &mut [f32; PANEL] = y.row_mut(row + t)[col..].first_chunk_mut().expect("a panel");
                    for i in 0..PANEL {
                        y[i] = gate[i] / (1.0 + exp::<FMA>(-gate[i])) * up[i];
                    }
                }
            }
            return;
        }
        for p in 0..unit {
            let panel_scales = PanelScales::of(w, panel + p);
            let col = (panel + p - first_panel) * PANEL;
            for t in 0..count {
                let values = panel_scales.apply(&sums[place(p, t)..], of[t].excess, of[t].scale);
                let y = &mut y.row_mut(row + t)[col..];
                match (y.first_chunk_mut::<PANEL>(), into) {
                    (Some(y), Into::Set) => *y = values,
                    (Some(y), _) => {
                        for i in 0..PANEL {
                            y[i] += values[i];
                        }
                    }
                    (None, Into::Set) => y.iter_mut().zip(values).for_each(|(y, value)| *y = value),
                    (None, _) => y.iter_mut().zip(values).for_each(|(y, value)| *y += value),
                }
            }
        }
    }
}

/// The same by plain loops.
pub mod scalar {
    /// Values that quantised activations stand for: round(x · 127 / max|x|) · max|x| / 127, row by row.
    pub fn quantised(x: &[f32], k: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(x.len());
        for row in x.chunks_exact(k) {
            let max = row.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            out.extend(row.iter().map(|x| if max == 0.0 { 0.0 } else { (x * (127.0 / max)).round_ties_even() * (max / 127.0) }));
        }
        out
    }

    /// y `[m, n]` = x `[m, k]` · w `[n, k]`ᵀ + bias, sums in f64.
    pub fn linear(x: &[f32], w: &[f32], bias: Option<&[f32]>, n: usize, k: usize) -> Vec<f64> {
        let mut y = Vec::new();
        for x in x.chunks_exact(k) {
            for (row, w) in w.chunks_exact(k).enumerate().take(n) {
                let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                y.push(sum + bias.map_or(0.0, |bias| f64::from(bias[row])));
            }
        }
        y
    }
}

#[cfg(test)]
mod tests;
