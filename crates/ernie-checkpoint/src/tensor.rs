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
    /// Signed 4-bit integer, to be multiplied by its group's scale. Eight are stored in each [`Dtype::I32`] of a tensor `…weight_packed`.
    I4,
    /// 32-bit integer: only as what [`Dtype::I4`] is stored in.
    I32,
    /// 64-bit integer: only as the shape of a packed tensor.
    I64,
}

impl Dtype {
    /// The type with this name in a safetensors header.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16, Self::I8, Self::I32, Self::I64].into_iter().find(|dtype| dtype.name() == name)
    }

    /// Its name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::I8 => "I8",
            Self::I4 => "I4",
            Self::I32 => "I32",
            Self::I64 => "I64",
        }
    }

    /// Bits of one element.
    pub fn bits(self) -> usize {
        match self {
            Self::I64 => 64,
            Self::F32 | Self::I32 => 32,
            Self::Bf16 | Self::F16 => 16,
            Self::I8 => 8,
            Self::I4 => 4,
        }
    }

    /// Bytes of one element that is stored by itself: all but [`Dtype::I4`], of which two make a byte.
    pub(crate) fn size(self) -> usize {
        self.bits().div_ceil(8)
    }

    /// Whether elements are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::Bf16 | Self::F16)
    }

    /// Whether elements are integers with scales.
    pub fn is_quantised(self) -> bool {
        matches!(self, Self::I8 | Self::I4)
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
    /// One per row for [`Dtype::I8`], one per group, `[rows, groups]`, for [`Dtype::I4`], none for the others.
    pub(crate) scales: Vec<f32>,
}

/// 4-bit elements: `weight[r, c] = (q[r, c] − 8) · scale[r, c / group]`.
#[derive(Debug, Clone, Copy)]
pub struct Int4<'a> {
    /// q, two to a byte, the first in its low half: `[rows, columns / 2]`.
    pub bytes: &'a [u8],
    /// `[rows, columns / group]`.
    pub scales: &'a [f32],
    /// Elements of a row that share a scale.
    pub group: usize,
}

impl Tensor<'_> {
    /// The stored elements, little-endian; for I8 and I4 without their scales.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() * 8 / self.dtype.bits()
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

    /// The 4-bit elements with the scales of their groups, where they are stored so.
    pub fn as_int4(&self) -> Option<Int4<'_>> {
        (self.dtype == Dtype::I4).then(|| Int4 { bytes: &self.bytes, scales: &self.scales, group: self.group() })
    }

    /// Elements that share a scale.
    fn group(&self) -> usize {
        self.len() / self.scales.len().max(1)
    }

    /// All elements in f32: exact for every float type; for I8 and I4, q · scale of the row or group.
    ///
    /// # Errors
    /// None at present: [`crate::Checkpoint::tensor`] has checked lengths and scales. The type leaves room for formats
    /// that are decoded here.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut values = numeric::widen(self.dtype, &self.bytes);
        self.scale(&mut values, 0);
        Ok(values)
    }

    /// Rows `rows` of a matrix in f32, as [`Tensor::to_f32`] would give them; a vector is one row.
    pub fn rows_to_f32(&self, rows: std::ops::Range<usize>) -> Vec<f32> {
        let width = self.shape.last().copied().unwrap_or(1);
        let bytes = width * self.dtype.bits() / 8;
        let mut values = numeric::widen(self.dtype, &self.bytes[rows.start * bytes..rows.end * bytes]);
        self.scale(&mut values, rows.start * width);
        values
    }

    /// Multiplies values by their scales, if they have any; the first is element `first`, and begins a row.
    fn scale(&self, values: &mut [f32], first: usize) {
        let group = self.group();
        if !self.dtype.is_quantised() || group == 0 {
            return;
        }
        for (values, scale) in values.chunks_exact_mut(group).zip(&self.scales[first / group..]) {
            values.iter_mut().for_each(|x| *x *= scale);
        }
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
