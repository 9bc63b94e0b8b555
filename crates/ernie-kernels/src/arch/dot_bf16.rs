//! The innermost loop of a product of bf16 with sums in f32, where the processor has an instruction for two products at once: twice the speed of
//! [`super::tile`]. Both operands stand as words of two elements that follow each other along the sum.
#![allow(unsafe_code)] // the instruction set itself: vector loads and stores through pointers
#![allow(clippy::needless_range_loop)] // indices name registers of a tile; iterators would hide which

#[cfg(target_arch = "x86_64")]
use super::isa::{Isa, isa};
use super::matrix::MatMut;
use super::tile::{COLS, Update};

/// Whether this processor has the instruction.
pub fn is_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// c = a·b, or c += a·b, for one tile, as [`super::tile::tile`] but with `pairs` words along the sum: word l of row i of a is `a[i * RS + l * CS]`, of column j of b
/// `b[l * COLS + j]`. Each element is a sum of its own, in the order of l.
///
/// # Panics
/// Unless [`is_available`].
pub fn tile<const M: usize, const RS: usize, const CS: usize>(c: &mut MatMut<'_>, a: &[u32], b: &[u32], pairs: usize, update: Update) {
    let (rows, cols, _) = c.layout();
    assert!(rows <= M && cols == COLS && b.len() >= pairs * COLS && (pairs == 0 || a.len() > (M - 1) * RS + (pairs - 1) * CS));
    assert!(is_available(), "products of bf16");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instructions are there; the assertion above keeps every load of a and b inside, and c is a view of its own elements.
    unsafe {
        avx512::<M, RS, CS>(c, a, b, pairs, update);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = update;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")]
unsafe fn avx512<const M: usize, const RS: usize, const CS: usize>(c: &mut MatMut<'_>, a: &[u32], b: &[u32], pairs: usize, update: Update) {
    use std::arch::x86_64::*;
    // SAFETY: both are 64 bytes that may hold anything.
    let words = |x: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
    let (rows, _, stride) = c.layout();
    let c = c.as_mut_ptr();
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    let (mut pa, mut pb) = (a.as_ptr(), b.as_ptr());
    for _ in 0..pairs {
        // SAFETY: step l reads b[l·COLS..][..COLS] and a[i·RS + l·CS], which the caller vouches for.
        unsafe {
            let (b0, b1) = (words(_mm512_loadu_si512(pb.cast())), words(_mm512_loadu_si512(pb.add(16).cast())));
            for i in 0..M {
                let x = words(_mm512_set1_epi32((*pa.add(i * RS)).cast_signed()));
                sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, b0);
                sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, b1);
            }
            pb = pb.add(COLS);
            pa = pa.wrapping_add(CS);
        }
    }
    // Every index of `sums` must be a constant of the unrolled loop, or the registers would go through memory.
    for i in 0..M {
        if i >= rows {
            break;
        }
        for half in 0..2 {
            // SAFETY: row i < rows of c, which has 32 columns.
            unsafe {
                let place = c.add(i * stride + 16 * half);
                let sum = match update {
                    Update::Set => sums[i][half],
                    Update::Add => _mm512_add_ps(sums[i][half], _mm512_loadu_ps(place)),
                };
                _mm512_storeu_ps(place, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::widen::narrow_pairs;
    use crate::testing::Random;

    #[test]
    fn equals_products_of_rounded_numbers() {
        if !is_available() {
            return;
        }
        let mut random = Random::new(71);
        for pairs in [1, 2, 7, 64] {
            let (a, b) = (random.vec(12 * 2 * pairs, 1.0), random.vec(COLS * 2 * pairs, 1.0));
            let mut a_words = vec![0; 12 * pairs];
            narrow_pairs(&mut a_words, &a);
            let mut b_words = vec![0; COLS * pairs];
            narrow_pairs(&mut b_words, &b);
            let value = |word: u32, half: usize| f64::from(f32::from_bits((word >> (16 * half)) << 16));
            let start = random.vec(12 * COLS, 1.0);
            for (rows, update) in [(12, Update::Set), (12, Update::Add), (5, Update::Add)] {
                let mut c = start.clone();
                // a by rows: word l of row i at i·pairs + l. (Constants, so one shape at a time.)
                match pairs {
                    1 => tile::<12, 1, 1>(&mut MatMut::new(&mut c[..rows * COLS], rows, COLS), &a_words, &b_words, pairs, update),
                    2 => tile::<12, 2, 1>(&mut MatMut::new(&mut c[..rows * COLS], rows, COLS), &a_words, &b_words, pairs, update),
                    7 => tile::<12, 7, 1>(&mut MatMut::new(&mut c[..rows * COLS], rows, COLS), &a_words, &b_words, pairs, update),
                    _ => tile::<12, 64, 1>(&mut MatMut::new(&mut c[..rows * COLS], rows, COLS), &a_words, &b_words, pairs, update),
                }
                for (place, (got, before)) in c.iter().zip(&start).enumerate() {
                    let (i, j) = (place / COLS, place % COLS);
                    let sum: f64 =
                        (0..2 * pairs).map(|l| value(a_words[i * pairs + l / 2], l % 2) * value(b_words[l / 2 * COLS + j], l % 2)).sum();
                    let expected = match (i < rows, update) {
                        (false, _) => f64::from(*before),
                        (_, Update::Set) => sum,
                        (_, Update::Add) => sum + f64::from(*before),
                    };
                    assert!((f64::from(*got) - expected).abs() < 2e-5, "{pairs} pairs, {rows} rows, {place}: {got} for {expected}");
                }
            }
        }
    }
}
