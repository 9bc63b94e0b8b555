//! tokenizer_training
