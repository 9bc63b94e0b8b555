//! sentencepiece
