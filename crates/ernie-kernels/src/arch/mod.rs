//! Instruction sets, chosen once at run time.
pub mod dot;
pub mod exp;
pub mod gemm;
pub mod isa;
