//! Integration tests of `ernie-checkpoint`: every way a model directory can be wrong, every way to write one, tokenizers
//! and chat templates.

mod bad_files;
mod bad_index;
mod chat_template;
mod configs;
mod embedded;
mod fixture;
mod incomplete;
mod mutation;
mod paddle;
mod quantizing;
mod quantizing_limits;
mod saving;
mod tokenizer;
