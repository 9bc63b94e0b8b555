//! Memory that will soon be needed, fetched a little at a time while arithmetic goes on.
//!
//! A processor has room for few lines on their way to it (sixteen on recent ones of Intel). Asked for all at once they keep out what the arithmetic itself waits
//! for; asked for one by one between its steps they cost next to nothing.
#![allow(unsafe_code)] // prefetches

use super::matrix::MatMut;

/// Bytes of a line of the cache.
const LINE: usize = 64;

/// What to fetch during a tile of a product: the tile of c that follows, to write to, and parts of the panels that follow.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Rows of c that are left, of `lines` lines each. The first of them begins at `row`, the others `stride` bytes behind each other; `fetched` of its lines are
    /// on their way.
    rows: usize,
    lines: usize,
    row: *const i8,
    stride: usize,
    fetched: usize,
    panels: [Lines; 2],
    /// Lines of c and of the panels that a step fetches.
    portion: [usize; 3],
}

/// Lines that lie one behind the other.
#[derive(Clone, Copy)]
struct Lines {
    at: *const i8,
    left: usize,
}

impl Ahead {
    /// The tile and the panels' bytes. Nothing is fetched yet.
    #[inline]
    pub(super) fn new(c: Option<&MatMut<'_>>, panels: [&[u8]; 2]) -> Self {
        let panels = panels.map(|bytes| Lines { at: bytes.as_ptr().cast(), left: bytes.len().div_ceil(LINE) });
        let Some(c) = c else {
            return Self { rows: 0, lines: 0, row: std::ptr::null(), stride: 0, fetched: 0, panels, portion: [0; 3] };
        };
        let (rows, cols, stride) = c.layout();
        let row: *const i8 = c.as_ptr().cast();
        // A row that begins within a line reaches into one more.
        let lines = (row.addr() % LINE + 4 * cols).div_ceil(LINE);
        Self { rows, lines, row, stride: 4 * stride, fetched: 0, panels, portion: [0; 3] }
    }

    /// Says how many calls of [`Ahead::step`] there will be, which then fetch it all.
    #[inline]
    pub(super) fn steps(&mut self, steps: usize) {
        let each = |lines: usize| if lines == 0 { 0 } else { lines.div_ceil(steps.max(1)) };
        self.portion = [each(self.rows * self.lines), each(self.panels[0].left), each(self.panels[1].left)];
    }

    /// Fetches the tile of c at once, and nothing of the panels.
    #[inline]
    pub(super) fn tile_at_once(self) {
        for row in 0..self.rows {
            for line in 0..self.lines {
                near(self.row.wrapping_add(row * self.stride + line * LINE));
            }
        }
    }

    /// Fetches the share of a step.
    #[inline]
    pub(super) fn step(&mut self) {
        let [of_c, of_panels @ ..] = self.portion;
        for _ in 0..of_c {
            if self.rows == 0 {
                break;
            }
            near(self.row.wrapping_add(self.fetched * LINE));
            self.fetched += 1;
            if self.fetched == self.lines {
                self.rows -= 1;
                self.fetched = 0;
                self.row = self.row.wrapping_add(self.stride);
            }
        }
        for (panel, portion) in self.panels.iter_mut().zip(of_panels) {
            let portion = portion.min(panel.left);
            for _ in 0..portion {
                far(panel.at);
                panel.at = panel.at.wrapping_add(LINE);
            }
            panel.left -= portion;
        }
    }
}

/// Fetches a line into the first-level cache.
#[inline]
fn near(line: *const i8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch touches nothing that the program can see, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Fetches a line into the second-level cache.
#[inline]
fn far(line: *const i8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: as in `near`.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}
