//! Integration tests: one binary, one module per subject.

mod chat_template;
mod tokenizer;
