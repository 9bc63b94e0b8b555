//! Tokenizers against the `sentencepiece` and `tokenizers` Python packages (fixtures: testdata/scripts/make_tokenizer_goldens.py).

mod files;

use std::path::PathBuf;

use ernie_checkpoint::{TokenBytes, Tokenizer};

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/tokenizers").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A fixture's bytes, read from the front.
struct Fixture<'a>(&'a [u8]);

impl<'a> Fixture<'a> {
    fn number(&mut self) -> usize {
        let mut number = 0;
        for shift in (0..).step_by(7) {
            let (byte, rest) = self.0.split_first().expect("fixture ends early");
            self.0 = rest;
            number |= usize::from(byte & 0x7f) << shift;
            if *byte < 0x80 {
                break;
            }
        }
        number
    }

    fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(length);
        self.0 = rest;
        bytes
    }

    fn ids(&mut self) -> Vec<u32> {
        let count = self.number();
        (0..count).map(|_| self.number() as u32).collect()
    }

    fn text(&mut self, original: &'a [u8]) -> &'a str {
        let bytes = match self.number() {
            0 => original,
            length => self.bytes(length - 1),
        };
        std::str::from_utf8(bytes).expect("the reference packages return valid text")
    }
}

fn strings() -> Vec<Vec<u8>> {
    let bytes = fixture("strings.bin");
    let mut fixture = Fixture(&bytes);
    let count = fixture.number();
    let strings = (0..count).map(|_| {
        let length = fixture.number();
        fixture.bytes(length).to_vec()
    });
    strings.collect()
}

/// Streams `ids` and checks that the parts make the whole.
fn assert_streams(tokenizer: &Tokenizer, ids: &[u32], whole: &str, what: &str) {
    let mut stream = tokenizer.decode_stream(false);
    let mut text = String::new();
    for id in ids {
        text.push_str(&stream.push(*id));
        assert!(whole.starts_with(&text), "{what}: streamed {text:?} is not the beginning of {whole:?} ({ids:?})");
    }
    text.push_str(&stream.finish());
    assert_eq!(text, whole, "{what}: streamed text ({ids:?})");
}

/// The bytes of the tokens are the text, but for spaces that decoding takes off its beginning.
fn assert_bytes(tokenizer: &Tokenizer, ids: &[u32], whole: &str, what: &str) {
    let bytes = ids.iter().flat_map(|id| match tokenizer.token_bytes(*id) {
        Some(TokenBytes::Text(bytes)) => bytes,
        Some(TokenBytes::Special(name)) => name.into_bytes(),
        None => Vec::new(),
    });
    let text = String::from_utf8(bytes.collect()).unwrap_or_else(|error| panic!("{what}: {error} ({ids:?})"));
    assert_eq!(text.trim_start_matches(' '), whole.trim_start_matches(' '), "{what}: bytes of {ids:?}");
}

/// Every string and random id sequence of the fixture; returns how many of each were compared.
fn compare(name: &str, tokenizer: &Tokenizer) -> (usize, usize) {
    let strings = strings();
    let golden = fixture(&format!("{name}.golden"));
    let mut golden = Fixture(&golden);
    for string in &strings {
        let ids = golden.ids();
        let text = golden.text(string);
        let shown = String::from_utf8_lossy(string);
        assert_eq!(tokenizer.encode_bytes(string, false).expect("encodes"), ids, "{name}: ids of {shown:?}");
        if let Ok(valid) = std::str::from_utf8(string) {
            assert_eq!(tokenizer.encode(valid, false).expect("encodes"), ids, "{name}: ids of {shown:?}");
        }
        assert_eq!(tokenizer.decode(&ids, false), text, "{name}: text of {ids:?} from {shown:?}");
        assert_streams(tokenizer, &ids, text, name);
        if std::str::from_utf8(string).is_ok() && !ids.iter().any(|id| tokenizer.unk_id() == Some(*id)) {
            assert_bytes(tokenizer, &ids, text, name);
        }
    }
    let sequences = golden.number();
    for _ in 0..sequences {
        let ids = golden.ids();
        let text = golden.text(b"");
        assert_eq!(tokenizer.decode(&ids, false), text, "{name}: text of {ids:?}");
        assert_streams(tokenizer, &ids, text, name);
    }
    assert!(golden.0.is_empty(), "{name}: the fixture has more than was compared");
    (strings.len(), sequences)
}

fn compare_sentencepiece(name: &str) {
    let file = format!("{name}.model");
    let tokenizer = Tokenizer::from_sentencepiece(&fixture(&file), file).expect("the model loads");
    let (strings, sequences) = compare(name, &tokenizer);
    println!("{name}: {strings} strings and {sequences} id sequences equal");
    assert!(strings >= 2000);
}

fn compare_json(name: &str) {
    let file = format!("{name}.json");
    let tokenizer = Tokenizer::from_tokenizer_json(&fixture(&file), file).expect("the tokenizer loads");
    let (strings, sequences) = compare(name, &tokenizer);
    println!("{name}: {strings} strings and {sequences} id sequences equal");
    assert!(strings >= 2000);
}

#[test]
fn bpe_with_byte_fallback_and_digits() {
    compare_sentencepiece("bpe_bytes");
}

#[test]
fn bpe_with_nfkc_and_dummy_prefix() {
    compare_sentencepiece("bpe_nfkc");
}

#[test]
fn bpe_with_whitespace_as_suffix_and_unused_pieces() {
    compare_sentencepiece("bpe_suffix");
}

#[test]
fn unigram_with_nfkc() {
    compare_sentencepiece("unigram_nfkc");
}

#[test]
fn unigram_with_byte_fallback_and_overlapping_symbols() {
    compare_sentencepiece("unigram_bytes");
}

#[test]
fn unigram_with_unused_pieces() {
    compare_sentencepiece("unigram_unused");
}

#[test]
fn tokenizer_json_byte_level() {
    compare_json("json_bytelevel");
}

#[test]
fn tokenizer_json_byte_fallback() {
    compare_json("json_byte_fallback");
}
