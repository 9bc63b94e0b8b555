//! Routed SwiGLU experts: y(token) = Σ_k weight_k · down_e(silu(gate_e x) · up_e x), e = the token's k-th expert.
//!
//! Letters: t tokens, h hidden, i intermediate, e experts, k experts per token, n = t·k pairs of a token and an expert. Pairs are sorted by
//! expert, so that each expert multiplies all its tokens at once; a *place* is a pair's rank in that order. Blocks of places and the order of
//! every sum are fixed by the routing alone, so results do not depend on threads.

pub mod scalar;

use std::ops::Range;

use rayon::prelude::*;

use crate::arch::gemm::{Threads, Update};
use crate::arch::isa::{mul_add, simd_fn};
use crate::arch::matrix::{Mat, MatMut};
use crate::arch::quantised::Rounding;
use crate::linear::{add_rows, add_to_rows};
use crate::matmul::{Left, Precision, Right, multiply};
use crate::row::{dot, scale};
use crate::scratch::{Scratch, recycle, take_buffer};
use crate::swiglu;

/// Places of one task. An expert's weights are packed anew for each block, so small blocks waste time and large ones leave threads idle.
const BLOCK_PLACES: usize = 512;
/// Tokens of one task where the experts' outputs are put together.
const BLOCK_TOKENS: usize = 32;

/// Sizes of a layer of routed experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens, t.
    pub tokens: usize,
    /// Width of the model, h.
    pub hidden: usize,
    /// Width inside one expert, i.
    pub intermediate: usize,
    /// Number of experts, e.
    pub experts: usize,
    /// Experts per token, k.
    pub top_k: usize,
}

impl Shape {
    fn pairs(&self) -> usize {
        self.tokens * self.top_k
    }
}

/// The weights of all experts of a layer, one expert after the other. Biases where the model has them.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// `[e, i, h]`.
    pub gate: &'a [f32],
    /// `[e, i, h]`.
    pub up: &'a [f32],
    /// `[e, h, i]`.
    pub down: &'a [f32],
    /// `[e, i]`.
    pub gate_bias: Option<&'a [f32]>,
    /// `[e, i]`.
    pub up_bias: Option<&'a [f32]>,
    /// `[e, h]`.
    pub down_bias: Option<&'a [f32]>,
    /// Of the products.
    pub precision: Precision,
}

impl<'a> Weights<'a> {
    /// Experts without biases.
    pub fn new(gate: &'a [f32], up: &'a [f32], down: &'a [f32], precision: Precision) -> Self {
        Weights { gate, up, down, gate_bias: None, up_bias: None, down_bias: None, precision }
    }

    fn check(&self, shape: Shape) {
        let Shape { hidden, intermediate, experts, .. } = shape;
        let matrix = experts * hidden * intermediate;
        assert!(self.gate.len() == matrix && self.up.len() == matrix && self.down.len() == matrix, "weights of {shape:?}");
        assert!(self.gate_bias.is_none_or(|bias| bias.len() == experts * intermediate), "gate bias of {shape:?}");
        assert!(self.up_bias.is_none_or(|bias| bias.len() == experts * intermediate), "up bias of {shape:?}");
        assert!(self.down_bias.is_none_or(|bias| bias.len() == experts * hidden), "down bias of {shape:?}");
    }
}

/// Where [`backward`] writes; each is shaped as what it is the gradient of, and overwritten. A bias gradient may be asked for only where the
/// bias exists.
pub struct Gradients<'a> {
    /// `dx[t, h]`.
    pub x: &'a mut [f32],
    /// `[e, i, h]`.
    pub gate: &'a mut [f32],
    /// `[e, i, h]`.
    pub up: &'a mut [f32],
    /// `[e, h, i]`.
    pub down: &'a mut [f32],
    /// Of the routing weights, `[t, k]`.
    pub routing: &'a mut [f32],
    /// `[e, i]`.
    pub gate_bias: Option<&'a mut [f32]>,
    /// `[e, i]`.
    pub up_bias: Option<&'a mut [f32]>,
    /// `[e, h]`.
    pub down_bias: Option<&'a mut [f32]>,
}

impl<'a> Gradients<'a> {
    /// Without gradients of biases.
    pub fn new(x: &'a mut [f32], gate: &'a mut [f32], up: &'a mut [f32], down: &'a mut [f32], routing: &'a mut [f32]) -> Self {
        Gradients { x, gate, up, down, routing, gate_bias: None, up_bias: None, down_bias: None }
    }
}

/// What the backward pass needs of the forward pass: 2·n·i numbers and the order of the pairs.
#[derive(Debug)]
pub struct Saved {
    shape: Shape,
    grouping: Grouping,
    /// gate_e·x by place, `[n, i]`.
    gate: Vec<f32>,
    /// up_e·x by place, `[n, i]`.
    up: Vec<f32>,
}

impl Drop for Saved {
    fn drop(&mut self) {
        recycle(std::mem::take(&mut self.gate));
        recycle(std::mem::take(&mut self.up));
    }
}

/// Adds to the residual stream `y[t, h]` from `x[t, h]`. `indices[t, k]` are each token's experts and `routing[t, k]` what their outputs are multiplied by; they
/// are summed in the order of k.
pub fn forward(y: &mut [f32], x: &[f32], weights: &Weights<'_>, indices: &[u32], routing: &[f32], shape: Shape) -> Saved {
    let Shape { tokens, hidden: h, intermediate: i, .. } = shape;
    weights.check(shape);
    assert!(x.len() == tokens * h && y.len() == x.len(), "x and y of {shape:?}");
    assert!(indices.len() == shape.pairs() && routing.len() == shape.pairs(), "routing of {shape:?}");
    let grouping = Grouping::new(indices, shape);
    let (mut gate, mut up) = (take_buffer(shape.pairs() * i), take_buffer(shape.pairs() * i));
    let mut outputs = Scratch::take(shape.pairs() * h);
    let gates = grouping.split_blocks(&mut gate, i);
    let ups = grouping.split_blocks(&mut up, i);
    let parts = grouping.split_blocks(&mut outputs, h);
    grouping.blocks.par_iter().zip(gates).zip(ups).zip(parts).for_each(|(((block, gate), up), output)| {
        let rows = block.places.len();
        let mut x_rows = Scratch::take(rows * h);
        grouping.gather(&mut x_rows, x, block, h);
        let expert = Expert::of(weights, block.expert, shape);
        let x_rows = expert.left(&x_rows, rows);
        expert.linear(gate, &x_rows, expert.gate, expert.gate_bias, rows);
        expert.linear(up, &x_rows, expert.up, expert.up_bias, rows);
        let mut activation = Scratch::take(rows * i);
        swiglu::forward_block(&mut activation, gate, up);
        expert.linear(output, &expert.left(&activation, rows), expert.down, expert.down_bias, rows);
    });
    grouping.combine(y, &outputs, Some(routing), h, Update::Add);
    Saved { shape, grouping, gate, up }
}

/// Gradients of [`forward`] from `dy[t, h]`, given its `x`, `weights` and `routing`.
///
/// By place, with a = silu(gate)·up and r its routing weight: dr = (downᵀ·dy)·a + dy·down_bias, da = r·downᵀ·dy, ddown = Σ r·dy·aᵀ, then SwiGLU
/// backwards, dgate = Σ dg·xᵀ, dup = Σ du·xᵀ, dx = gateᵀ·dg + upᵀ·du.
pub fn backward(saved: &Saved, gradients: Gradients<'_>, x: &[f32], weights: &Weights<'_>, routing: &[f32], dy: &[f32]) {
    let (shape, grouping) = (saved.shape, &saved.grouping);
    let Shape { tokens, hidden: h, intermediate: i, .. } = shape;
    weights.check(shape);
    assert!(x.len() == tokens * h && dy.len() == x.len() && gradients.x.len() == x.len(), "x, dx and dy of {shape:?}");
    assert!(routing.len() == shape.pairs() && gradients.routing.len() == routing.len(), "routing of {shape:?}");

    // By place: x, dy, r·a, dg, du, dx and dr.
    let n = shape.pairs();
    let (mut x_rows, mut dy_rows, mut dx_rows) = (Scratch::take(n * h), Scratch::take(n * h), Scratch::take(n * h));
    let (mut activation, mut dgate, mut dup) = (Scratch::take(n * i), Scratch::take(n * i), Scratch::take(n * i));
    let mut drouting = Scratch::take(n);
    let tasks = grouping
        .blocks
        .par_iter()
        .zip(grouping.split_blocks(&mut x_rows, h))
        .zip(grouping.split_blocks(&mut dy_rows, h))
        .zip(grouping.split_blocks(&mut dx_rows, h))
        .zip(grouping.split_blocks(&mut activation, i))
        .zip(grouping.split_blocks(&mut dgate, i))
        .zip(grouping.split_blocks(&mut dup, i))
        .zip(grouping.split_blocks(&mut drouting, 1));
    tasks.for_each(|(((((((block, x_rows), dy_rows), dx_rows), activation), dgate), dup), drouting)| {
        let rows = block.places.len();
        let expert = Expert::of(weights, block.expert, shape);
        let (gate, up) = (&saved.gate[block.places.start * i..][..rows * i], &saved.up[block.places.start * i..][..rows * i]);
        grouping.gather(x_rows, x, block, h);
        grouping.gather(dy_rows, dy, block, h);
        swiglu::forward_block(activation, gate, up);
        let mut dactivation = Scratch::take(rows * i);
        let dy_mat = Mat::new(dy_rows, rows, h);
        expert.input_gradient(&mut dactivation, &[(dy_mat, Mat::new(expert.down, h, i))]);
        for (row, place) in block.places.clone().enumerate() {
            let weight = routing[grouping.pairs[place] as usize];
            let (a, da) = (&mut activation[row * i..][..i], &mut dactivation[row * i..][..i]);
            let from_bias = expert.down_bias.map_or(0.0, |bias| dot(dy_mat.row(row), bias));
            drouting[row] = dot(a, da) + from_bias;
            scale(a, weight);
            scale(da, weight);
        }
        swiglu::backward_block(dgate, dup, gate, up, &dactivation);
        let (dgate, dup) = (Mat::new(dgate, rows, i), Mat::new(dup, rows, i));
        expert.input_gradient(dx_rows, &[(dgate, Mat::new(expert.gate, i, h)), (dup, Mat::new(expert.up, i, h))]);
    });
    for (&pair, &value) in grouping.pairs.iter().zip(drouting.iter()) {
        gradients.routing[pair as usize] = value;
    }
    grouping.combine(gradients.x, &dx_rows, None, h, Update::Set);
    let precision = weights.precision;
    grouping.weight_gradients([gradients.gate, gradients.up], [&dgate, &dup], i, &x_rows, h, precision);
    grouping.weight_gradients([gradients.down], [&dy_rows], h, &activation, i, precision);
    if let Some(sum) = gradients.gate_bias {
        assert!(weights.gate_bias.is_some(), "these experts have no gate bias");
        grouping.bias_gradient(sum, &dgate, i);
    }
    if let Some(sum) = gradients.up_bias {
        assert!(weights.up_bias.is_some(), "these experts have no up bias");
        grouping.bias_gradient(sum, &dup, i);
    }
    if let Some(sum) = gradients.down_bias {
        assert!(weights.down_bias.is_some(), "these experts have no down bias");
        for (&pair, row) in grouping.pairs.iter().zip(dy_rows.chunks_exact_mut(h)) {
            scale(row, routing[pair as usize]);
        }
        grouping.bias_gradient(sum, &dy_rows, h);
    }
}

/// The weights of one expert.
struct Expert<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    down: &'a [f32],
    gate_bias: Option<&'a [f32]>,
    up_bias: Option<&'a [f32]>,
    down_bias: Option<&'a [f32]>,
    precision: Precision,
}

impl<'a> Expert<'a> {
    fn of(weights: &Weights<'a>, expert: usize, shape: Shape) -> Self {
        let part = |x: &'a [f32], len: usize| &x[expert * len..][..len];
        let (h, i) = (shape.hidden, shape.intermediate);
        Expert {
            gate: part(weights.gate, i * h),
            up: part(weights.up, i * h),
            down: part(weights.down, h * i),
            gate_bias: weights.gate_bias.map(|bias| part(bias, i)),
            up_bias: weights.up_bias.map(|bias| part(bias, i)),
            down_bias: weights.down_bias.map(|bias| part(bias, h)),
            precision: weights.precision,
        }
    }

    /// x `[rows, k]`, ready for products.
    fn left(&self, x: &[f32], rows: usize) -> Left {
        Left::new(&[Mat::new(x, rows, x.len() / rows)], self.precision, Rounding::Nearest, Threads::One)
    }

    /// `y[rows, n]` = `x[rows, k]`·`w[n, k]ᵀ` + bias on this thread; n and k follow from the lengths.
    fn linear(&self, y: &mut [f32], x: &Left, w: &[f32], bias: Option<&[f32]>, rows: usize) {
        let n = y.len() / rows;
        let w = Right::new(&[Mat::new(w, n, w.len() / n)], self.precision, Threads::One);
        multiply(MatMut::new(y, rows, n), x, &w, Update::Set, Threads::One);
        if let Some(bias) = bias {
            add_to_rows(y, bias);
        }
    }

    /// `dx[rows, k]` = Σ `dy[rows, n]`·`w[n, k]` over pairs of dy and w.
    fn input_gradient(&self, dx: &mut [f32], pairs: &[(Mat<'_>, Mat<'_>)]) {
        let (dy, w): (Vec<Mat<'_>>, Vec<Mat<'_>>) = pairs.iter().map(|(dy, w)| (*dy, w.t())).unzip();
        let rows = dy[0].rows();
        let dy = Left::new(&dy, self.precision, Rounding::Stochastic, Threads::One);
        multiply(MatMut::new(dx, rows, dx.len() / rows), &dy, &Right::new(&w, self.precision, Threads::One), Update::Set, Threads::One);
    }
}

/// Pairs sorted by expert, and inside one expert by token.
#[derive(Debug)]
struct Grouping {
    top_k: usize,
    /// The pair (token·k + slot) at each place.
    pairs: Vec<u32>,
    /// The place of each pair.
    places: Vec<u32>,
    /// Places of expert e: `bounds[e]`..`bounds[e + 1]`.
    bounds: Vec<usize>,
    blocks: Vec<Block>,
}

/// Consecutive places of one expert.
#[derive(Debug)]
struct Block {
    expert: usize,
    places: Range<usize>,
}

impl Grouping {
    fn new(indices: &[u32], shape: Shape) -> Self {
        assert!(u32::try_from(indices.len()).is_ok(), "{} pairs of tokens and experts", indices.len());
        let mut bounds = vec![0; shape.experts + 1];
        for &expert in indices {
            assert!((expert as usize) < shape.experts, "expert {expert} of {}", shape.experts);
            bounds[expert as usize + 1] += 1;
        }
        for expert in 0..shape.experts {
            bounds[expert + 1] += bounds[expert];
        }
        let mut next = bounds.clone();
        let (mut pairs, mut places) = (vec![0; indices.len()], vec![0; indices.len()]);
        for (pair, &expert) in indices.iter().enumerate() {
            let place = next[expert as usize];
            next[expert as usize] += 1;
            pairs[place] = pair as u32;
            places[pair] = place as u32;
        }
        let mut blocks = Vec::new();
        for expert in 0..shape.experts {
            let end = bounds[expert + 1];
            for start in (bounds[expert]..end).step_by(BLOCK_PLACES) {
                blocks.push(Block { expert, places: start..(start + BLOCK_PLACES).min(end) });
            }
        }
        Grouping { top_k: shape.top_k, pairs, places, bounds, blocks }
    }

    /// Cuts `x[n, width]` at the blocks.
    fn split_blocks<'a>(&self, mut x: &'a mut [f32], width: usize) -> Vec<&'a mut [f32]> {
        let mut parts = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (part, rest) = x.split_at_mut(block.places.len() * width);
            parts.push(part);
            x = rest;
        }
        parts
    }

    /// rows = the rows of `x[t, width]` whose tokens are at the block's places.
    fn gather(&self, rows: &mut [f32], x: &[f32], block: &Block, width: usize) {
        for (&pair, row) in self.pairs[block.places.clone()].iter().zip(rows.chunks_exact_mut(width)) {
            row.copy_from_slice(&x[pair as usize / self.top_k * width..][..width]);
        }
    }

    /// `y[t, width]` = or += Σ_k weight·(the row at the place of the token's k-th pair); every weight is 1 if there are none.
    fn combine(&self, y: &mut [f32], rows: &[f32], weights: Option<&[f32]>, width: usize, update: Update) {
        y.par_chunks_mut(width * BLOCK_TOKENS).enumerate().for_each(|(task, y)| {
            for (token, y) in y.chunks_exact_mut(width).enumerate() {
                if update == Update::Set {
                    y.fill(0.0);
                }
                let first = (task * BLOCK_TOKENS + token) * self.top_k;
                for pair in first..first + self.top_k {
                    let row = &rows[self.places[pair] as usize * width..][..width];
                    add_scaled(y, row, weights.map_or(1.0, |weights| weights[pair]));
                }
            }
        });
    }

    /// Each `dw[e, out, in]` = Σ over the expert's places of its `dy[n, out]ᵀ`·`x[n, in]`.
    fn weight_gradients<const N: usize>(
        &self,
        dw: [&mut [f32]; N],
        dy: [&[f32]; N],
        outputs: usize,
        x: &[f32],
        inputs: usize,
        precision: Precision,
    ) {
        let experts = self.bounds.len() - 1;
        assert!(dw.iter().all(|dw| dw.len() == experts * outputs * inputs), "a weight gradient must be shaped as its weight");
        let mut tasks: Vec<Vec<&mut [f32]>> = (0..experts).map(|_| Vec::with_capacity(N)).collect();
        for dw in dw {
            tasks.iter_mut().zip(dw.chunks_exact_mut(outputs * inputs)).for_each(|(task, dw)| task.push(dw));
        }
        tasks.into_par_iter().enumerate().for_each(|(expert, dw)| {
            let places = self.bounds[expert]..self.bounds[expert + 1];
            let x = Right::new(&[Mat::block(x, inputs, places.clone(), 0..inputs).t()], precision, Threads::One);
            for (dw, dy) in dw.into_iter().zip(dy) {
                let dy =
                    Left::new(&[Mat::block(dy, outputs, places.clone(), 0..outputs).t()], precision, Rounding::Stochastic, Threads::One);
                multiply(MatMut::new(dw, outputs, inputs), &dy, &x, Update::Set, Threads::One);
            }
        });
    }

    /// `sum[e, width]` = Σ over the expert's places of `rows[n, width]`.
    fn bias_gradient(&self, sum: &mut [f32], rows: &[f32], width: usize) {
        assert_eq!(sum.len(), (self.bounds.len() - 1) * width, "a bias gradient must be shaped as its bias");
        sum.par_chunks_exact_mut(width).enumerate().for_each(|(expert, sum)| {
            sum.fill(0.0);
            add_rows(sum, &rows[self.bounds[expert] * width..self.bounds[expert + 1] * width]);
        });
    }
}

simd_fn! {
    fn add_scaled<FMA>(y: &mut [f32], x: &[f32], factor: f32) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = mul_add::<FMA>(factor, x, *y);
        }
    }
}

#[cfg(test)]
mod tests;
