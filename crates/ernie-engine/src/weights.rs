//! Weights in memory, as they are multiplied.
use ernie_checkpoint::{Checkpoint, Dtype, Tensor};
use ernie_kernels::decode::{self, WeightsRef};
use half::bf16;

use crate::error::Result;

/// In which form matrices are kept. Sums are f32 in any case; norms, biases and the router always stay f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightDtype {
    /// bf16 where the files have bf16, else f32: nothing is rounded.
    #[default]
    Auto,
    /// f32: exact, twice the memory of bf16.
    F32,
    /// bf16: f32 and 8-bit weights are rounded to it.
    Bf16,
}

/// A matrix, row-major.
#[derive(Clone, Debug)]
pub enum Weights {
    /// 32-bit values.
    F32(Vec<f32>),
    /// bfloat16 values.
    Bf16(Vec<bf16>),
}

impl Weights {
    fn load(tensor: &Tensor<'_>, dtype: WeightDtype) -> Result<Self> {
        let keep_bf16 = match dtype {
            WeightDtype::Auto => tensor.dtype == Dtype::Bf16,
            WeightDtype::F32 => false,
            WeightDtype::Bf16 => true,
        };
        Ok(if keep_bf16 { Weights::Bf16(tensor.to_bf16()?) } else { Weights::F32(tensor.to_f32()?) })
    }

    /// For the kernels.
    pub fn view(&self) -> WeightsRef<'_> {
        match self {
            Weights::F32(w) => WeightsRef::F32(w),
            Weights::Bf16(w) => WeightsRef::Bf16(w),
        }
    }

    /// Row `row` of a matrix of `width` columns, widened.
    pub fn copy_row(&self, row: usize, width: usize, out: &mut [f32]) {
        let range = row * width..(row + 1) * width;
        match self {
            Weights::F32(w) => out.copy_from_slice(&w[range]),
            Weights::Bf16(w) => out.iter_mut().zip(&w[range]).for_each(|(o, v)| *o = v.to_f32()),
        }
    }
}

/// y = W x (+ b).
#[derive(Clone, Debug)]
pub struct Linear {
    /// [n, k].
    pub weights: Weights,
    /// [n].
    pub bias: Option<Vec<f32>>,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

impl Linear {
    /// x: [t, k] → [t, n].
    pub fn forward(&self, x_tk: &[f32]) -> Vec<f32> {
        let t = x_tk.len() / self.k;
        let mut y_tn = vec![0.0; t * self.n];
        decode::linear(&mut y_tn, x_tk, self.weights.view(), self.bias.as_deref(), t, self.n, self.k);
        y_tn
    }
}

/// Reads a checkpoint's tensors by name and shape.
pub struct Loader<'a> {
    /// The files.
    pub checkpoint: &'a Checkpoint,
    /// Form of the matrices.
    pub dtype: WeightDtype,
}

impl Loader<'_> {
    /// The tensor, which must have this shape.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let tensor = self.checkpoint.tensor(name)?;
        if tensor.shape != shape {
            let (file, tensor, got) = (self.checkpoint.origin().to_owned(), name.to_owned(), tensor.shape);
            return Err(ernie_checkpoint::Error::Misshapen { file, tensor, expected: shape.to_owned(), got }.into());
        }
        Ok(tensor)
    }

    /// A matrix `[n, k]` kept as `dtype` says.
    pub fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Weights> {
        Weights::load(&self.tensor(name, &[n, k])?, self.dtype)
    }

    /// An f32 tensor of this shape, flat.
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        Ok(self.tensor(name, shape)?.to_f32()?)
    }

    /// `prefix.weight` and, if `bias`, `prefix.bias`.
    pub fn linear(&self, prefix: &str, n: usize, k: usize, bias: bool) -> Result<Linear> {
        let weights = self.matrix(&format!("{prefix}.weight"), n, k)?;
        let bias = bias.then(|| self.f32(&format!("{prefix}.bias"), &[n])).transpose()?;
        Ok(Linear { weights, bias, n, k })
    }
}
