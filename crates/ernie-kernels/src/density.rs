//! Semantic density: how far a token's state is from what came before it in its document.
//!
//! d_t = 1 − cos(x_t, m_t), m_t = decay·m_{t−1} + x_t, m before a document's first token being 0: the cosine does not see that m is a sum and no mean.
//! 0 at a document's first token, high where a token brings something new.
use std::ops::Range;

use rayon::prelude::*;

use crate::arch::isa::{LANES, mul_add, simd_fn};
use crate::scratch::Scratch;

/// Below this a product of squared lengths counts as none, and the density is 1.
pub const LEAST: f32 = 1e-30;

/// d `[t]` of rows x `[t, h]` of documents that lie between `cu_seqlens`, `[0, …, t]`.
pub fn forward(d: &mut [f32], x: &[f32], h: usize, decay: f32, cu_seqlens: &[u32]) {
    check(x, h, cu_seqlens, d.len());
    pieces(d, 1, cu_seqlens).into_par_iter().zip(documents(cu_seqlens)).for_each(|(d, rows)| {
        let mut mean = Scratch::take(h);
        mean.fill(0.0);
        follow(d, &mut mean, &x[rows.start * h..rows.end * h], decay);
    });
}

simd_fn! {
    /// One text on from the sum `mean` of what came before: d of its next rows, and `mean` with them.
    pub fn follow<FMA>(d: &mut [f32], mean: &mut [f32], x: &[f32], decay: f32) {
        let h = mean.len();
        for (d, x) in d.iter_mut().zip(x.chunks_exact(h)) {
            *d = 1.0 - cosine::<FMA>(x, mean, decay).0;
        }
    }
}

/// m = decay·m + x; the cosine of x and m, and the squared lengths of both.
#[inline(always)]
fn cosine<const FMA: bool>(x: &[f32], mean: &mut [f32], decay: f32) -> (f32, f32, f32) {
    let mut sums = [[0.0f32; LANES]; 3];
    let mut rest = [0.0f32; 3];
    let (mut means, blocks) = (mean.chunks_exact_mut(LANES), x.chunks_exact(LANES));
    let tail = blocks.remainder();
    for (m, x) in (&mut means).zip(blocks) {
        for lane in 0..LANES {
            m[lane] = mul_add::<FMA>(decay, m[lane], x[lane]);
            sums[0][lane] = mul_add::<FMA>(x[lane], m[lane], sums[0][lane]);
            sums[1][lane] = mul_add::<FMA>(x[lane], x[lane], sums[1][lane]);
            sums[2][lane] = mul_add::<FMA>(m[lane], m[lane], sums[2][lane]);
        }
    }
    for (m, x) in means.into_remainder().iter_mut().zip(tail) {
        *m = mul_add::<FMA>(decay, *m, *x);
        rest[0] += x * *m;
        rest[1] += x * x;
        rest[2] += *m * *m;
    }
    let total = |i: usize| sums[i].iter().sum::<f32>() + rest[i];
    let (dot, xx, mm) = (total(0), total(1), total(2));
    let product = xx * mm;
    (if product > LEAST { dot / product.sqrt() } else { 0.0 }, xx, mm)
}

/// dx `[t, h]` (overwritten) and the gradient of the decay, from dd `[t]`.
///
/// With c = cos(x, m): ∂c/∂x = m/(|x||m|) − c·x/|x|², ∂c/∂m = x/(|x||m|) − c·m/|m|²; what reaches m_t comes from its own row and, times the decay, from
/// the next.
pub fn backward(dx: &mut [f32], x: &[f32], h: usize, decay: f32, cu_seqlens: &[u32], dd: &[f32]) -> f32 {
    check(x, h, cu_seqlens, dd.len());
    assert_eq!(dx.len(), x.len(), "a gradient is shaped as what it belongs to");
    let of_decay: Vec<f64> = pieces(dx, h, cu_seqlens)
        .into_par_iter()
        .zip(documents(cu_seqlens))
        .map(|(dx, rows)| {
            let count = rows.len();
            let x = &x[rows.start * h..rows.end * h];
            let dd = &dd[rows];
            // All sums again, row by row, and what their cosines come to.
            let (mut means, mut cosines) = (Scratch::take(count * h), Scratch::take(3 * count));
            sums(&mut means, &mut cosines, x, h, decay);
            let mut carried = Scratch::take(h);
            carried.fill(0.0);
            let mut of_decay = 0.0f64;
            for row in (0..count).rev() {
                let place = row * h..(row + 1) * h;
                let before = if row > 0 { &means[(row - 1) * h..row * h] } else { &[][..] };
                let [c, xx, mm] = [cosines[3 * row], cosines[3 * row + 1], cosines[3 * row + 2]];
                let inverse = if xx * mm > LEAST { 1.0 / (xx * mm).sqrt() } else { 0.0 };
                let factors = [
                    -dd[row] * inverse,
                    if xx > 0.0 { dd[row] * c / xx } else { 0.0 },
                    if mm > 0.0 { dd[row] * c / mm } else { 0.0 },
                    decay,
                ];
                of_decay += f64::from(back(&mut dx[place.clone()], &mut carried, &x[place.clone()], &means[place], before, factors));
            }
            of_decay
        })
        .collect();
    of_decay.iter().sum::<f64>() as f32
}

simd_fn! {
    /// Row after row of m `[t, h]`, and of cosine, |x|² and |m|² `[t, 3]`.
    fn sums<FMA>(means: &mut [f32], cosines: &mut [f32], x: &[f32], h: usize, decay: f32) {
        for row in 0..x.len() / h {
            let (before, now) = means.split_at_mut(row * h);
            let now = &mut now[..h];
            match row {
                0 => now.fill(0.0),
                _ => now.copy_from_slice(&before[(row - 1) * h..]),
            }
            let (c, xx, mm) = cosine::<FMA>(&x[row * h..][..h], now, decay);
            cosines[3 * row..3 * row + 3].copy_from_slice(&[c, xx, mm]);
        }
    }
}

simd_fn! {
    /// One row back: dx, and in `carried` what reaches the row before; returns its part of the decay's gradient. `factors` are −dd/(|x||m|), dd·c/|x|²,
    /// dd·c/|m|² and the decay.
    fn back<FMA>(dx: &mut [f32], carried: &mut [f32], x: &[f32], m: &[f32], before: &[f32], factors: [f32; 4]) -> f32 {
        let [across, own_x, own_m, decay] = factors;
        for (((dx, carried), x), m) in dx.iter_mut().zip(carried.iter_mut()).zip(x).zip(m) {
            let reaches_m = *carried + across * x + own_m * m;
            *dx = across * m + own_x * x + reaches_m;
            *carried = reaches_m;
        }
        let of_decay = before.iter().zip(carried.iter()).map(|(m, dm)| m * dm).sum();
        for carried in carried {
            *carried *= decay;
        }
        of_decay
    }
}

fn check(x: &[f32], h: usize, cu_seqlens: &[u32], rows: usize) {
    assert!(h > 0 && x.len() == rows * h, "{} values are no {rows} rows of {h}", x.len());
    assert!(cu_seqlens.first() == Some(&0) && cu_seqlens.is_sorted() && cu_seqlens.last() == Some(&(rows as u32)), "bounds of {rows} rows");
}

fn documents(cu_seqlens: &[u32]) -> Vec<Range<usize>> {
    cu_seqlens.windows(2).map(|bounds| bounds[0] as usize..bounds[1] as usize).collect()
}

/// The part of each document, `width` values a row.
fn pieces<'a>(mut values: &'a mut [f32], width: usize, cu_seqlens: &[u32]) -> Vec<&'a mut [f32]> {
    let mut pieces = Vec::with_capacity(cu_seqlens.len());
    for rows in documents(cu_seqlens) {
        let (piece, rest) = values.split_at_mut(rows.len() * width);
        pieces.push(piece);
        values = rest;
    }
    pieces
}

/// The same by plain loops in f64.
pub mod scalar {
    /// d; see [`forward`](super::forward).
    pub fn forward(x: &[f64], h: usize, decay: f64, cu_seqlens: &[u32]) -> Vec<f64> {
        let mut d = Vec::new();
        for bounds in cu_seqlens.windows(2) {
            let mut m = vec![0.0; h];
            for row in bounds[0] as usize..bounds[1] as usize {
                let x = &x[row * h..(row + 1) * h];
                m.iter_mut().zip(x).for_each(|(m, x)| *m = decay * *m + x);
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                d.push(1.0 - dot(x, &m) / (dot(x, x) * dot(&m, &m)).sqrt());
            }
        }
        d
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, assert_gradient, narrow, weighted_sum, wide};

    const DOCUMENTS: [&[u32]; 4] = [&[0, 1], &[0, 9], &[0, 3, 3, 4, 12], &[0, 40, 41]];

    #[test]
    fn equals_the_plain_loops() {
        for cu_seqlens in DOCUMENTS {
            for h in [1, 5, 16, 70] {
                let t = cu_seqlens[cu_seqlens.len() - 1] as usize;
                let x = Random::new(3).vec(t * h, 2.0);
                for decay in [0.0, 0.6, 0.99] {
                    let mut d = vec![f32::NAN; t];
                    forward(&mut d, &x, h, decay, cu_seqlens);
                    assert_close("d", &d, &narrow(&scalar::forward(&wide(&x), h, f64::from(decay), cu_seqlens)), 2e-6);
                }
            }
        }
    }

    #[test]
    fn gradients_equal_differences() {
        let (h, decay, cu_seqlens) = (5, 0.7f32, &[0, 4, 9][..]);
        let (x, dd) = (Random::new(4).vec(9 * h, 1.0), Random::new(5).vec(9, 1.0));
        let mut dx = vec![f32::NAN; x.len()];
        let of_decay = backward(&mut dx, &x, h, decay, cu_seqlens, &dd);
        assert_gradient("dx", &dx, &x, |x| weighted_sum(&scalar::forward(x, h, f64::from(decay), cu_seqlens), &dd));
        assert_gradient("decay", &[of_decay], &[decay], |decay| weighted_sum(&scalar::forward(&wide(&x), h, decay[0], cu_seqlens), &dd));
    }

    #[test]
    fn a_text_that_comes_in_pieces_has_the_same_bits() {
        let (h, t, decay) = (20, 13, 0.9);
        let x = Random::new(6).vec(t * h, 1.0);
        let mut whole = vec![0.0; t];
        forward(&mut whole, &x, h, decay, &[0, t as u32]);
        for cut in 0..=t {
            let (mut pieces, mut mean) = (vec![0.0; t], vec![0.0; h]);
            let (first, second) = pieces.split_at_mut(cut);
            follow(first, &mut mean, &x[..cut * h], decay);
            follow(second, &mut mean, &x[cut * h..], decay);
            assert_eq!(pieces, whole);
        }
        assert!(whole[0].abs() < 1e-6 && whole[1..].iter().all(|d| *d > 0.1), "{whole:?}");
    }

    #[test]
    fn rows_of_zeros_are_new_and_have_no_gradient() {
        let (mut d, mut dx) = ([0.0; 2], [1.0; 6]);
        forward(&mut d, &[0.0; 6], 3, 0.9, &[0, 2]);
        assert_eq!(d, [1.0; 2]);
        assert_eq!(backward(&mut dx, &[0.0; 6], 3, 0.9, &[0, 2], &[1.0; 2]), 0.0);
        assert_eq!(dx, [0.0; 6]);
    }
}
