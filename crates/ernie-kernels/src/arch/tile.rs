//! The innermost loop of a product of single precision: a tile of c that stays in registers while k runs.
//!
//! A tile is up to [`ROWS`] x [`COLS`] elements: 24 registers of AVX-512, with room for a row of b and one broadcast element of a. Narrower
//! instruction sets walk the same packed operands in smaller tiles. The sum over k runs from left to right for every element, so its value depends
//! on nothing beside it.
#![allow(unsafe_code)] // the instruction set itself: vector loads and stores through pointers
#![allow(clippy::needless_range_loop)] // indices name registers of a tile; iterators would hide which

use super::ahead::Ahead;
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::isa::{isa, mul_add, simd_fn};
use super::matrix::MatMut;

/// Rows of a tile.
pub const ROWS: usize = 12;
/// Columns of a tile: two registers of AVX-512.
pub const COLS: usize = 32;

/// What happens to the elements that a product is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// They are overwritten, and not read.
    Set,
    /// The product is added to them.
    Add,
}

/// c = a·b, or c += a·b, for one tile: c has at most `M` rows and [`COLS`] columns.
///
/// Element (i, l) of a is `a[i * RS + l * CS]` for all i < `M`; element (l, j) of b is `b[l * COLS + j]` for all j < [`COLS`].
pub fn tile<const M: usize, const RS: usize, const CS: usize>(c: &mut MatMut<'_>, a: &[f32], b: &[f32], k: usize, update: Update) {
    tile_ahead::<M, RS, CS>(c, a, b, k, update, None);
}

/// The same, and fetches what is needed after it: with AVX-512 all of it, in steps; with others the tile of c, at once.
pub(super) fn tile_ahead<const M: usize, const RS: usize, const CS: usize>(
    c: &mut MatMut<'_>,
    a: &[f32],
    b: &[f32],
    k: usize,
    update: Update,
    ahead: Option<Ahead>,
) {
    let (rows, cols, _) = c.layout();
    assert!(rows <= M && cols <= COLS && b.len() >= k * COLS && (k == 0 || a.len() > (M - 1) * RS + (k - 1) * CS));
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        // SAFETY: `isa` has found AVX-512; the assertion above keeps every load of a and b inside, and c is a view of its own elements.
        return unsafe { avx512::<M, RS, CS>(c, a, b, k, update, ahead) };
    }
    if let Some(ahead) = ahead {
        ahead.tile_at_once();
    }
    match isa() {
        // SAFETY: as above, for AVX2; each time H divides M.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe {
            if M.is_multiple_of(6) {
                avx2::<6, 2, M, RS, CS>(c, a, b, k, update);
            } else if M.is_multiple_of(4) {
                avx2::<4, 2, M, RS, CS>(c, a, b, k, update);
            } else if M.is_multiple_of(2) {
                avx2::<2, 4, M, RS, CS>(c, a, b, k, update);
            } else {
                avx2::<1, 4, M, RS, CS>(c, a, b, k, update);
            }
        },
        _ => narrow::<M, RS, CS>(c, a, b, k, update),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn avx512<const M: usize, const RS: usize, const CS: usize>(
    c: &mut MatMut<'_>,
    a: &[f32],
    b: &[f32],
    k: usize,
    update: Update,
    mut ahead: Option<Ahead>,
) {
    use std::arch::x86_64::*;
    let (rows, cols, stride) = c.layout();
    let c = c.as_mut_ptr();
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    let (mut pa, mut pb) = (a.as_ptr(), b.as_ptr());
    if let Some(ahead) = &mut ahead {
        ahead.steps(k.div_ceil(BETWEEN_FETCHES));
    }
    let mut rest = k;
    while rest > 0 {
        let steps = match &mut ahead {
            Some(ahead) => {
                ahead.step();
                rest.min(BETWEEN_FETCHES)
            }
            None => rest,
        };
        rest -= steps;
        for _ in 0..steps {
            // SAFETY: step l reads b[l·COLS..][..COLS] and a[i·RS + l·CS], which the caller vouches for.
            unsafe {
                let (b0, b1) = (_mm512_loadu_ps(pb), _mm512_loadu_ps(pb.add(16)));
                for i in 0..M {
                    let x = _mm512_set1_ps(*pa.add(i * RS));
                    sums[i][0] = _mm512_fmadd_ps(x, b0, sums[i][0]);
                    sums[i][1] = _mm512_fmadd_ps(x, b1, sums[i][1]);
                }
                pb = pb.add(COLS);
                pa = pa.wrapping_add(CS);
            }
        }
    }
    let masks = [mask16(cols), mask16(cols.saturating_sub(16))];
    // Every index of `sums` must be a constant of the unrolled loop, or the registers would go through memory.
    for i in 0..M {
        if i >= rows {
            break;
        }
        for half in 0..2 {
            // SAFETY: row i < rows of c, and of it the columns below `cols` by the mask.
            unsafe {
                let place = c.add(i * stride).wrapping_add(16 * half);
                let sum = match update {
                    Update::Set => sums[i][half],
                    Update::Add => _mm512_add_ps(sums[i][half], _mm512_maskz_loadu_ps(masks[half], place)),
                };
                _mm512_mask_storeu_ps(place, masks[half], sum);
            }
        }
    }
}

/// Steps of the sum between two portions of what is fetched ahead: long enough that the branches are not noticed.
#[cfg(target_arch = "x86_64")]
const BETWEEN_FETCHES: usize = 8;

/// The tile by parts of `H` rows and `W` registers of columns. At 6 x 2 there are twelve sums, and of the sixteen registers there is room for b and an element
/// of a; less than eight sums would wait for each other, so low tiles are wide.
///
/// # Safety
/// The features; operands as [`tile`] asserts them, H must divide M, and W be 2 or 4.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const H: usize, const W: usize, const M: usize, const RS: usize, const CS: usize>(
    c: &mut MatMut<'_>,
    a: &[f32],
    b: &[f32],
    k: usize,
    update: Update,
) {
    assert!(M.is_multiple_of(H) && COLS.is_multiple_of(8 * W)); // Of constants.
    let (rows, cols, _) = c.layout();
    for col in (0..cols).step_by(8 * W) {
        for row in (0..rows).step_by(H) {
            let mut part = c.block(row..(row + H).min(rows), col..(col + 8 * W).min(cols));
            let (a, b) = (a.as_ptr().wrapping_add(row * RS), b.as_ptr().wrapping_add(col));
            // SAFETY: by the caller; rows row..row + H of a are below M, and columns col..col + 8·W of b below `COLS`.
            unsafe { avx2_part::<H, W, RS, CS>(&mut part, a, b, k, update) };
        }
    }
}

/// # Safety
/// The features; a and b must be as [`tile`] asserts it, from the part's first row and column on.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_part<const H: usize, const W: usize, const RS: usize, const CS: usize>(
    c: &mut MatMut<'_>,
    mut a: *const f32,
    mut b: *const f32,
    k: usize,
    update: Update,
) {
    use std::arch::x86_64::*;
    let (rows, _, stride) = c.layout();
    for i in 0..rows {
        _mm_prefetch::<_MM_HINT_T0>(c.as_mut_ptr().wrapping_add(i * stride).cast());
    }
    let mut sums = [[_mm256_setzero_ps(); W]; H];
    let mut steps = k;
    while steps >= UNROLL {
        for l in 0..UNROLL {
            // SAFETY: a step below k, see `avx2_step`.
            unsafe { avx2_step::<H, W, RS>(&mut sums, a.add(l * CS), b.add(l * COLS)) };
        }
        a = a.wrapping_add(UNROLL * CS);
        b = b.wrapping_add(UNROLL * COLS);
        steps -= UNROLL;
    }
    for _ in 0..steps {
        // SAFETY: as above.
        unsafe { avx2_step::<H, W, RS>(&mut sums, a, b) };
        a = a.wrapping_add(CS);
        b = b.wrapping_add(COLS);
    }
    put_avx2::<H, W>(c, |i, j| sums[i][j], update);
}

/// Steps of the sum without a branch between them: an eighth faster in a loop of tiles alone.
#[cfg(target_arch = "x86_64")]
const UNROLL: usize = 4;

/// Adds one step's products: of `H` elements of a, `RS` apart, and `8·W` of b.
///
/// # Safety
/// The features, and those elements.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_step<const H: usize, const W: usize, const RS: usize>(
    sums: &mut [[std::arch::x86_64::__m256; W]; H],
    a: *const f32,
    b: *const f32,
) {
    use std::arch::x86_64::*;
    // SAFETY: by the caller.
    unsafe {
        let mut bs = [_mm256_setzero_ps(); W];
        for j in 0..W {
            bs[j] = _mm256_loadu_ps(b.add(8 * j));
        }
        for i in 0..H {
            let x = _mm256_broadcast_ss(&*a.add(i * RS));
            for j in 0..W {
                sums[i][j] = _mm256_fmadd_ps(x, bs[j], sums[i][j]);
            }
        }
    }
}

/// Writes the elements of a tile, or adds them, as far as c goes; `sum` gives register (row, register of columns).
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn put_avx2<const H: usize, const W: usize>(
    c: &mut MatMut<'_>,
    sum: impl Fn(usize, usize) -> std::arch::x86_64::__m256,
    update: Update,
) {
    use std::arch::x86_64::*;
    let (rows, cols, stride) = c.layout();
    // Straight from the registers: through memory, as at an edge, products of most shapes take a tenth to a quarter longer.
    if (rows, cols) == (H, 8 * W) {
        let c = c.as_mut_ptr();
        for i in 0..H {
            for j in 0..W {
                // SAFETY: row i < rows of c, and of it eight columns below `cols`.
                unsafe {
                    let place = c.add(i * stride + 8 * j);
                    let sum = match update {
                        Update::Set => sum(i, j),
                        Update::Add => _mm256_add_ps(sum(i, j), _mm256_loadu_ps(place)),
                    };
                    _mm256_storeu_ps(place, sum);
                }
            }
        }
        return;
    }
    let mut at_edge = [[[0.0f32; 8]; W]; H];
    for i in 0..H {
        for j in 0..W {
            // SAFETY: eight elements.
            unsafe { _mm256_storeu_ps(at_edge[i][j].as_mut_ptr(), sum(i, j)) };
        }
    }
    put_at_edge(c, &at_edge, update);
}

/// The same for a tile that c has not all of.
#[cfg(target_arch = "x86_64")]
#[cold]
#[inline(never)]
fn put_at_edge<const W: usize>(c: &mut MatMut<'_>, sums: &[[[f32; 8]; W]], update: Update) {
    for (i, sums) in sums.iter().enumerate().take(c.rows()) {
        for (c, sum) in c.row_mut(i).iter_mut().zip(sums.as_flattened()) {
            match update {
                Update::Set => *c = *sum,
                Update::Add => *c += sum,
            }
        }
    }
}

/// The lowest `n` bits, up to 16.
#[cfg(target_arch = "x86_64")]
pub(super) fn mask16(n: usize) -> u16 {
    if n >= 16 { u16::MAX } else { (1 << n) - 1 }
}

/// The tile by parts of 4 x 16, sixteen registers of NEON (and of what every x86-64 has).
fn narrow<const M: usize, const RS: usize, const CS: usize>(c: &mut MatMut<'_>, a: &[f32], b: &[f32], k: usize, update: Update) {
    let (rows, cols, _) = c.layout();
    for row in (0..rows).step_by(4) {
        for col in (0..cols).step_by(16) {
            let a: [&[f32]; 4] = std::array::from_fn(|i| &a[((row + i).min(M - 1)) * RS..]);
            let mut sums = [[0.0; 16]; 4];
            part(&mut sums, a, CS, &b[col..], k);
            for (i, sums) in sums.iter().enumerate().take(rows - row) {
                let width = (cols - col).min(16);
                for (c, sum) in c.row_mut(row + i)[col..][..width].iter_mut().zip(sums) {
                    *c = match update {
                        Update::Set => *sum,
                        Update::Add => *c + sum,
                    };
                }
            }
        }
    }
}

simd_fn! {
    /// sums[i][j] = Σ_l a[i][l · step] · b[l · COLS + j].
    fn part<FMA>(sums: &mut [[f32; 16]; 4], a: [&[f32]; 4], step: usize, b: &[f32], k: usize) {
        let mut registers = [[0.0f32; 16]; 4];
        for l in 0..k {
            let b: &[f32; 16] = b[l * COLS..][..16].try_into().expect("16 elements");
            for i in 0..4 {
                let x = a[i][l * step];
                for j in 0..16 {
                    registers[i][j] = mul_add::<FMA>(x, b[j], registers[i][j]);
                }
            }
        }
        *sums = registers;
    }
}
