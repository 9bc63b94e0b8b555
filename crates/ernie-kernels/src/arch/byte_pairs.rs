//! Sums of products of bytes by AVX2, which multiplies no bytes without losing some: they are widened to pairs of 16 bits, whose products cannot overflow.
//! Bytes 0 and 2 of a word make one pair, bytes 1 and 3 the other: a mask and a shift, and nothing changes places.
#![allow(unsafe_code)] // the instruction set itself: vector loads and stores through pointers
#![allow(clippy::needless_range_loop)] // indices name registers of a tile; iterators would hide which

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Rows at once: of sixteen registers eight are for sums and four for the other operand, each word of which is in use twice.
pub(super) const HEIGHT: usize = 4;

/// Both pairs of `n` words of signed bytes, each to its half.
///
/// # Safety
/// The features; `n` words at `x`.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn widen([even, odd]: [&mut [MaybeUninit<i32>]; 2], x: *const u8, n: usize) {
    assert!(even.len() >= n && odd.len() >= n);
    let whole = n - n % 8;
    for l in (0..whole).step_by(8) {
        // SAFETY: words l..l + 8 of n.
        unsafe {
            let x = _mm256_loadu_si256(x.add(4 * l).cast());
            _mm256_storeu_si256(even.as_mut_ptr().add(l).cast(), _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)));
            _mm256_storeu_si256(odd.as_mut_ptr().add(l).cast(), _mm256_srai_epi16::<8>(x));
        }
    }
    for l in whole..n {
        // SAFETY: word l < n.
        let [b0, b1, b2, b3] = unsafe { x.add(4 * l).cast::<[i8; 4]>().read() }.map(i32::from);
        even[l].write((b0 & 0xffff) | (b2 << 16));
        odd[l].write((b1 & 0xffff) | (b3 << 16));
    }
}

/// Sums over `n` words of `T` widened rows times sixteen columns of unsigned bytes. Word l of row i is `pairs[_][i * row + l * word]`, and of the columns the
/// sixteen words at `w + l * step`.
///
/// # Safety
/// The features; all of these words must be there.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn sums<const T: usize>(
    pairs: [*const i32; 2],
    (row, word): (usize, usize),
    w: *const u8,
    step: usize,
    n: usize,
) -> [[__m256i; 2]; T] {
    let mut sums = [[_mm256_setzero_si256(); 2]; T];
    let even = _mm256_set1_epi16(0xff);
    for l in 0..n {
        // SAFETY: by the caller.
        unsafe {
            let w = w.add(l * step);
            let (w0, w1) = (_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(32).cast()));
            let halves =
                [[_mm256_and_si256(w0, even), _mm256_and_si256(w1, even)], [_mm256_srli_epi16::<8>(w0), _mm256_srli_epi16::<8>(w1)]];
            for half in 0..2 {
                for i in 0..T {
                    let x = _mm256_set1_epi32(*pairs[half].add(i * row + l * word));
                    sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(x, halves[half][0]));
                    sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(x, halves[half][1]));
                }
            }
        }
    }
    sums
}
