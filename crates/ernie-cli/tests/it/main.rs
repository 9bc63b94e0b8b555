//! The built program, run as users run it.
mod accounts;
mod chat;
mod eval;
mod explain;
mod generate;
mod goldens;
mod inspect;
mod program;
mod quantize;
mod serve;
mod summarise;
mod tiny_model;
mod tokenize;
mod train;
mod usage;
