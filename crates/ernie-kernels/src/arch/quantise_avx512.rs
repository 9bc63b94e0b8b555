//! The rounding loops of [`quantised`](super::quantised) for AVX-512: the same bits as the loops there, several times faster.
#![allow(unsafe_code)] // the instruction set itself: vector loads and stores through pointers
#![allow(clippy::needless_range_loop)] // indices name registers; iterators would hide which

use std::arch::x86_64::*;

use super::pack::transpose_square;
use super::quantised::{scale_of, streams};
use super::tile::mask16;

/// One step of sixteen generators, and their numbers in [-1/2, 1/2).
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
fn dither(state: &mut __m512i) -> __m512 {
    let mut z = *state;
    z = _mm512_xor_si512(z, _mm512_slli_epi32::<13>(z));
    z = _mm512_xor_si512(z, _mm512_srli_epi32::<17>(z));
    z = _mm512_xor_si512(z, _mm512_slli_epi32::<5>(z));
    *state = z;
    let one_to_two = _mm512_or_si512(_mm512_srli_epi32::<9>(z), _mm512_set1_epi32(0x3f80_0000));
    _mm512_sub_ps(_mm512_castsi512_ps(one_to_two), _mm512_set1_ps(1.5))
}

/// round(x · inverse + noise).
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
fn rounded<const STOCHASTIC: bool>(x: __m512, inverse: __m512, state: &mut __m512i) -> __m512i {
    let scaled = _mm512_mul_ps(x, inverse);
    _mm512_cvtps_epi32(if STOCHASTIC { _mm512_add_ps(scaled, dither(state)) } else { scaled })
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
fn magnitude_bits(x: __m512) -> __m512i {
    _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fff_ffff))
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
fn load_states(states: &[u32; 32]) -> [__m512i; 2] {
    // SAFETY: 32 words.
    unsafe { [_mm512_loadu_si512(states.as_ptr().cast()), _mm512_loadu_si512(states.as_ptr().add(16).cast())] }
}

/// See [`quantise_row`](super::quantised::quantise_row).
///
/// # Safety
/// The processor must have the features; `bytes` must be at least as long as `x`.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn row<const STOCHASTIC: bool>(bytes: &mut [u8], x: &[f32], seed: u32) -> (f32, i32) {
    let n = x.len();
    let masked = |i: usize| mask16(n.saturating_sub(i));
    let mut maxima = [_mm512_setzero_si512(); 4];
    for i in (0..n).step_by(64) {
        for (part, maximum) in maxima.iter_mut().enumerate() {
            let from = i + 16 * part;
            // SAFETY: the mask leaves out what lies behind the row.
            let x = unsafe { _mm512_maskz_loadu_ps(masked(from), x.as_ptr().wrapping_add(from)) };
            *maximum = _mm512_max_epu32(*maximum, magnitude_bits(x));
        }
    }
    let maximum = _mm512_max_epu32(_mm512_max_epu32(maxima[0], maxima[1]), _mm512_max_epu32(maxima[2], maxima[3]));
    let largest = _mm512_reduce_max_epu32(maximum);
    let (scale, inverse) = scale_of(largest, STOCHASTIC);
    let inverse = _mm512_set1_ps(inverse);
    let mut states = if STOCHASTIC { load_states(&streams(seed ^ largest)) } else { [_mm512_setzero_si512(); 2] };
    let mut sums = [_mm512_setzero_si512(); 2];
    for i in (0..n).step_by(32) {
        for half in 0..2 {
            let from = i + 16 * half;
            let mask = masked(from);
            // SAFETY: the mask leaves out what lies behind the row; `bytes` is as long.
            unsafe {
                let x = _mm512_maskz_loadu_ps(mask, x.as_ptr().wrapping_add(from));
                let q = _mm512_maskz_mov_epi32(mask, rounded::<STOCHASTIC>(x, inverse, &mut states[half]));
                sums[half] = _mm512_add_epi32(sums[half], q);
                _mm512_mask_cvtepi32_storeu_epi8(bytes.as_mut_ptr().wrapping_add(from).cast(), mask, q);
            }
        }
    }
    bytes[n..].fill(0);
    (scale, _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1])))
}

/// See [`quantise_columns`](super::quantised::quantise_columns), with `width` columns of `data` and zeros for the others.
///
/// # Safety
/// The processor must have the features; `data` must hold `length` rows of `width` elements, `words` `W` words for each four of them.
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) unsafe fn columns<const W: usize, const STOCHASTIC: bool>(
    words: &mut [u32],
    scales: &mut [f32],
    sums: &mut [i32],
    data: &[f32],
    (stride, width): (usize, usize),
    length: usize,
    seed: u32,
    by_rows: bool,
) {
    assert!(!by_rows || W <= 16);
    let load = |l: usize, part: usize| {
        let mask = mask16(width.saturating_sub(16 * part));
        // SAFETY: row l < length of the data, and of it the columns below `width` by the mask.
        unsafe { _mm512_maskz_loadu_ps(mask, data.as_ptr().wrapping_add(l * stride + 16 * part)) }
    };
    let parts = W.div_ceil(16);
    let mut maxima = [[_mm512_setzero_si512(); 2]; 2];
    for l in (0..length).step_by(2) {
        for part in 0..parts {
            // An odd last row counts twice.
            for (half, maxima) in maxima.iter_mut().enumerate() {
                maxima[part] = _mm512_max_epu32(maxima[part], magnitude_bits(load((l + half).min(length - 1), part)));
            }
        }
    }
    let mut largest = [0u32; 32];
    for part in 0..parts {
        let maximum = _mm512_max_epu32(maxima[0][part], maxima[1][part]);
        // SAFETY: 32 words.
        unsafe { _mm512_storeu_si512(largest.as_mut_ptr().add(16 * part).cast(), maximum) };
    }
    let mut inverses = [0.0f32; 32];
    for j in 0..W {
        (scales[j], inverses[j]) = scale_of(largest[j], STOCHASTIC);
    }
    // SAFETY: 32 elements.
    let inverses = unsafe { [_mm512_loadu_ps(inverses.as_ptr()), _mm512_loadu_ps(inverses.as_ptr().add(16))] };
    let mut states = [_mm512_setzero_si512(); 2];
    if STOCHASTIC {
        states = load_states(&streams(largest[..W].iter().fold(seed, |a, &b| a.rotate_left(5) ^ b)));
    }
    let mut totals = [_mm512_setzero_si512(); 2];
    let low = _mm512_set1_epi32(0xff);
    let count = words.len() / W;
    let mut square = [_mm512_setzero_ps(); 16];
    for group in 0..count {
        for part in 0..parts {
            let mut packed = _mm512_setzero_si512();
            for byte in 0..(length - group * 4).min(4) {
                let q = rounded::<STOCHASTIC>(load(group * 4 + byte, part), inverses[part], &mut states[part]);
                totals[part] = _mm512_add_epi32(totals[part], q);
                let q = _mm512_sll_epi32(_mm512_and_si512(q, low), _mm_cvtsi32_si128(8 * byte as i32));
                packed = _mm512_or_si512(packed, q);
            }
            if by_rows {
                square[group % 16] = _mm512_castsi512_ps(packed);
            } else {
                // SAFETY: a row of W words, by the mask.
                unsafe {
                    let place = words.as_mut_ptr().wrapping_add(group * W + 16 * part);
                    _mm512_mask_storeu_epi32(place.cast(), mask16(W - 16 * part), packed);
                }
            }
        }
        if by_rows && (group % 16 == 15 || group + 1 == count) {
            let first = group - group % 16;
            let mask = mask16(group + 1 - first);
            transpose_square(&mut square);
            for r in 0..W.min(16) {
                // SAFETY: words first.. of row r, as many as there are, by the mask.
                unsafe { _mm512_mask_storeu_ps(words.as_mut_ptr().wrapping_add(r * count + first).cast(), mask, square[r]) };
            }
        }
    }
    let mut all = [0i32; 32];
    // SAFETY: 32 words.
    unsafe {
        _mm512_storeu_si512(all.as_mut_ptr().cast(), totals[0]);
        _mm512_storeu_si512(all.as_mut_ptr().add(16).cast(), totals[1]);
    }
    sums.copy_from_slice(&all[..W]);
}
