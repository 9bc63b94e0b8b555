//! Rotary position embedding (arXiv 2104.09864), ERNIE's way: neighbouring elements (2i, 2i+1) of a head form the pair that is rotated.

use rayon::prelude::*;

use crate::arch::isa::simd_fn;

/// Rows of one task.
const ROWS_PER_TASK: usize = 64;

/// Cosines and sines for each position and pair.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// [positions, head_dim / 2].
    pub cos: Vec<f32>,
    /// [positions, head_dim / 2].
    pub sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// Angles position · theta^(−2i/head_dim). The frequency and the angle are rounded to f32 as in transformers' `Ernie4_5RotaryEmbedding`:
    /// at large positions that rounding moves the angle, and a model must see the angles it was trained with.
    pub fn new(theta: f64, head_dim: usize, positions: usize) -> Self {
        assert!(head_dim > 0 && head_dim.is_multiple_of(2), "head_dim {head_dim} must be even");
        let half = head_dim / 2;
        let inverse_frequency: Vec<f32> = (0..half)
            .map(|i| {
                let exponent = (2 * i) as f32 / head_dim as f32;
                1.0 / (theta.powf(f64::from(exponent)) as f32)
            })
            .collect();
        let (mut cos, mut sin) = (Vec::with_capacity(positions * half), Vec::with_capacity(positions * half));
        for position in 0..positions {
            for frequency in &inverse_frequency {
                let angle = f64::from(position as f32 * frequency);
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        RopeTable { cos, sin, half }
    }

    /// Elements of one head.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// Positions the table covers.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Rotates the heads of one row by the angles of `position`, backwards if `inverse`.
    pub(crate) fn rotate_row(&self, row: &mut [f32], position: usize, inverse: bool) {
        let (cos, sin) = self.row(position);
        rotate(row, cos, sin, if inverse { -1.0 } else { 1.0 });
    }

    fn row(&self, position: usize) -> (&[f32], &[f32]) {
        assert!(position < self.positions(), "position {position} in a table of {}", self.positions());
        (&self.cos[position * self.half..][..self.half], &self.sin[position * self.half..][..self.half])
    }
}

/// Rotates the heads of one row in place by the angles of `position`.
pub fn rotate_row(row: &mut [f32], table: &RopeTable, position: usize) {
    table.rotate_row(row, position, false);
}

/// Rotates every head of x[t, heads·head_dim] in place by the angles of its row's position, backwards if `inverse` (which is the gradient).
pub fn apply_interleaved(x: &mut [f32], table: &RopeTable, heads: usize, pos_of_row: impl Fn(usize) -> usize + Sync, inverse: bool) {
    let width = heads * table.head_dim();
    assert!(width > 0 && x.len().is_multiple_of(width), "{} elements are no rows of {heads} heads of {}", x.len(), table.head_dim());
    x.par_chunks_mut(width * ROWS_PER_TASK).enumerate().for_each(|(task, x)| {
        for (i, row) in x.chunks_exact_mut(width).enumerate() {
            let (cos, sin) = table.row(pos_of_row(task * ROWS_PER_TASK + i));
            rotate(row, cos, sin, if inverse { -1.0 } else { 1.0 });
        }
    });
}

simd_fn! {
    fn rotate<FMA>(row: &mut [f32], cos: &[f32], sin: &[f32], direction: f32) {
        for head in row.chunks_exact_mut(2 * cos.len()) {
            for ((pair, &cos), &sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                let (a, b, sin) = (pair[0], pair[1], sin * direction);
                pair[0] = a * cos - b * sin;
                pair[1] = b * cos + a * sin;
            }
        }
    }
}

/// The same by plain loops in f64.
pub mod scalar {
    use super::RopeTable;

    /// x rotated; see [`apply_interleaved`](super::apply_interleaved).
    pub fn apply_interleaved(x: &[f64], table: &RopeTable, heads: usize, pos_of_row: impl Fn(usize) -> usize, inverse: bool) -> Vec<f64> {
        let half = table.head_dim() / 2;
        let mut y = x.to_vec();
        for pair in 0..x.len() / 2 {
            let position = pos_of_row(pair / (heads * half));
            let entry = position * half + pair % half;
            let (cos, sin) = (f64::from(table.cos[entry]), f64::from(table.sin[entry]));
            let sin = if inverse { -sin } else { sin };
            y[2 * pair] = x[2 * pair] * cos - x[2 * pair + 1] * sin;
            y[2 * pair + 1] = x[2 * pair + 1] * cos + x[2 * pair] * sin;
        }
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, narrow, wide};

    #[test]
    fn equals_the_plain_loops_and_inverts() {
        let mut random = Random::new(9);
        for (rows, heads, head_dim) in [(1, 1, 2), (3, 2, 6), (70, 3, 10), (65, 2, 80), (130, 1, 128)] {
            let table = RopeTable::new(500_000.0, head_dim, 2 * rows + 1);
            let x = random.vec(rows * heads * head_dim, 1.0);
            let mut y = x.clone();
            apply_interleaved(&mut y, &table, heads, |row| 2 * row, false);
            assert_close("y", &y, &narrow(&scalar::apply_interleaved(&wide(&x), &table, heads, |row| 2 * row, false)), 1e-6);
            apply_interleaved(&mut y, &table, heads, |row| 2 * row, true);
            assert_close("x", &y, &x, 1e-6);
        }
    }

    #[test]
    fn angles_are_rounded_as_in_transformers() {
        let table = RopeTable::new(10_000.0, 4, 3);
        // inv_freq = [1, 1/100]; row 2 has the angles 2 and 0.02.
        assert_close("cos", &table.cos, &[1.0, 1.0, 0.540_302_3, 0.999_95, -0.416_146_84, 0.999_8], 1e-7);
        assert_close("sin", &table.sin, &[0.0, 0.0, 0.841_471, 0.009_999_833, 0.909_297_4, 0.019_998_666], 1e-7);
        // At position 100,003 the f32 angle of frequency 500000^(-2/64) differs from the exact one by far more than the sine's last place.
        let frequency = 1.0 / (500_000f64.powf(f64::from(2.0f32 / 64.0)) as f32);
        let far = RopeTable::new(500_000.0, 64, 100_004);
        assert_eq!(far.sin[100_003 * 32 + 1], f64::from(100_003.0f32 * frequency).sin() as f32);
    }
}
