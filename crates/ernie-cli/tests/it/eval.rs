//! `ernie eval`.
use crate::program::ernie;
use std::fs;

#[test]
fn texts_are_scored_one_by_one_and_together() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let story = file("story.txt", "Once upon a time there was a little dog who liked to play in the garden.");
    let noise = file("noise.txt", "xq zv 7% lorem }{ kkk wq9 zzxy 4471");
    let found = ernie(["eval", "perplexity", &story, &noise, "--weights", "f32", "--json"]).json();
    let of = |index: usize, key: &str| found["files"][index][key].as_f64().unwrap();
    assert!(of(0, "perplexity") * 4.0 < of(1, "perplexity"), "{found}");
    assert!((of(0, "perplexity") - of(0, "loss").exp()).abs() < 1e-9);
    assert_eq!(found["all"]["tokens"].as_u64().unwrap(), (of(0, "tokens") + of(1, "tokens")) as u64);
    assert!(of(0, "bits_per_byte") < found["all"]["bits_per_byte"].as_f64().unwrap());
    let table = ernie(["eval", "perplexity", &story]).ok();
    assert!(table.contains("bits/byte") && table.lines().count() == 3, "{table}");
    ernie(["eval", "perplexity", &story, "--context", "100000"]).fails(1, &["story.txt", "100000", "512"]);
    let broken = dir.path().join("broken.txt");
    fs::write(&broken, b"abc\xff").unwrap();
    ernie(["eval", "perplexity", broken.to_str().unwrap()]).fails(1, &["broken.txt", "byte 3"]);
}

#[test]
fn predictions_are_scored_line_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let references = file("references.txt", "the cat sat on the mat\nit was warm outside today\n");
    let predictions = file("predictions.txt", "the cat sat on the mat\nit was cold inside today\n");
    let found = ernie(["eval", "score", &predictions, &references, "--json"]).json();
    assert_eq!((found["lines"].as_u64(), found["rouge1"]["f1"].as_f64()), (Some(2), Some(0.8)), "{found}");
    assert!(found["bleu"]["score"].as_f64().unwrap() > 40.0);
    let (chinese, other) = (file("zh.txt", "今天天气很好\n"), file("other.txt", "今天天气不好\n"));
    assert_eq!(ernie(["eval", "score", &chinese, &other, "--json"]).json()["rouge1"]["f1"], 0.0);
    let f1 = ernie(["eval", "score", &chinese, &other, "--chinese", "--json"]).json()["rouge1"]["f1"].as_f64().unwrap();
    assert!((f1 - 5.0 / 6.0).abs() < 1e-12);
    assert!(ernie(["eval", "score", &predictions, &references]).ok().contains("ROUGE-Lsum"));
    ernie(["eval", "score", &chinese, &references]).fails(1, &["1 lines", "2"]);
}
