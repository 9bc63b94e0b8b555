//! Calls of functions and thoughts, of a model that knows neither.
use std::collections::HashSet;

use ernie_checkpoint::{ChatTemplate, Tokenizer};
use ernie_engine::{Constraint, TokenSet};
use ernie_serve::{Calls, Form, Grammars, ReasoningParser, Rule, ServeConfig};
use serde_json::{Value, json};

use crate::client::Running;
use crate::{nano, schemas};

fn weather() -> Value {
    json!({"type": "object", "properties": {"city": {"type": "string", "maxLength": 10}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"], "additionalProperties": false})
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": weather(), "strict": true}},
        {"type": "function", "function": {"name": "now"}},
        {"type": "function", "function": {"name": "paint", "parameters": {"$defs": {"colour": {"enum": ["red", "blue"]}}, "type": "object",
            "properties": {"colour": {"$ref": "#/$defs/colour"}}, "required": ["colour"], "additionalProperties": false}}}
    ])
}

/// With a template that tells of the functions in few words: the embedded model's context is short.
fn start(config: ServeConfig) -> Running {
    let source = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    Running::with_template(config, ChatTemplate::from_source(source).unwrap())
}

fn ask(more: Value) -> Value {
    let question = json!([{"role": "user", "content": "What is the weather?"}]);
    let mut body = json!({"messages": question, "tools": tools(), "temperature": 1, "max_tokens": 120});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// A stream's turn put together as a client does it.
fn put_together(events: &[Value]) -> (Value, String) {
    let (mut content, mut reasoning, mut calls, mut reason) = (String::new(), String::new(), Vec::<Value>::new(), String::new());
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let delta = &choice["delta"];
        content.push_str(delta["content"].as_str().unwrap_or_default());
        reasoning.push_str(delta["reasoning_content"].as_str().unwrap_or_default());
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                assert!(call["id"].is_string() && call["function"]["name"].is_string(), "a call begins with its name: {call}");
                calls.push(json!({"name": call["function"]["name"], "arguments": ""}));
            } else {
                assert!(call.get("id").is_none() && call["function"].get("name").is_none(), "and has it once: {call}");
            }
            let so_far = calls[index]["arguments"].as_str().unwrap().to_owned();
            calls[index]["arguments"] = json!(so_far + call["function"]["arguments"].as_str().unwrap());
        }
        reason.push_str(choice["finish_reason"].as_str().unwrap_or_default());
    }
    (json!({"content": content, "reasoning": reasoning, "calls": calls}), reason)
}

/// The same of a whole turn.
fn whole(choice: &Value) -> (Value, String) {
    let message = &choice["message"];
    let text = |field: &str| message[field].as_str().unwrap_or_default().to_owned();
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    let calls: Vec<Value> =
        calls.map(|call| json!({"name": call["function"]["name"], "arguments": call["function"]["arguments"]})).collect();
    (
        json!({"content": text("content"), "reasoning": text("reasoning_content"), "calls": calls}),
        choice["finish_reason"].as_str().unwrap().to_owned(),
    )
}

/// Checks a call's arguments against the schema of its function; returns the name.
fn check(call: &Value) -> String {
    let tools = tools();
    let name = call["function"]["name"].as_str().unwrap().to_owned();
    let tool = tools.as_array().unwrap().iter().find(|tool| tool["function"]["name"] == name.as_str()).unwrap();
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(tool["function"].get("parameters").and_then(|schema| schemas::fault(schema, &arguments)), None);
    assert!(arguments.is_object());
    name
}

#[test]
fn calls_that_must_come_do_and_their_arguments_obey() {
    let server = start(ServeConfig::default());
    let (mut names, mut ids) = (HashSet::new(), HashSet::new());
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let mut bodies = Vec::new();
    for seed in 0..6 {
        bodies.push((None, ask(json!({"tool_choice": "required", "parallel_tool_calls": false, "seed": seed, "n": 3}))));
    }
    // A function that is named is called once, whatever else may be allowed.
    for (name, parallel) in [("weather", Value::Null), ("paint", Value::Null), ("paint", json!(true)), ("paint", json!(false))] {
        bodies.push((Some(name), ask(json!({"tool_choice": named(name), "parallel_tool_calls": parallel, "seed": 9, "n": 4}))));
    }
    for (wanted, body) in bodies {
        let reply = server.post("/v1/chat/completions", &body);
        assert_eq!(reply.status, 200, "{}", reply.text);
        for choice in reply.json()["choices"].as_array().unwrap() {
            // `now` takes any arguments, so that it may not come to their end.
            if choice["finish_reason"] == "length" && choice["message"]["tool_calls"][0]["function"]["name"] == "now" {
                continue;
            }
            assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null), "{choice}");
            let calls = choice["message"]["tool_calls"].as_array().unwrap();
            assert_eq!((calls.len(), &calls[0]["type"]), (1, &json!("function")));
            let name = check(&calls[0]);
            assert!(wanted.is_none_or(|wanted| wanted == name));
            assert!(ids.insert(calls[0]["id"].as_str().unwrap().to_owned()), "ids are unique");
            names.insert(name);
        }
        let (mut one, mut streamed) = (body.clone(), body);
        one["n"] = json!(1);
        streamed["n"] = json!(1);
        streamed["stream"] = json!(true);
        let reply = server.post("/v1/chat/completions", &one).json();
        assert_eq!(put_together(&server.post("/v1/chat/completions", &streamed).events()), whole(&reply["choices"][0]));
    }
    assert!(names.len() >= 2, "{names:?}");
    // Cut off: the arguments so far, and it says so.
    let mut body = ask(json!({"tool_choice": named("weather"), "parallel_tool_calls": false, "seed": 1}));
    let reply = server.post("/v1/chat/completions", &body).json();
    // Without the last of `"}`, `}` and the closing mark.
    body["max_tokens"] = json!(reply["usage"]["completion_tokens"].as_u64().unwrap() - 12);
    let cut = server.post("/v1/chat/completions", &body).json();
    let [(all, reason), (some, cut_reason)] = [&reply, &cut].map(|reply| whole(&reply["choices"][0]));
    assert_eq!((reason.as_str(), cut_reason.as_str()), ("tool_calls", "length"));
    let [all, some] = [&all, &some].map(|turn| turn["calls"][0]["arguments"].as_str().unwrap().to_owned());
    assert!(all.starts_with(&some) && some.starts_with('{'), "{some} of {all}");
}

#[test]
fn several_calls_each_have_their_place() {
    let server = start(ServeConfig::default());
    let mut most = 0;
    for seed in 0..4 {
        let body = ask(json!({"tool_choice": "required", "tools": [tools()[2]], "seed": seed, "n": 4, "max_tokens": 160}));
        for choice in server.post("/v1/chat/completions", &body).json()["choices"].as_array().unwrap() {
            let calls = choice["message"]["tool_calls"].as_array().unwrap();
            let complete = calls.len() - usize::from(choice["finish_reason"] == "length");
            calls[..complete].iter().for_each(|call| drop(check(call)));
            most = most.max(calls.len());
        }
    }
    assert!(most >= 2, "at most {most} calls");
}

#[test]
fn calls_and_thoughts_are_read_from_the_text() {
    let server = start(ServeConfig { reasoning_parser: ReasoningParser::Ernie, ..ServeConfig::default() });
    let call = "<tool_call>\n{\"name\": \"paint\", \"arguments\": {\"colour\": \"red\"}}\n</tool_call>";
    let painted = json!([{"name": "paint", "arguments": "{\"colour\": \"red\"}"}]);
    let cases = [
        (format!("Sure.\n{call}\n"), json!({"content": "Sure.", "reasoning": "", "calls": painted}), "tool_calls"),
        (format!("<think>\nHm.\n</think>\n\n{call}"), json!({"content": "", "reasoning": "Hm.", "calls": painted}), "tool_calls"),
        (
            "<think>\nHm.\n</think>\n\n<response>\nYes.\n</response>\n".to_owned(),
            json!({"content": "Yes.", "reasoning": "Hm.", "calls": []}),
            "stop",
        ),
    ];
    for (text, expected, reason) in cases {
        // Spelled out by force. A call may come in the place of a text that has a form: the beginning decides, and biases decide the beginning.
        let ids = |text: &str| nano::tokenizer().encode(text, false).unwrap();
        let first: String = text.chars().take(7).collect();
        let bias: serde_json::Map<String, Value> = ids("<tool_call>")
            .iter()
            .map(|id| (id.to_string(), json!(-100)))
            .chain(ids(&first).iter().map(|id| (id.to_string(), json!(100))))
            .collect();
        let mut body = ask(json!({"guided_choice": [text], "logprobs": true, "temperature": 0, "logit_bias": bias}));
        let reply = server.post("/v1/chat/completions", &body).json();
        assert_eq!(whole(&reply["choices"][0]), (expected, reason.to_owned()), "{text:?}");
        body["stream"] = json!(true);
        let events = server.post("/v1/chat/completions", &body).events();
        assert_eq!(put_together(&events), whole(&reply["choices"][0]));
        let tokens = events.iter().flat_map(|e| e["choices"][0]["logprobs"]["content"].as_array().into_iter().flatten()).count();
        assert_eq!(tokens, reply["choices"][0]["logprobs"]["content"].as_array().unwrap().len(), "each token is reported once");
    }
    // Off by default, and without tools nothing is a call.
    let plain = start(ServeConfig::default());
    let text = format!("<think>\nHm.\n</think>\n\n{call}");
    let body = json!({"messages": [{"role": "user", "content": "x"}], "guided_choice": [text]});
    let reply = plain.post("/v1/chat/completions", &body).json();
    assert_eq!(
        (&reply["choices"][0]["message"], &reply["choices"][0]["finish_reason"]),
        (&json!({"role": "assistant", "content": text}), &json!("stop"))
    );
    let none = ask(json!({"guided_choice": [text], "tool_choice": "none"}));
    assert_eq!(plain.post("/v1/chat/completions", &none).json()["choices"][0]["message"]["content"], text.as_str());
}

#[test]
fn a_conversation_with_calls_is_rendered() {
    let server = Running::start();
    let messages = json!([
        {"role": "user", "content": "Paint it."},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "paint", "arguments": "{\"colour\": \"red\"}"}},
            {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
        {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
        {"role": "user", "content": "Thanks."}
    ]);
    let prompt_with = |server: &Running, messages: &Value, tools: &Value| {
        let tokens = server.post("/v1/tokenize", &json!({ "messages": messages, "tools": tools })).json()["tokens"].clone();
        server.post("/v1/detokenize", &json!({ "tokens": tokens })).json()["prompt"].as_str().unwrap().to_owned()
    };
    let prompt = |server: &Running, messages: &Value| prompt_with(server, messages, &Value::Null);
    let expected = "User: Paint it.\nAssistant: <tool_call>\n{\"name\":\"paint\",\"arguments\":{\"colour\":\"red\"}}\n</tool_call>\n\
        <tool_call>\n{\"name\":\"now\",\"arguments\":{}}\n</tool_call><|end_of_sentence|>User: <tool_response>\ndone\n</tool_response>\n\
        <tool_response>\nnoon\n</tool_response>\nUser: Thanks.\nAssistant: ";
    assert!(prompt(&server, &messages).ends_with(expected), "{}", prompt(&server, &messages));
    let told = "<|begin_of_sentence|>Be kind.\n\nYou can call these functions:\n<tools>\n{\"name\":\"now\"}\n</tools>\nTo call one, write:\n\
        <tool_call>\n{\"name\": \"...\", \"arguments\": {...}}\n</tool_call>\nThe result comes as <tool_response>.\nUser: Hi\nAssistant: ";
    let hello = json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]);
    assert_eq!(prompt_with(&server, &hello, &json!([tools()[1]])), told);
    assert_eq!(prompt_with(&server, &json!([hello[1]]), &json!([tools()[1]])), told.replace("Be kind.\n\n", ""));
    // A chat has the same prompt.
    let body = json!({"messages": hello, "tools": [tools()[1]], "max_tokens": 3});
    let chat = server.post("/v1/chat/completions", &body).json()["usage"]["prompt_tokens"].clone();
    assert_eq!(chat, server.post("/v1/tokenize", &body).json()["count"]);

    // A template that knows of tools does it all itself.
    let source = "{% if tools %}{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}\
        {% for c in m.tool_calls %}{{ c.function.name }}={{ c.function.arguments.colour }};{% endfor %}{{ m.tool_call_id }}|{% endfor %}";
    let server = Running::with_template(ServeConfig::default(), ChatTemplate::from_source(source).unwrap());
    let expected = "user:Paint it.|assistant:paint=red;now=;|tool:donecall_1|tool:nooncall_2|user:Thanks.|";
    assert_eq!(prompt(&server, &messages), expected);
    assert_eq!(prompt_with(&server, &messages, &tools()), format!("[weather][now][paint]{expected}"));

    for (param, message) in [
        (
            "messages[0].tool_calls[0].function.arguments",
            json!({"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "[1]"}}]}),
        ),
        ("messages[0].tool_calls[0].function.name", json!({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]})),
    ] {
        let (named, _) = server.post("/v1/chat/completions", &json!({ "messages": [message] })).error(400);
        assert_eq!(named.as_deref(), Some(param));
    }
}

#[test]
fn bad_tools_are_refused_with_their_field() {
    let server = Running::start();
    let function = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
    let cases = [
        ("tool_choice", json!({"tool_choice": "sometimes"})),
        ("tool_choice", json!({"tool_choice": "required", "tools": []})),
        ("tool_choice", json!({"tool_choice": 5})),
        ("tool_choice.function.name", json!({"tool_choice": {"type": "function", "function": {"name": "unknown"}}})),
        ("tool_choice.type", json!({"tool_choice": {"type": "custom", "function": {"name": "now"}}})),
        ("tools[0].type", json!({"tools": [{"type": "web_search", "function": {"name": "x"}}]})),
        ("tools[0].function", json!({"tools": [{"type": "function"}]})),
        ("tools[0].function.name", function(json!({"name": "with space"}))),
        ("tools[0].function.parameters", function(json!({"name": "x", "parameters": []}))),
        (
            "tools[1].function.name",
            json!({"tools": [{"type": "function", "function": {"name": "x"}}, {"type": "function", "function": {"name": "x"}}]}),
        ),
        (
            "tools",
            json!({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "nothing"}}}], "tool_choice": "required"}),
        ),
        ("functions", json!({"functions": [{"name": "x"}]})),
    ];
    for (param, more) in cases {
        let (named, message) = server.post("/v1/chat/completions", &ask(more.clone())).error(400);
        assert_eq!(named.as_deref(), Some(param), "{more}: {message}");
    }
}

/// How many tokens of a text a form allows, one after the other, and whether the answer may end there and is over there.
fn follow(grammars: &Grammars, form: &Form, ids: &[u32], end: u32) -> (usize, bool, bool) {
    let mut constraint = grammars.compile(form).unwrap().unwrap();
    let mut allowed = TokenSet::default();
    for (count, id) in ids.iter().enumerate() {
        allowed.clear();
        constraint.allow(&mut allowed).unwrap();
        if !allowed.contains(*id) {
            return (count, allowed.contains(end), false);
        }
        constraint.accept(*id).unwrap();
        if constraint.is_complete() {
            return (count + 1, true, true);
        }
    }
    allowed.clear();
    constraint.allow(&mut allowed).unwrap();
    (ids.len(), allowed.contains(end), false)
}

#[test]
fn forms_hold_after_thoughts_and_name_special_tokens() {
    // The embedded model's tokenizer, and one whose marks are single special tokens.
    let text = std::fs::read_to_string(nano::folder().join("tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    for (id, mark) in (8192..).zip(["<think>", "</think>", "<tool_call>", "</tool_call>"]) {
        let token = json!({"id": id, "content": mark, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        json["added_tokens"].as_array_mut().unwrap().push(token);
    }
    let marked = Tokenizer::from_tokenizer_json(json.to_string().as_bytes(), "marked.json").unwrap();
    assert_eq!(marked.encode("</think>", false).unwrap(), [8193]);
    let plain = Tokenizer::from_dir(nano::folder()).unwrap();
    let functions = vec![(
        "paint".to_owned(),
        json!({"type": "object", "properties": {"colour": {"enum": ["red"]}}, "required": ["colour"], "additionalProperties": false}),
    )];
    let calls = |several| Some(Calls { functions: functions.clone(), several });
    for tokenizer in [&plain, &marked] {
        let grammars = Grammars::new(tokenizer, 9000, &[2, 4]).unwrap();
        let ids = |text: &str| tokenizer.encode(text, false).unwrap();
        let all = |form: &Form, text: &str| follow(&grammars, form, &ids(text), 4);
        let fits = |form: &Form, text: &str| {
            let (count, may_end, _) = all(form, text);
            count == ids(text).len() && may_end
        };
        let json = Form { rule: Some(Rule::Json(json!({"type": "boolean"}))), thinks: true, ..Form::default() };
        assert!(fits(&json, "I think: {\"a\"}, 春眠.\n</think>\n\ntrue"));
        assert!(fits(&json, "</think>false"));
        assert!(!fits(&json, "true") && !fits(&json, "Hm.\n</think>\n\nmaybe"));
        let must = Form { calls: calls(false), ..Form::default() };
        let call = "<tool_call>\n{\"name\": \"paint\", \"arguments\": {\"colour\": \"red\"}}\n</tool_call>";
        assert_eq!(all(&must, call), (ids(call).len(), true, true), "one call, and nothing may follow");
        assert!(!fits(&must, "Sure."));
        let several = Form { calls: calls(true), thinks: true, ..Form::default() };
        assert!(fits(&several, &format!("Twice.</think>\n\n\n{call}\n{call}")));
        let either = Form { rule: Some(Rule::Choice(vec!["No.".to_owned()])), calls: calls(true), thinks: false };
        assert!(fits(&either, "No.") && fits(&either, call) && !fits(&either, &format!("No.{call}")));
    }
    // A text cannot spell a special token, whatever the grammar.
    let grammars = Grammars::new(&marked, 9000, &[2, 4]).unwrap();
    let anything = Form { rule: Some(Rule::Regex("(?s:.*)".to_owned())), ..Form::default() };
    assert_eq!(follow(&grammars, &anything, &[8193], 4), (0, true, false));
    assert!(follow(&grammars, &anything, &plain.encode("</think>", false).unwrap(), 4).1);
}
