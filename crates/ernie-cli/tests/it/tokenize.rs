//! `ernie tokenize`.
use crate::program::{ernie, ernie_with_input};
use crate::tiny_model;
use serde_json::json;

#[test]
fn text_goes_to_ids_and_back() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    let model = dir.path().to_str().unwrap();
    for text in ["Hi there", "你好 🙂", " two  spaces\n", "-5"] {
        let found = ernie(["tokenize", text, "--model", model, "--json"]).json();
        assert_eq!(found["text"], text);
        let ids = found["ids"].as_array().unwrap().iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        assert_eq!(ernie(["tokenize", "--decode", &ids, "--model", model]).ok(), format!("{text}\n"));
    }
    let found = ernie_with_input(["tokenize", "-", "--model", model, "--json"], "A!").json();
    assert_eq!(found["pieces"], json!(["A", "!"]));
    let table = ernie(["tokenize", "A\n", "--model", model]).ok();
    assert!(table.contains("A\n") && table.contains("<0x0A>") && table.ends_with("2 tokens\n"), "{table}");
}

#[test]
fn the_built_in_tokenizer_keeps_text_as_it_is() {
    let text = "Once upon a time, 从前有一只小兔子。🙂";
    assert_eq!(ernie(["tokenize", text, "--json"]).json()["text"], text);
}

#[test]
fn an_id_beyond_the_vocabulary_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    let model = dir.path().to_str().unwrap();
    ernie(["tokenize", "--decode", "3,9999", "--model", model]).fails(1, &["9999", &tiny_model::VOCAB.to_string()]);
}
