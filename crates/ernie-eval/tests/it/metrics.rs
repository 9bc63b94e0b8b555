//! `testdata/metrics/golden.json`, made by `testdata/scripts/make_metric_goldens.py` with rouge-score and sacrebleu.
use ernie_eval::{Rouge, Score, Tokenize, Units, best_rouge, bleu, mean_rouge, rouge};
use serde_json::Value;

fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/metrics/golden.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn near(what: &str, got: f64, expected: &Value) {
    let expected = expected.as_f64().unwrap();
    assert!((got - expected).abs() < 1e-6, "{what}: {got} for {expected}");
}

#[test]
fn rouge_equals_rouge_score() {
    let golden = golden();
    let cases = golden["rouge"].as_array().unwrap();
    assert!(cases.len() >= 12);
    for case in cases {
        let (target, prediction) = (case["target"].as_str().unwrap(), case["prediction"].as_str().unwrap());
        let got = rouge(target, prediction, Units::Words);
        let scores: [(&str, Score); 4] =
            [("rouge1", got.rouge1), ("rouge2", got.rouge2), ("rougeL", got.rouge_l), ("rougeLsum", got.rouge_l_sum)];
        for (name, score) in scores {
            for (part, value) in [("precision", score.precision), ("recall", score.recall), ("fmeasure", score.f1)] {
                near(&format!("{name} {part} of {prediction:?}"), value, &case[name][part]);
            }
        }
    }
}

#[test]
fn bleu_equals_sacrebleu() {
    let golden = golden();
    let cases = golden["bleu"].as_array().unwrap();
    assert!(cases.len() >= 6);
    for case in cases {
        let strings = |value: &'static str| -> Vec<Vec<String>> {
            let list = |value: &Value| value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect();
            case[value].as_array().unwrap().iter().map(list).collect()
        };
        let predictions: Vec<String> =
            case["predictions"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect();
        let references = strings("references");
        let tokenize = if case["tokenize"] == "zh" { Tokenize::Chinese } else { Tokenize::Mteval13a };
        let pairs = predictions.iter().zip(&references).map(|(p, r)| (p.as_str(), r.iter().map(String::as_str).collect::<Vec<_>>()));
        let got = bleu(pairs, tokenize);
        let name = case["name"].as_str().unwrap();
        near(name, got.score, &case["score"]);
        near(name, got.brevity_penalty, &case["bp"]);
        for (got, expected) in got.precisions.iter().zip(case["precisions"].as_array().unwrap()) {
            near(name, *got, expected);
        }
        assert_eq!(
            (got.predicted as u64, got.reference as u64),
            (case["sys_len"].as_u64().unwrap(), case["ref_len"].as_u64().unwrap()),
            "{name}"
        );
    }
}

#[test]
fn chinese_counts_by_characters_where_asked_to() {
    let (target, prediction) = ("今天天气很好。", "今天天气不好。");
    assert_eq!(rouge(target, prediction, Units::Words).rouge1.f1, 0.0);
    let score = rouge(target, prediction, Units::WordsAndHan);
    assert!((score.rouge1.f1 - 6.0 / 7.0).abs() < 1e-12 && (score.rouge_l.f1 - 6.0 / 7.0).abs() < 1e-12);
}

#[test]
fn means_are_over_pairs() {
    let pairs = [("the cat sat", "the cat sat"), ("one two", "three four")];
    assert_eq!(mean_rouge(pairs, Units::Words).rouge1.f1, 0.5);
    assert_eq!(mean_rouge(std::iter::empty(), Units::Words).rouge_l.recall, 0.0);
}

#[test]
fn of_several_targets_the_one_with_the_best_rouge_1_counts_in_all_scores() {
    // The second has more words of the prediction, the third fewer but in order.
    let targets = ["nothing of it", "mat the on sat cat the", "the cat sat"];
    let prediction = "the cat sat on the mat";
    let best = best_rouge(targets, prediction, Units::Words);
    assert_eq!(best, rouge(targets[1], prediction, Units::Words));
    assert_eq!(best.rouge1.f1, 1.0);
    assert!(best.rouge2.f1 < rouge(targets[2], prediction, Units::Words).rouge2.f1);
    assert_eq!(best_rouge([], prediction, Units::Words), Rouge::default());
}
