//! `ernie chat` over a pipe.
use crate::program::{ernie, ernie_with_input};
use crate::tiny_model;
use serde_json::{Value, json};

fn model() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    let path = dir.path().to_str().unwrap().to_owned();
    (dir, path)
}

fn saved(dir: &tempfile::TempDir, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir.path().join(name)).unwrap()).unwrap()
}

#[test]
fn the_first_answer_is_what_generate_answers() {
    let (_dir, model) = model();
    let flags = ["--model", &model, "--temperature", "0", "--max-tokens", "6"];
    let chat = ernie_with_input([&["chat"], &flags[..]].concat(), "hi\n").ok();
    let generated = ernie([&["generate", "--chat", "hi"], &flags[..]].concat()).ok();
    assert_eq!(chat, generated);
    let with_system = ernie_with_input([&["chat", "--system", "S"], &flags[..]].concat(), "hi\n").ok();
    let generated = ernie([&["generate", "--chat", "hi", "--system", "S"], &flags[..]].concat()).ok();
    assert_eq!(with_system, generated);
    assert_ne!(with_system, chat);
}

#[test]
fn a_conversation_is_saved_as_it_was() {
    let (dir, model) = model();
    let file = dir.path().join("talk.json");
    let input = format!("/system Be kind.\n\nhi\n  there  \n/save {}\n/quit\nnever said\n", file.display());
    let run = ernie_with_input(["chat", "--model", &model, "--temperature", "0", "--max-tokens", "4"], &input);
    assert!(run.stderr.contains("saved 5 messages"), "{run:?}");
    let answers = run.ok();
    let talk = saved(&dir, "talk.json");
    assert_eq!(talk["model"], json!(model));
    let messages = talk["messages"].as_array().unwrap();
    let roles: Vec<_> = messages.iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!(messages[0]["content"], "Be kind.");
    assert_eq!(messages[3]["content"], "there");
    let spoken = |index: usize| messages[index]["content"].as_str().unwrap();
    assert_eq!(answers, format!("{}\n{}\n", spoken(2), spoken(4)));
    // Nothing but the file is left in the folder.
    assert!(std::fs::read_dir(dir.path()).unwrap().all(|entry| !entry.unwrap().file_name().to_string_lossy().contains("tmp")));
}

#[test]
fn clear_forgets_the_turns() {
    let (_dir, model) = model();
    let chat = |input: &str| ernie_with_input(["chat", "--model", &model, "--temperature", "0", "--max-tokens", "6"], input).ok();
    let once = chat("hi\n");
    assert_eq!(chat("hi\n/clear\nhi\n"), format!("{once}{once}"));
    assert_ne!(chat("hi\nhi\n"), format!("{once}{once}"));
}

#[test]
fn a_long_conversation_loses_its_oldest_turns_and_says_so_once() {
    let (dir, model) = model();
    let file = dir.path().join("talk.json");
    let input = format!("{}/save {}\n", "tell me something\n".repeat(6), file.display());
    let run = ernie_with_input(["chat", "--model", &model, "--temperature", "0", "--max-tokens", "8"], &input);
    assert_eq!(run.stderr.matches("oldest turns are left out").count(), 1, "{run:?}");
    run.ok();
    assert_eq!(saved(&dir, "talk.json")["messages"].as_array().unwrap().len(), 12);
}

#[test]
fn what_cannot_be_answered_or_done_is_an_error() {
    let (_dir, model) = model();
    let chat = |input: &str| ernie_with_input(["chat", "--model", &model, "--max-tokens", "4"], input);
    chat(&"x".repeat(200)).fails(1, &["room for 92", "shorten"]);
    chat("/fly\n").fails(1, &["no command /fly", "/help"]);
    chat("/save\n").fails(1, &["/save needs"]);
    chat("/save /nonexistent-folder/talk.json\n").fails(1, &["not saved", "/nonexistent-folder/talk.json"]);
    ernie_with_input(["chat", "--model", &model, "--context", "500"], "hi\n").fails(2, &["--context 500", "96"]);
}

#[test]
fn the_built_in_model_talks() {
    let run = ernie_with_input(["chat", "--seed", "1", "--max-tokens", "20"], "Hello!\n你好\n");
    assert!(run.stdout.lines().count() >= 2, "{run:?}");
    assert!(run.ok().chars().any(|c| !c.is_whitespace()));
}
