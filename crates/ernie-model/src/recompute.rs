//! Loss and gradients of a batch, either with the whole network on the tape or with one layer at a time.
//!
//! The second way keeps each layer's input alone from the forward pass and computes the layer again on its way back (Chen et al., *Training
//! Deep Nets with Sublinear Memory Cost*, arXiv 1604.06174, with one layer per segment): a third more arithmetic, and the memory of one layer.
use burn::prelude::*;

use crate::{
    batch::PackedBatch,
    moe::Routing,
    ops,
    parameters::{NamedParameters, accumulate},
    text::{Choices, Ernie, LossWeights, Losses},
};

/// A term of the loss that routing decides.
type Term = fn(&Routing) -> Option<Tensor<1>>;

impl Ernie {
    /// The training loss of a batch, and the gradients of `share` times it; `total` is off the tape. With `recompute` only the layers' inputs are
    /// kept from the forward to the backward pass.
    pub fn loss_and_gradients(&self, batch: &PackedBatch, weights: &LossWeights, share: f64, recompute: bool) -> (Losses, NamedParameters) {
        if recompute {
            return self.recomputed(batch, weights, share);
        }
        let mut losses = self.loss(batch, weights);
        let total = losses.off_tape();
        (losses, self.backward(scaled(total, share)))
    }

    fn recomputed(&self, batch: &PackedBatch, weights: &LossWeights, share: f64) -> (Losses, NamedParameters) {
        let context = self.layer_context(batch);
        let (mut inputs, mut choices) = (Vec::new(), Vec::new());
        let plain = self.without_tape().model;
        let mut x_th = ops::embedding(plain.embed_tokens.weight.val(), &batch.ids);
        for (index, layer) in plain.layers.iter().enumerate() {
            let (y_th, chosen) = layer.forward(x_th.clone(), &context.of_layer(index, self.config().window(index)));
            inputs.push(std::mem::replace(&mut x_th, y_th));
            choices.push(chosen);
        }

        let x_th = leaf(x_th);
        let mut losses = self.head_losses(self.model.norm.forward(x_th.clone()), batch, weights);
        let total = losses.off_tape();
        let losses = losses.with_choices(&choices, weights);
        let (moe_layers, gate_layers) = (losses.usage.len() as f64, losses.active_heads.len() as f64);
        drop(choices);

        let mut gradients = NamedParameters::new();
        let mut dx_th = self.backward_to(x_th, scaled(total, share), &mut gradients);
        for ((index, layer), x_th) in self.model.layers.iter().enumerate().zip(inputs).rev() {
            let x_th = leaf(x_th);
            let (y_th, Choices { routing, gating }) = layer.forward(x_th.clone(), &context.of_layer(index, self.config().window(index)));
            let mut loss = ops::with_gradient(y_th, Tensor::from_inner(dx_th));
            if let Some(routing) = routing {
                let terms: [(f64, Term); 3] = [
                    (weights.balance, |routing| Some(routing.balance_loss())),
                    (weights.z, |routing| Some(routing.z_loss())),
                    (weights.pull, Routing::pull_loss),
                ];
                let terms = terms.into_iter().filter(|(weight, _)| *weight != 0.0);
                for (weight, term) in terms.filter_map(|(weight, term)| Some((weight, term(&routing)?))) {
                    loss = loss + scaled(term / moe_layers * weight, share);
                }
            }
            if let Some(gating) = gating.filter(|_| weights.gate != 0.0) {
                loss = loss + scaled(gating.regulariser(weights.gate_target) / gate_layers * weights.gate, share);
            }
            dx_th = self.backward_to(x_th, loss, &mut gradients);
        }
        let embedding_th = ops::embedding(self.model.embed_tokens.weight.val(), &batch.ids);
        // A weight may be met more than once: the embedding here, by the head where they are tied, and by multi-token prediction.
        accumulate(&mut gradients, self.backward(ops::with_gradient(embedding_th, Tensor::from_inner(dx_th))));
        (losses, gradients)
    }

    /// Adds the parameters' gradients to `gradients` and returns that of `x_th`.
    fn backward_to(&self, x_th: Tensor<2>, loss: Tensor<1>, gradients: &mut NamedParameters) -> Tensor<2> {
        let mut tape = ops::backward(loss);
        let dx_th = x_th.grad_remove(&mut tape).expect("the loss is made from x");
        accumulate(gradients, self.collect_gradients(tape));
        dx_th
    }
}

impl Losses {
    /// Leaves the total's value alone and returns the total on the tape.
    fn off_tape(&mut self) -> Tensor<1> {
        let value = self.total.clone().inner();
        std::mem::replace(&mut self.total, value)
    }
}

/// The start of a tape.
fn leaf(x_th: Tensor<2>) -> Tensor<2> {
    Tensor::from_inner(x_th).require_grad()
}

fn scaled(loss: Tensor<1>, share: f64) -> Tensor<1> {
    if share == 1.0 { loss } else { loss * share }
}
