//! Operands of 8-bit products: quantised in blocks along k while they are packed.
//!
//! Each row of an operand has a scale of its own for every [`BLOCK`] elements along k: q = round(x · 127 / max|x|), x ≈ q · scale. Rounding is to
//! nearest, or stochastic (up with a probability equal to the fraction, so that the expected value is x): gradients need that, for most of their elements
//! are smaller than half a step. The random bits are a function of the block's own values and place, so the same data always gives the same bits.
#![allow(unsafe_code)] // calling the loops for an instruction set after asking the processor for it

use rayon::prelude::*;

use super::amx;
use super::gemm::Threads;
use super::isa::{Isa, isa, simd_fn};
use super::matrix::Mat;
use super::pack::{group, transpose};
use super::tile::{COLS, ROWS};
#[cfg(target_arch = "x86_64")]
use super::{quantise_avx2 as avx2, quantise_avx512 as avx512};
use crate::scratch::Scratch;

#[cfg(not(target_arch = "x86_64"))]
const _: fn() -> Isa = isa; // The loops below are for every instruction set.

/// Elements along k that share a scale.
pub const BLOCK: usize = 256;

/// Added to a number below 2²², leaves the nearest integer in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// How a value between two steps is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest step, ties to even.
    Nearest,
    /// To either neighbour, at random, right on average.
    Stochastic,
}

/// A quantised matrix `[rows, k]` in panels of `W` rows: inside a block of a panel, four bytes along k for each row in turn, or where the processor has tiles
/// and the operand is a left one, row by row. Left operands hold q, right operands (`OFFSET`) hold q + 128, for the instruction multiplies signed by
/// unsigned bytes.
pub struct Packed8<const W: usize, const OFFSET: bool> {
    /// Four bytes in each element.
    data: Scratch,
    /// `[panel, block, W]`.
    scales: Vec<f32>,
    /// Σ q over a block, `[panel, block, W]`.
    sums: Vec<i32>,
    rows: usize,
    k: usize,
    /// Where each block starts along k, in words of four bytes, and where the last one ends.
    starts: Vec<usize>,
}

/// Where the words, scales and sums of a group are written.
type Slot<'a> = ((&'a mut [f32], &'a mut [f32]), &'a mut [i32]);

/// One block of one panel.
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    /// `[⌈k / 4⌉, W, 4]`, or row by row `[W, ⌈k / 4⌉, 4]`.
    pub bytes: &'a [u8],
    /// Whether row by row.
    pub by_rows: bool,
    /// `[W]`.
    pub scales: &'a [f32],
    /// `[W]`.
    pub sums: &'a [i32],
}

impl<const W: usize, const OFFSET: bool> Packed8<W, OFFSET> {
    /// Quantises and packs matrices with equally many rows, one behind the other along k. A part whose length is no multiple of [`BLOCK`] ends
    /// with a shorter block.
    pub fn stacked(parts: &[Mat<'_>], rounding: Rounding, threads: Threads) -> Self {
        let rows = parts[0].rows();
        assert!(parts.iter().all(|part| part.rows() == rows), "parts of different heights");
        let blocks: Vec<(Mat<'_>, usize, usize)> = parts
            .iter()
            .flat_map(|&part| (0..part.cols()).step_by(BLOCK).map(move |from| (part, from, BLOCK.min(part.cols() - from))))
            .collect();
        let mut starts = vec![0];
        for (_, _, length) in &blocks {
            starts.push(starts[starts.len() - 1] + length.div_ceil(4));
        }
        let words = starts[blocks.len()];
        let panels = rows.div_ceil(W);
        let mut data = Scratch::take_lines(panels * W * words);
        let (mut scales, mut sums) = (vec![0.0; panels * blocks.len() * W], vec![0; panels * blocks.len() * W]);
        if words > 0 {
            let group = group(parts, W);
            let fill = |(index, ((out, scales), sums)): (usize, Slot<'_>)| {
                for (block, &(part, from, length)) in blocks.iter().enumerate() {
                    for (panel, out) in out.chunks_exact_mut(W * words).enumerate() {
                        let out = &mut out[W * starts[block]..W * starts[block + 1]];
                        let place = (panel * blocks.len() + block) * W..(panel * blocks.len() + block + 1) * W;
                        let (scales, sums, first) = (&mut scales[place.clone()], &mut sums[place], (index * group + panel) * W);
                        quantise_panel::<W, OFFSET>(out, scales, sums, part, first, from, length, rounding);
                    }
                }
            };
            let (group_words, each) = (group * W * words, group * W * blocks.len());
            match threads {
                Threads::One => {
                    let groups = data.chunks_mut(group_words).zip(scales.chunks_mut(each)).zip(sums.chunks_mut(each));
                    groups.enumerate().for_each(fill);
                }
                Threads::All => {
                    let groups = data.par_chunks_mut(group_words).zip(scales.par_chunks_mut(each)).zip(sums.par_chunks_mut(each));
                    groups.enumerate().for_each(fill);
                }
            }
        }
        let k = parts.iter().map(Mat::cols).sum();
        Packed8 { data, scales, sums, rows, k, starts }
    }

    /// Quantises and packs one matrix.
    pub fn new(x: Mat<'_>, rounding: Rounding, threads: Threads) -> Self {
        Self::stacked(&[x], rounding, threads)
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Where the blocks start along k, in words of four bytes, and where the last one ends: operands of one product must have the same.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// A block of a panel.
    pub fn panel(&self, panel: usize, block: usize) -> Panel<'_> {
        let (blocks, words) = (self.starts.len() - 1, self.starts[self.starts.len() - 1]);
        let (start, end) = (self.starts[block], self.starts[block + 1]);
        let bytes = bytemuck::cast_slice(&self.data[(panel * words + start) * W..][..(end - start) * W]);
        let place = (panel * blocks + block) * W;
        Panel { bytes, by_rows: by_rows::<OFFSET>(), scales: &self.scales[place..][..W], sums: &self.sums[place..][..W] }
    }

    /// The values that the bytes stand for, `[rows, k]`, for tests. All parts but the last must be whole blocks.
    #[cfg(test)]
    pub fn dequantised(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.k];
        for row in 0..self.rows {
            for l in 0..self.k {
                let panel = self.panel(row / W, l / BLOCK);
                let (word, words) = (l % BLOCK / 4, panel.bytes.len() / (4 * W));
                let byte = panel.bytes[4 * if panel.by_rows { row % W * words + word } else { word * W + row % W } + l % 4];
                let q = if OFFSET { i32::from(byte) - 128 } else { i32::from(byte as i8) };
                values[row * self.k + l] = q as f32 * panel.scales[row % W];
            }
        }
        values
    }
}

/// Whether panels of these operands lie row by row.
fn by_rows<const OFFSET: bool>() -> bool {
    !OFFSET && amx::available()
}

/// Quantises columns `from..from + length` of rows `first..first + W` of x into `out` (words of four bytes).
#[allow(clippy::too_many_arguments)] // Three results, and where their values come from.
fn quantise_panel<const W: usize, const OFFSET: bool>(
    out: &mut [f32],
    scales: &mut [f32],
    sums: &mut [i32],
    x: Mat<'_>,
    first: usize,
    from: usize,
    length: usize,
    rounding: Rounding,
) {
    let (rows, (row_stride, col_stride), data) = (W.min(x.rows() - first), x.strides(), x.data());
    let seed = (first as u32).wrapping_mul(0x9e37_79b1) ^ (from as u32).wrapping_mul(0x85eb_ca77);
    let stochastic = rounding == Rounding::Stochastic;
    let words: &mut [u32] = bytemuck::cast_slice_mut(out);
    if row_stride == 1 && x.rows() > 1 {
        let columns = Columns { data: &data[from * col_stride + first..], stride: col_stride, width: rows, length };
        quantise_columns::<W>(words, scales, sums, columns, stochastic, seed, by_rows::<OFFSET>());
    } else {
        assert!(col_stride == 1 || length <= 1, "neither rows nor columns are contiguous");
        let mut quantise = |r: usize, bytes: &mut [u8]| {
            let row = &data[(first + r) * row_stride + from..][..length];
            (scales[r], sums[r]) = quantise_row(bytes, row, stochastic, seed ^ (r as u32).wrapping_mul(0xc2b2_ae3d));
        };
        let count = length.div_ceil(4);
        if by_rows::<OFFSET>() {
            let (full, missing) = words.split_at_mut(rows * count);
            full.chunks_exact_mut(count).enumerate().for_each(|(r, words)| quantise(r, bytemuck::cast_slice_mut(words)));
            missing.fill(0);
        } else {
            let mut bytes = [[0.0f32; BLOCK / 4]; W];
            for (r, bytes) in bytes.iter_mut().enumerate().take(rows) {
                quantise(r, &mut bytemuck::cast_slice_mut(bytes)[..4 * count]);
            }
            let rows_of_words: [&[f32]; W] = std::array::from_fn(|r| &bytes[r][..count]);
            transpose::<W>(bytemuck::cast_slice_mut(words), &rows_of_words, count);
        }
        scales[rows..].fill(0.0);
        sums[rows..].fill(0);
    }
    if OFFSET {
        flip_signs(words);
    }
}

simd_fn! {
    /// q + 128 of every byte q.
    fn flip_signs<FMA>(words: &mut [u32]) {
        for word in words {
            *word ^= 0x8080_8080;
        }
    }
}

/// Generator states side by side, as many as elements are rounded at once.
const STREAMS: usize = 32;

/// Independent xorshift generators (Marsaglia 2003), never zero.
#[inline(always)]
pub(super) fn streams(seed: u32) -> [u32; STREAMS] {
    let mut states = [0; STREAMS];
    for (i, state) in states.iter_mut().enumerate() {
        let mut z = seed.wrapping_add((i as u32).wrapping_mul(0x9e37_79b9));
        z = (z ^ (z >> 16)).wrapping_mul(0x21f0_aaad);
        z = (z ^ (z >> 15)).wrapping_mul(0x735a_2d97);
        *state = (z ^ (z >> 15)) | 1;
    }
    states
}

/// The next number of a stream, uniform in [-1/2, 1/2).
#[inline(always)]
fn dither(state: &mut u32) -> f32 {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    f32::from_bits(0x3f80_0000 | (*state >> 9)) - 1.5
}

/// (scale, its inverse) for a block whose largest magnitude has these bits. A value that is no number makes the scale none, so that it shows in the product.
///
/// The largest becomes ±127; where it is moved by up to a half before it is rounded, a little less, or it might become 128, which as a byte is −128.
#[inline(always)]
pub(super) fn scale_of(largest: u32, stochastic: bool) -> (f32, f32) {
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return (f32::NAN, 0.0);
    }
    let steps = if stochastic { 126.99 } else { 127.0 };
    // Below this the inverse would overflow.
    if largest < 1e-30 { (0.0, 0.0) } else { (largest / steps, steps / largest) }
}

/// Quantises a row to signed bytes, zeros behind it; returns its scale and the sum of the quantised values.
fn quantise_row(bytes: &mut [u8], x: &[f32], stochastic: bool, seed: u32) -> (f32, i32) {
    assert!(bytes.len() >= x.len());
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `isa` has found the instructions; the assertion above.
    unsafe {
        match (isa(), stochastic) {
            (Isa::Avx512, false) => return avx512::row::<false>(bytes, x, seed),
            (Isa::Avx512, true) => return avx512::row::<true>(bytes, x, seed),
            (Isa::Avx2, false) => return avx2::row::<false>(bytes, x, seed),
            (Isa::Avx2, true) => return avx2::row::<true>(bytes, x, seed),
            (Isa::Portable, _) => {}
        }
    }
    plain_row(bytes, x, stochastic, seed)
}

simd_fn! {
    /// [`quantise_row`] for every instruction set.
    fn plain_row<FMA>(bytes: &mut [u8], x: &[f32], stochastic: bool, seed: u32) -> (f32, i32) {
        let mut maxima = [0u32; STREAMS];
        let blocks = x.chunks_exact(STREAMS);
        for (lane, x) in blocks.remainder().iter().enumerate() {
            maxima[lane] = x.to_bits() & 0x7fff_ffff;
        }
        for block in blocks {
            for lane in 0..STREAMS {
                maxima[lane] = maxima[lane].max(block[lane].to_bits() & 0x7fff_ffff);
            }
        }
        let largest = maxima.iter().fold(0, |a, &b| a.max(b));
        let (scale, inverse) = scale_of(largest, stochastic);
        let mut sums = [0i32; STREAMS];
        let mut states = if stochastic { streams(seed ^ largest) } else { [0; STREAMS] };
        let whole = x.len() - x.len() % STREAMS;
        for (bytes, x) in bytes[..whole].chunks_exact_mut(STREAMS).zip(x.chunks_exact(STREAMS)) {
            for lane in 0..STREAMS {
                let noise = if stochastic { dither(&mut states[lane]) } else { 0.0 };
                let q = (x[lane] * inverse + noise + ROUND).to_bits();
                sums[lane] += (q as i32) << 24 >> 24;
                bytes[lane] = q as u8;
            }
        }
        for (lane, (byte, x)) in bytes[whole..].iter_mut().zip(&x[whole..]).enumerate() {
            let noise = if stochastic { dither(&mut states[lane]) } else { 0.0 };
            let q = (x * inverse + noise + ROUND).to_bits();
            sums[lane] += (q as i32) << 24 >> 24;
            *byte = q as u8;
        }
        bytes[x.len()..].fill(0);
        (scale, sums.iter().sum())
    }
}

/// `length` rows of `width` neighbouring elements, `stride` apart.
#[derive(Clone, Copy)]
struct Columns<'a> {
    data: &'a [f32],
    stride: usize,
    width: usize,
    length: usize,
}

/// Quantises up to `W` columns along their length: word (l, j) holds rows 4l to 4l + 3 of column j; missing columns are zero. `by_rows`: the words of each
/// column in turn (AVX-512, narrow panels).
fn quantise_columns<const W: usize>(
    words: &mut [u32],
    scales: &mut [f32],
    sums: &mut [i32],
    x: Columns<'_>,
    stochastic: bool,
    seed: u32,
    by_rows: bool,
) {
    const { assert!(W == ROWS || W == COLS) };
    assert!(x.width <= W && words.len() == W * x.length.div_ceil(4) && scales.len() == W && sums.len() == W);
    assert!(x.length == 0 || x.data.len() >= (x.length - 1) * x.stride + x.width);
    #[cfg(target_arch = "x86_64")]
    {
        let (data, shape, length) = (x.data, (x.stride, x.width), x.length);
        // SAFETY: `isa` has found the instructions; the assertions above.
        unsafe {
            match (isa(), stochastic) {
                (Isa::Avx512, false) => return avx512::columns::<W, false>(words, scales, sums, data, shape, length, seed, by_rows),
                (Isa::Avx512, true) => return avx512::columns::<W, true>(words, scales, sums, data, shape, length, seed, by_rows),
                (Isa::Avx2, false) => return avx2::columns::<W, false>(words, scales, sums, data, shape, length, seed),
                (Isa::Avx2, true) => return avx2::columns::<W, true>(words, scales, sums, data, shape, length, seed),
                (Isa::Portable, _) => {}
            }
        }
    }
    assert!(!by_rows);
    plain_columns::<W>(words, scales, sums, x, stochastic, seed);
}

/// [`quantise_columns`] for every instruction set.
fn plain_columns<const W: usize>(words: &mut [u32], scales: &mut [f32], sums: &mut [i32], x: Columns<'_>, stochastic: bool, seed: u32) {
    // The last panel of a matrix is copied, with zeros beside its columns.
    let mut padded = Scratch::take(if x.width < W { W * x.length } else { 0 });
    for (l, padded) in padded.chunks_exact_mut(W).enumerate() {
        padded[..x.width].copy_from_slice(&x.data[l * x.stride..][..x.width]);
        padded[x.width..].fill(0.0);
    }
    let (data, stride) = if x.width < W { (&padded[..], W) } else { (x.data, x.stride) };
    // The macro that compiles a loop for each instruction set takes no constant parameters.
    let columns = if W == ROWS { columns12 } else { columns32 };
    columns(words, scales, sums, data, stride, x.length, stochastic, seed);
}

macro_rules! columns {
    ($name:ident, $w:literal) => {
        simd_fn! {
            fn $name<FMA>(words: &mut [u32], scales: &mut [f32], sums: &mut [i32], data: &[f32], stride: usize, length: usize, stochastic: bool, seed: u32) {
                let row = |l: usize| -> &[f32; $w] { data[l * stride..][..$w].try_into().expect("a row of the panel") };
                let mut maxima = [0u32; $w];
                for l in 0..length {
                    let x = row(l);
                    for j in 0..$w {
                        maxima[j] = maxima[j].max(x[j].to_bits() & 0x7fff_ffff);
                    }
                }
                let mut inverses = [0.0f32; $w];
                for j in 0..$w {
                    (scales[j], inverses[j]) = scale_of(maxima[j], stochastic);
                }
                let mut states = [0u32; $w];
                if stochastic {
                    let mixed = maxima.iter().fold(seed, |a, &b| a.rotate_left(5) ^ b);
                    states.copy_from_slice(&streams(mixed)[..$w]);
                }
                let mut totals = [0i32; $w];
                for (group, words) in words.chunks_exact_mut($w).enumerate() {
                    let mut packed = [0u32; $w];
                    for byte in 0..4 {
                        let l = group * 4 + byte;
                        if l < length {
                            let x = row(l);
                            for j in 0..$w {
                                let noise = if stochastic { dither(&mut states[j]) } else { 0.0 };
                                let q = (x[j] * inverses[j] + noise + ROUND).to_bits();
                                totals[j] += (q as i32) << 24 >> 24;
                                packed[j] |= (q & 0xff) << (8 * byte);
                            }
                        }
                    }
                    words.copy_from_slice(&packed);
                }
                sums.copy_from_slice(&totals);
            }
        }
    };
}
columns!(columns12, 12);
columns!(columns32, 32);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn random(rows: usize, k: usize) -> Vec<f32> {
        let mut random = Random::new(31);
        (0..rows * k).map(|_| random.uniform() * random.uniform().powi(4)).collect()
    }

    /// Quantised along rows and along columns, each value is within half a step (nearest) or a whole step (stochastic) of the original.
    #[test]
    fn values_are_kept_to_a_step() {
        for (rows, k) in [(1, 1), (5, 3), (12, 256), (13, 300), (40, 515), (31, 64), (100, 70)] {
            let x = random(rows, k);
            let transposed: Vec<f32> = (0..rows * k).map(|i| x[i % rows * k + i / rows]).collect();
            for (rounding, share) in [(Rounding::Nearest, 0.5), (Rounding::Stochastic, 1.0)] {
                let by_rows = Mat::new(&x, rows, k);
                let by_columns = Mat::new(&transposed, k, rows).t();
                let all = [
                    Packed8::<12, false>::new(by_rows, rounding, Threads::All).dequantised(),
                    Packed8::<12, false>::new(by_columns, rounding, Threads::One).dequantised(),
                    Packed8::<32, true>::new(by_rows, rounding, Threads::One).dequantised(),
                    Packed8::<32, true>::new(by_columns, rounding, Threads::All).dequantised(),
                ];
                for got in all {
                    for row in 0..rows {
                        for from in (0..k).step_by(BLOCK) {
                            let place = row * k + from..row * k + k.min(from + BLOCK);
                            let step = x[place.clone()].iter().fold(0.0f32, |a, x| a.max(x.abs())) / 127.0;
                            for (got, x) in got[place.clone()].iter().zip(&x[place]) {
                                assert!((got - x).abs() <= step * (share + 1e-4), "[{rows}, {k}] row {row}: {got} for {x}, step {step}");
                            }
                        }
                    }
                }
            }
        }
    }

    /// Over many blocks the mean of the rounded values is the mean of the values, though each is far below half a step.
    #[test]
    fn stochastic_rounding_is_right_on_average() {
        let (rows, k) = (2000, 256);
        let mut x = vec![0.11f32 / 127.0; rows * k];
        for (i, row) in x.chunks_exact_mut(k).enumerate() {
            row[7] = 1.0 + i as f32 * 1e-6; // Sets the step, and differs, as real rows do.
        }
        for packed in [
            Packed8::<12, false>::new(Mat::new(&x, rows, k), Rounding::Stochastic, Threads::All).dequantised(),
            Packed8::<12, false>::new(Mat::new(&x, rows, k).rows_of(0..rows), Rounding::Nearest, Threads::All).dequantised(),
        ]
        .iter()
        .enumerate()
        {
            let (index, values) = packed;
            let sum: f64 = values.iter().enumerate().filter(|(i, _)| i % k != 7).map(|(_, v)| f64::from(*v)).sum();
            let mean = sum / (rows * (k - 1)) as f64 * 127.0;
            let expected = if index == 0 { 0.11 } else { 0.0 };
            assert!((mean - expected).abs() < 2e-3, "{mean} against {expected}");
        }
    }

    type Quantise = fn(&mut [u32], &mut [f32], &mut [i32], Columns<'_>, bool, u32);

    fn in_words<const W: usize>(words: &mut [u32], scales: &mut [f32], sums: &mut [i32], x: Columns<'_>, stochastic: bool, seed: u32) {
        quantise_columns::<W>(words, scales, sums, x, stochastic, seed, false);
    }

    /// As [`in_words`], from words of each column in turn where the instruction set has them.
    fn by_rows_in_words(words: &mut [u32], scales: &mut [f32], sums: &mut [i32], x: Columns<'_>, stochastic: bool, seed: u32) {
        quantise_columns::<12>(words, scales, sums, x, stochastic, seed, isa() == Isa::Avx512);
        if isa() == Isa::Avx512 {
            let (by_rows, count) = (words.to_vec(), words.len() / 12);
            words.iter_mut().enumerate().for_each(|(place, word)| *word = by_rows[place % 12 * count + place / 12]);
        }
    }

    #[test]
    fn every_instruction_set_rounds_to_the_same_bits() {
        let mut random = Random::new(33);
        for (length, width) in [(1, 1), (6, 12), (7, 12), (64, 5), (100, 11), (255, 32), (256, 17)] {
            let mut x = random.vec(length * 40, 3.0);
            // A column of zeros, and one whose scale would have no inverse.
            x.chunks_exact_mut(40).for_each(|row| (row[1], row[3]) = (0.0, row[3] * 1e-33));
            let columns = Columns { data: &x, stride: 40, width, length };
            for stochastic in [false, true] {
                let (mut a, mut b) = (vec![1u8; length.next_multiple_of(4)], vec![2u8; length.next_multiple_of(4)]);
                assert_eq!(quantise_row(&mut a, &x[..length], stochastic, 5), plain_row(&mut b, &x[..length], stochastic, 5));
                assert_eq!(a, b);
                let by_columns = |f: Quantise| {
                    let (mut words, mut scales, mut sums) = (vec![1; 32 * length.div_ceil(4)], vec![1.0; 32], vec![1; 32]);
                    f(&mut words, &mut scales, &mut sums, columns, stochastic, 6);
                    (words, scales, sums)
                };
                assert_eq!(by_columns(in_words::<32>), by_columns(plain_columns::<32>));
                let by_narrow = |f: Quantise| {
                    let (mut words, mut scales, mut sums) = (vec![1; 12 * length.div_ceil(4)], vec![1.0; 12], vec![1; 12]);
                    f(&mut words, &mut scales, &mut sums, Columns { width: width.min(12), ..columns }, stochastic, 6);
                    (words, scales, sums)
                };
                assert_eq!(by_narrow(in_words::<12>), by_narrow(plain_columns::<12>));
                assert_eq!(by_narrow(by_rows_in_words), by_narrow(plain_columns::<12>));
            }
        }
    }

    /// What is largest in a block is the likeliest to be carried beyond the last step; among eight million that is, four in a million would be.
    #[test]
    fn no_value_changes_its_sign() {
        const LENGTH: usize = 1 << 18;
        for i in 0..32 {
            let value = 1.0 + i as f32 * 3.0 * f32::EPSILON;
            let (x, mut bytes) = (vec![value; LENGTH], vec![0u8; LENGTH]);
            let (scale, sum) = quantise_row(&mut bytes, &x, true, i);
            assert!(bytes.iter().all(|&byte| byte as i8 >= 126), "{value}");
            assert_eq!(sum, bytes.iter().map(|&byte| i32::from(byte as i8)).sum::<i32>());
            assert!((sum as f32 * scale / (LENGTH as f32 * value) - 1.0).abs() < 1e-4, "right on average");
            let (length, columns) = (LENGTH / 32, Columns { data: &x, stride: 32, width: 32, length: LENGTH / 32 });
            let (mut words, mut scales, mut sums) = (vec![0u32; 32 * length / 4], vec![0.0; 32], vec![0; 32]);
            in_words::<32>(&mut words, &mut scales, &mut sums, columns, true, i);
            let bytes: &[u8] = bytemuck::cast_slice(&words);
            assert!(bytes.iter().all(|&byte| byte as i8 >= 126), "{value} by columns");
            assert_eq!(sums.iter().sum::<i32>(), bytes.iter().map(|&byte| i32::from(byte as i8)).sum::<i32>());
        }
    }

    #[test]
    fn what_is_not_a_number_stays_visible() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; 2 * 300];
            x[301] = bad;
            let packed = Packed8::<12, false>::new(Mat::new(&x, 2, 300), Rounding::Nearest, Threads::One);
            assert!(packed.panel(0, 0).scales[1].is_nan());
        }
        let packed = Packed8::<12, false>::new(Mat::new(&[0.0; 8], 2, 4), Rounding::Stochastic, Threads::One);
        assert_eq!(packed.dequantised(), [0.0; 8]);
    }
}
