//! Weights in memory, as they are multiplied.
use ernie_checkpoint::{Checkpoint, Dtype, Tensor};
use ernie_kernels::arch::dot_i8::PANEL;
use ernie_kernels::arch::pool::Pool;
use ernie_kernels::float::{self, WeightsRef};
use ernie_kernels::int4::Matrix4;
use ernie_kernels::int8::{self, Into, Matrix8, Rows8};
use ernie_kernels::swiglu;
use half::bf16;

use crate::error::{Error, Result};

/// In which form matrices are kept. Sums are f32 or exact integers in any case; norms and the router always stay f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightDtype {
    /// As the files have them: 8-bit, experts of 4 bits, bf16, else f32. Nothing is rounded.
    #[default]
    Auto,
    /// f32: exact, twice the memory of bf16.
    F32,
    /// bf16: f32 and 8-bit weights are rounded to it.
    Bf16,
    /// 8 bits with a scale per row, activations rounded to 8 bits per token: a quarter of the memory of f32, and much faster.
    Int8,
}

/// A matrix `[n, k]`.
#[derive(Debug)]
pub enum Matrix {
    /// 32-bit values, row-major.
    F32(Vec<f32>),
    /// bfloat16 values, row-major.
    Bf16(Vec<bf16>),
    /// Bytes, packed, with their scales; a bias is part of it.
    Int8(Matrix8),
}

/// Activations that are multiplied: the values, and the same as bytes if a matrix of bytes asks for them.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// `[t, k]`; this and the next up to date only where a layer [`Needs`] them.
    pub values: &'a [f32],
    /// `[t, k]`.
    pub rows: &'a Rows8,
}

/// What a layer reads of an [`Input`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// The values alone.
    Values,
    /// The bytes alone.
    Bytes,
    /// Both: a router beside experts of bytes.
    Both,
}

/// y = W x (+ b).
#[derive(Debug)]
pub struct Linear {
    /// `[n, k]`.
    pub matrix: Matrix,
    /// `[n]`; for bytes it is in the matrix.
    bias: Option<Vec<f32>>,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

impl Linear {
    /// Whether it multiplies bytes.
    pub fn is_int8(&self) -> bool {
        matches!(self.matrix, Matrix::Int8(_))
    }

    /// What it reads of its input.
    pub fn needs(&self) -> Needs {
        if self.is_int8() { Needs::Bytes } else { Needs::Values }
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        (self.n as f64 * self.k as f64 * self.bytes_per_weight()) as usize
    }

    /// Memory of one weight.
    pub fn bytes_per_weight(&self) -> f64 {
        match &self.matrix {
            Matrix::F32(_) => 4.0,
            Matrix::Bf16(_) => 2.0,
            Matrix::Int8(_) => 1.0,
        }
    }

    /// x `[t, k]` → y `[t, n]`, added to y with `add`.
    pub fn forward(&self, pool: &Pool, y_tn: &mut [f32], x: Input<'_>, add: bool) {
        let float = |y_tn: &mut [f32], w| {
            let t = y_tn.len() / self.n;
            float::linear(pool, y_tn, &x.values[..t * self.k], w, self.bias.as_deref(), t, self.n, self.k, add);
        };
        match &self.matrix {
            Matrix::F32(w) => float(y_tn, WeightsRef::F32(w)),
            Matrix::Bf16(w) => float(y_tn, WeightsRef::Bf16(w)),
            Matrix::Int8(w) => int8::linear(pool, y_tn, x.rows, w, if add { Into::Add } else { Into::Set }),
        }
    }

    /// Row `row`, widened, `[k]`: for embeddings.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.k..(row + 1) * self.k;
        match &self.matrix {
            Matrix::F32(w) => out.copy_from_slice(&w[range]),
            Matrix::Bf16(w) => out.iter_mut().zip(&w[range]).for_each(|(o, v)| *o = v.to_f32()),
            Matrix::Int8(w) => w.copy_row(row, out),
        }
    }
}

/// silu(gate x) · (up x): both projections as one matrix. In floats the rows of gate come before those of up; in bytes panels of sixteen rows
/// alternate, and `i` is rounded up to whole panels, whose outputs are zero.
#[derive(Debug)]
pub struct GateUp {
    linear: Linear,
    /// Outputs.
    pub i: usize,
}

impl GateUp {
    /// Whether it multiplies bytes.
    pub fn is_int8(&self) -> bool {
        self.linear.is_int8()
    }

    /// What it reads of its input.
    pub fn needs(&self) -> Needs {
        self.linear.needs()
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        self.linear.bytes()
    }

    /// x `[t, h]` → y `[t, i]`; `both` is working memory.
    pub fn forward(&self, pool: &Pool, y_ti: &mut [f32], both: &mut Vec<f32>, x: Input<'_>) {
        if let Matrix::Int8(w) = &self.linear.matrix {
            return int8::linear(pool, y_ti, x.rows, w, Into::SwiGlu);
        }
        let t = y_ti.len() / self.i;
        both.resize(t * 2 * self.i, 0.0);
        self.linear.forward(pool, both, x, false);
        for (y_i, both) in y_ti.chunks_exact_mut(self.i).zip(both.chunks_exact(2 * self.i)) {
            let (gate_i, up_i) = both.split_at(self.i);
            swiglu::forward_block(y_i, gate_i, up_i);
        }
    }
}

/// Reads a checkpoint's tensors by name and shape.
pub struct Loader<'a> {
    /// The files.
    pub checkpoint: &'a Checkpoint,
    /// Form of the matrices.
    pub dtype: WeightDtype,
    /// Threads that pack.
    pub pool: &'a Pool,
}

/// A matrix `[rows, k]` of the checkpoint, and its bias.
struct Part<'a> {
    tensor: Tensor<'a>,
    rows: usize,
    bias: Option<Vec<f32>>,
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

    /// An f32 tensor of this shape, flat.
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.checkpoint.validate_numbers(name)?;
        Ok(self.tensor(name, shape)?.to_f32()?)
    }

    /// `name`, `[n, k]`, as a layer without a bias: an embedding or a head.
    pub fn matrix(&self, name: &str, n: usize, k: usize, bias: Option<&str>) -> Result<Linear> {
        let bias = bias.map(|name| self.f32(name, &[n])).transpose()?;
        self.rows(vec![Part { tensor: self.tensor(name, &[n, k])?, rows: n, bias }], k)
    }

    /// `prefix.weight` and, if `bias`, `prefix.bias`, for each of several projections of the same input, as one matrix: their outputs side by side.
    pub fn linear(&self, projections: &[(String, usize)], k: usize, bias: bool) -> Result<Linear> {
        let parts = projections.iter().map(|(prefix, n)| self.part(prefix, *n, k, bias)).collect::<Result<_>>()?;
        self.rows(parts, k)
    }

    fn part(&self, prefix: &str, n: usize, k: usize, bias: bool) -> Result<Part<'_>> {
        let bias = bias.then(|| self.f32(&format!("{prefix}.bias"), &[n])).transpose()?;
        Ok(Part { tensor: self.tensor(&format!("{prefix}.weight"), &[n, k])?, rows: n, bias })
    }

    fn rows(&self, parts: Vec<Part<'_>>, k: usize) -> Result<Linear> {
        let n = parts.iter().map(|part| part.rows).sum();
        let mut bias: Option<Vec<f32>> = None;
        for part in &parts {
            if let Some(part) = &part.bias {
                bias.get_or_insert_default().extend(part);
            }
        }
        let all: Vec<&Part<'_>> = parts.iter().collect();
        let matrix = match self.form(&all) {
            Dtype::I8 => {
                let matrix = self.pack(&all, n, k, k, |row| {
                    let mut row = row;
                    for (index, part) in parts.iter().enumerate() {
                        if row < part.rows {
                            return Some((index, row));
                        }
                        row -= part.rows;
                    }
                    None
                })?;
                Matrix::Int8(match bias.take() {
                    Some(bias) => matrix.with_bias(&bias),
                    None => matrix,
                })
            }
            Dtype::Bf16 => {
                self.validate(&all)?;
                let mut values = Vec::with_capacity(n * k);
                parts.iter().try_for_each(|part| part.tensor.to_bf16().map(|part| values.extend(part)))?;
                Matrix::Bf16(values)
            }
            _ => {
                self.validate(&all)?;
                let mut values = Vec::with_capacity(n * k);
                parts.iter().try_for_each(|part| part.tensor.to_f32().map(|part| values.extend(part)))?;
                Matrix::F32(values)
            }
        };
        self.release(&all);
        Ok(Linear { matrix, bias, n, k })
    }

    /// Gate and up projection of an MLP.
    pub fn gate_up(&self, prefix: &str, i: usize, h: usize, bias: bool) -> Result<GateUp> {
        let (gate, up) = (format!("{prefix}.gate_proj"), format!("{prefix}.up_proj"));
        let parts = [self.part(&gate, i, h, bias)?, self.part(&up, i, h, bias)?];
        if self.form(&[&parts[0], &parts[1]]) != Dtype::I8 {
            drop(parts);
            return Ok(GateUp { linear: self.linear(&[(gate, i), (up, i)], h, bias)?, i });
        }
        let matrix = self.alternating(&[parts], i, h)?;
        let padded = i.next_multiple_of(PANEL);
        Ok(GateUp { linear: Linear { matrix: Matrix::Int8(matrix), bias: None, n: 2 * padded, k: h }, i: padded })
    }

    /// The down projection that goes with [`Loader::gate_up`]: in bytes its input is as wide as that one's output.
    pub fn down(&self, prefix: &str, h: usize, i: usize, bias: bool) -> Result<Linear> {
        let part = self.part(&format!("{prefix}.down_proj"), h, i, bias)?;
        if self.form(&[&part]) != Dtype::I8 {
            drop(part);
            return self.linear(&[(format!("{prefix}.down_proj"), h)], i, bias);
        }
        let matrix = self.stacked(&[part], h, i)?;
        Ok(Linear { matrix: Matrix::Int8(matrix), bias: None, n: h, k: i.next_multiple_of(PANEL) })
    }

    /// The routed experts `0..experts` as two matrices of bytes, one expert's rows after the other's; `None` if they are not to be bytes.
    pub fn experts8(&self, prefix: &str, experts: usize, i: usize, h: usize, bias: bool) -> Result<Option<(Matrix8, Matrix8)>> {
        let part = |expert: usize, name: &str, n, k| self.part(&format!("{prefix}.{expert}.{name}"), n, k, bias);
        if self.form(&[&part(0, "gate_proj", i, h)?]) != Dtype::I8 {
            return Ok(None);
        }
        let pairs: Vec<[Part<'_>; 2]> =
            (0..experts).map(|e| Ok([part(e, "gate_proj", i, h)?, part(e, "up_proj", i, h)?])).collect::<Result<_>>()?;
        let gate_up = self.alternating(&pairs, i, h)?;
        let downs: Vec<Part<'_>> = (0..experts).map(|e| part(e, "down_proj", h, i)).collect::<Result<_>>()?;
        let down = self.stacked(&downs, h, i)?;
        Ok(Some((gate_up, down)))
    }

    /// The routed experts as [`Loader::experts8`] gives them, of 4 bits; `None` if the files have them otherwise, or in groups that the kernels do not take.
    pub fn experts4(&self, prefix: &str, experts: usize, i: usize, h: usize, bias: bool) -> Result<Option<(Matrix4, Matrix4)>> {
        let part = |expert: usize, name: &str, n, k| self.part(&format!("{prefix}.{expert}.{name}"), n, k, bias);
        if self.dtype != WeightDtype::Auto || part(0, "gate_proj", i, h)?.tensor.dtype != Dtype::I4 {
            return Ok(None);
        }
        let (mut ups, mut downs) = (Vec::with_capacity(2 * experts), Vec::with_capacity(experts));
        for expert in 0..experts {
            ups.extend([part(expert, "gate_proj", i, h)?, part(expert, "up_proj", i, h)?]);
            downs.push(part(expert, "down_proj", h, i)?);
        }
        let (Some(group_up), Some(group_down)) = (group_of(&ups, h), group_of(&downs, i)) else { return Ok(None) };
        if !i.is_multiple_of(PANEL) {
            return Ok(None);
        }
        let gate_up = self.pack4(&ups, experts * 2 * i, h, group_up, |row| alternating(row, i))?;
        let each = h.next_multiple_of(PANEL);
        let down = self.pack4(&downs, experts * each, i, group_down, |row| (row % each < h).then_some((row / each, row % each)))?;
        Ok(Some((gate_up, down)))
    }

    /// Packs `n` rows of `k` 4-bit weights; `source` names a part and its row.
    fn pack4(
        &self,
        parts: &[Part<'_>],
        n: usize,
        k: usize,
        group: usize,
        source: impl Fn(usize) -> Option<(usize, usize)> + Sync,
    ) -> Result<Matrix4> {
        let fill = |row: usize, bytes: &mut [u8], scales: &mut [bf16]| {
            let Some((part, row)) = source(row) else { return };
            let weights = parts[part].tensor.as_int4().expect("all parts have been asked");
            bytes.copy_from_slice(&weights.bytes[row * k / 2..][..k / 2]);
            let own = &weights.scales[row * (k / group)..];
            scales.iter_mut().zip(own).for_each(|(scale, own)| *scale = bf16::from_f32(*own));
        };
        let matrix = Matrix4::pack(self.pool, n, k, group, fill).map_err(|_| Error::NoMemoryForWeights { bytes: n * k / 2 })?;
        let parts: Vec<&Part<'_>> = parts.iter().collect();
        self.release(&parts);
        let bias = parts.iter().any(|part| part.bias.is_some());
        Ok(if bias { matrix.with_bias(&biases(&parts, n, source)) } else { matrix })
    }

    /// Pairs of gate and up `[i, h]` as panels that alternate.
    fn alternating(&self, pairs: &[[Part<'_>; 2]], i: usize, h: usize) -> Result<Matrix8> {
        let each = 2 * i.next_multiple_of(PANEL);
        let source = |row: usize| alternating(row, i);
        let parts: Vec<&Part<'_>> = pairs.iter().flatten().collect();
        let matrix = self.pack(&parts, pairs.len() * each, h, h, source)?;
        self.release(&parts);
        let bias = parts.iter().any(|part| part.bias.is_some());
        Ok(if bias { matrix.with_bias(&biases(&parts, pairs.len() * each, source)) } else { matrix })
    }

    /// Matrices `[h, i]` one below the other, each from a whole panel on; columns are padded with zeros to whole panels.
    fn stacked(&self, parts: &[Part<'_>], h: usize, i: usize) -> Result<Matrix8> {
        let each = h.next_multiple_of(PANEL);
        let n = if parts.len() == 1 { h } else { parts.len() * each };
        let source = |row: usize| (row % each < h).then_some((row / each, row % each));
        let parts: Vec<&Part<'_>> = parts.iter().collect();
        let matrix = self.pack(&parts, n, i.next_multiple_of(PANEL), i, source)?;
        self.release(&parts);
        let bias = parts.iter().any(|part| part.bias.is_some());
        Ok(if bias { matrix.with_bias(&biases(&parts, n, source)) } else { matrix })
    }

    /// The form in which these matrices are kept as one.
    fn form(&self, parts: &[&Part<'_>]) -> Dtype {
        match self.dtype {
            WeightDtype::F32 => Dtype::F32,
            WeightDtype::Bf16 => Dtype::Bf16,
            WeightDtype::Int8 => Dtype::I8,
            WeightDtype::Auto => {
                let first = parts[0].tensor.dtype;
                let alike = parts.iter().all(|part| part.tensor.dtype == first);
                if alike && matches!(first, Dtype::I8 | Dtype::Bf16) { first } else { Dtype::F32 }
            }
        }
    }

    /// Packs `n` rows of `k` bytes, of which a part's row gives the first `width`; `source` names the part and its row.
    fn pack(
        &self,
        parts: &[&Part<'_>],
        n: usize,
        k: usize,
        width: usize,
        source: impl Fn(usize) -> Option<(usize, usize)> + Sync,
    ) -> Result<Matrix8> {
        if k > int8::MAX_K {
            return Err(Error::Unsupported { what: "8-bit weights with such long rows", instead: "keep them in bf16" });
        }
        let fill = |row: usize, out: &mut [i8]| {
            let Some((part, row)) = source(row) else { return 0.0 };
            let out = &mut out[..width];
            match parts[part].tensor.as_int8() {
                Some((bytes, scales)) => {
                    out.copy_from_slice(&bytes[row * width..][..width]);
                    scales[row]
                }
                None => {
                    let values = parts[part].tensor.rows_to_f32(row..row + 1);
                    ernie_checkpoint::quantise_row(&values, out)
                }
            }
        };
        let matrix = Matrix8::pack(self.pool, n, k, fill).map_err(|_| Error::NoMemoryForWeights { bytes: n * k })?;
        // Rounding a row that has something other than numbers gives it the scale NaN: then it is looked for.
        if !matrix.is_finite() {
            self.validate(parts)?;
        }
        Ok(matrix)
    }

    fn validate(&self, parts: &[&Part<'_>]) -> Result<()> {
        parts.iter().try_for_each(|part| Ok(self.checkpoint.validate_numbers(&part.tensor.name)?))
    }

    /// The pages of tensors that have been copied need not stay in memory.
    fn release(&self, parts: &[&Part<'_>]) {
        for part in parts {
            self.checkpoint.release(&part.tensor.name);
        }
    }
}

/// Which matrix and which of its rows stands at `row` where panels of gate and up `[i, …]` alternate, pair by pair.
fn alternating(row: usize, i: usize) -> Option<(usize, usize)> {
    let each = 2 * i.next_multiple_of(PANEL);
    let (pair, row) = (row / each, row % each);
    let (panel, lane) = (row / PANEL, row % PANEL);
    let row = panel / 2 * PANEL + lane;
    (row < i).then_some((2 * pair + panel % 2, row))
}

/// The group that the scales of 4-bit matrices with `k` columns are for: one for all of them, and scales that bf16 holds exactly.
fn group_of(parts: &[Part<'_>], k: usize) -> Option<usize> {
    let group = parts.first()?.tensor.as_int4()?.group;
    let alike = parts.iter().all(|part| {
        part.tensor.as_int4().is_some_and(|w| w.group == group && w.scales.iter().all(|scale| bf16::from_f32(*scale).to_f32() == *scale))
    });
    (alike && Matrix4::can_pack(k, group)).then_some(group)
}

/// The biases of packed rows, zero where there are none.
fn biases(parts: &[&Part<'_>], n: usize, source: impl Fn(usize) -> Option<(usize, usize)>) -> Vec<f32> {
    let bias = |row| source(row).and_then(|(part, row)| parts[part].bias.as_ref().map(|bias| bias[row]));
    (0..n).map(|row| bias(row).unwrap_or(0.0)).collect()
}
