//! `ernie eval`.
use crate::program::ernie;
use crate::train::{project, train};
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
fn a_model_is_scored_on_the_sources_of_its_recipe_as_its_training_did() {
    let dir = project();
    let file = dir.path().join("tiny.toml");
    let recipe = fs::read_to_string(&file).unwrap();
    // A second source, of other text.
    let verse = |n: usize| format!("{n} 床前明月光，疑是地上霜。{}\n<|endoftext|>\n", n * 7);
    fs::write(dir.path().join("data/verse.txt"), (0..200).map(verse).collect::<String>()).unwrap();
    let second = "[[data.source]]\nname = \"verse\"\nformat = \"separated\"\npaths = [\"verse.txt\"]\nweight = 1.0\nlicence = \"CC0-1.0\"\n\n[schedule]";
    fs::write(&file, recipe.replace("[schedule]", second)).unwrap();
    let report = train(dir.path(), &["--json"]).json();
    let place = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (file, data, model) = (place("tiny.toml"), place("data"), place("out/model"));
    let call = ["eval", "perplexity", "--recipe", &file, "--data", &data, "--model", &model];
    let found = ernie([&call[..], &["--json"]].concat()).json();
    let sources = found["sources"].as_array().unwrap();
    assert_eq!((sources.len(), &found["sequence_length"]), (2, &64.into()), "{found}");
    for (source, expected) in sources.iter().zip(report["validation"].as_array().unwrap()) {
        assert_eq!((&source["source"], &source["loss"]), (&expected[0], &expected[1]));
        assert!((source["perplexity"].as_f64().unwrap() - source["loss"].as_f64().unwrap().exp()).abs() < 1e-9);
    }
    let table = ernie(call).ok();
    assert!(table.contains("stories") && table.contains("verse") && table.lines().count() == 3, "{table}");

    // The built-in model has a tokenizer of its own.
    ernie(["eval", "perplexity", "--recipe", &file, "--data", &data]).fails(1, &["another tokenizer", "tokenizer.path"]);
    ernie(["eval", "perplexity", "--recipe", "none.toml"]).fails(1, &["none.toml"]);
    ernie(["eval", "perplexity", "--recipe", &file, "text.txt"]).fails(2, &["--recipe"]);
    ernie(["eval", "perplexity", "--recipe", &file, "--weights", "int8"]).fails(2, &["--weights"]);
    ernie(["eval", "perplexity", "--data", &data]).fails(2, &["--recipe"]);
    ernie(["eval", "perplexity"]).fails(2, &["FILE"]);
    let config = dir.path().join("out/model/config.json");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("\"max_position_embeddings\": 256"), "{text}");
    fs::write(&config, text.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 32")).unwrap();
    ernie(call).fails(1, &["32 tokens", "64"]);
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
