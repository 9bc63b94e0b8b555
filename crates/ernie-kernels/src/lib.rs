//! CPU maths on slices, forward and backward: one file per operator, a scalar twin for each.
//!
//! All matrices are row-major `f32` unless a name says otherwise. Functions take slices and shapes, assert that they agree, and never allocate
//! in proportion to anything but their arguments. `arch/` holds the instruction sets and all `unsafe` of the project's maths; the choice is
//! made once, at run time.
pub mod adamw;
pub mod arch;
pub mod attention;
pub mod cross_entropy;
pub mod density;
pub mod embedding;
pub mod experts;
pub mod float;
pub mod head_gates;
pub mod int4;
pub mod int8;
pub mod linear;
pub mod logits;
pub mod matmul;
pub mod memory;
pub mod norm_linear;
pub mod paged;
pub mod rms_norm;
pub mod rope;
pub mod router;
mod row;
pub mod scratch;
pub mod swiglu;
pub mod swiglu_linear;
#[cfg(test)]
mod testing;
