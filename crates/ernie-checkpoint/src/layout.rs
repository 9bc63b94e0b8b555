//! From stored tensors to Hugging Face names and shapes.
//!
//! The `-Paddle` releases have the prefix `ernie.`, fuse q|k|v into `qkv_proj` and gate|up into `up_gate_proj`, and store
//! matrices [in, out]. Which layout a checkpoint has is decided once, by its names: a square matrix alone cannot tell.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use crate::config::{Config, Family};
use crate::error::{Error, Result};
use crate::packed;
use crate::shards::{Stored, Weights};
use crate::tensor::Dtype;

/// How the tensors of a checkpoint are named and oriented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Hugging Face: matrices [out, in], one tensor per projection.
    HuggingFace,
    /// PaddlePaddle: prefix `ernie.`, fused projections, matrices [in, out].
    Paddle,
}

/// What must be done to stored bytes to get the Hugging Face tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Transform {
    /// Nothing.
    None,
    /// Take these columns of an [in, out] matrix and transpose them into [out, in].
    Columns(Range<usize>),
    /// Take these elements of a vector.
    Part(Range<usize>),
}

/// Where a Hugging Face tensor comes from.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// Index into [`Weights::stored`].
    pub(crate) stored: usize,
    /// Shape in Hugging Face orientation.
    pub(crate) shape: Vec<usize>,
    pub(crate) transform: Transform,
    /// Type of the elements: the stored one, but [`Dtype::I4`] for packed integers.
    pub(crate) dtype: Dtype,
    /// Index into [`Weights::stored`] of the scales of I8 and I4.
    pub(crate) scale: Option<usize>,
}

/// Hugging Face names and where each comes from, and the stored tensors that belong to none.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) layout: Layout,
    pub(crate) sources: BTreeMap<String, Source>,
    /// Indices into [`Weights::stored`]: scales and shapes without a weight.
    pub(crate) orphans: Vec<usize>,
}

/// Ending of a scale's name; its weight has `weight` instead.
pub(crate) const SCALE_SUFFIX: &str = ".weight_scale";
/// Endings of the names of 4-bit weights and of the shapes that they have unpacked.
pub(crate) const PACKED_SUFFIX: &str = ".weight_packed";
pub(crate) const SHAPE_SUFFIX: &str = ".weight_shape";

pub(crate) fn table(weights: &Weights, config: &Config) -> Result<Table> {
    let paddle = weights.stored.iter().any(|s| {
        let name = &s.entry.name;
        name.starts_with("ernie.") || name.contains(".qkv_proj.") || name.contains(".up_gate_proj.")
    });
    let layout = if paddle { Layout::Paddle } else { Layout::HuggingFace };
    let mut sources = BTreeMap::new();
    let (mut scales, mut shapes) = (BTreeMap::new(), BTreeMap::new());
    for (index, stored) in weights.stored.iter().enumerate() {
        let name = &stored.entry.name;
        if let Some(stem) = name.strip_suffix(SCALE_SUFFIX) {
            scales.insert(format!("{stem}.weight"), index);
            continue;
        }
        if let Some(stem) = name.strip_suffix(SHAPE_SUFFIX) {
            shapes.insert(format!("{stem}.weight"), index);
            continue;
        }
        let mut dtype = stored.entry.dtype;
        let parts = match (layout, name.strip_suffix(PACKED_SUFFIX)) {
            (Layout::HuggingFace, Some(stem)) => {
                let shape = packed::unpacked_shape(weights, stored)?;
                dtype = Dtype::I4;
                vec![(format!("{stem}.weight"), shape, Transform::None)]
            }
            _ if matches!(dtype, Dtype::I32 | Dtype::I64) => {
                let (file, tensor) = (weights.path(stored).to_owned(), name.clone());
                return Err(Error::UnsupportedDtype { file, tensor, expected: "F32, BF16, F16 or I8", got: dtype.to_string() });
            }
            (Layout::HuggingFace, None) => vec![hugging_face(released_name(name), &stored.entry.shape)],
            (Layout::Paddle, _) => from_paddle(weights.path(stored), stored, config)?,
        };
        for (name, shape, transform) in parts {
            let source = Source { stored: index, shape, transform, dtype, scale: None };
            if let Some(first) = sources.insert(name.clone(), source) {
                let file = weights.path(stored).to_owned();
                let first = weights.path(&weights.stored[first.stored]).to_owned();
                return Err(Error::DuplicateTensor { file, tensor: name, first });
            }
        }
    }
    for (name, source) in &mut sources {
        let scale = scales.remove(name);
        let stored = &weights.stored[source.stored];
        match source.dtype {
            Dtype::I8 => source.scale = Some(scale_of(weights, stored, name, layout, scale)?),
            Dtype::I4 => source.scale = Some(packed::scale_of(weights, source, name, scale, shapes.remove(name))?),
            // A scale beside a float weight would be ignored in silence; it is reported as surplus.
            _ => scales.extend(scale.map(|index| (name.clone(), index))),
        }
    }
    Ok(Table { layout, sources, orphans: scales.into_values().chain(shapes.into_values()).collect() })
}

type Part = (String, Vec<usize>, Transform);

/// transformers 5 writes the vision transformer under `model.vision_model.`, the releases have it at the top.
fn released_name(name: &str) -> &str {
    match name.strip_prefix("model.") {
        Some(rest) if rest.starts_with("vision_model.") => rest,
        _ => name,
    }
}

/// As stored, but for the MTP projection [h, 2h], which one release stores transposed.
fn hugging_face(name: &str, shape: &[usize]) -> Part {
    if name.contains("mtp_linear_proj")
        && let &[rows, columns] = shape
        && rows > columns
    {
        return (name.to_owned(), vec![columns, rows], Transform::Columns(0..columns));
    }
    (name.to_owned(), shape.to_vec(), Transform::None)
}

fn from_paddle(file: &Path, stored: &Stored, config: &Config) -> Result<Vec<Part>> {
    let (stored_name, dtype, shape) = (&stored.entry.name, stored.entry.dtype, &stored.entry.shape);
    if dtype == Dtype::I8 {
        return Err(Error::UnsupportedDtype {
            file: file.into(),
            tensor: stored_name.clone(),
            expected: "F32, BF16 or F16 in the -Paddle layout",
            got: dtype.to_string(),
        });
    }
    let name = match stored_name.strip_prefix("ernie.") {
        Some(rest) => released_name(&format!("model.{rest}")).to_owned(),
        None => stored_name.clone(),
    };
    let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    if let Some((prefix, suffix)) = name.split_once("qkv_proj.") {
        let widths = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        return split(file, stored, prefix, suffix, &widths, config.hidden_size);
    }
    if let Some((prefix, suffix)) = name.split_once("up_gate_proj.") {
        let half = shape.last().map_or(0, |columns| columns / 2);
        return split(file, stored, prefix, suffix, &[("gate_proj", half), ("up_proj", half)], config.hidden_size);
    }
    // The MTP projection comes in both orientations, which its shape tells apart.
    if name.contains("mtp_linear_proj") {
        return Ok(vec![hugging_face(&name, shape)]);
    }
    // The embedding is a table, not a linear map; the vision-language routers are [hidden, experts] in both layouts.
    let router = name.contains(".mlp.gate.weight");
    let as_stored = name.ends_with("embed_tokens.weight") || (router && config.family == Family::VlMoe) || !(name.ends_with(".weight"));
    match shape.as_slice() {
        &[rows, columns] if !as_stored => Ok(vec![(name, vec![columns, rows], Transform::Columns(0..columns))]),
        _ => Ok(vec![(name, shape.clone(), Transform::None)]),
    }
}

/// Splits a fused projection along its output dimension.
fn split(file: &Path, stored: &Stored, prefix: &str, suffix: &str, widths: &[(&str, usize)], hidden: usize) -> Result<Vec<Part>> {
    let shape = &stored.entry.shape;
    let total: usize = widths.iter().map(|w| w.1).sum();
    let fits = matches!(*shape.as_slice(), [columns] | [_, columns] if columns == total);
    if !fits {
        let expected = if shape.len() == 1 { vec![total] } else { vec![hidden, total] };
        let (tensor, got) = (stored.entry.name.clone(), shape.clone());
        return Err(Error::Misshapen { file: file.into(), tensor, expected, got });
    }
    let mut begin = 0;
    let mut part = |&(name, width): &(&str, usize)| {
        let range = begin..begin + width;
        begin += width;
        let name = format!("{prefix}{name}.{suffix}");
        match *shape.as_slice() {
            [rows, _] => (name, vec![width, rows], Transform::Columns(range)),
            _ => (name, vec![width], Transform::Part(range)),
        }
    };
    Ok(widths.iter().map(&mut part).collect())
}

/// The scales of an I8 weight: present, a float type, one per row.
fn scale_of(weights: &Weights, stored: &Stored, name: &str, layout: Layout, scale: Option<usize>) -> Result<usize> {
    let file = weights.path(stored).to_owned();
    let &[rows, _] = stored.entry.shape.as_slice() else {
        let expected = "F32, BF16 or F16 for what is not a matrix";
        return Err(Error::UnsupportedDtype { file, tensor: name.into(), expected, got: "I8".into() });
    };
    debug_assert_eq!(layout, Layout::HuggingFace, "refused before in the -Paddle layout");
    let scale_name = format!("{}{SCALE_SUFFIX}", name.strip_suffix(".weight").unwrap_or(name));
    let error = |got: String| Error::Scale { file, tensor: name.into(), scale: scale_name, rows, got };
    let Some(index) = scale else { return Err(error("it is missing".into())) };
    let found = &weights.stored[index].entry;
    let per_row = found.shape == [rows, 1] || found.shape == [rows];
    if !per_row || !found.dtype.is_float() {
        return Err(error(format!("its shape is {:?}, its dtype {}", found.shape, found.dtype)));
    }
    Ok(index)
}

impl Transform {
    /// The Hugging Face tensor's bytes from the stored ones; `None` where they are the same.
    pub(crate) fn apply(&self, bytes: &[u8], dtype: Dtype, stored_shape: &[usize]) -> Option<Vec<u8>> {
        match self {
            Self::None => None,
            Self::Part(range) => Some(bytes[range.start * dtype.size()..range.end * dtype.size()].to_vec()),
            Self::Columns(range) => {
                let columns = stored_shape.last().copied().unwrap_or(0);
                Some(match dtype.size() {
                    4 => transpose_columns::<4>(bytes, columns, range.clone()),
                    2 => transpose_columns::<2>(bytes, columns, range.clone()),
                    _ => transpose_columns::<1>(bytes, columns, range.clone()),
                })
            }
        }
    }
}

/// Columns `range` of a matrix with `columns` columns and elements of N bytes, transposed. In square tiles, so that
/// both sides stay in cache.
fn transpose_columns<const N: usize>(bytes: &[u8], columns: usize, range: Range<usize>) -> Vec<u8> {
    const TILE: usize = 32;
    let (input, _) = bytes.as_chunks::<N>();
    let rows = input.len().checked_div(columns).unwrap_or(0);
    let width = range.len();
    let mut out = vec![0; width * rows * N];
    let (output, _) = out.as_chunks_mut::<N>();
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..width).step_by(TILE) {
            for c in c0..(c0 + TILE).min(width) {
                for r in r0..(r0 + TILE).min(rows) {
                    output[c * rows + r] = input[r * columns + range.start + c];
                }
            }
        }
    }
    out
}
