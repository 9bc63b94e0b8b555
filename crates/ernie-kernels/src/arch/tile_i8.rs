//! The innermost loop of an 8-bit product: a tile of sums of products of bytes, scaled and added to c in single precision.
//!
//! The sums are whole numbers below 2³¹ (255 · 127 · 256 for one block), so every instruction set finds the same ones.
#![allow(unsafe_code)] // the instruction set itself: vector loads and stores through pointers
#![allow(clippy::needless_range_loop)] // indices name registers of a tile; iterators would hide which

#[cfg(target_arch = "x86_64")]
use std::mem::MaybeUninit;

use super::amx::Tiles;
#[cfg(target_arch = "x86_64")]
use super::byte_pairs::{self, HEIGHT, widen};
use super::isa::{Isa, isa, simd_fn};
use super::matrix::MatMut;
use super::quantised::Panel;
#[cfg(target_arch = "x86_64")]
use super::tile::put_avx2;
use super::tile::{COLS, ROWS, Update};

/// c = a·b or c += a·b for one tile and one block along k: c(i, j) gets scale_a(i) · scale_b(j) · Σ q_a · q_b.
///
/// `tiles`: those of this thread, if a lies row by row.
#[inline(always)] // With AMX a tile takes a fifth of a microsecond.
pub(super) fn tile(c: &mut MatMut<'_>, a: Panel<'_>, b: Panel<'_>, update: Update, tiles: Option<&Tiles>) {
    let (rows, cols, _) = c.layout();
    let words = a.bytes.len() / (4 * ROWS);
    assert!(words <= MAX_WORDS && rows <= ROWS && cols <= COLS && a.bytes.len() == words * 4 * ROWS && b.bytes.len() == words * 4 * COLS);
    assert!(a.scales.len() == ROWS && a.sums.len() == ROWS && b.scales.len() == COLS);
    assert!(a.by_rows == tiles.is_some() && !b.by_rows);
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 && has_vnni() {
        // SAFETY: the features were asked for; the assertions above keep every load inside, and c is a view of its own elements.
        return unsafe {
            match tiles {
                Some(_) => avx512::<true>(c, a, b, words, update, tiles),
                None => avx512::<false>(c, a, b, words, update, None),
            }
        };
    }
    assert!(!a.by_rows, "tiles without AVX-512");
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx2 {
        // SAFETY: as above; and a block has no more words than its buffer.
        return unsafe { avx2(c, a, b, words, update) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (isa(), Isa::Portable);
    narrow(c, a, b, words, update);
}

#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni") // One load of a cached answer.
}

/// The tile of the result in registers of sixteen sums. With `TILES` (a constant, so that the strides of a are) AMX finds the sums of as much of the block as
/// fills its tiles.
///
/// # Safety
/// The features; panels as [`tile`] asserts them, of a row by row with `TILES`, which must be there then.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")]
unsafe fn avx512<const TILES: bool>(c: &mut MatMut<'_>, a: Panel<'_>, b: Panel<'_>, words: usize, update: Update, tiles: Option<&Tiles>) {
    use std::arch::x86_64::*;
    let (rows, cols, stride) = c.layout();
    let c = c.as_mut_ptr();
    let mut sums = [[_mm512_setzero_si512(); 2]; ROWS];
    let (mut pa, mut pb) = (a.bytes.as_ptr(), b.bytes.as_ptr());
    let (row_step, word_step) = if TILES { (4 * words, 4) } else { (4, 4 * ROWS) };
    let mut rest = words;
    if let Some(tiles) = tiles
        && TILES
        && words >= 16
    {
        let mut of_tiles = MaybeUninit::<[[i32; COLS]; ROWS]>::uninit();
        // SAFETY: the whole groups of 16 words of both panels, all of whose sums are written.
        unsafe {
            tiles.sums(of_tiles.as_mut_ptr(), (pa, row_step), pb, words / 16);
            for i in 0..ROWS {
                let of_row = of_tiles.as_ptr().cast::<i32>().add(COLS * i);
                sums[i] = [_mm512_loadu_si512(of_row.cast()), _mm512_loadu_si512(of_row.add(16).cast())];
            }
            rest = words % 16;
            (pa, pb) = (pa.add((words - rest) * word_step), pb.add((words - rest) * 4 * COLS));
        }
    }
    for _ in 0..rest {
        // SAFETY: step l reads word l of all rows of both panels.
        unsafe {
            let (b0, b1) = (_mm512_loadu_si512(pb.cast()), _mm512_loadu_si512(pb.add(64).cast()));
            for i in 0..ROWS {
                let x = _mm512_set1_epi32(pa.add(row_step * i).cast::<i32>().read_unaligned());
                sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], b0, x);
                sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], b1, x);
            }
            pb = pb.add(4 * COLS);
            pa = pa.add(word_step);
        }
    }
    // SAFETY: b has a scale for each of its COLS columns.
    let scales = unsafe { [_mm512_loadu_ps(b.scales.as_ptr()), _mm512_loadu_ps(b.scales.as_ptr().add(16))] };
    let masks = [super::tile::mask16(cols), super::tile::mask16(cols.saturating_sub(16))];
    for i in 0..ROWS {
        if i >= rows {
            break;
        }
        // b holds q + 128: the sums have 128·Σ q_a too much. Where a value is no number that may be too large; the scale is then none either.
        let excess = _mm512_set1_epi32(a.sums[i].wrapping_mul(128));
        let scale = _mm512_set1_ps(a.scales[i]);
        for half in 0..2 {
            // SAFETY: row i < rows of c, and of it the columns below `cols` by the mask.
            unsafe {
                let place = c.add(i * stride).wrapping_add(16 * half);
                let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i][half], excess));
                let sum = _mm512_mul_ps(sum, _mm512_mul_ps(scale, scales[half]));
                let sum = match update {
                    Update::Set => sum,
                    Update::Add => _mm512_add_ps(sum, _mm512_maskz_loadu_ps(masks[half], place)),
                };
                _mm512_mask_storeu_ps(place, masks[half], sum);
            }
        }
    }
}

/// Words of a block, at most.
const MAX_WORDS: usize = super::quantised::BLOCK / 4;

/// The tile by parts of 4 x 16 for processors without a product of bytes: bytes are widened to 16 bits, whose products of pairs cannot overflow. That has
/// half as many products in an instruction as 8 bits, and twice as many as single precision.
///
/// # Safety
/// The features; panels as [`tile`] asserts them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(c: &mut MatMut<'_>, a: Panel<'_>, b: Panel<'_>, words: usize, update: Update) {
    use std::arch::x86_64::*;
    let (rows, cols, _) = c.layout();
    const { assert!(ROWS.is_multiple_of(HEIGHT) && COLS.is_multiple_of(16)) };
    let mut pairs = [[const { MaybeUninit::<i32>::uninit() }; ROWS * MAX_WORDS]; 2];
    let [even, odd] = &mut pairs;
    // SAFETY: the words of the panel.
    unsafe { widen([even, odd], a.bytes.as_ptr(), words * ROWS) };
    for col in (0..cols).step_by(16) {
        for row in (0..rows).step_by(HEIGHT) {
            let pairs = [pairs[0].as_ptr().wrapping_add(row).cast(), pairs[1].as_ptr().wrapping_add(row).cast()];
            let b_part = b.bytes.as_ptr().wrapping_add(4 * col);
            // SAFETY: parts of four rows, all widened above, and of sixteen columns of the two panels, whose lengths `tile` asserts.
            let registers: [[__m256i; 2]; HEIGHT] = unsafe { byte_pairs::sums(pairs, (1, ROWS), b_part, 4 * COLS, words) };
            // SAFETY: b has a scale for each of its COLS columns.
            let scales = unsafe { [_mm256_loadu_ps(b.scales.as_ptr().add(col)), _mm256_loadu_ps(b.scales.as_ptr().add(col + 8))] };
            let (a_scales, a_sums) = (&a.scales[row..][..HEIGHT], &a.sums[row..][..HEIGHT]);
            let scaled = |i: usize, half: usize| {
                // As above.
                let excess = _mm256_set1_epi32(a_sums[i].wrapping_mul(128));
                let scale = _mm256_mul_ps(_mm256_set1_ps(a_scales[i]), scales[half]);
                _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(registers[i][half], excess)), scale)
            };
            let mut part = c.block(row..(row + HEIGHT).min(rows), col..(col + 16).min(cols));
            put_avx2::<HEIGHT, 2>(&mut part, scaled, update);
        }
    }
}

/// c = or += sums · scale · scales.
#[inline(always)]
fn scaled(c: &mut [f32], sums: &[i32; 16], scale: f32, scales: &[f32], update: Update) {
    for ((c, sum), b) in c.iter_mut().zip(sums).zip(scales) {
        let sum = *sum as f32 * (scale * b);
        *c = if update == Update::Set { sum } else { *c + sum };
    }
}

/// The tile by parts of 4 x 16.
fn narrow(c: &mut MatMut<'_>, a: Panel<'_>, b: Panel<'_>, words: usize, update: Update) {
    let (rows, cols, _) = c.layout();
    for row in (0..rows).step_by(4) {
        for col in (0..cols).step_by(16) {
            let mut sums = [[0; 16]; 4];
            part(&mut sums, &a.bytes[4 * row..], &b.bytes[4 * col..], words);
            for (i, sums) in sums.iter().enumerate().take(rows - row) {
                scaled(&mut c.row_mut(row + i)[col..(col + 16).min(cols)], sums, a.scales[row + i], &b.scales[col..], update);
            }
        }
    }
}

simd_fn! {
    /// sums[i][j] = Σ q_a(i) · q_b(j) over four rows of a and sixteen columns of b.
    fn part<FMA>(sums: &mut [[i32; 16]; 4], a: &[u8], b: &[u8], words: usize) {
        let mut registers = [[0i32; 16]; 4];
        for l in 0..words {
            let b: &[u8; 64] = b[l * 4 * COLS..][..64].try_into().expect("64 bytes");
            let a: &[u8; 16] = a[l * 4 * ROWS..][..16].try_into().expect("16 bytes");
            for i in 0..4 {
                for j in 0..16 {
                    for byte in 0..4 {
                        registers[i][j] += i32::from(a[4 * i + byte] as i8) * i32::from((b[4 * j + byte] ^ 0x80) as i8);
                    }
                }
            }
        }
        *sums = registers;
    }
}
