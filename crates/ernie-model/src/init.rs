//! Deterministic initial weights: the same seed gives the same bits on every machine and thread count.
use burn::{module::Param, prelude::*, tensor::TensorData};

/// Draws parameters in the order in which the model asks for them.
pub struct Init {
    device: Device,
    /// None: every value is zero, for a network whose weights are about to be loaded.
    state: Option<u64>,
    /// Standard deviation of projections and embeddings (`initializer_range`).
    pub std: f64,
    /// The same for the projections that write into the residual stream, divided by √(2·layers) (GPT-2's rule), so that its
    /// variance does not grow with depth.
    pub residual_std: f64,
}

impl Init {
    /// A stream for `layers` decoder layers.
    pub fn new(device: &Device, seed: u64, std: f64, layers: usize) -> Self {
        Self { device: device.clone(), state: Some(seed), std, residual_std: std / (2.0 * layers.max(1) as f64).sqrt() }
    }

    /// Zeros for everything: a network about to be filled from a checkpoint.
    pub fn zeros(device: &Device) -> Self {
        Self { device: device.clone(), state: None, std: 0.0, residual_std: 0.0 }
    }

    /// A trainable tensor of independent normal values.
    pub fn normal<const D: usize>(&mut self, shape: [usize; D], std: f64) -> Param<Tensor<D>> {
        let length = shape.iter().product::<usize>();
        let values = match &mut self.state {
            Some(state) => (0..length).map(|_| (gaussian(state) * std) as f32).collect::<Vec<_>>(),
            None => vec![0.0; length],
        };
        Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), &self.device))
    }

    /// A trainable tensor of one value.
    pub fn constant<const D: usize>(&mut self, shape: [usize; D], value: f32) -> Param<Tensor<D>> {
        let values = vec![value; shape.iter().product()];
        Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), &self.device))
    }

    /// A tensor of zeros that no gradient reaches.
    pub fn frozen_zeros<const D: usize>(&mut self, shape: [usize; D]) -> Param<Tensor<D>> {
        self.constant(shape, 0.0).set_require_grad(false)
    }
}

/// One standard normal value (Box-Muller, first branch).
fn gaussian(state: &mut u64) -> f64 {
    let u = 1.0 - uniform(state);
    let v = uniform(state);
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Uniform in [0, 1), 53 bits: SplitMix64 (Steele, Lea, Flood 2014).
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}
