//! The training loop from outside: it learns, it resumes to the bit, it survives being killed, it refuses what cannot train.
mod curriculum;
mod experiments;
mod learning;
mod profile;
mod resume;
mod run;
