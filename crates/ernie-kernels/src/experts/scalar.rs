//! The experts and their gradients by plain loops in f64, one token after the other.
#![allow(clippy::needless_range_loop)] // Indices as in the formulas.

use super::Shape;

/// Weights in f64; see [`Weights`](super::Weights). A model without biases has zeros.
#[derive(Clone)]
pub struct Weights {
    /// `[e, i, h]`.
    pub gate: Vec<f64>,
    /// `[e, i, h]`.
    pub up: Vec<f64>,
    /// `[e, h, i]`.
    pub down: Vec<f64>,
    /// `[e, i]`.
    pub gate_bias: Vec<f64>,
    /// `[e, i]`.
    pub up_bias: Vec<f64>,
    /// `[e, h]`.
    pub down_bias: Vec<f64>,
}

/// Gradients, shaped as what they belong to.
pub struct Gradients {
    /// `dx[t, h]`.
    pub x: Vec<f64>,
    /// Of the routing weights, `[t, k]`.
    pub routing: Vec<f64>,
    /// Of the experts' weights.
    pub weights: Weights,
}

/// y; see [`forward`](super::forward).
pub fn forward(x: &[f64], weights: &Weights, indices: &[u32], routing: &[f64], shape: Shape) -> Vec<f64> {
    let h = shape.hidden;
    let mut y = vec![0.0; shape.tokens * h];
    for (pair, &expert) in indices.iter().enumerate() {
        let token = pair / shape.top_k;
        let inner = Inner::new(&x[token * h..][..h], weights, expert as usize, shape);
        for (row, output) in inner.output(weights, expert as usize, shape).into_iter().enumerate() {
            y[token * h + row] += routing[pair] * output;
        }
    }
    y
}

/// See [`backward`](super::backward).
pub fn backward(x: &[f64], weights: &Weights, indices: &[u32], routing: &[f64], dy: &[f64], shape: Shape) -> Gradients {
    let Shape { hidden: h, intermediate: i, .. } = shape;
    let zeros = |x: &Vec<f64>| vec![0.0; x.len()];
    let mut d = Gradients {
        x: vec![0.0; x.len()],
        routing: vec![0.0; routing.len()],
        weights: Weights {
            gate: zeros(&weights.gate),
            up: zeros(&weights.up),
            down: zeros(&weights.down),
            gate_bias: zeros(&weights.gate_bias),
            up_bias: zeros(&weights.up_bias),
            down_bias: zeros(&weights.down_bias),
        },
    };
    for (pair, &expert) in indices.iter().enumerate() {
        let (token, e) = (pair / shape.top_k * h, expert as usize);
        let (x, dy, r) = (&x[token..][..h], &dy[token..][..h], routing[pair]);
        let inner = Inner::new(x, weights, e, shape);
        d.routing[pair] = inner.output(weights, e, shape).iter().zip(dy).map(|(o, dy)| o * dy).sum();
        let mut da = vec![0.0; i];
        for row in 0..h {
            d.weights.down_bias[e * h + row] += r * dy[row];
            for col in 0..i {
                d.weights.down[(e * h + row) * i + col] += r * dy[row] * inner.activation[col];
                da[col] += r * dy[row] * weights.down[(e * h + row) * i + col];
            }
        }
        let (dgate, dup) = crate::swiglu::scalar::backward(&inner.gate, &inner.up, &da);
        for row in 0..i {
            d.weights.gate_bias[e * i + row] += dgate[row];
            d.weights.up_bias[e * i + row] += dup[row];
            for col in 0..h {
                let at = (e * i + row) * h + col;
                d.weights.gate[at] += dgate[row] * x[col];
                d.weights.up[at] += dup[row] * x[col];
                d.x[token + col] += dgate[row] * weights.gate[at] + dup[row] * weights.up[at];
            }
        }
    }
    d
}

/// One token inside one expert.
struct Inner {
    gate: Vec<f64>,
    up: Vec<f64>,
    activation: Vec<f64>,
}

impl Inner {
    fn new(x: &[f64], weights: &Weights, expert: usize, shape: Shape) -> Self {
        let rows = expert * shape.intermediate..(expert + 1) * shape.intermediate;
        let gate: Vec<f64> = rows.clone().map(|row| affine(&weights.gate, &weights.gate_bias, x, row)).collect();
        let up: Vec<f64> = rows.map(|row| affine(&weights.up, &weights.up_bias, x, row)).collect();
        let activation = crate::swiglu::scalar::forward(&gate, &up);
        Inner { gate, up, activation }
    }

    fn output(&self, weights: &Weights, expert: usize, shape: Shape) -> Vec<f64> {
        let rows = expert * shape.hidden..(expert + 1) * shape.hidden;
        rows.map(|row| affine(&weights.down, &weights.down_bias, &self.activation, row)).collect()
    }
}

fn affine(w: &[f64], bias: &[f64], x: &[f64], row: usize) -> f64 {
    w[row * x.len()..][..x.len()].iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias[row]
}
