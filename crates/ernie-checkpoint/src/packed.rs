//! 4-bit weights as compressed-tensors packs them: `X.weight_packed` holds eight elements of a row in each 32-bit integer, the first in its lowest bits,
//! each as q + 8; `X.weight_scale` `[rows, groups]` has a scale for each group of consecutive elements; `X.weight_shape` says `[rows, columns]`.

use crate::error::{Error, Result};
use crate::layout::{SCALE_SUFFIX, SHAPE_SUFFIX, Source};
use crate::shards::{Stored, Weights};
use crate::tensor::Dtype;

/// Elements in a 32-bit integer.
pub(crate) const PER_WORD: usize = 8;

/// `[rows, columns]` of a packed tensor.
pub(crate) fn unpacked_shape(weights: &Weights, stored: &Stored) -> Result<Vec<usize>> {
    let entry = &stored.entry;
    match (entry.dtype, entry.shape.as_slice()) {
        (Dtype::I32, &[rows, words]) if words.checked_mul(PER_WORD).is_some() => Ok(vec![rows, words * PER_WORD]),
        (dtype, shape) => {
            let problem = format!("expected a matrix of I32, got {dtype} of shape {shape:?}");
            Err(Error::Packed { file: weights.path(stored).to_owned(), tensor: entry.name.clone(), problem })
        }
    }
}

/// The scales of a packed weight, whose shape must be that of its integers. The scales may be of any float type; their number must divide the columns.
pub(crate) fn scale_of(weights: &Weights, source: &Source, name: &str, scale: Option<usize>, shape: Option<usize>) -> Result<usize> {
    let file = weights.path(&weights.stored[source.stored]).to_owned();
    let stem = name.strip_suffix(".weight").unwrap_or(name);
    let error = |problem: String| Error::Packed { file: file.clone(), tensor: name.to_owned(), problem };
    let (rows, columns) = (source.shape[0], source.shape[1]);
    if let Some(index) = shape {
        let stored = &weights.stored[index];
        let bytes = weights.bytes(stored);
        let told: Vec<i64> = match stored.entry.dtype {
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b)).collect(),
            Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|&b| i64::from(i32::from_le_bytes(b))).collect(),
            other => return Err(error(format!("expected I64 or I32 in `{stem}{SHAPE_SUFFIX}`, got {other}"))),
        };
        if told != [rows as i64, columns as i64] {
            return Err(error(format!(
                "`{stem}{SHAPE_SUFFIX}` says {told:?}, the integers hold {:?}; rows must be a multiple of {PER_WORD} long",
                source.shape
            )));
        }
    }
    let Some(index) = scale else { return Err(error(format!("`{stem}{SCALE_SUFFIX}` is missing"))) };
    let found = &weights.stored[index].entry;
    match *found.shape.as_slice() {
        [r, groups] if r == rows && groups > 0 && columns.is_multiple_of(groups) && found.dtype.is_float() => Ok(index),
        ref shape => Err(error(format!(
            "expected in `{stem}{SCALE_SUFFIX}` a float for each of {rows} rows and of groups that divide {columns} columns, got {} of shape {shape:?}",
            found.dtype
        ))),
    }
}
