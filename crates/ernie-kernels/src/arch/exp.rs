//! The exponential, written so that loops over it vectorise.

use super::isa::{mul_add, simd_fn};

/// e^x within 2 units in the last place for x in [-87.3, 88.3]; smaller arguments give e^-87.3 ≈ 1.2e-38 and larger ones e^88.3 ≈ 2.2e38,
/// never zero nor infinity. NaN stays NaN.
///
/// Cephes `expf`: x = n·ln 2 + r with ln 2 in two parts so that n times the first is exact, a polynomial of degree 5 for (e^r − 1 − r)/r²,
/// and n added to the exponent bits.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    /// Adding 1.5·2²³ rounds to an integer, which then stands in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.3, 88.3);
    let rounded = mul_add::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = mul_add::<FMA>(-n, LN2_HIGH, x);
    let r = mul_add::<FMA>(-n, LN2_LOW, r);
    let p = mul_add::<FMA>(1.987_569_1e-4, r, 1.398_2e-3);
    let p = mul_add::<FMA>(p, r, 8.333_452e-3);
    let p = mul_add::<FMA>(p, r, 4.166_579_6e-2);
    let p = mul_add::<FMA>(p, r, 1.666_666_6e-1);
    let p = mul_add::<FMA>(p, r, 0.5);
    let y = mul_add::<FMA>(p, r * r, r + 1.0);
    let power_of_two = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    y * power_of_two
}

simd_fn! {
    /// Replaces every element by its exponential (see [`exp`]).
    pub fn exp_in_place<FMA>(x: &mut [f32]) {
        for value in x {
            *value = exp::<FMA>(*value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_within_two_ulp_of_the_true_value() {
        let mut worst = 0.0f64;
        let arguments: Vec<f32> = (0..400_000).map(|i| -87.3 + i as f32 * (175.6 / 400_000.0)).collect();
        let mut values = arguments.clone();
        exp_in_place(&mut values);
        for (&x, &y) in arguments.iter().zip(&values) {
            let truth = (x as f64).exp();
            let ulp = f64::from(f32::from_bits((truth as f32).to_bits() + 1)) - f64::from(truth as f32);
            worst = worst.max((f64::from(y) - truth).abs() / ulp);
        }
        assert!(worst < 2.0, "{worst} ulp");
    }

    #[test]
    fn saturates_and_keeps_nan() {
        let mut x = [f32::NEG_INFINITY, -1e30, 0.0, 1e30, f32::INFINITY, f32::NAN];
        exp_in_place(&mut x);
        assert!(x[0] > 0.0 && x[0] < 2e-38 && x[1] == x[0]);
        assert_eq!(x[2], 1.0);
        assert!(x[3].is_finite() && x[3] > 2e38 && x[4] == x[3]);
        assert!(x[5].is_nan());
    }
}
