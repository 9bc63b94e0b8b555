//! Checked views of matrices.
#![allow(unsafe_code)] // Disjoint column blocks of one matrix cannot be told apart by slices.

use std::marker::PhantomData;
use std::ops::Range;

/// A matrix to read: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix that fills `data`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(rows.checked_mul(cols), Some(data.len()), "elements of a [{rows}, {cols}] matrix");
        Mat { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Rows `rows` and columns `cols` of the row-major matrix `data` whose rows are `stride` long.
    pub fn block(data: &'a [f32], stride: usize, rows: Range<usize>, cols: Range<usize>) -> Self {
        let fits = rows.end.checked_mul(stride).is_some_and(|end| end <= data.len());
        assert!(cols.end <= stride && fits, "rows {rows:?}, columns {cols:?} lie outside the matrix");
        let start = (rows.start * stride + cols.start).min(data.len());
        Mat { data: &data[start..], rows: rows.len(), cols: cols.len(), row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Mat { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Columns `cols` of a matrix that has not been transposed.
    pub fn columns(self, cols: Range<usize>) -> Self {
        assert!(self.col_stride == 1 && cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        Mat { data: &self.data[cols.start.min(self.data.len())..], cols: cols.len(), ..self }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The elements from the first on.
    pub(super) fn data(&self) -> &'a [f32] {
        self.data
    }

    /// Distances between rows and between columns.
    pub(super) fn strides(&self) -> (usize, usize) {
        (self.row_stride, self.col_stride)
    }

    /// The rows `range`.
    pub fn rows_of(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let start = (range.start * self.row_stride).min(self.data.len());
        Mat { data: &self.data[start..], rows: range.len(), ..*self }
    }

    /// One row of a matrix that has not been transposed.
    pub fn row(&self, i: usize) -> &'a [f32] {
        assert!(i < self.rows && self.col_stride == 1);
        &self.data[i * self.row_stride..][..self.cols]
    }
}

/// A row-major matrix to write, which may be a block of columns of a wider one. Two of them never overlap.
pub struct MatMut<'a> {
    start: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `MatMut` is the sole owner of its elements for 'a, like `&'a mut [f32]`, which is Send.
unsafe impl Send for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// A matrix that fills `data`.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(rows.checked_mul(cols), Some(data.len()), "elements of a [{rows}, {cols}] matrix");
        MatMut { start: data.as_mut_ptr(), rows, cols, row_stride: cols, borrow: PhantomData }
    }

    /// Rows 0..`rows` and columns 0..`cols` of the matrix `data` whose rows are `stride` long.
    pub fn corner(data: &'a mut [f32], stride: usize, rows: usize, cols: usize) -> Self {
        let fits = rows.checked_mul(stride).is_some_and(|end| end <= data.len());
        assert!(cols <= stride && fits, "[{rows}, {cols}] does not fit rows of {stride} in {}", data.len());
        MatMut { start: data.as_mut_ptr(), rows, cols, row_stride: stride, borrow: PhantomData }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Cuts the matrix into tiles: its rows at `row_bounds` (ascending, from 0 to the number of rows) and its columns every `width`, which
    /// divides their number. Tiles come row block by row block, and from left to right inside one.
    pub fn tiles(self, row_bounds: &[u32], width: usize) -> Vec<MatMut<'a>> {
        assert!(row_bounds.first() == Some(&0) && row_bounds.last().map(|&end| end as usize) == Some(self.rows));
        assert!(width > 0 && self.cols.is_multiple_of(width) && row_bounds.is_sorted());
        let mut tiles = Vec::with_capacity((row_bounds.len() - 1) * (self.cols / width));
        for bounds in row_bounds.windows(2) {
            let rows = bounds[0] as usize..bounds[1] as usize;
            for col in (0..self.cols).step_by(width) {
                // SAFETY: row rows.start <= self.rows and column col < self.cols, so this stays within the matrix or, for an empty last
                // block, one past its end; the tiles are disjoint by construction, and `self` is consumed.
                let start = unsafe { self.start.add(if rows.is_empty() { 0 } else { rows.start * self.row_stride + col }) };
                tiles.push(MatMut { start, rows: rows.len(), cols: width, row_stride: self.row_stride, borrow: PhantomData });
            }
        }
        tiles
    }

    /// Rows `rows` and columns `cols`, borrowed from this matrix.
    #[inline]
    pub fn block(&mut self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_> {
        // SAFETY: the result borrows this view mutably, so that nothing else can touch its elements.
        unsafe { self.alias(rows, cols) }
    }

    /// Rows `rows` and columns `cols`, without borrowing: for handing disjoint blocks to several threads.
    ///
    /// # Safety
    /// For as long as the block exists nothing else may touch its elements, and it must not outlive the matrix.
    #[inline]
    pub(super) unsafe fn alias(&self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        let empty = rows.is_empty() || cols.is_empty();
        let offset = if empty { 0 } else { rows.start * self.row_stride + cols.start };
        // SAFETY: unless the block is empty its first element lies within the matrix.
        let start = unsafe { self.start.add(offset) };
        MatMut { start, rows: rows.len(), cols: cols.len(), row_stride: self.row_stride, borrow: PhantomData }
    }

    /// Rows, columns, and the distance between rows.
    pub(super) fn layout(&self) -> (usize, usize, usize) {
        (self.rows, self.cols, self.row_stride)
    }

    /// The first element; the others follow by [`MatMut::layout`].
    pub(super) fn as_ptr(&self) -> *const f32 {
        self.start
    }

    /// The first element, to write to.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.start
    }

    /// Cuts the matrix into blocks of `rows` x `cols`, smaller at its right and lower edges; each comes with its first row and column.
    pub fn cut(self, rows: usize, cols: usize) -> Vec<(usize, usize, MatMut<'a>)> {
        assert!(rows > 0 && cols > 0);
        let mut blocks = Vec::with_capacity(self.rows.div_ceil(rows) * self.cols.div_ceil(cols));
        for row in (0..self.rows).step_by(rows) {
            for col in (0..self.cols).step_by(cols) {
                // SAFETY: (row, col) lies within the matrix; the blocks are disjoint, and `self` is consumed.
                let start = unsafe { self.start.add(row * self.row_stride + col) };
                let (rows, cols) = (rows.min(self.rows - row), cols.min(self.cols - col));
                blocks.push((row, col, MatMut { start, rows, cols, row_stride: self.row_stride, borrow: PhantomData }));
            }
        }
        blocks
    }

    /// The columns before `at`, and those from there on.
    pub fn split_columns(self, at: usize) -> (MatMut<'a>, MatMut<'a>) {
        assert!(at <= self.cols, "column {at} of {}", self.cols);
        // SAFETY: unless the matrix is empty, column `at` of its first row lies within it or one past its end; the two parts are disjoint.
        let right = if self.rows == 0 || at == self.cols { self.start } else { unsafe { self.start.add(at) } };
        (
            MatMut { cols: at, ..self },
            MatMut { start: right, rows: self.rows, cols: self.cols - at, row_stride: self.row_stride, borrow: PhantomData },
        )
    }

    /// One row.
    #[inline]
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: row i lies within the matrix, which this view owns; the result borrows the view.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(i * self.row_stride), self.cols) }
    }

    /// Sets every element.
    pub fn fill(&mut self, value: f32) {
        for i in 0..self.rows {
            self.row_mut(i).fill(value);
        }
    }
}
