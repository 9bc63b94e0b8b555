//! Linear layers of experts with 4-bit weights and 8-bit activations, for inference.
//!
//! Weights are symmetric, q in −8..=7, with one bf16 scale for each group of 32 to 128 inputs of an output; activations are the bytes of
//! [`crate::int8`]: y\[t, n\] = s_x(t) · Σ_g s_w(n, g) · Σ_{k in g} q_x q_w (+ bias). A token's result never depends on what is computed beside it.
use std::ops::Range;

use half::bf16;

use crate::arch::dot_i4::{self, MAX_GROUP, Panels, panels_at_once};
use crate::arch::dot_i8::{PANEL, TOKENS};
use crate::arch::exp::exp;
use crate::arch::isa::simd_fn;
use crate::arch::matrix::MatMut;
use crate::arch::pack::transpose;
use crate::arch::pool::Pool;
use crate::int8::{Groups, Into, OfRow, Rows8, blocks, token_tiles};
use crate::memory::Memory;
use crate::scratch::Scratch;

/// Two zeros, as weights are kept.
const ZEROS: u8 = 0x88;

/// Weights `[n, k]` packed for the products, with a scale for each row and group and perhaps a bias for each row.
#[derive(Debug)]
pub struct Matrix4 {
    memory: Memory,
    /// Bits of bf16 values, `[panels, groups, 16]`.
    scales: Vec<u16>,
    /// `[panels · 16]`, or empty.
    bias: Vec<f32>,
    n: usize,
    k: usize,
    group: usize,
}

impl Matrix4 {
    /// Whether rows of `k` weights can have a scale for every `group`.
    pub fn can_pack(k: usize, group: usize) -> bool {
        group > 0 && group.is_multiple_of(8) && group <= MAX_GROUP && k > 0 && k.is_multiple_of(group) && k <= crate::int8::MAX_K
    }

    /// Packs n rows of k weights; `fill` writes one row, two weights to a byte, the first in its low half, each as q + 8, and the scales of its groups. Rows
    /// beyond a caller's own matrix may be left as they are.
    ///
    /// # Errors
    /// What the system says when there is no memory.
    ///
    /// # Panics
    /// Unless [`Matrix4::can_pack`].
    pub fn pack(
        pool: &Pool,
        n: usize,
        k: usize,
        group: usize,
        fill: impl Fn(usize, &mut [u8], &mut [bf16]) + Sync,
    ) -> std::io::Result<Self> {
        assert!(Self::can_pack(k, group), "rows of {k} weights in groups of {group}");
        let (panels, words, groups) = (n.div_ceil(PANEL), k / 8, k / group);
        let mut memory = Memory::zeroed(panels * words * 4 * PANEL)?;
        let mut scales = vec![0; panels * groups * PANEL];
        let bytes = &mut memory.bytes_mut()[..panels * words * 4 * PANEL];
        pool.for_each_pieces(bytes, words * 4 * PANEL, (&mut scales, groups * PANEL), (&mut [0u8; 0], 1), |panel, out, scales, _| {
            let mut rows = Scratch::take(PANEL * words);
            bytemuck::cast_slice_mut::<f32, u8>(&mut rows).fill(ZEROS);
            let mut own = [bf16::ZERO; crate::int8::MAX_K / 8];
            for (r, row) in rows.chunks_exact_mut(words).enumerate().take(n - panel * PANEL) {
                own[..groups].fill(bf16::ZERO);
                fill(panel * PANEL + r, bytemuck::cast_slice_mut(row), &mut own[..groups]);
                for (scales, own) in scales.chunks_exact_mut(PANEL).zip(&own[..groups]) {
                    scales[r] = own.to_bits();
                }
            }
            let rows: [&[f32]; PANEL] = std::array::from_fn(|r| &rows[r * words..][..words]);
            transpose::<PANEL>(bytemuck::cast_slice_mut(out), &rows, words);
            for word in bytemuck::cast_slice_mut::<u8, u32>(out) {
                *word = spread(*word & 0xffff) | spread(*word >> 16) << 4;
            }
        });
        Ok(Matrix4 { memory, scales, bias: Vec::new(), n, k, group })
    }

    /// Adds a bias for each row, `[n]`.
    #[must_use]
    pub fn with_bias(mut self, bias: &[f32]) -> Self {
        assert_eq!(bias.len(), self.n, "one bias for each row");
        self.bias = bias.to_vec();
        self.bias.resize(self.n.next_multiple_of(PANEL), 0.0);
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

    /// Weights that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Bytes of the packed weights and their scales.
    pub fn bytes(&self) -> usize {
        self.n.next_multiple_of(PANEL) * self.k / 2 + self.scales.len() * 2
    }

    fn panels(&self, first: usize) -> Panels<'_> {
        let groups = self.k / self.group;
        let bytes = &self.memory.bytes()[first * self.k / 2 * PANEL..];
        Panels { bytes, scales: &self.scales[first * groups * PANEL..], group: self.group, groups }
    }
}

/// The four halves of bytes of a number below 2¹⁶, each in a byte of its own.
fn spread(halves: u32) -> u32 {
    let bytes = (halves | halves << 8) & 0x00ff_00ff;
    (bytes | bytes << 4) & 0x0f0f_0f0f
}

/// y = x·wᵀ, each group of rows with its own n rows of w: y `[rows, n]`, for [`Into::SwiGlu`] `[rows, n / 2]`. The sums of x have been made by
/// [`Rows8::sum_groups`] with this matrix's groups.
///
/// # Panics
/// If sizes do not fit, or groups overlap; for [`Into::Add`], which no expert needs.
pub fn grouped(pool: &Pool, y: &mut [f32], x: &Rows8, w: &Matrix4, n: usize, groups: &Groups, into: Into) {
    assert!(into != Into::Add, "experts are not added to anything here");
    assert!(x.k() == w.k, "rows of {} elements times a matrix of {} columns", x.k(), w.k);
    assert!(groups.parts().1.iter().all(|first| first + n <= w.n.next_multiple_of(PANEL)), "a group's part of the matrix");
    let y = MatMut::new(y, x.rows(), if into == Into::SwiGlu { n / 2 } else { n });
    blocks(pool, y, w.k / 2 * PANEL, n, groups.parts(), into, |y, rows, panels| task(y, x, rows, w, panels, into));
}

/// One block of y: `rows` of x times the panels `panels`.
fn task(y: &mut MatMut<'_>, x: &Rows8, rows: Range<usize>, w: &Matrix4, panels: Range<usize>, into: Into) {
    let mut sums = [0.0f32; 4 * TOKENS * PANEL];
    let tiles = rows.len().div_ceil(TOKENS);
    // As many panels as are finished together stay in the first-level cache while all tiles of tokens go by.
    let step = token_tiles(rows.clone(), tiles).last().map_or(1, |lowest| panels_at_once(lowest.len())).max(2);
    for first in panels.clone().step_by(step) {
        let end = (first + step).min(panels.end);
        for tokens in token_tiles(rows.clone(), tiles) {
            let own = panels_at_once(tokens.len());
            let at_once = if (end - first).is_multiple_of(own) { own } else { 1 };
            for panel in (first..end).step_by(at_once) {
                let part = &mut sums[(panel - first) * PANEL * TOKENS..];
                dot_i4::tile(part, x.tokens(tokens.clone()), x.totals(tokens.clone()), w.panels(panel), at_once);
            }
            let tile = Finish { sums: &sums, at_once, panels: first..end, tokens };
            finish(&tile, y, x, w, rows.start, panels.start, into);
        }
    }
}

/// A tile's sums on their way to y.
struct Finish<'a> {
    sums: &'a [f32],
    /// Panels side by side in a row of `sums`.
    at_once: usize,
    panels: Range<usize>,
    tokens: Range<usize>,
}

#[inline(always)]
fn bias_of(w: &Matrix4, panel: usize) -> [f32; PANEL] {
    w.bias.get(panel * PANEL..).and_then(<[f32]>::first_chunk::<PANEL>).copied().unwrap_or([0.0; PANEL])
}

/// sums · scale + bias.
#[inline(always)]
fn apply(sums: &[f32], scale: f32, bias: &[f32; PANEL]) -> [f32; PANEL] {
    let sums: &[f32; PANEL] = sums.first_chunk().expect("a panel");
    let mut values = [0.0; PANEL];
    for i in 0..PANEL {
        values[i] = sums[i] * scale + bias[i];
    }
    values
}

simd_fn! {
    /// Scales a tile's sums and brings them to y, a block whose first row and panel are given.
    fn finish<FMA>(tile: &Finish<'_>, y: &mut MatMut<'_>, x: &Rows8, w: &Matrix4, first_row: usize, first_panel: usize, into: Into) {
        let Finish { sums, at_once, ref panels, ref tokens } = *tile;
        let of = x.of(tokens.clone());
        let row = tokens.start - first_row;
        // Where the sums of panel p of token t stand.
        let place = |p: usize, t: usize| p / at_once * at_once * PANEL * TOKENS + (t * at_once + p % at_once) * PANEL;
        if into == Into::SwiGlu {
            for p in (0..panels.len()).step_by(2) {
                let (gates, ups) = (bias_of(w, panels.start + p), bias_of(w, panels.start + p + 1));
                let col = (panels.start + p - first_panel) / 2 * PANEL;
                for (t, &OfRow { scale, .. }) in of.iter().enumerate() {
                    let gate = apply(&sums[place(p, t)..], scale, &gates);
                    let up = apply(&sums[place(p + 1, t)..], scale, &ups);
                    let y: &mut [f32; PANEL] = y.row_mut(row + t)[col..].first_chunk_mut().expect("a panel");
                    for i in 0..PANEL {
                        y[i] = gate[i] / (1.0 + exp::<FMA>(-gate[i])) * up[i];
                    }
                }
            }
            return;
        }
        for p in 0..panels.len() {
            let bias = bias_of(w, panels.start + p);
            let col = (panels.start + p - first_panel) * PANEL;
            for (t, &OfRow { scale, .. }) in of.iter().enumerate() {
                let values = apply(&sums[place(p, t)..], scale, &bias);
                y.row_mut(row + t)[col..].iter_mut().zip(values).for_each(|(y, value)| *y = value);
            }
        }
    }
}

#[cfg(test)]
mod tests;
