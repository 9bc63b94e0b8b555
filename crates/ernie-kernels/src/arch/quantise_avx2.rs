//! The rounding loops of [`quantised`](super::quantised) for AVX2: the same bits as the loops there, of which the compiler leaves much scalar. Up to three times
//! as fast, the more so where values are rounded at random.
#![allow(unsafe_code)] // the instruction set itself: vector loads and stores through pointers
#![allow(clippy::needless_range_loop)] // indices name registers; iterators would hide which

use std::arch::x86_64::*;

use super::quantised::{scale_of, streams};
use super::tile::{COLS, ROWS};

/// One step of eight generators, and their numbers in [-1/2, 1/2).
#[inline]
#[target_feature(enable = "avx2,fma")]
fn dither(state: &mut __m256i) -> __m256 {
    let mut z = *state;
    z = _mm256_xor_si256(z, _mm256_slli_epi32::<13>(z));
    z = _mm256_xor_si256(z, _mm256_srli_epi32::<17>(z));
    z = _mm256_xor_si256(z, _mm256_slli_epi32::<5>(z));
    *state = z;
    let one_to_two = _mm256_or_si256(_mm256_srli_epi32::<9>(z), _mm256_set1_epi32(0x3f80_0000));
    _mm256_sub_ps(_mm256_castsi256_ps(one_to_two), _mm256_set1_ps(1.5))
}

/// round(x · inverse + noise).
#[inline]
#[target_feature(enable = "avx2,fma")]
fn rounded<const STOCHASTIC: bool>(x: __m256, inverse: __m256, state: &mut __m256i) -> __m256i {
    let scaled = _mm256_mul_ps(x, inverse);
    _mm256_cvtps_epi32(if STOCHASTIC { _mm256_add_ps(scaled, dither(state)) } else { scaled })
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn magnitude_bits(x: __m256) -> __m256i {
    _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fff_ffff))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn lanes(x: __m256i) -> [i32; 8] {
    let mut lanes = [0; 8];
    // SAFETY: eight words.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), x) };
    lanes
}

/// States 8·`part` to 8·`part` + 7.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn load_states(states: &[u32; 32], part: usize) -> __m256i {
    let eight = &states[8 * part..][..8];
    // SAFETY: eight words.
    unsafe { _mm256_loadu_si256(eight.as_ptr().cast()) }
}

/// Elements 8·`part` to 8·`part` + 7 of `x`, zeros behind its end.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn load(x: &[f32], part: usize) -> __m256 {
    let rest = &x[(8 * part).min(x.len())..];
    match rest.first_chunk::<8>() {
        // SAFETY: eight elements.
        Some(eight) => unsafe { _mm256_loadu_ps(eight.as_ptr()) },
        None => {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(rest.len() as i32), lanes);
            // SAFETY: the mask leaves out what lies behind the elements.
            unsafe { _mm256_maskload_ps(rest.as_ptr(), mask) }
        }
    }
}

/// See [`quantise_row`](super::quantised::quantise_row).
#[target_feature(enable = "avx2,fma")]
pub(super) fn row<const STOCHASTIC: bool>(bytes: &mut [u8], x: &[f32], seed: u32) -> (f32, i32) {
    let mut maxima = [_mm256_setzero_si256(); 4];
    for x in x.chunks(32) {
        for (part, maximum) in maxima.iter_mut().enumerate() {
            *maximum = _mm256_max_epu32(*maximum, magnitude_bits(load(x, part)));
        }
    }
    let maximum = _mm256_max_epu32(_mm256_max_epu32(maxima[0], maxima[1]), _mm256_max_epu32(maxima[2], maxima[3]));
    let largest = lanes(maximum).iter().fold(0, |a, &b| a.max(b as u32));
    let (scale, inverse) = scale_of(largest, STOCHASTIC);
    let inverse = _mm256_set1_ps(inverse);
    let mut states = [_mm256_setzero_si256(); 4];
    if STOCHASTIC {
        let all = streams(seed ^ largest);
        for part in 0..4 {
            states[part] = load_states(&all, part);
        }
    }
    // Packing leaves four bytes of each register in each half; this brings them into order.
    let in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let mut sums = [_mm256_setzero_si256(); 4];
    let (bytes, behind) = bytes.split_at_mut(x.len());
    for (bytes, x) in bytes.chunks_mut(32).zip(x.chunks(32)) {
        let mut q = [_mm256_setzero_si256(); 4];
        for part in 0..4 {
            // Noise alone, behind the end, is rounded to zero.
            q[part] = rounded::<STOCHASTIC>(load(x, part), inverse, &mut states[part]);
            sums[part] = _mm256_add_epi32(sums[part], q[part]);
        }
        let packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        let packed = _mm256_permutevar8x32_epi32(packed, in_order);
        match <&mut [u8; 32]>::try_from(&mut *bytes) {
            // SAFETY: 32 bytes.
            Ok(bytes) => unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), packed) },
            Err(_) => bytes.copy_from_slice(&bytemuck::cast_slice(&lanes(packed))[..bytes.len()]),
        }
    }
    behind.fill(0);
    let sum = _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3]));
    // Where a value is no number neither is the scale, and the sum, which may be too large, is not looked at.
    (scale, lanes(sum).iter().fold(0, |sum, &lane| sum.wrapping_add(lane)))
}

/// See [`quantise_columns`](super::quantised::quantise_columns): `width` columns of `data`, and zeros for the others.
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx2,fma")]
pub(super) fn columns<const W: usize, const STOCHASTIC: bool>(
    words: &mut [u32],
    scales: &mut [f32],
    sums: &mut [i32],
    data: &[f32],
    (stride, width): (usize, usize),
    length: usize,
    seed: u32,
) {
    const { assert!(W == ROWS || W == COLS) };
    let row = |l: usize| &data[l * stride..][..width];
    let registers = W.div_ceil(8);
    let mut maxima = [_mm256_setzero_si256(); 4];
    for l in 0..length {
        for part in 0..registers {
            maxima[part] = _mm256_max_epu32(maxima[part], magnitude_bits(load(row(l), part)));
        }
    }
    let (mut largest, mut inverses) = ([0u32; 32], [0.0f32; 32]);
    for part in 0..4 {
        largest[8 * part..][..8].copy_from_slice(&bytemuck::cast::<_, [u32; 8]>(lanes(maxima[part])));
    }
    for j in 0..W {
        (scales[j], inverses[j]) = scale_of(largest[j], STOCHASTIC);
    }
    let all_states = if STOCHASTIC { streams(largest[..W].iter().fold(seed, |a, &b| a.rotate_left(5) ^ b)) } else { [0; 32] };
    // As many registers of columns at once as there is room for beside what each needs: with a generator two, without one four.
    let at_once = registers.min(if STOCHASTIC { 2 } else { 4 });
    for first in (0..registers).step_by(at_once) {
        let (mut factors, mut states, mut totals) = ([_mm256_setzero_ps(); 4], [_mm256_setzero_si256(); 4], [_mm256_setzero_si256(); 4]);
        for i in 0..at_once {
            (factors[i], states[i]) = (load(&inverses, first + i), load_states(&all_states, first + i));
        }
        for (group, words) in words.chunks_exact_mut(W).enumerate() {
            let mut packed = [_mm256_setzero_si256(); 4];
            for byte in 0..(length - group * 4).min(4) {
                let row = row(group * 4 + byte);
                let place = _mm_cvtsi32_si128(8 * byte as i32);
                for i in 0..at_once {
                    let q = rounded::<STOCHASTIC>(load(row, first + i), factors[i], &mut states[i]);
                    totals[i] = _mm256_add_epi32(totals[i], q);
                    let q = _mm256_sll_epi32(_mm256_and_si256(q, _mm256_set1_epi32(0xff)), place);
                    packed[i] = _mm256_or_si256(packed[i], q);
                }
            }
            for i in 0..at_once {
                let words = &mut words[8 * (first + i)..];
                // SAFETY: eight words, or four.
                unsafe {
                    if let Some(eight) = words.first_chunk_mut::<8>() {
                        _mm256_storeu_si256(eight.as_mut_ptr().cast(), packed[i]);
                    } else if let Some(four) = words.first_chunk_mut::<4>() {
                        _mm_storeu_si128(four.as_mut_ptr().cast(), _mm256_castsi256_si128(packed[i]));
                    }
                }
            }
        }
        for i in 0..at_once {
            let from = 8 * (first + i);
            let sums = &mut sums[from..W.min(from + 8)];
            sums.copy_from_slice(&lanes(totals[i])[..sums.len()]);
        }
    }
}
