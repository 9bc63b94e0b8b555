//! One tensor of a checkpoint, under its Hugging Face name and in its Hugging Face orientation.

use std::borrow::Cow;
use std::fmt;

use half::bf16;

use crate::error::Result;
use crate::numeric;

/// Element type as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Signed byte, to be multiplied by its row's scale.
    I8,
}

impl Dtype {
    /// The type with this name in a safetensors header.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16, Self::I8].into_iter().find(|dtype| dtype.name() == name)
    }

    /// Its name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::I8 => "I8",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::I8 => 1,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor, row-major. Its bytes are borrowed from the mapped file, or owned where the `-Paddle` layout had to be
/// transposed or split.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Hugging Face name.
    pub name: String,
    /// Element type of [`Tensor::as_bytes`].
    pub dtype: Dtype,
    /// Shape in Hugging Face orientation.
    pub shape: Vec<usize>,
    pub(crate) bytes: Cow<'a, [u8]>,
    /// One per row, exactly for [`Dtype::I8`].
    pub(crate) scales: Vec<f32>,
}

impl Tensor<'_> {
    /// The stored elements, little-endian; for I8 without their scales.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements in place, where they are stored as f32 and the bytes happen to be aligned (they are in files that
    /// this program wrote).
    pub fn as_f32(&self) -> Option<&[f32]> {
        let readable = cfg!(target_endian = "little") && self.dtype == Dtype::F32;
        readable.then(|| bytemuck::try_cast_slice(&self.bytes).ok()).flatten()
    }

    /// The elements in place, where they are stored as bf16 and the bytes happen to be aligned.
    pub fn as_bf16(&self) -> Option<&[bf16]> {
        let readable = cfg!(target_endian = "little") && self.dtype == Dtype::Bf16;
        readable.then(|| bytemuck::try_cast_slice(&self.bytes).ok()).flatten()
    }

    /// The 8-bit elements with the scale of each row, where they are stored so: `weight[r, c] = q[r, c] · scale[r]`.
    pub fn as_int8(&self) -> Option<(&[i8], &[f32])> {
        (self.dtype == Dtype::I8).then(|| (bytemuck::cast_slice(&self.bytes), self.scales.as_slice()))
    }

    /// All elements in f32: exact for every float type; for I8, q · scale of the row.
    ///
    /// # Errors
    /// None at present: [`crate::Checkpoint::tensor`] has checked lengths and scales. The type leaves room for formats
    /// that are decoded here.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut values = numeric::widen(self.dtype, &self.bytes);
        if self.dtype == Dtype::I8 && !values.is_empty() {
            let row = values.len() / self.scales.len();
            for (row, scale) in values.chunks_exact_mut(row).zip(&self.scales) {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
        Ok(values)
    }

    /// Rows `rows` of a matrix in f32, as [`Tensor::to_f32`] would give them; a vector is one row.
    pub fn rows_to_f32(&self, rows: std::ops::Range<usize>) -> Vec<f32> {
        let width = self.shape.last().copied().unwrap_or(1);
        let bytes = width * self.dtype.size();
        let mut values = numeric::widen(self.dtype, &self.bytes[rows.start * bytes..rows.end * bytes]);
        if self.dtype == Dtype::I8 && width > 0 {
            for (row, scale) in values.chunks_exact_mut(width).zip(&self.scales[rows]) {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
        values
    }

    /// All elements in bf16, rounded to nearest even where they were wider.
    ///
    /// # Errors
    /// As [`Tensor::to_f32`].
    pub fn to_bf16(&self) -> Result<Vec<bf16>> {
        if self.dtype == Dtype::Bf16 {
            let (elements, _) = self.bytes.as_chunks::<2>();
            return Ok(elements.iter().map(|&b| bf16::from_le_bytes(b)).collect());
        }
        Ok(self.to_f32()?.into_iter().map(bf16::from_f32).collect())
    }
}
