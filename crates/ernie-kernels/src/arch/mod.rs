//! Instruction sets, chosen once at run time.
pub mod dot;
