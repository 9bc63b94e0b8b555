//! experts
