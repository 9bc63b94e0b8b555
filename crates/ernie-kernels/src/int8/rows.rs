//! Activations as bytes, and the norms in front of them.
use std::ops::Range;

use super::MAX_K;
use crate::arch::dot_i8::Tokens;
use crate::arch::isa::{LANES, mul_add, simd_fn};
use crate::arch::pool::Pool;
use crate::memory::Memory;
use crate::scratch::Scratch;

/// Quantised activations: `[rows, k]` signed bytes, each row with its scale.
#[derive(Debug)]
pub struct Rows8 {
    memory: Memory,
    /// Distance between rows in bytes: an odd number of cache lines, so that rows of one tile fall into different sets of the cache.
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) k: usize,
    pub(super) of: Vec<OfRow>,
    /// −8 · Σ q of each group of each row, where they were asked for: what takes off the 8 that 4-bit weights are kept with.
    totals: Vec<i32>,
    groups: usize,
}

/// What belongs to a row beside its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OfRow {
    pub scale: f32,
    /// 128 · Σ q: what weights kept as q + 128 add to a sum.
    pub excess: i32,
}

impl Rows8 {
    /// Room for nothing; grows when it is filled.
    pub fn new() -> Self {
        Rows8 {
            memory: Memory::zeroed(0).expect("nothing is always to be had"),
            stride: 0,
            rows: 0,
            k: 0,
            of: Vec::new(),
            totals: Vec::new(),
            groups: 0,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    fn shape(&mut self, rows: usize, k: usize) {
        assert!(k > 0 && k <= MAX_K, "rows of {k} elements; 1 to {MAX_K} are possible");
        self.stride = (k.div_ceil(64) | 1) * 64;
        (self.rows, self.k) = (rows, k);
        if self.memory.bytes().len() < rows * self.stride {
            self.memory = Memory::zeroed(rows * self.stride).expect("memory for activations");
        }
        self.of.resize(rows, OfRow::default());
    }

    /// Quantises x `[rows, k]`.
    pub fn quantise(&mut self, pool: &Pool, x: &[f32], k: usize) {
        self.fill(pool, x.len() / k, k, &mut [], |row, bytes, _| quantise_row(bytes, &x[row * k..][..k]));
    }

    /// Quantises rms_norm(x)·w, x `[rows, w.len()]`, in one pass; `normalised` gets the values too unless it is empty.
    ///
    /// # Panics
    /// If sizes do not fit.
    pub fn quantise_norm(&mut self, pool: &Pool, normalised: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
        let h = w.len();
        assert!(x.len().is_multiple_of(h) && (normalised.is_empty() || normalised.len() == x.len()), "normalised rows are shaped like x");
        self.fill(pool, x.len() / h, h, normalised, |row, bytes, normalised| {
            let x = &x[row * h..][..h];
            if normalised.is_empty() {
                let mut scratch = Scratch::take(h);
                norm_row(&mut scratch, x, w, eps);
                return quantise_row(bytes, &scratch);
            }
            norm_row(normalised, x, w, eps);
            quantise_row(bytes, normalised)
        });
    }

    /// Rows `rows` of `from`, in this order.
    pub fn gather(&mut self, from: &Rows8, rows: &[u32]) {
        self.shape(rows.len(), from.k);
        let stride = self.stride;
        for (place, &row) in rows.iter().enumerate() {
            let source = &from.memory.bytes()[row as usize * stride..][..stride];
            self.memory.bytes_mut()[place * stride..][..stride].copy_from_slice(source);
            self.of[place] = from.of[row as usize];
        }
    }

    /// Shapes and fills rows; `beside`, empty or `[rows, k]`, is dealt out with them.
    fn fill(
        &mut self,
        pool: &Pool,
        rows: usize,
        k: usize,
        beside: &mut [f32],
        quantise: impl Fn(usize, &mut [u8], &mut [f32]) -> (f32, i32) + Sync,
    ) {
        self.shape(rows, k);
        let (stride, per_task) = (self.stride, rows_per_task(rows, pool));
        let bytes = &mut self.memory.bytes_mut()[..rows * stride];
        let (beside_size, of_size) = (k * per_task, per_task);
        pool.for_each_pieces(bytes, stride * per_task, (&mut self.of, of_size), (beside, beside_size), |task, bytes, of, beside| {
            let mut beside = beside.chunks_exact_mut(k);
            for ((i, bytes), of) in bytes.chunks_exact_mut(stride).enumerate().zip(of) {
                let (scale, excess) = quantise(task * per_task + i, &mut bytes[..k], beside.next().unwrap_or_default());
                *of = OfRow { scale, excess };
                bytes[k..].fill(0);
            }
        });
    }

    /// The values that the bytes of a row stand for, for tests.
    pub fn dequantised(&self, row: usize) -> Vec<f32> {
        self.memory.bytes()[row * self.stride..][..self.k].iter().map(|&q| f32::from(q as i8) * self.of[row].scale).collect()
    }

    /// Sums of each `group` elements, which products with 4-bit weights need.
    ///
    /// # Panics
    /// Unless `group` divides k.
    pub fn sum_groups(&mut self, group: usize) {
        assert!(group > 0 && self.k.is_multiple_of(group), "groups of {group} in rows of {}", self.k);
        self.groups = self.k / group;
        self.totals.resize(self.rows * self.groups, 0);
        for (row, totals) in self.totals.chunks_exact_mut(self.groups).enumerate() {
            sum_row(totals, &self.memory.bytes()[row * self.stride..][..self.k], group);
        }
    }

    /// Elements of a row.
    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// Scales of rows.
    pub(crate) fn of(&self, rows: Range<usize>) -> &[OfRow] {
        &self.of[rows]
    }

    /// What [`Rows8::sum_groups`] found for rows.
    pub(crate) fn totals(&self, rows: Range<usize>) -> &[i32] {
        &self.totals[rows.start * self.groups..rows.end * self.groups]
    }

    pub(crate) fn tokens(&self, rows: Range<usize>) -> Tokens<'_> {
        Tokens { bytes: &self.memory.bytes()[rows.start * self.stride..], stride: self.stride, count: rows.len() }
    }
}

impl Default for Rows8 {
    fn default() -> Self {
        Self::new()
    }
}

/// normalised = rms_norm(x)·w, x `[rows, w.len()]`.
pub fn norm(pool: &Pool, normalised: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    let h = w.len();
    assert!(normalised.len() == x.len() && x.len().is_multiple_of(h), "normalised rows are shaped like x");
    let per_task = rows_per_task(x.len() / h, pool);
    pool.for_each_piece(normalised, h * per_task, |task, rows| {
        for (row, x) in rows.chunks_exact_mut(h).zip(x[task * per_task * h..].chunks_exact(h)) {
            norm_row(row, x, w, eps);
        }
    });
}

/// Rows of one task of a loop over rows: a short prompt is not worth several threads.
fn rows_per_task(rows: usize, pool: &Pool) -> usize {
    rows.div_ceil(4 * pool.threads()).max(8)
}

simd_fn! {
    /// y = x · w / sqrt(mean(x²) + eps).
    fn norm_row<FMA>(y: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
        let mut sums = [0.0f32; LANES];
        let (blocks, rest) = x.as_chunks::<LANES>();
        for block in blocks {
            for lane in 0..LANES {
                sums[lane] = mul_add::<FMA>(block[lane], block[lane], sums[lane]);
            }
        }
        let rest: f32 = rest.iter().map(|x| x * x).sum();
        let inverse = 1.0 / ((sums.iter().sum::<f32>() + rest) / x.len() as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * inverse * w;
        }
    }
}

/// Bytes of one row; returns its scale and 128 · Σ q. A row with a value that is not finite gets the scale NaN, so that it shows.
pub fn quantise_row(out: &mut [u8], x: &[f32]) -> (f32, i32) {
    let max = largest(x);
    if !max.is_finite() {
        out.fill(0);
        return (f32::NAN, 0);
    }
    if max == 0.0 {
        out.fill(0);
        return (0.0, 0);
    }
    // The reciprocal of a subnormal would be infinite.
    let inverse = if max < 1e-30 { 0.0 } else { 127.0 / max };
    (max / 127.0, 128 * round_row(out, x, inverse))
}

simd_fn! {
    /// max|x|, or something that is not finite if any element is not.
    fn largest<FMA>(x: &[f32]) -> f32 {
        // Comparisons let NaN slip through; the second sum is 0 unless something is not finite. (A maximum of bit patterns would do both, but
        // the compiler then gathers across rows of lanes.)
        let (mut most, mut bad) = ([0.0f32; LANES], [0.0f32; LANES]);
        let blocks = x.chunks_exact(LANES);
        let rest = blocks.remainder();
        for block in blocks {
            for lane in 0..LANES {
                let size = block[lane].abs();
                most[lane] = if size > most[lane] { size } else { most[lane] };
                bad[lane] += block[lane] * 0.0;
            }
        }
        let bad = bad.iter().sum::<f32>() + rest.iter().map(|x| x * 0.0).sum::<f32>();
        most.iter().chain(rest).fold(0.0f32, |most, x| most.max(x.abs())) + bad
    }
}

simd_fn! {
    /// q = round(x · inverse), ties to even; returns Σ q.
    fn round_row<FMA>(out: &mut [u8], x: &[f32], inverse: f32) -> i32 {
        /// Added to a number below 2²², leaves the nearest integer in the low bits of the sum.
        const ROUND: f32 = 12_582_912.0;
        let mut sums = [0i32; LANES];
        let (blocks, rest) = x.as_chunks::<LANES>();
        let (outs, out_rest) = out.as_chunks_mut::<LANES>();
        for (out, block) in outs.iter_mut().zip(blocks) {
            for lane in 0..LANES {
                let q = (block[lane] * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
                sums[lane] += q;
                out[lane] = q as u8;
            }
        }
        let mut sum: i32 = sums.iter().sum();
        for (out, x) in out_rest.iter_mut().zip(rest) {
            let q = (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
            sum += q;
            *out = q as u8;
        }
        sum
    }
}

simd_fn! {
    fn sum_row<FMA>(totals: &mut [i32], bytes: &[u8], group: usize) {
        for (total, bytes) in totals.iter_mut().zip(bytes.chunks_exact(group)) {
            *total = -8 * bytes.iter().map(|&q| i32::from(q as i8)).sum::<i32>();
        }
    }
}
