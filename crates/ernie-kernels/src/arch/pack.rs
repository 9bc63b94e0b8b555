//! Operands laid out for the tiles: panels of `W` rows, each panel column by column, so that the innermost loop reads memory in order.
#![allow(unsafe_code)] // transposing sixteen by sixteen in registers

use rayon::prelude::*;

use super::gemm::Threads;
use super::isa::{Isa, isa};
use super::matrix::Mat;
use crate::scratch::Scratch;

/// How many panels of `width` rows are filled together. Where a matrix lies column by column, neighbouring panels share cache lines and pages, which are then not fetched again for each:
/// 48 or 64 of its rows, three or four lines. Elsewhere they share nothing.
pub(super) fn group(parts: &[Mat<'_>], width: usize) -> usize {
    match parts.iter().any(|part| part.strides().0 == 1) {
        true if width < 16 => 4,
        true => 2,
        false => 1,
    }
}

/// Columns of such a matrix that are packed at a time: their pages are few enough to be remembered from one panel to the next.
const SLICE: usize = 64;

/// A matrix `[rows, k]` in panels of `W` rows: element (r, l) is `data[(r / W) * W * k + l * W + r % W]`; missing rows of the last panel are zero.
pub struct Packed<const W: usize> {
    data: Scratch,
    rows: usize,
    k: usize,
}

impl<const W: usize> Packed<W> {
    /// Packs `x[rows, k]`, whose rows or whose columns must lie contiguously.
    pub fn new(x: Mat<'_>, threads: Threads) -> Self {
        Self::stacked(&[x], threads)
    }

    /// Packs matrices with equally many rows, one behind the other along k.
    pub fn stacked(parts: &[Mat<'_>], threads: Threads) -> Self {
        let rows = parts[0].rows();
        assert!(parts.iter().all(|part| part.rows() == rows), "parts of different heights");
        let k = parts.iter().map(Mat::cols).sum();
        let mut data = Scratch::take(rows.next_multiple_of(W) * k);
        let group = group(parts, W);
        let fill = |(index, out): (usize, &mut [f32])| {
            let mut from = 0;
            for part in parts {
                let size = if part.strides().0 == 1 { SLICE } else { part.cols().max(1) };
                for first in (0..part.cols()).step_by(size) {
                    let slice = part.t().rows_of(first..part.cols().min(first + size)).t();
                    for (panel, out) in out.chunks_exact_mut(W * k).enumerate() {
                        panel_of::<W>(&mut out[W * (from + first)..][..W * slice.cols()], slice, (index * group + panel) * W);
                    }
                }
                from += part.cols();
            }
        };
        if k > 0 {
            match threads {
                Threads::One => data.chunks_mut(group * W * k).enumerate().for_each(fill),
                Threads::All => data.par_chunks_mut(group * W * k).enumerate().for_each(fill),
            }
        }
        Packed { data, rows, k }
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Panel `panel` from column `from` on.
    pub fn panel(&self, panel: usize, from: usize) -> &[f32] {
        &self.data[panel * W * self.k..][..W * self.k][W * from..]
    }
}

/// Writes rows `first..first + W` of x, column by column.
pub(crate) fn panel_of<const W: usize>(out: &mut [f32], x: Mat<'_>, first: usize) {
    let (rows, k, (row_stride, col_stride), data) = (W.min(x.rows() - first), x.cols(), x.strides(), x.data());
    assert_eq!(out.len(), W * k);
    if row_stride == 1 && x.rows() > 1 {
        for (l, out) in out.as_chunks_mut::<W>().0.iter_mut().enumerate() {
            let column = &data[l * col_stride + first..][..rows];
            // Of a constant length: by a few loads and stores instead of a call.
            match column.first_chunk() {
                Some(column) => *out = *column,
                None => {
                    out[..rows].copy_from_slice(column);
                    out[rows..].fill(0.0);
                }
            }
        }
        return;
    }
    assert!(col_stride == 1 || k <= 1, "neither rows nor columns are contiguous");
    let rows: [&[f32]; W] = std::array::from_fn(|r| if r < rows { &data[(first + r) * row_stride..][..k] } else { &[][..] });
    transpose::<W>(out, &rows, k);
}

/// `out[l * W + r]` = `rows[r][l]` for l < k; an empty row stands for zeros.
pub(crate) fn transpose<const W: usize>(out: &mut [f32], rows: &[&[f32]; W], k: usize) {
    assert!(out.len() == W * k && rows.iter().all(|row| row.is_empty() || row.len() == k));
    // Columns that whole registers take.
    let done = match isa() {
        Isa::Avx512 => k - k % 16,
        Isa::Avx2 if W.is_multiple_of(4) => k - k % 8,
        _ => 0,
    };
    #[cfg(target_arch = "x86_64")]
    if done > 0 && isa() == Isa::Avx2 {
        for r in (0..W).step_by(8) {
            let height = (W - r).min(8);
            for l in (0..done).step_by(8) {
                // SAFETY: `isa` has found AVX2; columns l..l+8 lie inside each row that is not empty, and the rows of `out` they become
                // (W·l + r … + height, four or eight elements) inside `out`.
                unsafe { transpose8(out.as_mut_ptr().add(l * W + r), W, &rows[r..r + height], l) };
            }
        }
    } else if done > 0 {
        for r in (0..W).step_by(16) {
            let height = (W - r).min(16);
            for l in (0..done).step_by(16) {
                // SAFETY: `isa` has found AVX-512; columns l..l+16 lie inside each row that is not empty, and the rows of `out` they become
                // (W·l + r … + height) inside `out`.
                unsafe { transpose16(out.as_mut_ptr().add(l * W + r), W, &rows[r..r + height], l) };
            }
        }
    }
    for l in done..k {
        for (out, row) in out[l * W..][..W].iter_mut().zip(rows) {
            *out = if row.is_empty() { 0.0 } else { row[l] };
        }
    }
}

/// `out[i * stride + r]` = `rows[r][from + i]` for i < 8 and four or eight rows.
///
/// # Safety
/// The features; rows that are not empty must have the eight columns, and `out` room for what is written.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn transpose8(out: *mut f32, stride: usize, rows: &[&[f32]], from: usize) {
    use std::arch::x86_64::*;
    debug_assert!(rows.len() == 4 || rows.len() == 8);
    let mut x = [_mm256_setzero_ps(); 8];
    for (x, row) in x.iter_mut().zip(rows) {
        if !row.is_empty() {
            // SAFETY: the caller's rows hold from..from+8.
            *x = unsafe { _mm256_loadu_ps(row.as_ptr().add(from)) };
        }
    }
    // Pairs of rows, then pairs of pairs inside each half, then the halves.
    let mut y = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        y[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for i in 0..2 {
        let (a, b, c, d) = (y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
        x[4 * i] = _mm256_shuffle_ps::<0x44>(a, c);
        x[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
        x[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
        x[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
    }
    for i in 0..4 {
        let columns = [_mm256_permute2f128_ps::<0x20>(x[i], x[4 + i]), _mm256_permute2f128_ps::<0x31>(x[i], x[4 + i])];
        for (half, column) in columns.into_iter().enumerate() {
            // SAFETY: row 4·half + i of the result, as many elements as there are rows.
            unsafe {
                let place = out.add((4 * half + i) * stride);
                if rows.len() == 8 {
                    _mm256_storeu_ps(place, column)
                } else {
                    _mm_storeu_ps(place, _mm256_castps256_ps128(column))
                };
            }
        }
    }
}

/// `out[i * stride + r]` = `rows[r][from + i]` for i < 16 and up to sixteen rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn transpose16(out: *mut f32, stride: usize, rows: &[&[f32]], from: usize) {
    use std::arch::x86_64::*;
    let mut x = [_mm512_setzero_ps(); 16];
    for (x, row) in x.iter_mut().zip(rows) {
        if !row.is_empty() {
            // SAFETY: the caller's rows hold from..from+16.
            *x = unsafe { _mm512_loadu_ps(row.as_ptr().add(from)) };
        }
    }
    let mask = super::tile::mask16(rows.len());
    transpose_square(&mut x);
    for (i, &column) in x.iter().enumerate() {
        // SAFETY: row i of the result, as many elements as there are rows.
        unsafe { _mm512_mask_storeu_ps(out.add(i * stride), mask, column) };
    }
}

/// Makes the rows of a square its columns.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
pub(super) fn transpose_square(x: &mut [std::arch::x86_64::__m512; 16]) {
    use std::arch::x86_64::*;
    // Pairs of rows, then pairs of pairs inside each quarter, then the quarters.
    let mut y = [_mm512_setzero_ps(); 16];
    for i in 0..8 {
        y[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for i in 0..4 {
        let (a, b, c, d) = (y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
        x[4 * i] = _mm512_shuffle_ps::<0x44>(a, c);
        x[4 * i + 1] = _mm512_shuffle_ps::<0xee>(a, c);
        x[4 * i + 2] = _mm512_shuffle_ps::<0x44>(b, d);
        x[4 * i + 3] = _mm512_shuffle_ps::<0xee>(b, d);
    }
    for i in 0..4 {
        let low = _mm512_shuffle_f32x4::<0x88>(x[i], x[4 + i]);
        let high = _mm512_shuffle_f32x4::<0x88>(x[8 + i], x[12 + i]);
        let low_odd = _mm512_shuffle_f32x4::<0xdd>(x[i], x[4 + i]);
        let high_odd = _mm512_shuffle_f32x4::<0xdd>(x[8 + i], x[12 + i]);
        y[i] = _mm512_shuffle_f32x4::<0x88>(low, high);
        y[4 + i] = _mm512_shuffle_f32x4::<0x88>(low_odd, high_odd);
        y[8 + i] = _mm512_shuffle_f32x4::<0xdd>(low, high);
        y[12 + i] = _mm512_shuffle_f32x4::<0xdd>(low_odd, high_odd);
    }
    *x = y;
}
