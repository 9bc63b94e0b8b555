//! Answers whose form is prescribed, of a model that has no idea of it: every one of them must have it.
use std::time::{Duration, Instant};

use ernie_checkpoint::TokenBytes;
use ernie_serve::ServeConfig;
use serde_json::{Value, json};

use crate::client::Running;
use crate::{nano, schemas};

/// The texts and the reasons of a reply with status 200.
fn texts(reply: &crate::client::Reply) -> Vec<(String, String)> {
    assert_eq!(reply.status, 200, "{}", reply.text);
    let json = reply.json();
    let choices = json["choices"].as_array().unwrap().iter();
    let text = |choice: &Value| choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap().to_owned();
    choices.map(|choice| (text(choice), choice["finish_reason"].as_str().unwrap().to_owned())).collect()
}

fn chat(more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Tell me something."}], "temperature": 1, "max_tokens": 400});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn completion(more: Value) -> Value {
    let mut body = json!({"prompt": "Once upon a time", "temperature": 1, "max_tokens": 400});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The text of a stream's first answer.
fn streamed(server: &Running, path: &str, mut body: Value) -> String {
    body["stream"] = json!(true);
    let events = server.post(path, &body).events();
    let pieces = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    pieces.filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str())).collect()
}

#[test]
fn every_answer_obeys_its_schema() {
    let server = Running::start();
    let mut different = 0;
    for (index, schema) in schemas::all().iter().enumerate() {
        let format = json!({"type": "json_schema", "json_schema": {"name": "it", "strict": true, "schema": schema}});
        let reply = server.post("/v1/chat/completions", &chat(json!({"response_format": format, "n": 4, "seed": 100 * index})));
        let answers = texts(&reply);
        for (text, reason) in &answers {
            assert_eq!(reason, "stop", "{schema}: {text}");
            let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{schema}: {error}: {text}"));
            assert_eq!(schemas::fault(schema, &value), None);
        }
        different += usize::from(answers.iter().any(|answer| *answer != answers[0]));
        if index.is_multiple_of(4) {
            let body = chat(json!({"response_format": format, "seed": 100 * index}));
            assert_eq!(streamed(&server, "/v1/chat/completions", body), answers[0].0, "streamed");
        }
        // The other way to say it, and the other route; greedy, and with every filter.
        let other = json!({"guided_json": schema.to_string(), "temperature": 0});
        let filtered =
            json!({"structured_outputs": {"json": schema}, "seed": 1, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1});
        for more in [other, filtered] {
            for (text, _) in texts(&server.post("/v1/completions", &completion(more))) {
                assert_eq!(schemas::fault(schema, &serde_json::from_str(&text).unwrap()), None, "{text}");
            }
        }
    }
    assert!(different > 15, "only {different} schemas gave more than one answer");
}

/// Whether a text has its form.
type Fits<'a> = &'a dyn Fn(&str) -> bool;

#[test]
fn objects_regexes_choices_and_grammars() {
    let server = Running::start();
    let object = json!({"response_format": {"type": "json_object"}, "max_tokens": 60, "n": 6, "seed": 5});
    for (text, reason) in texts(&server.post("/v1/chat/completions", &chat(object))) {
        // Without a schema it may go on for ever; so far it is the beginning of an object.
        assert!(text.starts_with('{') && (reason == "length" || serde_json::from_str::<Value>(&text).unwrap().is_object()), "{text}");
    }
    let digits = |text: &str| text.len() == 8 && text.bytes().enumerate().all(|(i, b)| if i == 3 { b == b'-' } else { b.is_ascii_digit() });
    let cases: [(Value, Fits); 8] = [
        (json!({"guided_regex": "[0-9]{3}-[0-9]{4}"}), &digits),
        (json!({"structured_outputs": {"regex": "[0-9]{3}-[0-9]{4}"}}), &digits),
        (json!({"guided_regex": "(yes|no)( indeed)?\\."}), &|text| ["yes.", "no.", "yes indeed.", "no indeed."].contains(&text)),
        (json!({"guided_regex": "[春眠不觉晓]{2,5}\\n?"}), &|text| (2..=6).contains(&text.chars().count())),
        (json!({"guided_choice": ["apple", "apple pie", "\"pear\"\n"]}), &|text| ["apple", "apple pie", "\"pear\"\n"].contains(&text)),
        (json!({"structured_outputs": {"choice": ["left", "right"]}}), &|text| ["left", "right"].contains(&text)),
        (json!({"guided_grammar": "start: sum\nsum: DIGIT (\"+\" DIGIT){1,3}\nDIGIT: /[0-9]/"}), &|text| {
            let parts: Vec<_> = text.split('+').collect();
            (2..=4).contains(&parts.len()) && parts.iter().all(|part| part.len() == 1 && part.bytes().all(|b| b.is_ascii_digit()))
        }),
        (
            json!({"structured_outputs": {"json": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4}, "disable_any_whitespace": true}}),
            &|text| !text.contains(' ') && serde_json::from_str::<Vec<u8>>(text).is_ok_and(|list| (2..=4).contains(&list.len())),
        ),
    ];
    for (more, fits) in &cases {
        let mut body = completion(more.clone());
        body["n"] = json!(8);
        for seed in [1, 2] {
            body["seed"] = json!(seed);
            let answers = texts(&server.post("/v1/completions", &body));
            assert!(answers.iter().all(|(text, reason)| reason == "stop" && fits(text)), "{more}: {answers:?}");
        }
        let mut one = body.clone();
        one["n"] = json!(1);
        assert_eq!(streamed(&server, "/v1/completions", one.clone()), texts(&server.post("/v1/completions", &one))[0].0, "{more}");
    }
}

#[test]
fn an_answer_that_is_cut_says_so_and_a_stop_string_still_ends_it() {
    let server = Running::start();
    let more = json!({"guided_regex": "(a|b){40}", "max_tokens": 5, "seed": 3});
    let (text, reason) = texts(&server.post("/v1/completions", &completion(more)))[0].clone();
    assert!(reason == "length" && text.len() < 40 && text.bytes().all(|b| b == b'a' || b == b'b'), "{text}");
    let more = json!({"guided_regex": "x{3}stop(a|b){40}", "stop": ["stop"]});
    assert_eq!(texts(&server.post("/v1/completions", &completion(more)))[0], ("xxx".to_owned(), "stop".to_owned()));
    // Where the text may end, the model's end of text is among the tokens to choose from; where it must, nothing is asked.
    let more = json!({"guided_regex": "(ab)*", "seed": 3, "n": 16, "max_tokens": 200});
    let answers = texts(&server.post("/v1/completions", &completion(more)));
    assert!(answers.iter().any(|(_, reason)| reason == "stop"), "{answers:?}");
    assert!(answers.iter().filter(|(_, reason)| reason == "stop").all(|(text, _)| text.replace("ab", "").is_empty()), "{answers:?}");
}

#[test]
fn the_others_do_not_notice_and_logprobs_are_the_models_own() {
    let plain = json!({"prompt": "The little bird", "max_tokens": 60, "seed": 11, "logprobs": 3, "ignore_eos": true});
    let bound = completion(json!({"guided_json": schemas::all()[23], "seed": 4, "logprobs": 0}));
    let text = |server: &Running, body: &Value| server.post("/v1/completions", body).json()["choices"].clone();
    let alone = {
        let server = Running::start();
        (text(&server, &plain), text(&server, &bound))
    };
    for draft_tokens in [0, 12] {
        let server = Running::with(ServeConfig { draft_tokens, ..ServeConfig::default() });
        std::thread::scope(|scope| {
            let plains: Vec<_> = (0..3).map(|_| scope.spawn(|| text(&server, &plain))).collect();
            let bounds: Vec<_> = (0..4).map(|_| scope.spawn(|| text(&server, &bound))).collect();
            plains.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), alone.0));
            bounds.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), alone.1));
        });
    }
    // As echo gives them, where nothing is masked.
    let server = Running::start();
    let choice = &alone.1[0];
    let prompt: Vec<u32> = nano::tokenizer().encode("Once upon a time", true).unwrap();
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
    let ids = tokens.iter().map(|token| {
        let bytes = TokenBytes::Text(token.as_str().unwrap().as_bytes().to_vec());
        // Of several tokens with the same bytes the later is no single byte.
        (0..8192).rfind(|id| nano::tokenizer().token_bytes(*id) == Some(bytes.clone())).unwrap()
    });
    let whole: Vec<u32> = prompt.iter().copied().chain(ids).collect();
    let body = json!({"prompt": whole, "max_tokens": 0, "echo": true, "logprobs": 0});
    let scored = server.post("/v1/completions", &body).json()["choices"][0]["logprobs"]["token_logprobs"].clone();
    assert_eq!(json!(scored.as_array().unwrap()[prompt.len()..]), choice["logprobs"]["token_logprobs"]);
}

#[test]
fn cancelling_gives_everything_back() {
    let server = Running::start();
    let body = json!({"prompt": "Once", "max_tokens": 480, "guided_regex": "(a|b| ){400,}", "n": 8}).to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
    let mut connection = std::net::TcpStream::connect(server.address).unwrap();
    std::io::Write::write_all(&mut connection, format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
    let wait = |what: &str, condition: &dyn Fn() -> bool| {
        let began = Instant::now();
        while !condition() {
            assert!(began.elapsed() < Duration::from_secs(60), "{what} did not happen");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    wait("the request is computed", &|| server.metric("ernie_requests_running") == 8.0);
    drop(connection);
    wait("the request is cancelled", &|| server.metric("ernie_requests_running") == 0.0);
    assert_eq!(server.metric("ernie_kv_cache_used_bytes"), 0.0);
    assert_eq!(
        texts(&server.post("/v1/completions", &completion(json!({"guided_choice": ["on"]})))),
        [("on".to_owned(), "stop".to_owned())]
    );
}

#[test]
fn what_cannot_be_obeyed_is_refused_with_its_field() {
    let server = Running::start();
    let format = |format: Value| json!({ "response_format": format });
    let schema = |schema: Value| format(json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}));
    let deep = format!("start: {}\"a\"{}", "(".repeat(50_000), ")".repeat(50_000));
    let chain: String = (0..20_000).map(|i| format!("r{i}: r{}\n", i + 1)).collect();
    let cases = [
        ("response_format.type", format(json!({"type": "yaml"}))),
        ("response_format.json_schema", format(json!({"type": "json_schema"}))),
        ("response_format.json_schema.schema", schema(json!({"type": "nothing"}))),
        ("response_format.json_schema.schema", schema(json!([]))),
        ("response_format.json_schema.schema", schema(json!({"$ref": "#/$defs/missing"}))),
        ("response_format.json_schema.schema", schema(json!({"type": "string", "pattern": "("}))),
        ("response_format.json_schema.schema", schema(json!({"type": "integer", "minimum": 3, "maximum": 2}))),
        ("guided_json", json!({"guided_json": "{"})),
        ("guided_json", json!({"guided_json": 5})),
        ("guided_regex", json!({"guided_regex": "("})),
        ("guided_regex", json!({"guided_regex": "(".repeat(300_000)})),
        ("guided_choice", json!({"guided_choice": []})),
        ("guided_choice", json!({"guided_choice": [""]})),
        ("guided_grammar", json!({"guided_grammar": "nothing to start with"})),
        ("guided_grammar", json!({"guided_grammar": "start: missing"})),
        ("guided_grammar", json!({ "guided_grammar": deep })),
        ("guided_grammar", json!({"guided_grammar": format!("start: r0\n{chain}")})),
        ("guided_regex", json!({"guided_regex": "x".repeat(10_000)})),
        ("guided_regex", json!({"guided_regex": "a", "guided_choice": ["a"], "response_format": {"type": "text"}})),
        ("structured_outputs", json!({"structured_outputs": {}})),
        ("structured_outputs.regex", json!({"structured_outputs": {"regex": "a", "json": {}}})),
        ("structured_outputs.structural_tag", json!({"structured_outputs": {"structural_tag": {}}})),
        ("structured_outputs.grammar", json!({"structured_outputs": {"grammar": "start: (\"a\""}})),
        ("ignore_eos", json!({"guided_choice": ["a"], "ignore_eos": true})),
    ];
    for (param, more) in cases {
        for (path, body) in [("/v1/chat/completions", chat(more.clone())), ("/v1/completions", completion(more.clone()))] {
            let began = Instant::now();
            let (named, message) = server.post(path, &body).error(400);
            let shown = &more.to_string()[..more.to_string().len().min(200)];
            let two = param == "guided_regex" && named.as_deref() == Some("guided_choice");
            assert!(named.as_deref() == Some(param) || two, "{shown}: {named:?}: {message}");
            assert!(message.len() < 1000, "{message}");
            assert!(began.elapsed() < Duration::from_secs(20), "{shown}: {:?}", began.elapsed());
        }
    }
    // The server lives.
    assert_eq!(texts(&server.post("/v1/completions", &completion(json!({"guided_choice": ["on"]}))))[0].0, "on");
}

#[test]
fn hostile_forms_do_no_harm() {
    let server = Running::start();
    let chain = |end: &str| format!("start: r0\n{}r3990: {end}\n", (0..3990).map(|i| format!("r{i}: r{}\n", i + 1)).collect::<String>());
    let nested = |depth: usize| (0..depth).fold(json!({"type": "boolean"}), |inner, _| json!({"type": "array", "items": inner}));
    let definitions = |key: &str| {
        let links = (0..4000).map(|i| (format!("d{i}"), json!({key: [{"$ref": format!("#/$defs/d{}", i + 1)}]})));
        links.chain([("d4000".to_owned(), json!({"type": "boolean"}))]).collect::<serde_json::Map<String, Value>>()
    };
    let optional: String = (0..4000).map(|i| format!("(a{i})?")).collect();
    let properties: serde_json::Map<String, Value> = (0..3000).map(|i| (format!("property{i}"), json!({"type": "string"}))).collect();
    let cases = [
        json!({"guided_choice": ["x".repeat(200_000)]}),
        json!({"guided_choice": (0..10_000).map(|i| format!("choice number {i}")).collect::<Vec<_>>()}),
        json!({"guided_regex": "y".repeat(200_000)}),
        json!({"guided_regex": "a|".repeat(50_000) + "b"}),
        json!({"guided_regex": "a?".repeat(20_000)}),
        json!({ "guided_regex": optional }),
        json!({"guided_regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"}),
        json!({"guided_regex": "(.{1,60},){1,60}([a-z]|[a-f]+x){1,99}end"}),
        json!({"guided_regex": "(?:(?:a|b|c|d)*a(?:a|b|c|d){30})"}),
        json!({"guided_regex": format!("{}a{}", "(".repeat(99), ")*".repeat(99))}),
        json!({"guided_grammar": chain("\"a\"")}),
        json!({"guided_grammar": chain("r0")}),
        json!({"guided_grammar": chain("\"a\"").replace('r', "R").replace("staRt", "start")}),
        json!({"guided_grammar": "start: a\na: a a | \"x\" | \"\""}),
        json!({"guided_grammar": format!("start: {}", "(\"a\" | ".repeat(99) + "\"b\"" + &")".repeat(99))}),
        json!({"guided_grammar": format!("start: {}", "\"a\" ".repeat(50_000))}),
        json!({"guided_grammar": format!("start: A\nA: {}", "\"a\" ".repeat(50_000))}),
        json!({"guided_grammar": format!("start: {}\"a\"", "!".repeat(5000))}),
        json!({"guided_grammar": format!("start: A\nA: {}/a/", "~".repeat(50_000))}),
        json!({"guided_grammar": format!("start: \"a\"{}", "?".repeat(50_000))}),
        json!({"guided_json": nested(50)}),
        json!({"guided_json": {"type": "object", "properties": properties}}),
        json!({"guided_json": {"type": "string", "minLength": 100_000, "maxLength": 1_000_000}}),
        json!({"guided_json": {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}}),
        json!({"guided_json": {"const": "z".repeat(200_000)}}),
        json!({"guided_json": {"$ref": "#"}}),
        json!({"guided_json": {"$defs": definitions("allOf"), "$ref": "#/$defs/d0"}}),
        json!({"guided_json": {"$defs": definitions("anyOf"), "$ref": "#/$defs/d0"}}),
        json!({"guided_json": {"allOf": [{"$ref": "#"}]}}),
        json!({"guided_json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}}),
        json!({"guided_json": {"type": "string", "pattern": "(a*)*(b|a*)*$"}}),
    ];
    for more in cases {
        let mut body = completion(more);
        body["max_tokens"] = json!(3);
        let (began, shown) = (Instant::now(), body.to_string().chars().take(120).collect::<String>());
        let status = server.post("/v1/completions", &body).status;
        println!("{status} {:7.1} ms {shown}", began.elapsed().as_secs_f64() * 1e3);
        assert!([200, 400].contains(&status), "{shown}: {status}");
        assert!(began.elapsed() < Duration::from_secs(20), "{shown}: {:?}", began.elapsed());
    }
    assert_eq!(texts(&server.post("/v1/completions", &completion(json!({"guided_choice": ["on"]}))))[0].0, "on");
}

#[test]
fn the_bytes_of_every_token_are_what_decoding_gives() {
    let tokenizer = nano::tokenizer();
    let anchor = tokenizer.encode("a", false).unwrap();
    let mut texts = 0;
    for id in 0..tokenizer.vocab_size() as u32 {
        let ids: Vec<u32> = anchor.iter().copied().chain([id]).collect();
        let decoded = tokenizer.decode(&ids, true);
        match tokenizer.token_bytes(id).unwrap() {
            TokenBytes::Special(name) => {
                assert_eq!((decoded.as_str(), tokenizer.decode(&ids, false)), ("a", format!("a{name}")), "{id}");
            }
            TokenBytes::Text(bytes) => {
                assert_eq!(decoded, format!("a{}", String::from_utf8_lossy(&bytes)), "{id}");
                texts += 1;
            }
        }
    }
    assert_eq!(texts, 8192 - 5);
}
