//! Dot products of f32 rows with f32 or bf16 weight rows: what decoding spends its time in.
//!
//! **Batch invariance.** Every output value of [`panel`] is one accumulator vector that runs through `k` from left to right and is reduced once at
//! the end, however many rows and tokens share the registers. A value therefore never depends on what is computed beside it. It may depend on
//! the instruction set, which is chosen once per process.
//!
//! bf16 weights are widened to f32 on the fly (a shift by 16 bits): the products are exactly those of the widened weights.
#![allow(unsafe_code)] // the instruction sets themselves: unaligned vector loads and stores through pointers
#![allow(clippy::needless_range_loop)] // indices name registers of a tile; iterators would hide which

use half::bf16;

use super::isa::{Isa, isa};

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

/// Runs the tile of `R` rows × `T` tokens over a panel; shared by the instruction sets, whose `tile` differs. `$wide` rows are taken at once for
/// a single token (a decoding step, where the number of independent accumulators must cover the latency of the multiply-add), else 4 × `$tokens`.
#[cfg(target_arch = "x86_64")]
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
    use super::{Sizes, Strides, Weight};
    use std::arch::x86_64::*;

    // All of them, though the code needs F alone: without VL the compiler leaves half of the registers unused and spills sums to memory.

    const LANES: usize = 16;

    /// Sixteen weights, widened.
    ///
    /// # Safety
    /// `p` is readable for sixteen weights.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
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
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
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
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
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
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    pub unsafe fn panel<W: Weight>(out: &mut [f32], strides: Strides, x: &[f32], w: &[W], sizes: Sizes) {
        panel_loop!(out, strides, x, w, sizes, 8, 6, [1, 2, 3, 4, 5, 6]);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{Sizes, Strides, Weight};
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
}

/// Plain Rust with sixteen partial sums. Where the processor's baseline has vectors (aarch64) the compiler uses them.
mod portable {
    use super::{Sizes, Strides, Weight};

    const LANES: usize = 16;

    /// Sum of the lanes, by halves.
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// Every instruction set that this machine can run.
    fn isas() -> impl Iterator<Item = Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|&i| i <= isa())
    }

    fn check_panel<W: Weight>(w: &[W], sizes: Sizes) {
        let Sizes { m, n, k } = sizes;
        let x = Random::new(7).vec(m * k, 1.0);
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
            let w = Random::new(3).vec(n * k, 1.0);
            check_panel(&w, Sizes { m, n, k });
            let w: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
            check_panel(&w, Sizes { m, n, k });
        }
    }

    #[test]
    fn panel_writes_where_the_strides_say() {
        let (m, n, k) = (3, 5, 20);
        let (x, w) = (Random::new(1).vec(m * k, 1.0), Random::new(2).vec(n * k, 1.0));
        let (mut plain, mut turned) = (vec![0.0; m * n], vec![0.0; m * n]);
        panel(&mut plain, Strides { token: n, row: 1 }, &x, &w, Sizes { m, n, k });
        panel(&mut turned, Strides { token: 1, row: m }, &x, &w, Sizes { m, n, k });
        for t in 0..m {
            for r in 0..n {
                assert_eq!(plain[t * n + r], turned[r * m + t]);
            }
        }
    }
}
