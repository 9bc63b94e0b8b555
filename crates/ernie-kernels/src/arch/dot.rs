//! Dot products of f32 rows with f32 or bf16 weight rows, weighted sums of rows, and the softmax between them: what decoding with a key/value
//! cache spends its time in.
//!
//! **Batch invariance.** Every output value of [`panel`] is one accumulator vector that runs through `k` from left to right and is reduced once at
//! the end, however many rows and tokens share the registers; every output value of [`weighted_sum`] is one accumulator that runs through the rows
//! in order. A value therefore never depends on what is computed beside it. It may depend on the instruction set, which is chosen once per process.
//!
//! bf16 weights are widened to f32 on the fly (a shift by 16 bits): the products are exactly those of the widened weights.
#![allow(unsafe_code)] // the instruction sets themselves: unaligned vector loads and stores through pointers
#![allow(clippy::needless_range_loop)] // indices name registers of a tile; iterators would hide which

use half::bf16;
use std::sync::OnceLock;

/// A weight as it is stored: `f32` or `bf16`.
pub trait Weight: Copy + Send + Sync + private::Sealed + 'static {
    /// Zero, with which the last partial vector of a row is filled.
    const ZERO: Self;
    /// Whether the sixteen bits are the upper half of an f32.
    const BF16: bool;
    /// The value, widened exactly.
    fn widen(self) -> f32;
}

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

impl Weight for f32 {
    const ZERO: Self = 0.0;
    const BF16: bool = false;
    fn widen(self) -> f32 {
        self
    }
}

impl Weight for bf16 {
    const ZERO: Self = bf16::ZERO;
    const BF16: bool = true;
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// Instruction set used by this module, from the fastest that the processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512F: sixteen lanes, 32 registers.
    Avx512,
    /// AVX2 with FMA: eight lanes, 16 registers.
    Avx2,
    /// Plain Rust, sixteen lanes in an array.
    Portable,
}

/// The instruction set in use, chosen once.
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Isa::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    })
}

/// Where output value (token, row) of [`panel`] goes: `token * token_stride + row * row_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Strides {
    /// Distance between two tokens.
    pub token: usize,
    /// Distance between two weight rows.
    pub row: usize,
}

/// Matrix sizes of [`panel`]: `m` tokens, `n` weight rows, `k` values in each.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Tokens (rows of `x`).
    pub m: usize,
    /// Weight rows (outputs per token).
    pub n: usize,
    /// Length of a row.
    pub k: usize,
}

/// `out[token, row] = Σ_k x[token, k] · w[row, k]` with `x: [m, k]`, `w: [n, k]`; the place of each output is given by `strides`.
///
/// # Panics
/// If a slice does not fit the sizes.
pub fn panel<W: Weight>(out: &mut [f32], strides: Strides, x: &[f32], w: &[W], sizes: Sizes) {
    panel_on(isa(), out, strides, x, w, sizes);
}

fn panel_on<W: Weight>(isa: Isa, out: &mut [f32], strides: Strides, x: &[f32], w: &[W], sizes: Sizes) {
    let Sizes { m, n, k } = sizes;
    assert_eq!(x.len(), m * k, "panel: x is [{m}, {k}]");
    assert_eq!(w.len(), n * k, "panel: w is [{n}, {k}]");
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * strides.token + (n - 1) * strides.row < out.len(), "panel: out is too short for {m} tokens, {n} rows");
    match isa {
        // SAFETY: `isa()` answers `Avx512` or `Avx2` only after detecting the features (tests ask for one only when it is detected);
        // the asserts above keep every row of `x` and `w` inside its slice.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::panel(out, strides, x, w, sizes) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::panel(out, strides, x, w, sizes) },
        _ => portable::panel(out, strides, x, w, sizes),
    }
}

/// `out[j, :] += Σ_p weights[j, p] · rows[p, :]`, p ascending: `out: [m, d]`, `weights: [m, ·]` with rows `weight_stride` apart, `rows: [n, d]`.
///
/// # Panics
/// If a slice does not fit the sizes.
pub fn weighted_sum(out: &mut [f32], weights: &[f32], weight_stride: usize, rows: &[f32], n: usize, d: usize) {
    weighted_sum_on(isa(), out, weights, weight_stride, rows, n, d);
}

fn weighted_sum_on(isa: Isa, out: &mut [f32], weights: &[f32], weight_stride: usize, rows: &[f32], n: usize, d: usize) {
    if out.is_empty() || n == 0 {
        return;
    }
    assert!(d > 0 && out.len().is_multiple_of(d), "weighted_sum: out is [m, {d}]");
    assert_eq!(rows.len(), n * d, "weighted_sum: rows are [{n}, {d}]");
    let m = out.len() / d;
    assert!((m - 1) * weight_stride + n <= weights.len(), "weighted_sum: too few weights for {m} sums of {n} rows");
    match isa {
        // SAFETY: the features were detected (see `panel_on`); the code is plain slices compiled for them.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::weighted_sum(out, weights, weight_stride, rows, n, d) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::weighted_sum(out, weights, weight_stride, rows, n, d) },
        _ => portable::weighted_sum::<false>(out, weights, weight_stride, rows, n, d),
    }
}

/// Softmax of `scale · s` in place over one row. Two passes: maximum, then exponentials and their sum in sixteen fixed lanes.
pub fn softmax(s: &mut [f32], scale: f32) {
    softmax_on(isa(), s, scale);
}

fn softmax_on(isa: Isa, s: &mut [f32], scale: f32) {
    match isa {
        // SAFETY: the features were detected (see `panel_on`); the code is plain slices compiled for them.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::softmax(s, scale) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::softmax(s, scale) },
        _ => portable::softmax::<false>(s, scale),
    }
}

/// Runs the tile of `R` rows × `T` tokens over a panel; shared by the instruction sets, whose `tile` differs. `$wide` rows are taken at once for
/// a single token (a decoding step, where the number of independent accumulators must cover the latency of the multiply-add), else 4 × `$tokens`.
macro_rules! panel_loop {
    ($out:ident, $strides:ident, $x:ident, $w:ident, $sizes:ident, $wide:literal, $tokens:literal, [$($t:literal),*]) => {{
        let Sizes { m, n, k } = $sizes;
        let mut put = |token: usize, row: usize, value: f32| $out[token * $strides.token + row * $strides.row] = value;
        let mut row = 0;
        if m == 1 {
            while row + $wide <= n {
                // SAFETY: rows row..row+$wide lie inside `w`, the one token inside `x`.
                let tile = unsafe { tile::<W, $wide, 1>($x.as_ptr(), $w.as_ptr().add(row * k), k) };
                for (r, &value) in tile[0].iter().enumerate() {
                    put(0, row + r, value);
                }
                row += $wide;
            }
        }
        // A few tokens stay in the first-level cache while the rows pass by; the caller keeps a panel of rows within the second level.
        let left = row;
        let mut token = 0;
        while token < m {
            let tokens = (m - token).min($tokens);
            let mut row = left;
            while row < n {
                let rows = if row + 4 <= n { 4 } else { 1 };
                // SAFETY: rows row..row+rows lie inside `w`, tokens token..token+tokens inside `x`.
                unsafe {
                    let (xp, wp) = ($x.as_ptr().add(token * k), $w.as_ptr().add(row * k));
                    match (rows, tokens) {
                        $(
                            (4, $t) => {
                                for (t, values) in tile::<W, 4, $t>(xp, wp, k).iter().enumerate() {
                                    for (r, &value) in values.iter().enumerate() {
                                        put(token + t, row + r, value);
                                    }
                                }
                            }
                            (1, $t) => {
                                for (t, values) in tile::<W, 1, $t>(xp, wp, k).iter().enumerate() {
                                    put(token + t, row, values[0]);
                                }
                            }
                        )*
                        _ => unreachable!("rows are 4 or 1, tokens 1..={}", $tokens),
                    }
                }
                row += rows;
            }
            token += tokens;
        }
    }};
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Sizes, Strides, Weight, portable};
    use std::arch::x86_64::*;

    const LANES: usize = 16;

    /// Sixteen weights, widened.
    ///
    /// # Safety
    /// `p` is readable for sixteen weights.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load<W: Weight>(p: *const W) -> __m512 {
        // SAFETY: by the caller; both loads are unaligned ones.
        unsafe {
            if W::BF16 {
                let half = _mm256_loadu_si256(p.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            } else {
                _mm512_loadu_ps(p.cast())
            }
        }
    }

    /// The last `len < 16` weights of a row, filled up with zeros.
    ///
    /// # Safety
    /// `p` is readable for `len` weights.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_tail<W: Weight>(p: *const W, len: usize) -> __m512 {
        let mut padded = [W::ZERO; LANES];
        // SAFETY: `len < LANES` weights are readable at `p` by the caller, and `padded` holds LANES.
        unsafe {
            std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), len);
            load(padded.as_ptr())
        }
    }

    /// `R` weight rows times `T` tokens.
    ///
    /// # Safety
    /// `x` is readable for `T·k` values, `w` for `R·k` weights.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn tile<W: Weight, const R: usize, const T: usize>(x: *const f32, w: *const W, k: usize) -> [[f32; R]; T] {
        let mut sums = [[_mm512_setzero_ps(); R]; T];
        let full = k / LANES * LANES;
        // SAFETY: i + LANES ≤ k in the loop and full + (k − full) = k after it: all reads stay inside rows of length k.
        unsafe {
            let mut i = 0;
            while i < full {
                let mut xs = [_mm512_setzero_ps(); T];
                for (t, x_t) in xs.iter_mut().enumerate() {
                    *x_t = load(x.add(t * k + i));
                }
                for r in 0..R {
                    let w_r = load(w.add(r * k + i));
                    for t in 0..T {
                        sums[t][r] = _mm512_fmadd_ps(xs[t], w_r, sums[t][r]);
                    }
                }
                i += LANES;
            }
            if full < k {
                for r in 0..R {
                    let w_r = load_tail(w.add(r * k + full), k - full);
                    for t in 0..T {
                        sums[t][r] = _mm512_fmadd_ps(load_tail(x.add(t * k + full), k - full), w_r, sums[t][r]);
                    }
                }
            }
        }
        let mut out = [[0.0; R]; T];
        for t in 0..T {
            for r in 0..R {
                out[t][r] = _mm512_reduce_add_ps(sums[t][r]);
            }
        }
        out
    }

    /// # Safety
    /// AVX-512F; `x` is `[m, k]`, `w` is `[n, k]`.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn panel<W: Weight>(out: &mut [f32], strides: Strides, x: &[f32], w: &[W], sizes: Sizes) {
        panel_loop!(out, strides, x, w, sizes, 8, 6, [1, 2, 3, 4, 5, 6]);
    }

    #[target_feature(enable = "avx512f")]
    pub fn weighted_sum(out: &mut [f32], weights: &[f32], weight_stride: usize, rows: &[f32], n: usize, d: usize) {
        portable::weighted_sum::<true>(out, weights, weight_stride, rows, n, d);
    }

    #[target_feature(enable = "avx512f")]
    pub fn softmax(s: &mut [f32], scale: f32) {
        portable::softmax::<true>(s, scale);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{Sizes, Strides, Weight, portable};
    use std::arch::x86_64::*;

    const LANES: usize = 8;

    /// Eight weights, widened.
    ///
    /// # Safety
    /// `p` is readable for eight weights.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load<W: Weight>(p: *const W) -> __m256 {
        // SAFETY: by the caller; both loads are unaligned ones.
        unsafe {
            if W::BF16 {
                let half = _mm_loadu_si128(p.cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
            } else {
                _mm256_loadu_ps(p.cast())
            }
        }
    }

    /// The last `len < 8` weights of a row, filled up with zeros.
    ///
    /// # Safety
    /// `p` is readable for `len` weights.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load_tail<W: Weight>(p: *const W, len: usize) -> __m256 {
        let mut padded = [W::ZERO; LANES];
        // SAFETY: `len < LANES` weights are readable at `p` by the caller, and `padded` holds LANES.
        unsafe {
            std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), len);
            load(padded.as_ptr())
        }
    }

    /// `R` weight rows times `T` tokens.
    ///
    /// # Safety
    /// `x` is readable for `T·k` values, `w` for `R·k` weights.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<W: Weight, const R: usize, const T: usize>(x: *const f32, w: *const W, k: usize) -> [[f32; R]; T] {
        let mut sums = [[_mm256_setzero_ps(); R]; T];
        let full = k / LANES * LANES;
        // SAFETY: i + LANES ≤ k in the loop and full + (k − full) = k after it: all reads stay inside rows of length k.
        unsafe {
            let mut i = 0;
            while i < full {
                let mut xs = [_mm256_setzero_ps(); T];
                for (t, x_t) in xs.iter_mut().enumerate() {
                    *x_t = load(x.add(t * k + i));
                }
                for r in 0..R {
                    let w_r = load(w.add(r * k + i));
                    for t in 0..T {
                        sums[t][r] = _mm256_fmadd_ps(xs[t], w_r, sums[t][r]);
                    }
                }
                i += LANES;
            }
            if full < k {
                for r in 0..R {
                    let w_r = load_tail(w.add(r * k + full), k - full);
                    for t in 0..T {
                        sums[t][r] = _mm256_fmadd_ps(load_tail(x.add(t * k + full), k - full), w_r, sums[t][r]);
                    }
                }
            }
        }
        let mut out = [[0.0; R]; T];
        for t in 0..T {
            for r in 0..R {
                let lanes = sums[t][r];
                let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                out[t][r] = _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)));
            }
        }
        out
    }

    /// # Safety
    /// AVX2 and FMA; `x` is `[m, k]`, `w` is `[n, k]`.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn panel<W: Weight>(out: &mut [f32], strides: Strides, x: &[f32], w: &[W], sizes: Sizes) {
        panel_loop!(out, strides, x, w, sizes, 8, 3, [1, 2, 3]);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn weighted_sum(out: &mut [f32], weights: &[f32], weight_stride: usize, rows: &[f32], n: usize, d: usize) {
        portable::weighted_sum::<true>(out, weights, weight_stride, rows, n, d);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn softmax(s: &mut [f32], scale: f32) {
        portable::softmax::<true>(s, scale);
    }
}

/// Plain Rust in fixed-size arrays. `FMA` says that the surrounding function was compiled for a processor with the instruction; without it
/// `mul_add` would be a library call. The bodies are inlined into such functions, where the compiler turns the arrays into vectors.
mod portable {
    use super::{Sizes, Strides, Weight};

    const LANES: usize = 16;

    #[inline(always)]
    fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
        if FMA { a.mul_add(b, c) } else { a * b + c }
    }

    /// Sum of the lanes, by halves.
    #[inline(always)]
    fn reduce(mut lanes: [f32; LANES]) -> f32 {
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    pub fn panel<W: Weight>(out: &mut [f32], strides: Strides, x: &[f32], w: &[W], sizes: Sizes) {
        let Sizes { m, n, k } = sizes;
        for row in 0..n {
            let w_row = &w[row * k..(row + 1) * k];
            for token in 0..m {
                let x_row = &x[token * k..(token + 1) * k];
                let mut lanes = [0.0; LANES];
                let (x_chunks, w_chunks) = (x_row.chunks_exact(LANES), w_row.chunks_exact(LANES));
                let (x_tail, w_tail) = (x_chunks.remainder(), w_chunks.remainder());
                for (x_c, w_c) in x_chunks.zip(w_chunks) {
                    for i in 0..LANES {
                        lanes[i] += x_c[i] * w_c[i].widen();
                    }
                }
                for (i, (&x_i, &w_i)) in x_tail.iter().zip(w_tail).enumerate() {
                    lanes[i] += x_i * w_i.widen();
                }
                out[token * strides.token + row * strides.row] = reduce(lanes);
            }
        }
    }

    #[inline(always)]
    pub fn weighted_sum<const FMA: bool>(out: &mut [f32], weights: &[f32], weight_stride: usize, rows: &[f32], n: usize, d: usize) {
        for (j, out_j) in out.chunks_exact_mut(d).enumerate() {
            let weights_j = &weights[j * weight_stride..j * weight_stride + n];
            let mut start = 0;
            // 64 columns at a time stay in registers while the rows go by.
            while start + 64 <= d {
                let columns = &mut out_j[start..start + 64];
                let mut sums = [0.0; 64];
                sums.copy_from_slice(columns);
                for (&weight, row) in weights_j.iter().zip(rows.chunks_exact(d)) {
                    let row: &[f32; 64] = row[start..start + 64].try_into().expect("64 columns");
                    for i in 0..64 {
                        sums[i] = multiply_add::<FMA>(weight, row[i], sums[i]);
                    }
                }
                columns.copy_from_slice(&sums);
                start += 64;
            }
            if start < d {
                for (&weight, row) in weights_j.iter().zip(rows.chunks_exact(d)) {
                    for (o, &value) in out_j[start..].iter_mut().zip(&row[start..]) {
                        *o = multiply_add::<FMA>(weight, value, *o);
                    }
                }
            }
        }
    }

    /// eˣ for x ≤ 0, 0 below −87: eˣ = 2ⁿ·eʳ with r = x − n·ln 2, |r| ≤ ln 2 / 2, and a polynomial of degree 6 (Cephes `expf`). NaN stays NaN.
    #[inline(always)]
    pub(super) fn exp_of_negative<const FMA: bool>(x: f32) -> f32 {
        // Adding 1.5·2²³ rounds to the nearest integer, in every instruction set alike.
        const ROUND: f32 = 12_582_912.0;
        let clamped = if x < -87.0 { -87.0 } else { x };
        let n = multiply_add::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND) - ROUND;
        let r = multiply_add::<FMA>(n, -0.693_359_4, clamped);
        let r = multiply_add::<FMA>(n, 2.121_944_4e-4, r);
        let mut p = 1.987_569_1e-4;
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = multiply_add::<FMA>(p, r, c);
        }
        let e = multiply_add::<FMA>(p, r * r, r) + 1.0;
        let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
        let y = e * power;
        if x < -87.0 { 0.0 } else { y }
    }

    #[inline(always)]
    pub fn softmax<const FMA: bool>(s: &mut [f32], scale: f32) {
        let mut maxima = [f32::NEG_INFINITY; LANES];
        let chunks = s.chunks_exact_mut(LANES);
        for chunk in chunks {
            for i in 0..LANES {
                chunk[i] *= scale;
                maxima[i] = if chunk[i] > maxima[i] { chunk[i] } else { maxima[i] };
            }
        }
        let tail = s.len() / LANES * LANES;
        for value in &mut s[tail..] {
            *value *= scale;
            maxima[0] = if *value > maxima[0] { *value } else { maxima[0] };
        }
        let max = maxima.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let mut sums = [0.0; LANES];
        for chunk in s.chunks_exact_mut(LANES) {
            for i in 0..LANES {
                chunk[i] = exp_of_negative::<FMA>(chunk[i] - max);
                sums[i] += chunk[i];
            }
        }
        for (i, value) in s[tail..].iter_mut().enumerate() {
            *value = exp_of_negative::<FMA>(*value - max);
            sums[i] += *value;
        }
        let inverse = 1.0 / reduce(sums);
        for value in s {
            *value *= inverse;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every instruction set that this machine can run.
    fn isas() -> Vec<Isa> {
        let mut isas = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                isas.push(Isa::Avx2);
            }
            if is_x86_feature_detected!("avx512f") {
                isas.push(Isa::Avx512);
            }
        }
        isas
    }

    /// Values in (−1, 1) from a linear congruential generator.
    fn values(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn check_panel<W: Weight>(w: &[W], sizes: Sizes) {
        let Sizes { m, n, k } = sizes;
        let x = values(m * k, 7);
        for isa in isas() {
            let mut out = vec![f32::NAN; m * n];
            panel_on(isa, &mut out, Strides { token: n, row: 1 }, &x, w, sizes);
            for token in 0..m {
                let x_row = &x[token * k..(token + 1) * k];
                let mut alone = vec![f32::NAN; n];
                panel_on(isa, &mut alone, Strides { token: n, row: 1 }, x_row, w, Sizes { m: 1, n, k });
                for row in 0..n {
                    let exact: f64 = (0..k).map(|i| f64::from(x_row[i]) * f64::from(w[row * k + i].widen())).sum();
                    let got = out[token * n + row];
                    assert!(
                        (f64::from(got) - exact).abs() <= 1e-6 * (k as f64 + 4.0),
                        "{isa:?} {sizes:?} {token} {row}: {got} for {exact}"
                    );
                    assert_eq!(got.to_bits(), alone[row].to_bits(), "{isa:?} {sizes:?}: value depends on the batch");
                    let mut one = [f32::NAN];
                    let w_row = &w[row * k..(row + 1) * k];
                    panel_on(isa, &mut one, Strides { token: 1, row: 1 }, x_row, w_row, Sizes { m: 1, n: 1, k });
                    assert_eq!(got.to_bits(), one[0].to_bits(), "{isa:?} {sizes:?}: value depends on the other rows");
                }
            }
        }
    }

    #[test]
    fn panel_equals_the_exact_sum_and_never_depends_on_the_batch() {
        for (m, n, k) in [(1, 1, 1), (1, 8, 16), (1, 13, 33), (2, 5, 7), (3, 4, 48), (6, 9, 31), (7, 12, 64), (13, 10, 100), (4, 3, 0)] {
            let w = values(n * k, 3);
            check_panel(&w, Sizes { m, n, k });
            let w: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
            check_panel(&w, Sizes { m, n, k });
        }
    }

    #[test]
    fn panel_writes_where_the_strides_say() {
        let (m, n, k) = (3, 5, 20);
        let (x, w) = (values(m * k, 1), values(n * k, 2));
        let (mut plain, mut turned) = (vec![0.0; m * n], vec![0.0; m * n]);
        panel(&mut plain, Strides { token: n, row: 1 }, &x, &w, Sizes { m, n, k });
        panel(&mut turned, Strides { token: 1, row: m }, &x, &w, Sizes { m, n, k });
        for t in 0..m {
            for r in 0..n {
                assert_eq!(plain[t * n + r], turned[r * m + t]);
            }
        }
    }

    #[test]
    fn weighted_sum_equals_the_exact_sum_and_continues_bit_for_bit() {
        for (m, n, d) in [(1, 1, 1), (2, 9, 5), (3, 40, 64), (4, 33, 128), (1, 17, 100)] {
            let (weights, rows) = (values(m * n, 5), values(n * d, 6));
            for isa in isas() {
                let mut out = vec![0.0; m * d];
                weighted_sum_on(isa, &mut out, &weights, n, &rows, n, d);
                for j in 0..m {
                    for c in 0..d {
                        let exact: f64 = (0..n).map(|p| f64::from(weights[j * n + p]) * f64::from(rows[p * d + c])).sum();
                        assert!((f64::from(out[j * d + c]) - exact).abs() < 1e-5);
                    }
                }
                let mut in_parts = vec![0.0; m * d];
                let split = n / 2;
                weighted_sum_on(isa, &mut in_parts, &weights, n, &rows[..split * d], split, d);
                weighted_sum_on(isa, &mut in_parts, &weights[split..], n, &rows[split * d..], n - split, d);
                assert_eq!(out, in_parts, "{isa:?}");
            }
        }
    }

    #[test]
    fn softmax_equals_the_exact_one() {
        for len in [1, 2, 15, 16, 17, 100] {
            for isa in isas() {
                let scores: Vec<f32> = values(len, 11).iter().map(|v| v * 60.0).collect();
                let mut got = scores.clone();
                softmax_on(isa, &mut got, 0.7);
                let max = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(f64::from(b * 0.7)));
                let exact: Vec<f64> = scores.iter().map(|&s| (f64::from(s * 0.7) - max).exp()).collect();
                let sum: f64 = exact.iter().sum();
                for (g, e) in got.iter().zip(exact) {
                    assert!((f64::from(*g) - e / sum).abs() <= 3e-7, "{isa:?} {len}: {g} for {}", e / sum);
                }
            }
        }
    }

    #[test]
    fn exponential_is_close_over_its_whole_range_and_lets_nan_through() {
        let mut x = 0.0f32;
        while x > -86.9 {
            for got in [portable::exp_of_negative::<false>(x), portable::exp_of_negative::<true>(x)] {
                let exact = f64::from(x).exp();
                assert!(((f64::from(got) - exact) / exact).abs() < 3e-7, "exp({x}) = {got}, exactly {exact}");
            }
            x -= 0.0137;
        }
        assert_eq!(portable::exp_of_negative::<false>(-200.0), 0.0);
        assert_eq!(portable::exp_of_negative::<false>(f32::NEG_INFINITY), 0.0);
        assert!(portable::exp_of_negative::<false>(f32::NAN).is_nan());
    }
}
