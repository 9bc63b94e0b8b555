//! Sums of products of 4-bit weights and bytes, for inference: a few tokens times a few panels of weights.
//!
//! Weights stand in panels of [`PANEL`] rows like those of [`super::dot_i8`], but a byte holds two of them, each as q + 8: in every eight bytes' worth of a
//! row, the low halves are elements 0 to 3, the high halves 4 to 7. Each group of elements along k has a scale of its own, in bf16: within a group the
//! sum is a whole number, and groups are added up in f32, in order, whatever is computed beside them.
#![allow(unsafe_code)] // the instruction set itself: vector loads and stores through pointers
#![allow(clippy::needless_range_loop)] // indices name registers of a tile; iterators would hide which

use super::dot_i8::{self, Fetch, PANEL, TOKENS, Tokens};
#[cfg(target_arch = "x86_64")]
use super::isa::{Isa, isa};
use super::isa::{mul_add, simd_fn};

/// Largest group of elements that share a scale.
pub const MAX_GROUP: usize = 128;

/// Panels of weights, one behind the other.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    /// `[panels, k / 8, 64]`.
    pub bytes: &'a [u8],
    /// Bits of bf16 values, `[panels, k / group, 16]`.
    pub scales: &'a [u16],
    /// Elements that share a scale: a multiple of 8, at most [`MAX_GROUP`].
    pub group: usize,
    /// Groups in a row.
    pub groups: usize,
}

/// How many panels a tile of so many tokens takes at once.
pub fn panels_at_once(tokens: usize) -> usize {
    match tokens {
        0..=2 => 4,
        3..=6 => 2,
        _ => 1,
    }
}

/// `sums[t, 16·p + r] = Σ_g scale(g) · Σ_{k in g} q_x(t) · q_w(16·p + r)` for `panels` panels, the rows of `sums` 16·`panels` long. `panels` is
/// [`panels_at_once`] or 1. `totals[t, g]` is −8 · Σ q_x over a group, what takes off the 8 that weights are kept with.
pub fn tile(sums: &mut [f32], x: Tokens<'_>, totals: &[i32], w: Panels<'_>, panels: usize) {
    let Tokens { bytes, stride, count } = x;
    let (group, groups) = (w.group, w.groups);
    assert!((1..=TOKENS).contains(&count) && (panels == 1 || panels == panels_at_once(count)), "a tile of {count} tokens, {panels} panels");
    assert!(group > 0 && group.is_multiple_of(8) && group <= MAX_GROUP, "groups of {group} elements");
    assert!(bytes.len() >= (count - 1) * stride + groups * group && totals.len() >= count * groups, "tokens of the tile");
    assert!(w.bytes.len() >= panels * groups * group / 2 * PANEL && w.scales.len() >= panels * groups * PANEL, "weights of the tile");
    assert!(sums.len() >= count * panels * PANEL, "sums of the tile");
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the features are there; the assertions keep every load and store inside.
        return unsafe { avx512::tile(sums, x, totals, w, panels) };
    }
    by_groups(sums, x, totals, w, panels);
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{PANEL, Panels, Tokens};
    use std::arch::x86_64::*;

    /// # Safety
    /// The features; sizes as [`super::tile`] asserts them.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")]
    pub unsafe fn tile(sums: &mut [f32], x: Tokens<'_>, totals: &[i32], w: Panels<'_>, panels: usize) {
        macro_rules! by_shape {
            ($(($t:literal, $p:literal)),*) => {
                match (x.count, panels) {
                    // SAFETY: by the caller.
                    $(($t, $p) => unsafe { run::<$t, $p>(sums, x, totals, w) },)*
                    _ => unreachable!("asserted by the caller"),
                }
            };
        }
        by_shape!(
            (1, 4),
            (2, 4),
            (3, 2),
            (4, 2),
            (5, 2),
            (6, 2),
            (1, 1),
            (2, 1),
            (3, 1),
            (4, 1),
            (5, 1),
            (6, 1),
            (7, 1),
            (8, 1),
            (9, 1),
            (10, 1),
            (11, 1),
            (12, 1)
        );
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")]
    unsafe fn run<const T: usize, const P: usize>(out: &mut [f32], x: Tokens<'_>, totals: &[i32], weights: Panels<'_>) {
        let mut sums = [[_mm512_setzero_ps(); P]; T];
        let low_half = _mm512_set1_epi8(0x0f);
        let (pairs, groups) = (weights.group / 8, weights.groups);
        let (panel, scale_panel) = (groups * pairs * 4 * PANEL, groups * PANEL);
        let (mut w, mut q, mut scales) = (weights.bytes.as_ptr(), x.bytes.as_ptr(), weights.scales.as_ptr());
        for group in 0..groups {
            // SAFETY: group `group` of P panels and of T rows, all inside by the caller.
            unsafe {
                let mut whole = [[_mm512_setzero_si512(); P]; T];
                for t in 0..T {
                    let total = _mm512_set1_epi32(*totals.as_ptr().add(t * groups + group));
                    for p in 0..P {
                        whole[t][p] = total;
                    }
                }
                for _ in 0..pairs {
                    let mut low = [_mm512_setzero_si512(); P];
                    let mut high = [_mm512_setzero_si512(); P];
                    for p in 0..P {
                        let both = _mm512_loadu_si512(w.add(p * panel).cast());
                        low[p] = _mm512_and_si512(both, low_half);
                        high[p] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low_half);
                    }
                    for t in 0..T {
                        let words = q.add(t * x.stride).cast::<i32>();
                        let first = _mm512_set1_epi32(words.read_unaligned());
                        for p in 0..P {
                            whole[t][p] = _mm512_dpbusd_epi32(whole[t][p], low[p], first);
                        }
                        let second = _mm512_set1_epi32(words.add(1).read_unaligned());
                        for p in 0..P {
                            whole[t][p] = _mm512_dpbusd_epi32(whole[t][p], high[p], second);
                        }
                    }
                    w = w.add(4 * PANEL);
                    q = q.add(8);
                }
                for p in 0..P {
                    let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(scales.add(p * scale_panel).cast()));
                    let scale = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits));
                    for t in 0..T {
                        sums[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[t][p]), scale, sums[t][p]);
                    }
                }
                scales = scales.add(PANEL);
            }
        }
        for t in 0..T {
            for p in 0..P {
                // SAFETY: T·P·16 sums fit `out` by the caller.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr().add((t * P + p) * PANEL), sums[t][p]) };
            }
        }
    }
}

/// The tile on the products of bytes: each group of a panel is taken apart, which is little beside multiplying it.
fn by_groups(sums: &mut [f32], x: Tokens<'_>, totals: &[i32], w: Panels<'_>, panels: usize) {
    let mut apart = [0u8; MAX_GROUP * PANEL];
    let mut whole = [0i32; TOKENS * PANEL];
    let bytes = w.group / 2 * PANEL;
    sums[..x.count * panels * PANEL].fill(0.0);
    for panel in 0..panels {
        for group in 0..w.groups {
            let place = panel * w.groups + group;
            let apart = &mut apart[..2 * bytes];
            take_apart(apart, &w.bytes[place * bytes..][..bytes]);
            let tokens = Tokens { bytes: &x.bytes[group * w.group..], ..x };
            dot_i8::tile(&mut whole, tokens, apart, 1, w.group / 4, Fetch::Nothing);
            let scales: &[u16; PANEL] = w.scales[place * PANEL..].first_chunk().expect("a panel of scales");
            for t in 0..x.count {
                let whole: &[i32; PANEL] = whole[t * PANEL..].first_chunk().expect("a panel of sums");
                let sums: &mut [f32; PANEL] = sums[(t * panels + panel) * PANEL..].first_chunk_mut().expect("a panel of sums");
                add_scaled(sums, whole, totals[t * w.groups + group], scales);
            }
        }
    }
}

simd_fn! {
    /// Pairs of words from the halves of bytes.
    fn take_apart<FMA>(apart: &mut [u8], halves: &[u8]) {
        for (apart, halves) in apart.chunks_exact_mut(8 * PANEL).zip(halves.chunks_exact(4 * PANEL)) {
            for i in 0..4 * PANEL {
                apart[i] = halves[i] & 0x0f;
                apart[4 * PANEL + i] = halves[i] >> 4;
            }
        }
    }
}

simd_fn! {
    fn add_scaled<FMA>(sums: &mut [f32; PANEL], whole: &[i32; PANEL], total: i32, scales: &[u16; PANEL]) {
        for i in 0..PANEL {
            sums[i] = mul_add::<FMA>((whole[i] + total) as f32, f32::from_bits(u32::from(scales[i]) << 16), sums[i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn every_shape_finds_what_plain_loops_find() {
        let mut random = Random::new(43);
        for count in 1..=TOKENS {
            for panels in [1, panels_at_once(count)] {
                for (group, groups) in [(8, 3), (32, 1), (32, 7), (64, 2), (128, 3)] {
                    let k = group * groups;
                    let stride = k + 12;
                    let bytes: Vec<u8> = (0..count * stride).map(|_| (random.below(255) as u8).wrapping_sub(127)).collect();
                    let weights: Vec<u8> = (0..panels * k / 2 * PANEL).map(|_| random.below(256) as u8).collect();
                    let scales: Vec<u16> = (0..panels * groups * PANEL).map(|_| 0x3c00 + random.below(256) as u16).collect();
                    let x_at = |t: usize, i: usize| i32::from(bytes[t * stride + i] as i8);
                    let totals: Vec<i32> = (0..count * groups)
                        .map(|place| -8 * (0..group).map(|i| x_at(place / groups, place % groups * group + i)).sum::<i32>())
                        .collect();
                    let w_at = |row: usize, i: usize| {
                        let byte = weights[((row / PANEL * k + i) / 8 * PANEL + row % PANEL) * 4 + i % 4];
                        i32::from(if i % 8 < 4 { byte & 15 } else { byte >> 4 }) - 8
                    };
                    let mut expected = vec![0.0f64; count * panels * PANEL];
                    for (place, sum) in expected.iter_mut().enumerate() {
                        let (t, row) = (place / (panels * PANEL), place % (panels * PANEL));
                        for g in 0..groups {
                            let whole: i32 = (g * group..(g + 1) * group).map(|i| x_at(t, i) * w_at(row, i)).sum();
                            let scale = scales[(row / PANEL * groups + g) * PANEL + row % PANEL];
                            *sum += f64::from(whole) * f64::from(f32::from_bits(u32::from(scale) << 16));
                        }
                    }
                    let w = Panels { bytes: &weights, scales: &scales, group, groups };
                    let x = Tokens { bytes: &bytes, stride, count };
                    let (mut fast, mut plain) = (vec![-1.0; expected.len()], vec![-1.0; expected.len()]);
                    tile(&mut fast, x, &totals, w, panels);
                    by_groups(&mut plain, x, &totals, w, panels);
                    for ((&fast, &plain), expected) in fast.iter().zip(&plain).zip(&expected) {
                        let tolerance = 1e-6 * 127.0 * 8.0 * 0.01 * k as f64;
                        assert!(
                            (f64::from(fast) - expected).abs() < tolerance,
                            "{count} tokens, {panels} panels, {group}: {fast} for {expected}"
                        );
                        assert_eq!(fast, plain, "both in the same order");
                    }
                }
            }
        }
    }
}
