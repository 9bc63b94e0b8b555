//! Instruction sets, chosen once at run time.
mod ahead;
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod byte_pairs;
pub mod dot;
pub mod dot_bf16;
pub mod dot_i4;
pub mod dot_i8;
pub mod exp;
pub mod gemm;
pub mod gemm_i8;
pub mod isa;
pub mod limits;
pub mod matrix;
pub mod pack;
pub mod pool;
#[cfg(target_arch = "x86_64")]
mod quantise_avx2;
#[cfg(target_arch = "x86_64")]
mod quantise_avx512;
pub mod quantised;
pub mod tile;
mod tile_i8;
pub mod widen;
