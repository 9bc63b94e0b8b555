//! Memory that will soon be needed, fetched a little at a time while arithmetic goes on.
//!
//! A processor has room for few lines on their way to it (sixteen on recent ones of Intel). Asked for all at once they keep out what the arithmetic itself waits
//! for; asked for one by one between its steps they cost next to nothing.
#![allow(unsafe_code)] // prefetches
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // Only AVX-512 fetches in steps.

use super::matrix::MatMut;
use super::tile::ROWS;

/// Bytes of a line of the cache.
pub(super) const LINE: usize = 64;

/// What to fetch during a tile of a product: the tile of c that follows, and parts of the panels that follow.
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
struct Lines {
    at: *const i8,
    left: usize,
}

impl Ahead {
    /// The tile and the panels' bytes. Nothing is fetched yet.
    #[inline]
    pub(super) fn new(c: Option<&MatMut<'_>>, panels: [&[u8]; 2]) -> Self {
        let panels = panels.map(|bytes| Lines { at: bytes.as_ptr().cast(), left: lines(bytes.as_ptr().addr(), bytes.len()) });
        let Some(c) = c else {
            return Self { rows: 0, lines: 0, row: std::ptr::null(), stride: 0, fetched: 0, panels, portion: [0; 3] };
        };
        let (rows, cols, stride) = c.layout();
        let row: *const i8 = c.as_ptr().cast();
        // Where rows begin at different places of a line, some reach into one more.
        let begin = if (4 * stride).is_multiple_of(LINE) { row.addr() } else { LINE - 4 };
        Self { rows, lines: lines(begin, 4 * cols), row, stride: 4 * stride, fetched: 0, panels, portion: [0; 3] }
    }

    /// Fetches the tile of c at once, and nothing of the panels.
    #[inline]
    pub(super) fn tile_at_once(self) {
        // Mostly the tile is whole, and this then a few instructions without branches.
        if (self.rows, self.lines) == (ROWS, 2) {
            for row in 0..ROWS {
                let row = self.row.wrapping_add(row * self.stride);
                fetch::<true>(row);
                fetch::<true>(row.wrapping_add(LINE));
            }
            return;
        }
        for row in 0..self.rows {
            for line in 0..self.lines {
                fetch::<true>(self.row.wrapping_add(row * self.stride + line * LINE));
            }
        }
    }

    /// Says how many calls of [`Ahead::step`] there will be, which then fetch it all.
    #[inline]
    pub(super) fn steps(&mut self, steps: usize) {
        // Mostly there is nothing of a panel, and a division takes longer than to see that.
        let each = |lines: usize| if lines == 0 { 0 } else { lines.div_ceil(steps.max(1)) };
        self.portion = [each(self.rows * self.lines), each(self.panels[0].left), each(self.panels[1].left)];
    }

    /// Fetches the share of a step.
    #[inline]
    pub(super) fn step(&mut self) {
        let [of_c, of_panels @ ..] = self.portion;
        for _ in 0..of_c {
            if self.rows == 0 {
                break;
            }
            fetch::<true>(self.row.wrapping_add(self.fetched * LINE));
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
                fetch::<false>(panel.at);
                panel.at = panel.at.wrapping_add(LINE);
            }
            panel.left -= portion;
        }
    }
}

/// How many lines so many bytes from an address on touch.
fn lines(address: usize, bytes: usize) -> usize {
    if bytes == 0 { 0 } else { (address % LINE + bytes).div_ceil(LINE) }
}

/// Fetches a line, into the first-level cache if it is `NEAR`, else into the second.
#[inline(always)]
fn fetch<const NEAR: bool>(line: *const i8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch touches nothing that the program can see, wherever it points.
        unsafe { if NEAR { _mm_prefetch::<_MM_HINT_T0>(line) } else { _mm_prefetch::<_MM_HINT_T1>(line) } };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every step fetches its share, and as many as were announced everything.
    #[test]
    fn all_is_fetched_in_the_steps_announced() {
        let (mut elements, bytes) = (vec![0.0; 13 * 100], vec![0u8; 1000]);
        for (rows, cols, left, right) in [(12, 32, 0, 1000), (13, 5, 999, 64), (1, 1, 1, 0), (12, 32, 0, 0)] {
            for steps in [1, 3, 32] {
                let mut whole = MatMut::new(&mut elements[..rows * 100], rows, 100);
                let c = whole.block(0..rows, 3..3 + cols);
                for c in [Some(&c), None] {
                    let mut ahead = Ahead::new(c, [&bytes[..left], &bytes[bytes.len() - right..]]);
                    let wanted = [ahead.rows * ahead.lines, ahead.panels[0].left, ahead.panels[1].left];
                    assert_eq!(c.is_some(), wanted[0] >= rows * cols.div_ceil(16));
                    ahead.steps(steps);
                    for _ in 1..steps {
                        ahead.step();
                    }
                    let left = [ahead.rows * ahead.lines - ahead.fetched, ahead.panels[0].left, ahead.panels[1].left];
                    assert_eq!(left, wanted.map(|lines| lines.saturating_sub((steps - 1) * lines.div_ceil(steps))));
                    ahead.step();
                    assert_eq!((ahead.rows, ahead.panels[0].left, ahead.panels[1].left), (0, 0, 0));
                }
            }
        }
    }

    /// Lines are counted from where they begin.
    #[test]
    fn bytes_across_the_end_of_a_line_touch_the_next() {
        assert_eq!(
            [(0, 64), (60, 4), (60, 5), (0, 0), (63, 0), (127, 66)].map(|(address, bytes)| lines(address, bytes)),
            [1, 1, 2, 0, 0, 3]
        );
    }
}
