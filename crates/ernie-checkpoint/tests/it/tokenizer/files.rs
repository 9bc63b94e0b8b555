//! A model directory's tokenizer files: which are taken, how added tokens work, and what damaged ones do.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use ernie_checkpoint::{Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde_json::json;

fn fixture_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/tokenizers").join(name)
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(fixture_path(name)).expect("the fixture is there")
}

fn bpe_bytes() -> Tokenizer {
    Tokenizer::from_sentencepiece(&fixture("bpe_bytes.model"), "bpe_bytes.model").expect("the model loads")
}

/// A directory with `bpe_bytes.model` under `model_name`, and the given side files.
fn directory(model_name: &str, files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::copy(fixture_path("bpe_bytes.model"), dir.path().join(model_name)).expect("copied");
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).expect("written");
    }
    dir
}

const CONFIG: &str = r#"{
    "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "unk_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>", "mask_token": "not in the vocabulary",
    "additional_special_tokens": ["<mask:1>", "7", "8"], "add_bos_token": true,
    "added_tokens_decoder": {
        "5000": {"content": "<|begin_of_sentence|>", "special": true},
        "5001": {"content": "<|end_of_sentence|>", "special": true},
        "5002": {"content": "<mask:1>", "special": true, "lstrip": true, "rstrip": true},
        "5003": {"content": "<mask:10>", "special": false},
        "5004": {"content": "word", "single_word": true, "special": false}
    }
}"#;

#[test]
fn added_tokens_around_sentencepiece() {
    let dir = directory("tokenizer.model", &[("tokenizer_config.json", CONFIG), ("added_tokens.json", r#"{"<tool>": 5010}"#)]);
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("it loads");
    let plain = bpe_bytes();
    let text = |text: &str| plain.encode(text, false).expect("encodes");
    let encode = |text: &str| tokenizer.encode(text, false).expect("encodes");
    let join = |parts: &[Vec<u32>]| parts.concat();

    assert_eq!(encode("<|begin_of_sentence|>Hi there<|end_of_sentence|>"), join(&[vec![5000], text("Hi there"), vec![5001]]));
    // The longest token wins, and a prefix of a token is text.
    assert_eq!(encode("<mask:10><mask:"), join(&[vec![5003], text("<mask:")]));
    assert_eq!(encode("a <mask:1> \n b"), join(&[text("a"), vec![5002], text("b")]));
    assert_eq!(encode("word sword word"), join(&[vec![5004], text(" sword "), vec![5004]]));
    assert_eq!(encode("x<tool></s>"), join(&[text("x"), vec![5010, 2]]));
    assert_eq!(tokenizer.encode("Hi", true).expect("encodes"), join(&[vec![1], text("Hi")]));
    assert_eq!(
        tokenizer.encode_bytes(b"\xff<tool>\xe4\xbd", false).expect("encodes"),
        join(&[text("\u{fffd}"), vec![5010], text("\u{fffd}\u{fffd}")])
    );

    // Digits stay ordinary text although the directory lists some as special.
    let ids = encode("<s>1<mask:1>78 word<|end_of_sentence|>");
    assert_eq!(tokenizer.decode(&ids, true), "178 word");
    assert_eq!(tokenizer.decode(&ids, false), "<s>1<mask:1>78 word<|end_of_sentence|>");
    assert!(!tokenizer.is_special(text("7")[0]) && tokenizer.is_special(5000) && tokenizer.is_special(1) && !tokenizer.is_special(5010));

    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id(), tokenizer.pad_id()), (Some(1), Some(2), Some(0), None));
    assert_eq!(tokenizer.vocab_size(), 5011);
    assert_eq!(tokenizer.id_to_piece(5010).as_deref(), Some("<tool>"));
    assert_eq!(tokenizer.piece_to_id("<mask:10>"), Some(5003));
    assert_eq!(tokenizer.piece_to_id("<0x0A>").and_then(|id| tokenizer.id_to_piece(id)).as_deref(), Some("<0x0A>"));
    assert_eq!(tokenizer.special_tokens().sep.as_deref(), Some("<|end_of_sentence|>"));
    assert_eq!(tokenizer.decode(&[9999, 5010, u32::MAX], false), "<tool>");
}

#[test]
fn takes_tokenizer_json_first() {
    for name in ["tokenizer.model", "spm.model", "ernie_token_100k.model"] {
        let dir = directory(name, &[]);
        let tokenizer = Tokenizer::from_dir(dir.path()).expect(name);
        assert_eq!(tokenizer.vocab_size(), bpe_bytes().vocab_size());
        std::fs::copy(fixture_path("json_bytelevel.json"), dir.path().join("tokenizer.json")).expect("copied");
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "</s>"}"#).expect("written");
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("tokenizer.json");
        assert_eq!((tokenizer.eos_id(), tokenizer.is_special(2), tokenizer.bos_id()), (Some(2), true, None));
        // Its post-processor puts <s> first.
        let ids = tokenizer.encode("Once", true).expect("encodes");
        assert_eq!(ids[0], 1);
        assert_eq!(tokenizer.decode(&ids, true), "Once");
        assert_eq!(tokenizer.decode(&ids, false), "<s>Once");
    }
    let empty = tempfile::tempdir().expect("a directory");
    assert!(matches!(Tokenizer::from_dir(empty.path()), Err(TokenizerError::Missing { .. })));
}

#[test]
fn streams_whole_characters() {
    let tokenizer = bpe_bytes();
    let original = "ok 龘😀👨‍👩‍👧 é!";
    let ids = tokenizer.encode(original, false).expect("encodes");
    let mut stream = tokenizer.decode_stream(true);
    let parts: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
    // 😀 is four byte pieces: three give nothing, the fourth the character.
    let emoji = parts.iter().position(|part| part == "😀").expect("the emoji comes out whole");
    assert!(parts[emoji - 3..emoji].iter().all(String::is_empty), "{parts:?}");
    assert_eq!(parts.concat() + &stream.finish(), original);

    // A character cut short is given up only when something else follows.
    let bytes: Vec<u32> = ["<0xF0>", "<0x9F>", "<0x98>"].map(|piece| tokenizer.piece_to_id(piece).expect("a byte piece")).into();
    let mut stream = tokenizer.decode_stream(true);
    assert!(bytes.iter().all(|id| stream.push(*id).is_empty()));
    assert_eq!(stream.push(tokenizer.piece_to_id("7").expect("a digit")), "\u{fffd}\u{fffd}\u{fffd}7");
    assert!(bytes.iter().all(|id| stream.push(*id).is_empty()));
    assert_eq!(stream.finish(), "\u{fffd}\u{fffd}\u{fffd}");
}

#[test]
fn refuses_bad_side_files() {
    for (name, text, field) in [
        ("tokenizer_config.json", r#"{"bos_token": 3}"#, "bos_token"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {"content": "a"}}}"#, "added_tokens_decoder.x"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"4": {"content": "a", "special": 1}}}"#, "added_tokens_decoder.4.special"),
        ("tokenizer_config.json", r#"{"add_bos_token": "yes"}"#, "add_bos_token"),
        ("tokenizer_config.json", "[]", "object"),
        ("special_tokens_map.json", r#"{"additional_special_tokens": "x"}"#, "additional_special_tokens"),
        ("added_tokens.json", r#"{"a": -1}"#, "a: expected a token id"),
        ("added_tokens.json", "{", "EOF"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer.json", "\u{0}", "tokenizer.json"),
    ] {
        let dir = directory("tokenizer.model", &[(name, text)]);
        let error = Tokenizer::from_dir(dir.path()).expect_err(text).to_string();
        assert!(error.contains(name) && error.contains(field), "{text}: {error}");
    }
}

#[test]
fn refuses_damaged_models_with_the_place() {
    let model = fixture("bpe_bytes.model");
    let load = |bytes: &[u8]| Tokenizer::from_sentencepiece(bytes, "dir/tokenizer.model");
    for bytes in [&model[..model.len() / 2], b"", b"not a model", &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f, 1][..]] {
        let error = load(bytes).expect_err("damaged").to_string();
        assert!(error.starts_with("dir/tokenizer.model: "), "{error}");
    }
    // trainer_spec.model_type = 4 (characters), appended: the last value counts.
    let error = load(&[&model[..], &[0x12, 2, 0x18, 4]].concat()).expect_err("unsupported").to_string();
    assert!(error.contains("model_type is 4"), "{error}");
    // A second unknown piece, a piece without text, and one with an infinite score.
    for (piece, reason) in [
        (&[0x0a, 5, 0x0a, 1, b'~', 0x18, 2][..], "unknown"),
        (&[0x0a, 0], "empty"),
        (&[0x0a, 8, 0x0a, 1, b'~', 0x15, 0, 0, 0x80, 0x7f], "finite"),
        (&[0x0a, 3, 0x0a, 1, 0xff], "UTF-8"),
        (&[0x0a, 5, 0x0a, 1, b'~', 0x18, 9], "type 9"),
    ] {
        let error = load(&[&model[..], piece].concat()).expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
    }
}

/// Loads; if that works, encodes and decodes.
fn exercise(bytes: &[u8]) {
    if let Ok(tokenizer) = Tokenizer::from_sentencepiece(bytes, Path::new("fuzz.model")) {
        for text in [&b" Once upon\ta time 123 \xe4\xbd\xa0\xe5\xa5\xbd \xff\xf0\x9f\x98 \xef\xbc\xa1 abcab<sep>"[..], b""] {
            let ids = tokenizer.encode_bytes(text, true).expect("SentencePiece encoding cannot fail");
            tokenizer.decode(&ids, true);
        }
        tokenizer.decode(&[0, 1, 2, 3, 300, 500, 900, 1200], false);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        exercise(&bytes);
    }

    /// Real models with a few bytes changed, and cut: most still parse, with lying lengths, tries and scores.
    #[test]
    fn damaged_models_never_panic(
        which in 0usize..3,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = fixture(["unigram_nfkc.model", "bpe_suffix.model", "unigram_bytes.model"][which]);
        for (index, value) in changes {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise(&bytes);
    }

    /// Streaming equals whole decoding for any ids and either treatment of special tokens.
    #[test]
    fn any_stream_is_the_whole(ids in proptest::collection::vec(0u32..1320, 0..40), skip_special: bool) {
        for (name, tokenizer) in STREAMED.iter() {
            let mut stream = tokenizer.decode_stream(skip_special);
            let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
            text.push_str(&stream.finish());
            prop_assert_eq!(text, tokenizer.decode(&ids, skip_special), "{}", name);
        }
    }
}

/// One tokenizer for each way of decoding.
static STREAMED: LazyLock<Vec<(String, Tokenizer)>> = LazyLock::new(|| {
    let mut all = Vec::new();
    for name in ["bpe_bytes.model", "bpe_suffix.model", "unigram_nfkc.model", "unigram_bytes.model"] {
        all.push((name.to_owned(), Tokenizer::from_sentencepiece(&fixture(name), name).expect("loads")));
    }
    let decoders = [
        serde_json::Value::Null,
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        json!({"type": "BPEDecoder", "suffix": "e"}),
        json!({"type": "WordPiece", "prefix": "e", "cleanup": true}),
    ];
    for name in ["json_bytelevel.json", "json_byte_fallback.json"] {
        let original = fixture(name);
        all.push((name.to_owned(), Tokenizer::from_tokenizer_json(&original, name).expect("loads")));
        for decoder in &decoders {
            let mut fields: serde_json::Value = serde_json::from_slice(&original).expect("JSON");
            fields["decoder"] = decoder.clone();
            let tokenizer = Tokenizer::from_tokenizer_json(fields.to_string().as_bytes(), name).expect("loads");
            all.push((format!("{name} with decoder {decoder}"), tokenizer));
        }
    }
    all
});

/// The library panics on these (found by fuzzing): text that is no JSON inside a decoder, a normaliser's table that is none.
#[test]
fn files_on_which_the_library_panics_are_refused() {
    let name = "json_byte_fallback.json";
    let original = String::from_utf8(fixture(name)).expect("text");
    let within = original.find("\"decoder\"").expect("a decoder") + 40;
    let cut = [&original[..within], "{", &original[within..]].concat();
    let mut fields: serde_json::Value = serde_json::from_str(&original).expect("JSON");
    fields["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
    for bad in [cut.as_str(), &original[..within], &fields.to_string()] {
        let error = Tokenizer::from_tokenizer_json(bad.as_bytes(), name).expect_err("it was accepted");
        assert!(matches!(error, TokenizerError::TokenizerJson { .. }) && error.to_string().contains(name), "{error}");
    }
}

/// A decoder that takes more characters from a token's end than it has makes the library panic.
#[test]
fn a_decoder_that_takes_too_much_gives_no_text() {
    let name = "json_byte_fallback.json";
    let mut fields: serde_json::Value = serde_json::from_slice(&fixture(name)).expect("JSON");
    fields["decoder"] = json!({"type": "Strip", "content": "e", "start": 0, "stop": 2});
    let tokenizer = Tokenizer::from_tokenizer_json(fields.to_string().as_bytes(), name).expect("loads");
    let e = tokenizer.piece_to_id("e").expect("a piece");
    assert_eq!(tokenizer.decode(&[e], false), "");
    let mut stream = tokenizer.decode_stream(false);
    assert_eq!(stream.push(e) + &stream.finish(), "");
}

#[test]
fn is_shared_between_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    shared(&bpe_bytes());
}
