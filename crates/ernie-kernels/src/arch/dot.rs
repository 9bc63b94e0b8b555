//! Dot products of f32 rows with f32 and bf16 weights.
