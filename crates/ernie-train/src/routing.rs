//! What happens to the routers outside the gradient: the aux-free bias update and the orthogonality step.

/// Moves the selection bias of one router towards even use: `bias += rate · sign(mean(usage) − usage)` (arXiv 2408.15664; ERNIE's
/// `moe_correction_bias_adjust_callback`). `usage` counts tokens per expert over the whole step.
pub fn update_bias(bias: &mut [f32], usage: &[u64], rate: f64) {
    let mean = usage.iter().sum::<u64>() as f64 / usage.len() as f64;
    bias.iter_mut().zip(usage).for_each(|(bias, &used)| step_towards(bias, used, mean, rate));
}

/// The same towards use in given shares, which sum to 1: `bias += rate · sign(share · sum(usage) − usage)`.
pub fn update_bias_towards(bias: &mut [f32], usage: &[u64], shares: &[f64], rate: f64) {
    let sum = usage.iter().sum::<u64>() as f64;
    bias.iter_mut().zip(usage).zip(shares).for_each(|((bias, &used), share)| step_towards(bias, used, share * sum, rate));
}

fn step_towards(bias: &mut f32, used: u64, wanted: f64, rate: f64) {
    let direction = match wanted.partial_cmp(&(used as f64)) {
        Some(std::cmp::Ordering::Greater) => 1.0,
        Some(std::cmp::Ordering::Less) => -1.0,
        _ => 0.0,
    };
    *bias += (rate * direction) as f32;
}

/// `‖ŴŴᵀ − I‖² / e²` of a router's weights `[e, h]`, rows normalised (ERNIE's `ortho_loss_callback`).
pub fn orthogonality_loss(weights: &[f32], experts: usize) -> f64 {
    let (unit, _) = unit_rows(weights, experts);
    gram_minus_identity(&unit).iter().flatten().map(|g| g * g).sum::<f64>() / (experts * experts) as f64
}

/// One step of plain gradient descent on [`orthogonality_loss`], as released: after the optimizer, `w −= lr · λ · ∇`.
///
/// With ŵ_i = w_i/‖w_i‖, G = ŴŴᵀ − I and D = 4GŴ/e²: ∇_i = (D_i − ŵ_i (ŵ_i·D_i)) / ‖w_i‖.
pub fn orthogonality_step(weights: &mut [f32], experts: usize, step: f64) {
    let hidden = weights.len() / experts;
    let (unit, norms) = unit_rows(weights, experts);
    let gram = gram_minus_identity(&unit);
    for (i, row) in weights.chunks_mut(hidden).enumerate() {
        let mut d = vec![0.0; hidden];
        for (j, other) in unit.iter().enumerate() {
            let factor = 4.0 * gram[i][j] / (experts * experts) as f64;
            d.iter_mut().zip(other).for_each(|(d, u)| *d += factor * u);
        }
        let along = dot(&d, &unit[i]);
        for ((w, d), u) in row.iter_mut().zip(&d).zip(&unit[i]) {
            *w -= (step * (d - u * along) / norms[i]) as f32;
        }
    }
}

fn unit_rows(weights: &[f32], experts: usize) -> (Vec<Vec<f64>>, Vec<f64>) {
    let rows = weights.chunks(weights.len() / experts).map(|row| row.iter().map(|&w| w as f64).collect::<Vec<_>>());
    rows.map(|row| {
        let norm = dot(&row, &row).sqrt().max(1e-12);
        (row.iter().map(|w| w / norm).collect(), norm)
    })
    .unzip()
}

fn gram_minus_identity(unit: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let entry = |i: usize, j: usize| dot(&unit[i], &unit[j]) - f64::from(i == j);
    (0..unit.len()).map(|i| (0..unit.len()).map(|j| entry(i, j)).collect()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bias_rises_for_idle_experts_and_falls_for_busy_ones() {
        let mut bias = [30.0, 30.0, 30.0, 30.0];
        update_bias(&mut bias, &[10, 0, 5, 5], 1e-3);
        assert_eq!(bias, [29.999, 30.001, 30.0, 30.0]);
        update_bias_towards(&mut bias, &[10, 0, 5, 5], &[0.5, 0.0, 0.125, 0.375], 1e-3);
        assert_eq!(bias, [29.999, 30.001, 29.999, 30.001]);
    }

    /// Rows of a small made-up matrix.
    const W: [f32; 6] = [1.0, 0.5, -0.2, 0.8, 0.7, 0.1];

    #[test]
    fn orthogonality_step_follows_the_numerical_gradient() {
        let (step, h) = (1e-3, 1e-3);
        let mut moved = W;
        orthogonality_step(&mut moved, 2, step);
        for i in 0..W.len() {
            let at = |delta: f32| {
                let mut w = W;
                w[i] += delta;
                orthogonality_loss(&w, 2)
            };
            let numerical = (at(h) - at(-h)) / (2.0 * h as f64);
            let taken = (W[i] - moved[i]) as f64 / step;
            assert!((numerical - taken).abs() < 2e-3 * numerical.abs().max(0.1), "{i}: {numerical} against {taken}");
        }
    }

    #[test]
    fn orthogonality_loss_falls_to_zero_for_orthogonal_rows() {
        let mut w = W;
        for _ in 0..2000 {
            orthogonality_step(&mut w, 2, 0.1);
        }
        assert!(orthogonality_loss(&w, 2) < 1e-6);
        assert_eq!(orthogonality_loss(&[2.0, 0.0, 0.0, 5.0], 2), 0.0);
    }
}
