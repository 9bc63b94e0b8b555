//! Linear layers over weights stored as f32, or as bf16 widened on the fly, for inference. Forward only.
//!
//! **Batch invariance**: a token's values are the same bits whether it comes alone or among others (see [`crate::arch::dot`]), so a request's tokens
//! depend neither on the batch nor on how its prompt is cut into chunks.
use half::bf16;

use crate::arch::dot::{self, Sizes, Strides, Weight};
use crate::arch::pool::Pool;
use crate::scratch::Scratch;

/// Below this many multiply-adds a second thread costs more than it saves (the pool takes about a microsecond to share a loop).
const PARALLEL_WORK: usize = 1 << 16;

/// Weights that a core reads repeatedly during a prefill, in bytes: half a usual second-level cache.
const PANEL_BYTES: usize = 256 << 10;

/// Weights of a linear layer, `[n, k]` row-major, as they are stored.
#[derive(Clone, Copy, Debug)]
pub enum WeightsRef<'a> {
    /// 32-bit weights.
    F32(&'a [f32]),
    /// bfloat16 weights, widened to f32 as they are read; sums are f32.
    Bf16(&'a [bf16]),
}

impl WeightsRef<'_> {
    /// Number of weights.
    pub fn len(&self) -> usize {
        match self {
            WeightsRef::F32(w) => w.len(),
            WeightsRef::Bf16(w) => w.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias[n])`, or with `add` that is added to y. Parallel over `n` when the work is worth it; the bits of a token's
/// row depend on neither `m` nor threads.
///
/// # Panics
/// If a slice does not fit the sizes.
#[allow(clippy::too_many_arguments)] // A product's operands and sizes.
pub fn linear(pool: &Pool, y: &mut [f32], x: &[f32], w: WeightsRef<'_>, bias: Option<&[f32]>, m: usize, n: usize, k: usize, add: bool) {
    assert_eq!(y.len(), m * n, "linear: y is [{m}, {n}]");
    assert_eq!(x.len(), m * k, "linear: x is [{m}, {k}]");
    assert_eq!(w.len(), n * k, "linear: w is [{n}, {k}]");
    if let Some(bias) = bias {
        assert_eq!(bias.len(), n, "linear: bias is [{n}]");
    }
    if add {
        let mut product = Scratch::take(m * n);
        linear(pool, &mut product, x, w, bias, m, n, k, false);
        y.iter_mut().zip(product.iter()).for_each(|(y, product)| *y += product);
        return;
    }
    match w {
        WeightsRef::F32(w) => products(pool, y, x, w, Sizes { m, n, k }),
        WeightsRef::Bf16(w) => products(pool, y, x, w, Sizes { m, n, k }),
    }
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(n) {
            for (value, b) in row.iter_mut().zip(bias) {
                *value += b;
            }
        }
    }
}

fn products<W: Weight>(pool: &Pool, y: &mut [f32], x: &[f32], w: &[W], sizes: Sizes) {
    let Sizes { m, n, k } = sizes;
    let threads = pool.threads();
    if threads == 1 || m * n * k < PARALLEL_WORK {
        return dot::panel(y, Strides { token: n, row: 1 }, x, w, sizes);
    }
    // A few pieces per thread, so that one that is held up leaves work to the others; whole register tiles in each.
    let rows = n.div_ceil(threads * 4).next_multiple_of(8);
    let rows_of = |piece: usize, rows: usize| &w[piece * rows * k..((piece + 1) * rows * k).min(n * k)];
    if m == 1 {
        pool.for_each_piece(y, rows, |piece, y| {
            dot::panel(y, Strides { token: y.len(), row: 1 }, x, rows_of(piece, rows), Sizes { m, n: y.len(), k });
        });
        return;
    }
    // With several tokens a piece of rows is read again for each few of them: keep it within the second-level cache.
    let rows = rows.min((PANEL_BYTES / (k * size_of::<W>()).max(1)).next_multiple_of(8));
    // Each piece of rows fills its own part of yᵀ: [n, m]; then y is that, turned.
    let mut turned = Scratch::take(m * n);
    pool.for_each_piece(&mut turned, rows * m, |piece, out| {
        dot::panel(out, Strides { token: 1, row: m }, x, rows_of(piece, rows), Sizes { m, n: out.len() / m, k });
    });
    for (row, values) in turned.chunks_exact(m).enumerate() {
        for (token, &value) in values.iter().enumerate() {
            y[token * n + row] = value;
        }
    }
}

/// The same by plain loops, with sums in f64.
pub mod scalar {
    use super::WeightsRef;

    /// Twin of [`super::linear`].
    pub fn linear(y: &mut [f32], x: &[f32], w: WeightsRef<'_>, bias: Option<&[f32]>, m: usize, n: usize, k: usize) {
        let weight = |i: usize| match w {
            WeightsRef::F32(w) => f64::from(w[i]),
            WeightsRef::Bf16(w) => w[i].to_f64(),
        };
        for token in 0..m {
            for row in 0..n {
                let sum: f64 = (0..k).map(|i| f64::from(x[token * k + i]) * weight(row * k + i)).sum();
                y[token * n + row] = (sum + bias.map_or(0.0, |b| f64::from(b[row]))) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// (5, 530, 257) is beyond `PARALLEL_WORK`, and so is (1, 4100, 130).
    #[test]
    fn linear_equals_its_twin_and_never_depends_on_the_batch() {
        let pool = Pool::new(2);
        for (m, n, k) in [(1, 3, 5), (4, 9, 40), (5, 530, 257), (1, 4100, 130)] {
            let (x, w, bias) = (Random::new(1).vec(m * k, 1.0), Random::new(2).vec(n * k, 1.0), Random::new(3).vec(n, 1.0));
            let half: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
            for weights in [WeightsRef::F32(&w), WeightsRef::Bf16(&half)] {
                for bias in [None, Some(bias.as_slice())] {
                    let (mut fast, mut slow) = (vec![0.0; m * n], vec![0.0; m * n]);
                    linear(&pool, &mut fast, &x, weights, bias, m, n, k, false);
                    scalar::linear(&mut slow, &x, weights, bias, m, n, k);
                    for (f, s) in fast.iter().zip(&slow) {
                        assert!((f - s).abs() < 2e-5, "[{m}, {n}, {k}]: {f} for {s}");
                    }
                    let mut sum = fast.clone();
                    linear(&pool, &mut sum, &x, weights, bias, m, n, k, true);
                    assert!(sum.iter().zip(&fast).all(|(sum, y)| *sum == y + y));
                    for token in 0..m {
                        let mut alone = vec![0.0; n];
                        linear(&pool, &mut alone, &x[token * k..(token + 1) * k], weights, bias, 1, n, k, false);
                        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                        assert_eq!(bits(&alone), bits(&fast[token * n..(token + 1) * n]), "[{m}, {n}, {k}] token {token}");
                    }
                }
            }
        }
    }
}
