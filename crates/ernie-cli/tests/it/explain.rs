//! `ernie explain`.
use crate::program::{ernie, ernie_with_input};
use crate::tiny_model;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn golden(model: &str) -> String {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/models").join(model);
    dir.to_str().unwrap().to_owned()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

#[test]
fn the_built_in_mixture_shows_surprise_and_experts() {
    let text = "Once upon a time there was a little dog.";
    let found = ernie(["explain", text, "--json"]).json();
    let tokens = found["tokens"].as_array().unwrap();
    assert_eq!(tokens.iter().map(|token| token["piece"].as_str().unwrap()).collect::<String>(), text);
    assert_eq!(tokens[0]["loss"], Value::Null);
    let losses: Vec<f64> = tokens[1..].iter().map(|token| token["loss"].as_f64().unwrap()).collect();
    assert!((found["mean_loss"].as_f64().unwrap() - losses.iter().sum::<f64>() / losses.len() as f64).abs() < 1e-6);
    // Experts in the layers that config.json names, two for each token, and their counts.
    let layers = found["layers"].as_array().unwrap();
    assert_eq!(layers.iter().map(|layer| layer["layer"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    for layer in layers {
        assert_eq!(layer["heads"], Value::Null);
        let mut counts = vec![0.0; 8];
        for choices in layer["experts"]["choices"].as_array().unwrap() {
            let choices = choices.as_array().unwrap();
            let weights: Vec<f64> = choices.iter().map(|choice| choice["weight"].as_f64().unwrap()).collect();
            assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-5 && weights.len() == 2, "{weights:?}");
            choices.iter().for_each(|choice| counts[choice["expert"].as_u64().unwrap() as usize] += 1.0);
        }
        assert_eq!(numbers(&layer["experts"]["tokens"]), counts);
    }
    let picture = ernie(["explain", text]).ok();
    for part in ["token", "Once", "·upon", "\n1 experts ", "\n5 experts ", "mean loss", "layer 5   tokens per expert 0:"] {
        assert!(picture.contains(part), "no {part:?} in {picture}");
    }
    assert!(!picture.contains('\x1b') && !picture.contains("density"), "{picture}");
}

#[test]
fn losses_are_those_of_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    let story = dir.path().join("story.txt");
    std::fs::write(&story, "Once upon a time there was a little dog who liked to play in the garden.").unwrap();
    let story = story.to_str().unwrap();
    let explained = ernie(["explain", "--file", story, "--json"]).json();
    let scored = ernie(["eval", "perplexity", story, "--weights", "f32", "--json"]).json();
    let (explained, scored) = (explained["mean_loss"].as_f64().unwrap(), scored["all"]["loss"].as_f64().unwrap());
    assert!((explained - scored).abs() < 1e-4, "{explained} {scored}");
}

#[test]
fn gated_heads_are_shown_with_their_density() {
    let model = golden("moe_gated_local");
    let call = ["explain", "--model", &model, "--ids", "22,37,24,20,64,3,30,18,59,99,79,88"];
    let found = ernie([&call[..], &["--json"]].concat()).json();
    assert_eq!((&found["tokens"][1]["id"], &found["tokens"][1]["piece"]), (&json!(37), &Value::Null));
    let picture = ernie(call).ok();
    for layer in found["layers"].as_array().unwrap() {
        let heads = &layer["heads"];
        let rows = heads["active"].as_array().unwrap();
        let active: Vec<bool> = rows.iter().flat_map(|row| row.as_array().unwrap()).map(|active| active.as_bool().unwrap()).collect();
        let gates: Vec<f64> = heads["gates"].as_array().unwrap().iter().flat_map(numbers).collect();
        assert_eq!(active, gates.iter().map(|&gate| gate >= 0.4).collect::<Vec<_>>());
        let share = active.iter().filter(|active| **active).count() as f64 / active.len() as f64;
        assert!((heads["active_share"].as_f64().unwrap() - share).abs() < 1e-12);
        assert_eq!((rows.len(), active.len(), numbers(&heads["density"]).len()), (12, 48, 12));
        let number = layer["layer"].as_u64().unwrap();
        for part in [format!("\n{number} density "), format!("\n{number} head 2,3 "), format!("heads active {:.1}%", 100.0 * share)] {
            assert!(picture.contains(&part), "no {part:?} in {picture}");
        }
    }
    let one = ernie([&call[..], &["--layers", "1", "--json"]].concat()).json();
    assert_eq!(one["layers"], json!([found["layers"][1]]));
    assert_ne!(one["layers"][0]["experts"], Value::Null);
}

#[test]
fn a_plain_dense_model_has_its_surprise() {
    let call = ["explain", "--model", &golden("dense_tied"), "--ids", "5,6,7,8"];
    assert_eq!(ernie([&call[..], &["--json"]].concat()).json()["layers"], json!([]));
    assert!(ernie(call).ok().contains("4 tokens, mean loss"));
}

#[test]
fn text_comes_from_an_argument_a_file_or_standard_input() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    let model = dir.path().to_str().unwrap();
    let file = dir.path().join("text.txt");
    std::fs::write(&file, "A\tb 从\n").unwrap();
    let from_file = ernie(["explain", "--file", file.to_str().unwrap(), "--model", model]).ok();
    assert_eq!(ernie(["explain", "A\tb 从\n", "--model", model]).ok(), from_file);
    assert_eq!(ernie_with_input(["explain", "-", "--model", model], "A\tb 从\n").ok(), from_file);
    // Lines are as narrow as asked, words of the legend aside.
    let long = ernie(["explain", &"word ".repeat(15), "--model", model, "--width", "40"]).ok();
    let rows = long.lines().filter(|line| line.starts_with("token") || line.starts_with("1 experts"));
    let widths: Vec<usize> = rows.map(|line| line.chars().count()).collect();
    assert!(widths.len() > 6 && widths.iter().all(|&width| width <= 40), "{long}");
}

#[test]
fn the_svg_is_well_formed_whatever_the_text() {
    let dir = tempfile::tempdir().unwrap();
    // The model's folder is the picture's title.
    let model = dir.path().join("a<b>&\"c\"");
    std::fs::create_dir(&model).unwrap();
    tiny_model::write(&model);
    let file = dir.path().join("picture.svg");
    std::fs::write(&file, "an older one").unwrap();
    let text = "<b>&amp; \"q\" 'x' ]]> \u{1}\u{1b} 从🙂</b>";
    let call = ["explain", text, "--model", model.to_str().unwrap(), "--svg", file.to_str().unwrap(), "--json"];
    let found = ernie(call).json();
    let svg = std::fs::read_to_string(&file).unwrap();
    let elements = well_formed(&svg);
    let count = |name: &str| elements.iter().filter(|element| *element == name).count();
    let tokens = found["tokens"].as_array().unwrap().len();
    // A paper, a bar for each loss, two experts for each token.
    assert_eq!(count("rect"), 1 + (tokens - 1) + 2 * tokens);
    assert!(svg.contains("a&lt;b&gt;&amp;&quot;c&quot;"));
    let gated = ernie(["explain", "--ids", "3,4,5", "--model", &golden("dense_gated"), "--svg", file.to_str().unwrap()]).ok();
    assert!(gated.contains("density"));
    let elements = well_formed(&std::fs::read_to_string(&file).unwrap());
    assert_eq!(elements.iter().filter(|element| *element == "polyline").count(), 2);
    assert_eq!(leftovers(dir.path()), ["a<b>&\"c\"", "picture.svg"]);
}

fn leftovers(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The names of all elements of an XML text, after a check of tags, quotes, entities and characters.
fn well_formed(xml: &str) -> Vec<String> {
    let (mut open, mut elements): (Vec<&str>, Vec<String>) = (Vec::new(), Vec::new());
    let mut rest = xml;
    while let Some((text, after)) = rest.split_once('<') {
        plain(text);
        assert!(!open.is_empty() || text.trim().is_empty(), "text outside the root: {text:?}");
        let (tag, after) = after.split_once('>').expect("a tag ends");
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
            continue;
        }
        let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let (name, mut attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        assert!(!name.is_empty() && name.chars().all(|char| char.is_ascii_alphabetic()), "{name:?}");
        let mut seen = Vec::new();
        while !attributes.trim().is_empty() {
            let (key, after) = attributes.trim_start().split_once("=\"").expect("an attribute is quoted");
            let (value, after) = after.split_once('"').expect("a quote ends");
            assert!(!seen.contains(&key) && key.chars().all(|char| char.is_ascii_alphabetic() || "-:".contains(char)), "{key:?}");
            plain(value);
            seen.push(key);
            attributes = after;
        }
        elements.push(name.to_owned());
        if !closed {
            open.push(name);
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} are open, {rest:?} is left");
    elements
}

/// Text between tags or quotes.
fn plain(text: &str) {
    assert!(!text.contains('>') && !text.contains(|char: char| char.is_control() && char != '\n'), "{text:?}");
    for after in text.split('&').skip(1) {
        assert!(["amp;", "lt;", "gt;", "quot;"].iter().any(|entity| after.starts_with(entity)), "&{after:?}");
    }
}

#[test]
fn what_cannot_be_explained_is_refused() {
    ernie(["explain", ""]).fails(1, &["the built-in model", "the text is empty"]);
    ernie_with_input(["explain", "-"], "").fails(1, &["the text is empty"]);
    ernie(["explain", &"dog ".repeat(600)]).fails(1, &["tokens", "512", "shorter text"]);
    ernie(["explain", "--ids", "3,9999"]).fails(1, &["9999", "position 1", "8192"]);
    ernie(["explain", "x", "--layers", "6"]).fails(2, &["--layers 6", "0 to 5"]);
    ernie(["explain", "--file", "no/such/file"]).fails(1, &["no/such/file"]);
    ernie(["explain", "x", "--model", "no/such/model"]).fails(1, &["no/such/model", "does not exist"]);
    ernie(["explain", "x", "--model", &golden("dense_tied")]).fails(1, &["has no tokenizer", "--ids"]);
    ernie(["explain", "x", "--svg", "no/such/folder/x.svg"]).fails(1, &["no/such/folder/x.svg"]);
}
