//! The ERNIE-4.5 text decoder, dense and mixture of experts, as Burn modules: one file per part, each reading like its equations.
//!
//! Dimension letters used throughout: `t` tokens of the packed batch, `h` hidden size, `n` heads, `d` head size, `i` intermediate size,
//! `e` experts, `k` experts per token, `v` vocabulary. Shapes stand at the end of a name (`x_th`) where more than one is about.
//!
//! A batch is *packed*: its sequences lie one after another in one row of `t` tokens, and `cu_seqlens` (`[0, …, t]`) says where each
//! document starts. Attention is causal inside a document and never crosses its bounds; positions count from its start.
//!
//! The hot operators go through [`ops`]; this crate knows no rank, no recipe and no optimizer.
pub mod attention;
pub mod batch;
pub mod context_gate;
pub mod correlation;
pub mod init;
pub mod linear;
pub mod mlp;
pub mod moe;
pub mod mtp;
pub mod norm;
pub mod ops;
pub mod parameters;
mod recompute;
pub mod steering;
pub mod text;

pub use batch::PackedBatch;
pub use parameters::{LoadError, NamedParameters};
pub use steering::Steering;
pub use text::{Ernie, LossWeights, Losses};

/// The CPU, with a tape for gradients.
pub fn training_device() -> burn::prelude::Device {
    burn::prelude::Device::flex().autodiff()
}

/// The GPU that wgpu takes for the best, with a tape for gradients; the operators run as [`ops::plain`]. Burn looks for the device when
/// the first tensor is made and panics where there is none.
#[cfg(feature = "gpu")]
pub fn gpu_training_device() -> burn::prelude::Device {
    burn::prelude::Device::wgpu(burn::tensor::DeviceKind::DefaultDevice).autodiff()
}

/// The CPU, without a tape.
pub fn inference_device() -> burn::prelude::Device {
    burn::prelude::Device::flex()
}
