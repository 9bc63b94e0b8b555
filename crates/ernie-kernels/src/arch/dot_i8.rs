//! Sums of products of bytes, for inference: a few tokens times a few panels of weights.
//!
//! Weights stand in panels of [`PANEL`] rows: four bytes along k of each row in turn, so that one register holds a word of every row. They are kept
//! as q + 128, for the instructions multiply unsigned by signed bytes; what that adds (128 · Σ q_x) is taken off by the caller.
//! All sums are whole numbers below 2³¹ (for k < 2¹⁶), so every instruction set finds the same ones, whatever is computed beside them.
#![allow(unsafe_code)] // the instruction sets themselves: vector loads and stores through pointers
#![allow(clippy::needless_range_loop)] // indices name registers of a tile; iterators would hide which

use super::isa::{Isa, isa, simd_fn};

/// Rows of weights in a panel: the 32-bit lanes of AVX-512.
pub const PANEL: usize = 16;
/// Most tokens of a tile.
pub const TOKENS: usize = 12;
/// Most sums of a tile: 24 registers of AVX-512.
pub const SUMS: usize = 24 * PANEL;

/// Tokens of a tile: rows of signed bytes, `stride` apart, `words` words of four bytes each.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// All rows, the first one first.
    pub bytes: &'a [u8],
    /// Distance between rows.
    pub stride: usize,
    /// Number of rows, 1 to [`TOKENS`].
    pub count: usize,
}

/// How many panels a tile of so many tokens takes at once.
pub fn panels_at_once(tokens: usize) -> usize {
    match tokens {
        0..=3 => 8,
        4..=6 => 4,
        _ => 2,
    }
}

/// What is fetched into the caches while a tile is computed; a hint that instruction sets may ignore.
#[derive(Clone, Copy)]
pub enum Fetch<'a> {
    /// The tile's own weights, a little ahead of where it stands: nobody has read them yet.
    Own,
    /// The weights of a later tile, as many words as this one has: its own are there already.
    Later(&'a [u8]),
    /// Nothing.
    Nothing,
}

/// `sums[t, 16·p + r] = Σ q_x(t) · (q_w(16·p + r) + 128)` for `panels` panels, the rows of `sums` 16·`panels` long. `panels` is
/// [`panels_at_once`] or 1; `weights` holds the panels one behind the other, `words` words of k in each.
pub fn tile(sums: &mut [i32], x: Tokens<'_>, weights: &[u8], panels: usize, words: usize, fetch: Fetch<'_>) {
    let Tokens { bytes, stride, count } = x;
    assert!((1..=TOKENS).contains(&count) && (panels == 1 || panels == panels_at_once(count)), "a tile of {count} tokens, {panels} panels");
    assert!(bytes.len() >= (count - 1) * stride + words * 4, "tokens of the tile");
    assert!(weights.len() >= panels * words * 4 * PANEL && sums.len() >= count * panels * PANEL, "weights and sums of the tile");
    #[cfg(not(target_arch = "x86_64"))]
    let _ = fetch; // Only AVX-512 takes the hint.
    match level() {
        // SAFETY: `level` has found the features; the assertions keep every load and store inside.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Vnni => unsafe { avx512::tile(sums, x, weights, panels, words, fetch) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::AvxVnni => unsafe { avx_vnni::tile(sums, x, weights, panels, words) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::tile(sums, x, weights, panels, words) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Level::Dotprod => unsafe { neon::tile(sums, x, weights, panels, words) },
        Level::Portable => by_columns(sums, x, weights, panels, words),
    }
}

/// Instruction sets with a tile of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Dotprod,
    Portable,
}

#[cfg(target_arch = "x86_64")]
fn level() -> Level {
    // Each a load of a cached answer.
    match isa() {
        Isa::Avx512 if is_x86_feature_detected!("avx512vnni") => Level::Avx512Vnni,
        Isa::Avx512 | Isa::Avx2 if is_x86_feature_detected!("avxvnni") => Level::AvxVnni,
        Isa::Avx512 | Isa::Avx2 => Level::Avx2,
        Isa::Portable => Level::Portable,
    }
}

#[cfg(target_arch = "aarch64")]
fn level() -> Level {
    if isa() == Isa::Portable && std::arch::is_aarch64_feature_detected!("dotprod") { Level::Dotprod } else { Level::Portable }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn level() -> Level {
    let _: Isa = isa();
    Level::Portable
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Fetch, PANEL, Tokens};
    use std::arch::x86_64::*;

    /// Calls `run` for the shape of a tile.
    macro_rules! by_shape {
        ($arguments:tt, $count:expr, $panels:expr, [$(($t:literal, $p:literal)),*]) => {
            match ($count, $panels) {
                $(
                    ($t, $p) => by_shape!(@call $t, $p, $arguments),
                    ($t, 1) => by_shape!(@call $t, 1, $arguments),
                )*
                _ => unreachable!("asserted by the caller"),
            }
        };
        (@call $t:literal, $p:literal, ($($argument:expr),*)) => { run::<$t, $p>($($argument),*) };
    }

    /// # Safety
    /// The features; sizes as [`super::tile`] asserts them.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")]
    pub unsafe fn tile(sums: &mut [i32], x: Tokens<'_>, weights: &[u8], panels: usize, words: usize, fetch: Fetch<'_>) {
        // SAFETY: by the caller.
        unsafe {
            by_shape!(
                (sums, x, weights, words, fetch),
                x.count,
                panels,
                [(1, 8), (2, 8), (3, 8), (4, 4), (5, 4), (6, 4), (7, 2), (8, 2), (9, 2), (10, 2), (11, 2), (12, 2)]
            );
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")]
    unsafe fn run<const T: usize, const P: usize>(out: &mut [i32], x: Tokens<'_>, weights: &[u8], words: usize, fetch: Fetch<'_>) {
        let mut sums = [[_mm512_setzero_si512(); P]; T];
        let panel = words * 4 * PANEL;
        let (mut w, mut q) = (weights.as_ptr(), x.bytes.as_ptr());
        // Each word fetches a line of every panel of its own, or one line of a later panel.
        let (mut far, lines) = match fetch {
            // The processor itself reads four streams and more ahead of time, and is slower if told to; of two it reads too little ahead.
            Fetch::Own if P == 2 => (w.wrapping_add(P * panel), P),
            Fetch::Own => (w, 0),
            Fetch::Later(later) => (later.as_ptr(), 1),
            Fetch::Nothing => (w, 0),
        };
        for _ in 0..words {
            // SAFETY: word l of P panels and of T rows, all inside by the caller; a prefetch touches nothing the program can see.
            unsafe {
                let mut ws = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    ws[p] = _mm512_loadu_si512(w.add(p * panel).cast());
                }
                if lines == 1 {
                    _mm_prefetch::<_MM_HINT_T1>(far.cast());
                } else if lines == P {
                    for p in 0..P {
                        _mm_prefetch::<_MM_HINT_T0>(far.wrapping_add(p * panel).cast());
                    }
                }
                for t in 0..T {
                    let x = _mm512_set1_epi32(q.add(t * x.stride).cast::<i32>().read_unaligned());
                    for p in 0..P {
                        sums[t][p] = _mm512_dpbusd_epi32(sums[t][p], ws[p], x);
                    }
                }
                w = w.add(4 * PANEL);
                q = q.add(4);
                far = far.wrapping_add(4 * PANEL);
            }
        }
        for t in 0..T {
            for p in 0..P {
                // SAFETY: T·P·16 sums fit `out` by the caller.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().add((t * P + p) * PANEL).cast(), sums[t][p]) };
            }
        }
    }
}

/// The tile for 256-bit registers: each panel is two of them.
#[cfg(target_arch = "x86_64")]
mod avx_vnni {
    use super::{PANEL, Tokens};
    use std::arch::x86_64::*;

    /// # Safety
    /// The features; sizes as [`super::tile`] asserts them.
    #[target_feature(enable = "avx2,fma,avxvnni")]
    pub unsafe fn tile(sums: &mut [i32], x: Tokens<'_>, weights: &[u8], panels: usize, words: usize) {
        // Sixteen registers: tiles of up to four tokens, one panel at a time.
        let width = panels * PANEL;
        for panel in 0..panels {
            for first in (0..x.count).step_by(4) {
                let count = (x.count - first).min(4);
                let part = Tokens { bytes: &x.bytes[first * x.stride..], stride: x.stride, count };
                let (out, weights) = (&mut sums[first * width + panel * PANEL..], &weights[panel * words * 4 * PANEL..]);
                // SAFETY: by the caller, for this part.
                unsafe {
                    match count {
                        1 => run::<1>(out, width, part, weights, words),
                        2 => run::<2>(out, width, part, weights, words),
                        3 => run::<3>(out, width, part, weights, words),
                        _ => run::<4>(out, width, part, weights, words),
                    }
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,avxvnni")]
    unsafe fn run<const T: usize>(out: &mut [i32], width: usize, x: Tokens<'_>, weights: &[u8], words: usize) {
        let mut sums = [[_mm256_setzero_si256(); 2]; T];
        for l in 0..words {
            // SAFETY: word l of the panel and of T rows.
            unsafe {
                let w = weights.as_ptr().add(l * 4 * PANEL);
                let ws = [_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(32).cast())];
                for t in 0..T {
                    let x = _mm256_set1_epi32(x.bytes.as_ptr().add(t * x.stride + 4 * l).cast::<i32>().read_unaligned());
                    for half in 0..2 {
                        sums[t][half] = _mm256_dpbusd_avx_epi32(sums[t][half], ws[half], x);
                    }
                }
            }
        }
        for t in 0..T {
            for half in 0..2 {
                // SAFETY: rows of `out` are `width` apart and hold a panel each, by the caller.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().add(t * width + half * 8).cast(), sums[t][half]) };
            }
        }
    }
}

/// Tokens are widened to 16 bits, once for all panels.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::super::byte_pairs::{self, HEIGHT, widen};
    use super::{PANEL, TOKENS, Tokens};
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    /// Words of tokens that are widened at a time: 12 KiB. Few tokens have long pieces, for weights that come from memory are best read in long pieces.
    const WIDENED: usize = 128 * TOKENS;

    /// # Safety
    /// The features; sizes as [`super::tile`] asserts them.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn tile(sums: &mut [i32], x: Tokens<'_>, weights: &[u8], panels: usize, words: usize) {
        let width = panels * PANEL;
        let height = x.count.div_ceil(x.count.div_ceil(HEIGHT));
        let piece = WIDENED / x.count;
        let mut pairs = [[const { MaybeUninit::<i32>::uninit() }; WIDENED]; 2];
        // Once, too, where there are no words, for the sums are written then.
        for from in (0..words.max(1)).step_by(piece) {
            let n = piece.min(words - from);
            for t in 0..x.count {
                let [even, odd] = &mut pairs;
                let halves = [&mut even[t * piece..][..n], &mut odd[t * piece..][..n]];
                // SAFETY: words from..from + n of row t.
                unsafe { widen(halves, x.bytes.as_ptr().add(t * x.stride + 4 * from), n) };
            }
            for panel in 0..panels {
                for first in (0..x.count).step_by(height) {
                    let count = (x.count - first).min(height);
                    let out = &mut sums[first * width + panel * PANEL..];
                    // SAFETY: word `from` of the panel; and the rows from `first` on, whose n words have just been written.
                    unsafe {
                        let w = weights.as_ptr().add((panel * words + from) * 4 * PANEL);
                        let pairs = [pairs[0].as_ptr().add(first * piece).cast::<i32>(), pairs[1].as_ptr().add(first * piece).cast()];
                        match count {
                            1 => run::<1>(out, width, pairs, piece, w, n, from > 0),
                            2 => run::<2>(out, width, pairs, piece, w, n, from > 0),
                            3 => run::<3>(out, width, pairs, piece, w, n, from > 0),
                            _ => run::<HEIGHT>(out, width, pairs, piece, w, n, from > 0),
                        }
                    }
                }
            }
        }
    }

    /// Sums over `n` words of one panel and `T` tokens, added to those of `out` if `more`.
    ///
    /// # Safety
    /// The features; `n` words of the panel at `w`, and of each token, `piece` apart, in both of `pairs`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run<const T: usize>(out: &mut [i32], width: usize, pairs: [*const i32; 2], piece: usize, w: *const u8, n: usize, more: bool) {
        // SAFETY: by the caller.
        let sums: [[__m256i; 2]; T] = unsafe { byte_pairs::sums(pairs, (piece, 1), w, 4 * PANEL, n) };
        for t in 0..T {
            let out = &mut out[t * width..][..PANEL];
            for half in 0..2 {
                // SAFETY: a panel's sixteen sums.
                unsafe {
                    let place = out.as_mut_ptr().add(8 * half).cast();
                    let sum = if more { _mm256_add_epi32(sums[t][half], _mm256_loadu_si256(place)) } else { sums[t][half] };
                    _mm256_storeu_si256(place, sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::{PANEL, Tokens};
    use std::arch::aarch64::*;

    /// # Safety
    /// The features; sizes as [`super::tile`] asserts them.
    #[target_feature(enable = "neon,dotprod")]
    pub unsafe fn tile(sums: &mut [i32], x: Tokens<'_>, weights: &[u8], panels: usize, words: usize) {
        let width = panels * PANEL;
        for panel in 0..panels {
            for first in (0..x.count).step_by(4) {
                let count = (x.count - first).min(4);
                let part = Tokens { bytes: &x.bytes[first * x.stride..], stride: x.stride, count };
                let (out, weights) = (&mut sums[first * width + panel * PANEL..], &weights[panel * words * 4 * PANEL..]);
                // SAFETY: by the caller, for this part.
                unsafe {
                    match count {
                        1 => run::<1>(out, width, part, weights, words),
                        2 => run::<2>(out, width, part, weights, words),
                        3 => run::<3>(out, width, part, weights, words),
                        _ => run::<4>(out, width, part, weights, words),
                    }
                }
            }
        }
    }

    /// Signed products of w − 128, plus 128 · Σ x to make them those of w: the sums that every other instruction set finds.
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn run<const T: usize>(out: &mut [i32], width: usize, x: Tokens<'_>, weights: &[u8], words: usize) {
        let mut sums = [[vdupq_n_s32(0); 4]; T];
        let mut totals = [vdupq_n_s32(0); T];
        let (flip, ones) = (vdupq_n_u8(0x80), vdupq_n_s8(1));
        for l in 0..words {
            // SAFETY: word l of the panel and of T rows.
            unsafe {
                let w = weights.as_ptr().add(l * 4 * PANEL);
                let mut ws = [vdupq_n_s8(0); 4];
                for quarter in 0..4 {
                    ws[quarter] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w.add(16 * quarter)), flip));
                }
                for t in 0..T {
                    let word = x.bytes.as_ptr().add(t * x.stride + 4 * l).cast::<i32>().read_unaligned();
                    let x = vreinterpretq_s8_s32(vdupq_n_s32(word));
                    totals[t] = sdot(totals[t], ones, x);
                    for quarter in 0..4 {
                        sums[t][quarter] = sdot(sums[t][quarter], ws[quarter], x);
                    }
                }
            }
        }
        for t in 0..T {
            let excess = vshlq_n_s32::<7>(totals[t]);
            for quarter in 0..4 {
                // SAFETY: rows of `out` are `width` apart and hold a panel each, by the caller.
                unsafe { vst1q_s32(out.as_mut_ptr().add(t * width + 4 * quarter), vaddq_s32(sums[t][quarter], excess)) };
            }
        }
    }

    /// The intrinsic for this instruction is not stable.
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: an instruction on registers alone, of a feature this function has.
        unsafe {
            std::arch::asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sums, in(vreg) a, in(vreg) b, options(pure, nomem, nostack));
        }
        sums
    }
}

/// The tile by plain loops, one token and one panel at a time.
fn by_columns(sums: &mut [i32], x: Tokens<'_>, weights: &[u8], panels: usize, words: usize) {
    for t in 0..x.count {
        for panel in 0..panels {
            let out = &mut sums[(t * panels + panel) * PANEL..][..PANEL];
            let out: &mut [i32; PANEL] = out.try_into().expect("a panel of sums");
            column(out, &x.bytes[t * x.stride..][..4 * words], &weights[panel * words * 4 * PANEL..][..words * 4 * PANEL]);
        }
    }
}

simd_fn! {
    fn column<FMA>(sums: &mut [i32; PANEL], x: &[u8], weights: &[u8]) {
        let mut lanes = [0i32; PANEL];
        for (x, w) in x.chunks_exact(4).zip(weights.chunks_exact(4 * PANEL)) {
            for lane in 0..PANEL {
                for byte in 0..4 {
                    lanes[lane] += i32::from(x[byte] as i8) * i32::from(w[4 * lane + byte]);
                }
            }
        }
        *sums = lanes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// Every tile of every instruction set that this processor has, against loops over numbers.
    #[test]
    fn every_shape_and_level_finds_the_same_sums() {
        let mut random = Random::new(41);
        for count in 1..=TOKENS {
            for panels in [1, panels_at_once(count)] {
                for words in [1, 3, 64, 257] {
                    let stride = words * 4 + 12;
                    let bytes: Vec<u8> = (0..count * stride).map(|_| (random.below(255) as u8).wrapping_sub(127)).collect();
                    let weights: Vec<u8> = (0..panels * words * 4 * PANEL).map(|_| random.below(256) as u8).collect();
                    let x = Tokens { bytes: &bytes, stride, count };
                    let mut expected = vec![0i32; count * panels * PANEL];
                    for (place, sum) in expected.iter_mut().enumerate() {
                        let (t, column) = (place / (panels * PANEL), place % (panels * PANEL));
                        for l in 0..4 * words {
                            let w = weights[(column / PANEL * words + l / 4) * 4 * PANEL + column % PANEL * 4 + l % 4];
                            *sum += i32::from(bytes[t * stride + l] as i8) * i32::from(w);
                        }
                    }
                    let mut sums = vec![-1; expected.len()];
                    for fetch in [Fetch::Own, Fetch::Later(&weights), Fetch::Nothing] {
                        sums.fill(-1);
                        tile(&mut sums, x, &weights, panels, words, fetch);
                        assert_eq!(sums, expected, "{:?}, {count} tokens, {panels} panels, {words} words", level());
                    }
                    by_columns(&mut sums, x, &weights, panels, words);
                    assert_eq!(sums, expected, "portable");
                    #[cfg(target_arch = "x86_64")]
                    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                        sums.fill(-1);
                        // SAFETY: asked for, and the sizes are those that `tile` asserts.
                        unsafe { avx2::tile(&mut sums, x, &weights, panels, words) };
                        assert_eq!(sums, expected, "AVX2");
                    }
                    #[cfg(target_arch = "x86_64")]
                    if is_x86_feature_detected!("avxvnni") {
                        sums.fill(-1);
                        // SAFETY: as above.
                        unsafe { avx_vnni::tile(&mut sums, x, &weights, panels, words) };
                        assert_eq!(sums, expected, "AVX-VNNI");
                    }
                }
            }
        }
    }
}
