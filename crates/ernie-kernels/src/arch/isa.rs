//! Which instruction set the processor has, asked once; and `simd_fn!`, which compiles one loop for each of them.
//!
//! Binaries are built for the oldest processor of an architecture, so the compiler may use wide registers only inside functions marked
//! `#[target_feature]`. `simd_fn!` writes those functions: the body is ordinary safe code, in a form the compiler can vectorise (slices, plain
//! loops, arrays of [`LANES`] partial sums), and is compiled three times on x86-64 and once elsewhere (aarch64 has its vectors in the baseline).
#![allow(unsafe_code)] // Calling a `#[target_feature]` function after asking the processor for the feature.

use std::sync::OnceLock;

/// Partial sums (or maxima) kept by a reduction: two registers of AVX-512, so that one addition need not wait for the one before.
pub const LANES: usize = 32;

/// Instruction sets that kernels are compiled for, poorest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every processor of the architecture has (on aarch64 this includes NEON).
    Portable,
    /// x86-64 with AVX2 and fused multiply-add.
    Avx2,
    /// x86-64 with AVX-512 F, VL, BW and DQ.
    Avx512,
}

/// The instruction set in use: the best this processor has, found at the first call. The environment variable `ERNIE_ISA` (`portable`, `avx2`,
/// `avx512`: that without AMX) can only lower it: for tests and for narrowing down a fault. Any other value lowers nothing.
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| detect().min(limit().unwrap_or(Isa::Avx512)))
}

/// What the environment lowers the instruction set to; the best one counts too, for it has no tiles (`amx.rs`).
pub(super) fn limit() -> Option<Isa> {
    match std::env::var("ERNIE_ISA").as_deref() {
        Ok("portable") => Some(Isa::Portable),
        Ok("avx2") => Some(Isa::Avx2),
        Ok("avx512") => Some(Isa::Avx512),
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let has_avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq");
    match (has_avx2, has_avx512) {
        (true, true) => Isa::Avx512,
        (true, false) => Isa::Avx2,
        _ => Isa::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

/// Defines a function whose body is compiled for every [`Isa`] and chosen at each call (one load and a branch: call it per row, not per element).
///
/// `simd_fn! { pub fn name<FMA>(args…) -> R { body } }`. The name in angle brackets is a `const bool`, true where the processor has fused
/// multiply-add; pass it to [`mul_add`] and [`exp`](crate::arch::exp::exp). Everything the body calls must be `#[inline(always)]` or small,
/// or else it is compiled without the wide registers.
macro_rules! simd_fn {
    ($(#[$attr:meta])* $vis:vis fn $name:ident<$fma:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$attr])*
        #[allow(unsafe_code)] // The one `unsafe` is written below, in arch/, for every use of the macro.
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const $fma: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                match $crate::arch::isa::isa() {
                    // SAFETY: the body is safe code; the call asks only that the processor has these features, and `isa` has found them.
                    $crate::arch::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::arch::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                    $crate::arch::isa::Isa::Portable => body::<false>($($arg),*),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            body::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}
pub(crate) use simd_fn;

/// `a * b + c`, fused where that is one instruction (elsewhere `f32::mul_add` would be a call to the mathematics library).
#[inline(always)]
pub fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A slip in the variable would make the runs of `testing.rs` on the lesser instruction sets runs on the best one.
    #[test]
    fn the_instruction_set_is_the_one_that_the_variable_names() {
        let best = detect();
        let expected = match std::env::var("ERNIE_ISA") {
            Err(_) => best,
            Ok(name) if name == "portable" => Isa::Portable,
            Ok(name) if name == "avx2" && best >= Isa::Avx2 => Isa::Avx2,
            // A processor without it runs what it has.
            Ok(name) if name == "avx2" || name == "avx512" => best,
            Ok(name) => panic!("ERNIE_ISA={name} is no instruction set"),
        };
        assert_eq!(isa(), expected);
        #[cfg(target_arch = "x86_64")]
        assert_eq!(best >= Isa::Avx2, is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));
    }
}
