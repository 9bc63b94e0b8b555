//! bf16 to f32 and back, where pairs of elements stand in words.
#![allow(unsafe_code)] // vector loads and stores through pointers: left to itself the compiler gathers and scatters here

use super::isa::simd_fn;
#[cfg(target_arch = "x86_64")]
use super::isa::{Isa, isa};
use super::tile::COLS;

/// Widens rows of [`COLS`] words of two bf16: the lower halves of a row become one row of elements, the upper halves the row after it.
///
/// # Panics
/// If there are not whole rows of words, or `out` has not two elements for each.
pub fn widen_pairs(out: &mut [f32], words: &[u32]) {
    assert!(words.len().is_multiple_of(COLS) && out.len() == 2 * words.len(), "{} words into {} elements", words.len(), out.len());
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        // SAFETY: `isa` has found AVX-512, and the lengths are as asserted.
        return unsafe { avx512(out, words) };
    }
    for (out, words) in out.chunks_exact_mut(2 * COLS).zip(words.chunks_exact(COLS)) {
        let (low, high) = out.split_at_mut(COLS);
        for ((low, high), word) in low.iter_mut().zip(high).zip(words) {
            *low = f32::from_bits(word << 16);
            *high = f32::from_bits(word & 0xffff_0000);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn avx512(out: &mut [f32], words: &[u32]) {
    use std::arch::x86_64::*;
    let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    for index in (0..words.len()).step_by(COLS) {
        for half in [0, COLS / 2] {
            // SAFETY: words index..index+32 and elements 2·index..2·index+64 exist.
            unsafe {
                let pair = _mm512_loadu_si512(words.as_ptr().add(index + half).cast());
                let out = out.as_mut_ptr().add(2 * index + half);
                _mm512_storeu_si512(out.cast(), _mm512_slli_epi32::<16>(pair));
                _mm512_storeu_si512(out.add(COLS).cast(), _mm512_and_si512(pair, high));
            }
        }
    }
}

simd_fn! {
    /// Words of two bf16 from neighbours, rounded to nearest even; the first in the lower half.
    ///
    /// # Panics
    /// If `out` has not a word for each two elements.
    pub fn narrow_pairs<FMA>(out: &mut [u32], x: &[f32]) {
        assert!(x.len() == 2 * out.len(), "{} elements into {} words", x.len(), out.len());
        for (word, pair) in out.iter_mut().zip(x.as_chunks::<2>().0) {
            *word = round(pair[0]) | round(pair[1]) << 16;
        }
    }
}

/// The bits of the nearest bf16. What is no number stays none.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn both_halves_of_every_word_find_their_places() {
        let values: Vec<f32> = (0..192).map(|i| bf16::from_f32(i as f32 * 1.7 - 40.0).to_f32()).collect();
        let words: Vec<u32> = (0..96)
            .map(|word| {
                let at = |half: usize| u32::from(bf16::from_f32(values[word / 32 * 64 + half * 32 + word % 32]).to_bits());
                at(0) | at(1) << 16
            })
            .collect();
        let mut out = vec![0.0; 192];
        widen_pairs(&mut out, &words);
        assert_eq!(out, values);
    }

    #[test]
    fn pairs_are_rounded_to_nearest_even() {
        let mut x: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.731).sin() * 10f32.powi(i % 60 - 30)).collect();
        x.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE / 4.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
        let mut words = vec![0; x.len() / 2];
        narrow_pairs(&mut words, &x);
        for (pair, word) in x.chunks(2).zip(&words) {
            let expected = |x: f32| u32::from(bf16::from_f32(x).to_bits());
            assert_eq!(*word, expected(pair[0]) | expected(pair[1]) << 16, "{pair:?}");
        }
        narrow_pairs(&mut words[..1], &[f32::NAN, f32::from_bits(u32::MAX)]);
        assert!(bf16::from_bits(words[0] as u16).is_nan() && bf16::from_bits((words[0] >> 16) as u16).is_nan());
    }
}
