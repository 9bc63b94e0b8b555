//! Conversions between stored bytes and numbers, all little-endian and safe for unaligned bytes.

use half::{bf16, f16};

use crate::tensor::Dtype;

/// Widens stored elements to f32, exactly; those of I8 and I4 without their scales. `bytes` holds whole elements.
pub(crate) fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let (halves, _) = bytes.as_chunks::<2>();
    match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::Bf16 => halves.iter().map(|&b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)).collect(),
        Dtype::F16 => halves.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::I8 => bytes.iter().map(|&b| f32::from(b.cast_signed())).collect(),
        Dtype::I4 => bytes.iter().flat_map(|&b| [b & 15, b >> 4]).map(|q| f32::from(q) - 8.0).collect(),
        // Only as containers, which nobody widens.
        Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|&b| i32::from_le_bytes(b) as f32).collect(),
        Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b) as f32).collect(),
    }
}

/// Rounds to bf16, to nearest with ties to even, as bytes.
pub(crate) fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
}

/// The elements as little-endian bytes.
pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Symmetric 8-bit quantisation of one row, as compressed-tensors does it: scale = max|w| / 127, q = round-half-even(w / scale) in \[-127, 127\]; returns
/// the scale. A row of zeros has scale 1, one with something that is not finite NaN.
pub fn quantise_row(values: &[f32], quantised: &mut [i8]) -> f32 {
    if values.iter().any(|x| !x.is_finite()) {
        quantised.fill(0);
        return f32::NAN;
    }
    let scale = values.iter().fold(0.0_f32, |m, x| m.max(x.abs())) / 127.0;
    // The quotient of a denormal row could vanish; 1 then maps it to zeros.
    let scale = if scale > 0.0 { scale } else { 1.0 };
    for (q, x) in quantised.iter_mut().zip(values) {
        *q = (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    scale
}

/// [`quantise_row`] for each of many rows.
pub(crate) fn quantise_rows(values: &[f32], row: usize) -> (Vec<u8>, Vec<f32>) {
    let mut quantised = vec![0u8; values.len()];
    let rows = values.chunks_exact(row.max(1)).zip(quantised.chunks_exact_mut(row.max(1)));
    let scales = rows.map(|(values, quantised)| quantise_row(values, bytemuck::cast_slice_mut(quantised))).collect();
    (quantised, scales)
}

/// Symmetric 4-bit quantisation of finite values in groups that share a scale: q in \[-8, 7\] as signed bytes, and the scales, which are bf16 values. Of the scales
/// max|w| / d with d from 6.5 to 8.5 the one with the least squared error is taken: the largest weight may be worth cutting off for the sake of all the others.
pub(crate) fn quantise_groups(values: &[f32], group: usize) -> (Vec<u8>, Vec<f32>) {
    let mut quantised = vec![0u8; values.len()];
    let groups = values.chunks_exact(group).zip(quantised.chunks_exact_mut(group));
    let scales = groups.map(|(values, quantised)| quantise_group(values, bytemuck::cast_slice_mut(quantised))).collect();
    (quantised, scales)
}

fn quantise_group(values: &[f32], quantised: &mut [i8]) -> f32 {
    let max = values.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    let mut best = (f32::INFINITY, 1.0);
    for step in 0..=16 {
        let scale = bf16::from_f32(max / (6.5 + step as f32 / 8.0)).to_f32();
        // A quotient too small for a scale: everything becomes zero.
        if scale < 1e-30 {
            break;
        }
        let (inverse, mut sums) = (1.0 / scale, [0.0f32; 8]);
        for values in values.chunks(8) {
            for (sum, x) in sums.iter_mut().zip(values) {
                *sum += (x - four_bits(x * inverse) * scale).powi(2);
            }
        }
        let error = sums.iter().sum();
        if error < best.0 {
            best = (error, scale);
        }
    }
    let scale = best.1;
    for (q, x) in quantised.iter_mut().zip(values) {
        *q = four_bits(x / scale) as i8;
    }
    scale
}

/// The nearest of −8, …, 7, ties to even.
fn four_bits(x: f32) -> f32 {
    /// Added to a number below 2²², rounds it to a whole number. (The function for it is a call on processors without SSE 4.1.)
    const ROUND: f32 = 12_582_912.0;
    x.clamp(-8.0, 7.0) + ROUND - ROUND
}

/// Signed bytes in \[-8, 7\] as halves of bytes, each with 8 added, the first in the low half.
pub(crate) fn pack_halves(quantised: &[u8]) -> Vec<u8> {
    let half = |q: u8| q.wrapping_add(8) & 15;
    quantised.as_chunks::<2>().0.iter().map(|&[low, high]| half(low) | half(high) << 4).collect()
}

/// Index and value of the first NaN or infinity. Blocks are tested by their exponent bits without a branch per
/// element, so that a whole checkpoint is scanned at about the speed of memory.
pub(crate) fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, f32)> {
    const BLOCK: usize = 1 << 14;
    let suspicious = |block: &[u8]| match dtype {
        Dtype::F32 => {
            let exponent = 0x7f80_0000;
            block.as_chunks::<4>().0.iter().fold(false, |any, &b| any | (u32::from_le_bytes(b) & exponent == exponent))
        }
        Dtype::Bf16 | Dtype::F16 => {
            let exponent = if dtype == Dtype::Bf16 { 0x7f80 } else { 0x7c00 };
            block.as_chunks::<2>().0.iter().fold(false, |any, &b| any | (u16::from_le_bytes(b) & exponent == exponent))
        }
        Dtype::I8 | Dtype::I4 | Dtype::I32 | Dtype::I64 => false,
    };
    let (i, block) = bytes.chunks(BLOCK).enumerate().find(|(_, block)| suspicious(block))?;
    let values = widen(dtype, block);
    let at = values.iter().position(|x| !x.is_finite())?;
    Some((i * BLOCK / dtype.size() + at, values[at]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even() {
        // 1 + 2^-8 is half way between 1 and 1 + 2^-7: to even, 1. One ulp above it: up. 1 + 3·2^-8: tie, up to even.
        let cases = [(0x3f80_8000, 0x3f80), (0x3f80_8001, 0x3f81), (0x3f81_8000, 0x3f82), (0xbf81_8000, 0xbf82)];
        for (f32_bits, bf16_bits) in cases {
            let bytes = bf16_bytes(&[f32::from_bits(f32_bits)]);
            assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]), bf16_bits, "{f32_bits:x}");
        }
        // The largest f32 rounds to infinity, which saving refuses only if it was one before; so it must be seen here.
        assert_eq!(bf16_bytes(&[f32::MAX]), [0x80, 0x7f]);
    }

    #[test]
    fn finds_the_first_non_finite_element_across_blocks() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let mut values = vec![1.0_f32; 20_000];
            values[17_123] = f32::NAN;
            values[19_000] = f32::INFINITY;
            let bytes: Vec<u8> = match dtype {
                Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
                Dtype::Bf16 => bf16_bytes(&values),
                _ => f32_bytes(&values),
            };
            let (at, value) = first_non_finite(dtype, &bytes).unwrap();
            assert_eq!(at, 17_123);
            assert!(value.is_nan());
            assert!(first_non_finite(dtype, &bytes[..17_123 * dtype.size()]).is_none());
        }
    }

    #[test]
    fn int4_groups_lose_no_more_than_the_plain_scale_and_unpack_to_themselves() {
        let values: Vec<f32> =
            (0..320).map(|i| (i as f32 * 0.37).sin() * (i / 100 + 1) as f32 + if i % 32 == 5 { 4.0 } else { 0.0 }).collect();
        let (quantised, scales) = quantise_groups(&values, 32);
        assert_eq!((quantised.len(), scales.len()), (320, 10));
        let error = |values: &[f32], q: &dyn Fn(usize) -> f32, scale: f32| -> f32 {
            values.iter().enumerate().map(|(i, x)| (x - q(i) * scale).powi(2)).sum()
        };
        for (values, (q, &scale)) in values.chunks(32).zip(quantised.chunks(32).zip(&scales)) {
            assert_eq!(bf16::from_f32(scale).to_f32(), scale);
            let plain = bf16::from_f32(values.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 7.0).to_f32();
            let best = error(values, &|i| f32::from(q[i].cast_signed()), scale);
            assert!(best <= error(values, &|i| (values[i] / plain).round_ties_even().clamp(-8.0, 7.0), plain) * 1.0001);
        }
        let unpacked = widen(Dtype::I4, &pack_halves(&quantised));
        assert!(unpacked.iter().zip(&quantised).all(|(x, q)| *x == f32::from(q.cast_signed())));
        assert_eq!(quantise_groups(&[0.0; 32], 32), (vec![0; 32], vec![1.0]));
        assert_eq!(quantise_groups(&[1e-40; 32], 32).0, vec![0; 32]);
    }

    #[test]
    fn int8_rows_are_within_half_a_step() {
        let values: Vec<f32> = (0..300).map(|i| (i as f32 * 0.37).sin() * (i / 100 + 1) as f32).collect();
        let (quantised, scales) = quantise_rows(&values, 100);
        assert_eq!(scales.len(), 3);
        for (i, (&q, &x)) in quantised.iter().zip(&values).enumerate() {
            let scale = scales[i / 100];
            assert!((f32::from(q.cast_signed()) * scale - x).abs() <= scale * 0.5001);
        }
        assert!(quantised.iter().any(|&q| q.cast_signed().unsigned_abs() == 127));
        assert_eq!(quantise_rows(&[0.0; 4], 4), (vec![0; 4], vec![1.0]));
        assert_eq!(quantise_rows(&[1e-45, 0.0], 2).0, vec![0, 0]);
    }
}
