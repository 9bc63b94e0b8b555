//! bf16 to f32, where the order of elements is chosen for it.
#![allow(unsafe_code)] // vector loads and stores through pointers: left to itself the compiler gathers and scatters here

#[cfg(target_arch = "x86_64")]
use super::isa::{Isa, isa};

/// Widens words of two bf16: of each sixteen words the lower halves become sixteen elements, the upper halves the sixteen after them.
///
/// # Panics
/// If there are not whole sixteens of words, or `out` has not two elements for each.
pub fn widen_pairs(out: &mut [f32], words: &[u32]) {
    assert!(words.len().is_multiple_of(16) && out.len() == 2 * words.len(), "{} words into {} elements", words.len(), out.len());
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        // SAFETY: `isa` has found AVX-512, and the lengths are as asserted.
        return unsafe { avx512(out, words) };
    }
    for (out, words) in out.chunks_exact_mut(32).zip(words.chunks_exact(16)) {
        let (low, high) = out.split_at_mut(16);
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
    for index in (0..words.len()).step_by(16) {
        // SAFETY: words index..index+16 and elements 2·index..2·index+32 exist.
        unsafe {
            let pair = _mm512_loadu_si512(words.as_ptr().add(index).cast());
            let out = out.as_mut_ptr().add(2 * index);
            _mm512_storeu_si512(out.cast(), _mm512_slli_epi32::<16>(pair));
            _mm512_storeu_si512(out.add(16).cast(), _mm512_and_si512(pair, high));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn both_halves_of_every_word_find_their_places() {
        let values: Vec<f32> = (0..96).map(|i| bf16::from_f32(i as f32 * 1.7 - 40.0).to_f32()).collect();
        let words: Vec<u32> = (0..48)
            .map(|word| {
                let at = |half: usize| u32::from(bf16::from_f32(values[word / 16 * 32 + half * 16 + word % 16]).to_bits());
                at(0) | at(1) << 16
            })
            .collect();
        let mut out = vec![0.0; 96];
        widen_pairs(&mut out, &words);
        assert_eq!(out, values);
    }
}
