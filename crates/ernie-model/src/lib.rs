//! ernie-model
