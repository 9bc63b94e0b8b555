//! Chat templates against transformers' rendering (fixture: testdata/scripts/make_tokenizer_goldens.py), and their limits.

use std::path::PathBuf;

use ernie_checkpoint::{ChatTemplate, ChatTemplateError, ChatTemplateOptions, Message, SpecialTokens};
use serde_json::Value;

fn conversation(value: &Value) -> Vec<Message> {
    let turns = value.as_array().expect("a conversation is a list");
    turns.iter().map(|turn| Message::new(turn[0].as_str().expect("role"), turn[1].as_str().expect("content"))).collect()
}

fn render(template: &ChatTemplate, messages: &[Message]) -> Result<String, ChatTemplateError> {
    template.render(messages, false, &ChatTemplateOptions::default())
}

#[test]
fn renders_as_transformers_does() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/tokenizers/chat.json");
    let fixture: Value = serde_json::from_slice(&std::fs::read(path).expect("the fixture is there")).expect("it is JSON");
    let token = |name: &str| fixture["tokens"][name].as_str().map(str::to_owned);
    let special = SpecialTokens {
        bos: token("bos_token"),
        eos: token("eos_token"),
        cls: token("cls_token"),
        sep: token("sep_token"),
        ..SpecialTokens::default()
    };
    let (mut rendered, mut refused) = (0, 0);
    for case in fixture["cases"].as_array().expect("cases") {
        let name = case["template"].as_str().expect("a name");
        let template = match &fixture["templates"][name] {
            Value::String(source) => ChatTemplate::from_source(source).expect("it parses").with_special_tokens(special.clone()),
            _ => ChatTemplate::builtin(),
        };
        let messages = conversation(&fixture["conversations"][case["conversation"].as_u64().expect("an index") as usize]);
        let options = ChatTemplateOptions { enable_thinking: case["enable_thinking"].as_bool(), ..ChatTemplateOptions::default() };
        let result = template.render(&messages, case["add_generation_prompt"] == true, &options);
        match (result, case["text"].as_str(), case["refused"].as_str()) {
            (Ok(text), Some(expected), _) => {
                assert_eq!(text, expected, "{name}, {messages:?}, {options:?}");
                rendered += 1;
            }
            (Err(ChatTemplateError::Refused { message, .. }), None, Some(expected)) => {
                assert_eq!(message, expected, "{name}");
                refused += 1;
            }
            (result, _, _) => panic!("{name}, {messages:?}: transformers gave {case}, we {result:?}"),
        }
    }
    println!("{rendered} prompts equal, {refused} refusals equal");
    assert!(rendered >= 150 && refused >= 6);
}

#[test]
fn builtin_is_the_family_template() {
    let messages =
        [Message::new("system", "Be kind."), Message::new("user", "你好"), Message::new("assistant", "Hi!"), Message::new("user", "Bye")];
    let text = ChatTemplate::builtin().render(&messages, true, &ChatTemplateOptions::default()).expect("it renders");
    assert_eq!(text, "<|begin_of_sentence|>Be kind.\nUser: 你好\nAssistant: Hi!<|end_of_sentence|>User: Bye\nAssistant: ");
    let refused = render(&ChatTemplate::builtin(), &[Message::new("tool", "42")]).expect_err("an unknown role");
    assert!(refused.to_string().contains("role 'tool'"), "{refused}");
}

#[test]
fn reads_the_template_of_a_directory() {
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("written");
    let load = || ChatTemplate::from_dir(dir.path());
    let messages = [Message::new("user", "x")];
    assert!(load().expect("no files").is_none());
    write(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token }}config {{ messages[0].content }}"}"#,
    );
    assert_eq!(render(&load().expect("valid").expect("there"), &messages).expect("renders"), "<b>config x");
    let named = r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
    write("tokenizer_config.json", named);
    assert_eq!(render(&load().expect("valid").expect("there"), &messages).expect("renders"), "D");
    write("chat_template.jinja", "file {{ messages[0].content }}");
    assert_eq!(render(&load().expect("valid").expect("there"), &messages).expect("renders"), "file x");

    std::fs::remove_file(dir.path().join("chat_template.jinja")).expect("removed");
    for bad in [
        r#"{"chat_template": 3}"#,
        r#"{"chat_template": [{"name": "a", "template": "A"}, {"name": "b", "template": "B"}]}"#,
        r#"{"chat_template": ["x"]}"#,
        "{",
    ] {
        write("tokenizer_config.json", bad);
        let error = load().expect_err(bad).to_string();
        assert!(error.contains("tokenizer_config.json"), "{error}");
    }
}

#[test]
fn errors_name_the_line() {
    let broken = ChatTemplate::from_source("line one\n{% for x %}").expect_err("does not parse");
    assert!(matches!(broken, ChatTemplateError::Syntax { line: 2, .. }), "{broken:?}");
    let failing = ChatTemplate::from_source("one\ntwo\n{{ messages[0].a.b }}").expect("parses");
    let error = render(&failing, &[Message::new("user", "")]).expect_err("fails");
    assert!(matches!(error, ChatTemplateError::Render { line: 3, .. }), "{error:?}");
    let refusing = ChatTemplate::from_source("\n{{ raise_exception('no') }}").expect("parses");
    let error = render(&refusing, &[]).expect_err("refuses");
    assert!(matches!(&error, ChatTemplateError::Refused { line: 2, message, .. } if message == "no"), "{error:?}");
}

#[test]
fn templates_are_confined() {
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let error = render(&ChatTemplate::from_source(endless).expect("parses"), &[]).expect_err("does not end");
    assert!(matches!(error, ChatTemplateError::TooMuchWork { .. }), "{error:?}");

    let huge = "{% for a in range(1000) %}{{ 'x' * 100000 }}{% endfor %}";
    let error = render(&ChatTemplate::from_source(huge).expect("parses"), &[]).expect_err("too long");
    assert!(matches!(error, ChatTemplateError::TooLong { .. } | ChatTemplateError::TooMuchWork { .. }), "{error:?}");

    let recursive = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    render(&ChatTemplate::from_source(recursive).expect("parses"), &[]).expect_err("never returns");

    for outside in ["{% include '/etc/hostname' %}", "{% import 'x' as x %}", "{% include 'chat_template' %}", "{{ strftime_now('%Y') }}"] {
        let template = ChatTemplate::from_source(outside).expect("parses");
        render(&template, &[]).expect_err(outside);
    }
    ChatTemplate::from_source(&"x".repeat(5 << 20)).expect_err("too large a template");
}

/// Found by fuzzing: the `%` of `{%}` is not the one of an end.
#[test]
fn an_opened_tag_does_not_end_itself() {
    for source in ["{%}", "{%} endif %}", "a {%}", "{%%}", "{%-}{% generation %}", "{%}{% generation %}x{% endgeneration %}"] {
        assert!(ChatTemplate::from_source(source).is_err(), "{source}");
    }
}

#[test]
fn what_a_template_reads_is_known_and_messages_have_further_fields() {
    let source = "{%- if not tools is defined %}{% set tools = none %}{% endif %}{% for m in messages %}{{ m.role }}{{ m.tool_call_id }}\
        {% for call in m.tool_calls %}({{ call.function.name }}: {{ call.function.arguments | tojson }}){% endfor %};{% endfor %}";
    let template = ChatTemplate::from_source(source).expect("it parses");
    assert!(template.uses("tools") && template.uses("messages"));
    assert!(!template.uses("m") && !template.uses("tool_calls"));
    assert!(!ChatTemplate::builtin().uses("tools") && ChatTemplate::builtin().uses("add_generation_prompt"));
    let mut calling = Message::new("assistant", "");
    calling.fields.push(("tool_calls".into(), serde_json::json!([{"function": {"name": "add", "arguments": {"b": 1, "a": [2]}}}])));
    let mut result = Message::new("tool", "3");
    result.fields.push(("tool_call_id".into(), "x1".into()));
    assert_eq!(render(&template, &[calling, result]).expect("renders"), "assistant(add: {\"b\": 1, \"a\": [2]});toolx1;");
}
