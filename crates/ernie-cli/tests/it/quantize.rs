//! `ernie quantize` and what becomes of its result; `ernie bench`.
use crate::program::ernie;
use crate::tiny_model;

fn path(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_owned()
}

#[test]
fn a_quantised_model_runs_and_is_what_int8_weights_are() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (path(&dir, "model"), path(&dir, "int8"));
    tiny_model::write(model.as_ref());
    let report = ernie(["quantize", &model, &out, "--json"]).json();
    assert!(report["bytes"].as_u64().unwrap() < report["source_bytes"].as_u64().unwrap());
    assert!(report["relative_errors"]["routed experts"].as_f64().unwrap() < 0.02);
    assert_eq!(ernie(["inspect", &out, "--json"]).json()["ok"], true);
    // Rounded on disk or while loading: the same bits.
    let logits = |flags: &[&str]| ernie([&["logits", "--ids", "270,300,280", "--last", "3"], flags].concat()).ok();
    assert_eq!(logits(&["--model", &out]), logits(&["--model", &model, "--weights", "int8"]));
    assert_ne!(logits(&["--model", &out]), logits(&["--model", &out, "--weights", "f32"]));
    assert_ne!(logits(&["--model", &out]), logits(&["--model", &out, "--kv-cache", "int8"]));
    let text = ernie(["quantize", &model, &path(&dir, "other")]).ok();
    assert!(text.contains("MiB instead of") && text.contains("attention"), "{text}");
}

#[test]
fn experts_may_have_four_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out, eight) = (path(&dir, "model"), path(&dir, "int4"), path(&dir, "int8"));
    tiny_model::write(model.as_ref());
    let report = ernie(["quantize", &model, &out, "--scheme", "w4a8", "--json"]).json();
    let bytes = report["bytes"].as_u64().unwrap();
    assert!(bytes < ernie(["quantize", &model, &eight, "--json"]).json()["bytes"].as_u64().unwrap());
    let errors = &report["relative_errors"];
    assert!(errors["routed experts"].as_f64().unwrap() > 5.0 * errors["attention"].as_f64().unwrap(), "{report}");
    let inspected = ernie(["inspect", &out, "--tensors", "--json"]).json();
    assert_eq!(inspected["ok"], true);
    let dtype = |name: &str| inspected["tensors"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap()["dtype"].clone();
    assert_eq!(dtype("model.layers.1.mlp.experts.0.up_proj.weight"), "I4");
    assert_eq!(dtype("model.layers.1.mlp.shared_experts.up_proj.weight"), "I8");
    let logits = |flags: &[&str]| ernie([&["logits", "--ids", "270,300,280", "--last", "3"], flags].concat()).ok();
    assert_ne!(logits(&["--model", &out]), logits(&["--model", &eight]));
    assert_ne!(logits(&["--model", &out]), logits(&["--model", &out, "--weights", "f32"]));
    ernie(["quantize", &model, &path(&dir, "x"), "--scheme", "w4a8", "--group-size", "64"])
        .fails(1, &["rows of 32", "groups of 64", "8 bits"]);
    ernie(["quantize", &model, &path(&dir, "x"), "--scheme", "w4a8", "--group-size", "48"]).fails(2, &["--group-size", "32, 64, 128"]);
    ernie(["quantize", &model, &path(&dir, "x"), "--group-size", "64"]).fails(1, &["--group-size", "--scheme w4a8"]);
}

#[test]
fn nothing_is_overwritten_unasked_and_nothing_half_written() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (path(&dir, "model"), path(&dir, "int8"));
    tiny_model::write(model.as_ref());
    ernie(["quantize", &model, &out]).ok();
    ernie(["quantize", &model, &out]).fails(1, &["holds a model already", "--force"]);
    ernie(["quantize", &model, &out, "--force"]).ok();
    ernie(["quantize", &out, &path(&dir, "twice")]).fails(1, &["quantised already"]);
    ernie(["quantize", &path(&dir, "nowhere"), &path(&dir, "x")]).fails(1, &["does not exist"]);
    assert!(!dir.path().join("x").exists());
    // A model with a weight that is no number.
    std::fs::write(dir.path().join("model/model.safetensors"), b"damaged").unwrap();
    ernie(["quantize", &model, &path(&dir, "bad")]).fails(1, &["model.safetensors"]);
    assert!(!dir.path().join("bad").exists());
}

#[test]
fn a_bench_reports_speeds_and_shares() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    let model = dir.path().to_str().unwrap();
    let flags = ["--pp", "20", "--tg", "6", "--batch", "1,3", "--repeat", "2"];
    let report = ernie([&["bench", "--model", model, "--json"][..], &flags].concat()).json();
    for field in ["bandwidth_gb_s", "int8_gop_s", "f32_gflop_s"] {
        assert!(report["limits"][field].as_f64().unwrap() > 0.0, "{report}");
    }
    for rate in [&report["prefill"], &report["decode"]["1"], &report["decode"]["3"]] {
        let (least, median, most) = (rate["min"].as_f64().unwrap(), rate["tokens_per_s"].as_f64().unwrap(), rate["max"].as_f64().unwrap());
        assert!(least > 0.0 && least <= median && median <= most && rate["share_of_limit"].as_f64().unwrap() > 0.0, "{report}");
    }
    assert!(report["load_s"].as_f64().unwrap() <= report["first_token_s"].as_f64().unwrap());
    let table = ernie([&["bench", "--model", model][..], &flags].concat()).ok();
    assert!(table.contains("prompt of 20") && table.contains("3 requests together") && table.contains("GB/s"), "{table}");
}
