//! ernie-engine
