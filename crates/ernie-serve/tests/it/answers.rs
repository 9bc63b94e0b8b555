//! What clients are answered.
use ernie_engine::{LogProbs, SamplingParams, Session};
use serde_json::{Value, json};

use crate::client::Running;
use crate::nano;

const PROMPT: &str = "Once upon a time";

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens, ..SamplingParams::greedy() }
}

fn ids(text: &str) -> Vec<u32> {
    nano::tokenizer().encode(text, true).unwrap()
}

/// Text, finish reasons and log-probabilities of a stream's answer, put together.
fn joined(events: &[Value], index: u64) -> (String, Vec<Value>, Vec<Value>) {
    let (mut text, mut reasons, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()).filter(|choice| choice["index"] == index) {
        text.push_str(choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default());
        reasons.extend(Some(choice["finish_reason"].clone()).filter(|reason| !reason.is_null()));
        let lists = [&choice["logprobs"]["token_logprobs"], &choice["logprobs"]["content"]];
        logprobs.extend(lists.into_iter().filter_map(Value::as_array).flatten().cloned());
    }
    (text, reasons, logprobs)
}

#[test]
fn completions_are_those_of_generate_streamed_and_not() {
    let server = Running::start();
    let expected = nano::generate(&ids(PROMPT), &greedy(40));
    let mut body = json!({"model": "nano", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "logprobs": 2});
    let reply = server.post("/v1/completions", &body);
    assert_eq!(reply.status, 200, "{}", reply.text);
    let whole = reply.json();
    let choice = &whole["choices"][0];
    assert_eq!((choice["text"].as_str(), choice["finish_reason"].as_str()), (Some(&*expected.text), Some("length")));
    let usage = json!({"prompt_tokens": ids(PROMPT).len(), "completion_tokens": 40, "total_tokens": ids(PROMPT).len() + 40});
    assert_eq!((&whole["usage"], &whole["object"], &whole["model"]), (&usage, &json!("text_completion"), &json!("nano")));
    assert_eq!(whole["id"], format!("cmpl-{}", reply.headers["x-request-id"].to_str().unwrap()));
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect::<String>(), expected.text);
    for (scores, chosen) in
        choice["logprobs"]["top_logprobs"].as_array().unwrap().iter().zip(choice["logprobs"]["token_logprobs"].as_array().unwrap())
    {
        // Greedy: the chosen one is the likeliest.
        let best = scores.as_object().unwrap().values().map(|v| v.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
        assert_eq!(best, chosen.as_f64().unwrap());
    }

    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let events = server.post("/v1/completions", &body).events();
    let (last, pieces) = events.split_last().unwrap();
    assert_eq!((&last["usage"], last["choices"].as_array().map(Vec::len)), (&usage, Some(0)));
    assert!(pieces.len() > 20 && pieces.iter().all(|event| event.get("usage") == Some(&Value::Null)), "null until the last");
    let (text, reasons, logprobs) = joined(pieces, 0);
    assert_eq!((text, reasons, json!(logprobs)), (expected.text, vec![json!("length")], choice["logprobs"]["token_logprobs"].clone()));
}

#[test]
fn every_form_of_prompt_is_the_same_prompt() {
    let server = Running::start();
    let other = "The little bird";
    let texts = [PROMPT, other].map(|prompt| nano::generate(&ids(prompt), &greedy(12)).text);
    let ask = |prompt: Value| {
        let reply = server.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 12, "temperature": 0}));
        assert_eq!(reply.status, 200, "{}", reply.text);
        let choices = reply.json()["choices"].as_array().unwrap().clone();
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ask(json!(PROMPT)), texts[..1]);
    assert_eq!(ask(json!([PROMPT, other])), texts);
    assert_eq!(ask(json!(ids(PROMPT))), texts[..1]);
    assert_eq!(ask(json!([ids(PROMPT), ids(other)])), texts);
}

#[test]
fn seeds_reproduce_and_n_answers_have_one_after_the_other() {
    let server = Running::start();
    let ask = |body: Value| server.post("/v1/completions", &body).json();
    let body = |n: usize, seed: i64| json!({"prompt": PROMPT, "max_tokens": 20, "n": n, "seed": seed, "top_k": 50, "min_p": 0.01});
    let four = ask(body(4, 7));
    let text = |reply: &Value, index: usize| reply["choices"][index]["text"].as_str().unwrap().to_owned();
    let params = SamplingParams { max_tokens: 20, top_k: 50, min_p: 0.01, ..SamplingParams::default() };
    for index in 0..4 {
        let seed = 7 + index as u64;
        assert_eq!(text(&four, index), nano::generate(&ids(PROMPT), &SamplingParams { seed, ..params.clone() }).text);
        assert_eq!(text(&ask(body(1, seed as i64)), 0), text(&four, index));
    }
    assert_ne!(text(&four, 0), text(&four, 1));
    assert_eq!(four["usage"]["prompt_tokens"], ids(PROMPT).len());
    let unseeded = json!({"prompt": PROMPT, "max_tokens": 30});
    assert_ne!(text(&ask(unseeded.clone()), 0), text(&ask(unseeded), 0), "without a seed each draw is another");
    let mut streamed = body(4, 7);
    streamed["stream"] = json!(true);
    let events = server.post("/v1/completions", &streamed).events();
    for index in 0..4 {
        assert_eq!(joined(&events, index).0, text(&four, index as usize));
    }
}

#[test]
fn stop_strings_end_an_answer_before_they_begin() {
    let server = Running::start();
    let whole = nano::generate(&ids(PROMPT), &greedy(60)).text;
    let at = whole.char_indices().nth(30).unwrap().0;
    let stop: String = whole[at..].chars().take(9).collect();
    let expected = &whole[..whole.find(&stop).unwrap()];
    let body = json!({"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "stop": ["nowhere at all", stop]});
    let reply = server.post("/v1/completions", &body).json();
    assert_eq!((&reply["choices"][0]["text"], &reply["choices"][0]["finish_reason"]), (&json!(expected), &json!("stop")));
    let mut body = body;
    body["stream"] = json!(true);
    let events = server.post("/v1/completions", &body).events();
    let (text, reasons, _) = joined(&events, 0);
    assert_eq!((text.as_str(), reasons), (expected, vec![json!("stop")]));
}

#[test]
fn penalties_and_biases_arrive() {
    let server = Running::start();
    let params = SamplingParams {
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: 0.2,
        logit_bias: vec![(300, 4.0), (500, -100.0)],
        ..greedy(30)
    };
    let body = json!({
        "prompt": PROMPT, "max_tokens": 30, "temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2,
        "logit_bias": {"300": 4, "500": -100}
    });
    let text = server.post("/v1/completions", &body).json()["choices"][0]["text"].clone();
    assert_eq!(text, nano::generate(&ids(PROMPT), &params).text);
    assert_ne!(text, nano::generate(&ids(PROMPT), &greedy(30)).text);
    // A token that is commanded is all that comes.
    let body = json!({"prompt": PROMPT, "max_tokens": 3, "logit_bias": {"300": 100}, "logprobs": 0});
    let tokens = server.post("/v1/completions", &body).json()["choices"][0]["logprobs"]["tokens"].clone();
    assert!(tokens[0] == tokens[1] && tokens[1] == tokens[2], "{tokens}");
}

#[test]
fn echo_scores_a_prompt_as_the_model_does() {
    let server = Running::start();
    let prompt = ids("Once upon a time there was a little bird. She liked to sing.");
    let model = nano::model();
    let logits = Session::new(&model, 100).unwrap().logits_for(&prompt, prompt.len()).unwrap();
    let expected: f64 = logits.chunks_exact(8192).zip(&prompt[1..]).map(|(row, id)| f64::from(LogProbs::of(row).of_token(*id))).sum();
    for (max_tokens, text) in [(0, String::new()), (1, nano::generate(&prompt, &greedy(1)).text)] {
        let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "echo": true, "logprobs": 1});
        let reply = server.post("/v1/completions", &body).json();
        let choice = &reply["choices"][0];
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        assert_eq!(logprobs.len(), prompt.len() + max_tokens);
        assert!(logprobs[0].is_null() && choice["logprobs"]["top_logprobs"][0].is_null());
        let sum: f64 = logprobs[1..prompt.len()].iter().map(|value| value.as_f64().unwrap()).sum();
        assert!((sum - expected).abs() < 1e-3, "{sum} for {expected}");
        assert_eq!(choice["text"], nano::tokenizer().decode(&prompt, true) + &text);
        assert_eq!(reply["usage"]["completion_tokens"], max_tokens);
    }
    let streamed = json!({"prompt": prompt, "max_tokens": 5, "temperature": 0, "echo": true, "logprobs": 1, "stream": true});
    let (_, _, logprobs) = joined(&server.post("/v1/completions", &streamed).events(), 0);
    assert_eq!(logprobs.len(), prompt.len() + 5);
}

#[test]
fn offsets_of_tokens_are_those_of_the_text_though_characters_come_in_pieces() {
    let server = Running::start();
    // Characters that the tokenizer has only as bytes.
    let text = "a😀b🦀c";
    let body = json!({"prompt": PROMPT, "max_tokens": 40, "guided_choice": [text], "logprobs": 0});
    let choice = &server.post("/v1/completions", &body).json()["choices"][0];
    assert_eq!(choice["text"], text);
    let (tokens, offsets) = (choice["logprobs"]["tokens"].as_array().unwrap(), choice["logprobs"]["text_offset"].as_array().unwrap());
    let at = |token: &str| offsets[tokens.iter().position(|one| one.as_str().unwrap().ends_with(token)).unwrap()].as_u64().unwrap();
    assert!(tokens.iter().filter(|token| token.as_str().unwrap().contains('\u{fffd}')).count() >= 4, "{tokens:?}");
    assert_eq!([at("a"), at("b"), at("c")], [0, 2, 4], "{tokens:?} {offsets:?}");
    assert!(offsets.windows(2).all(|two| two[0].as_u64() <= two[1].as_u64()));
}

#[test]
fn chats_are_answered_streamed_and_not() {
    let server = Running::start();
    let tokenizer = nano::tokenizer();
    let messages = json!([
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "What do "}, {"type": "text", "text": "birds eat?"}]}
    ]);
    let turns = [ernie_checkpoint::Message::new("system", "Be kind."), ernie_checkpoint::Message::new("user", "What do birds eat?")];
    let template = ernie_checkpoint::ChatTemplate::builtin();
    let prompt = ernie_checkpoint::encode_conversation(&tokenizer, &template, &turns, true, &Default::default()).unwrap();
    let stop_ids = ernie_checkpoint::end_of_turn_ids(&tokenizer);
    let expected = nano::generate(&prompt, &SamplingParams { stop_ids, ..greedy(60) });
    let mut body = json!({"messages": messages, "max_completion_tokens": 60, "temperature": 0, "logprobs": true, "top_logprobs": 3});
    let whole = server.post("/v1/chat/completions", &body).json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": expected.text}));
    let ended = expected.finish_reason == ernie_engine::FinishReason::Stop;
    assert_eq!(choice["finish_reason"], if ended { "stop" } else { "length" });
    assert_eq!((&whole["object"], &whole["usage"]["completion_tokens"]), (&json!("chat.completion"), &json!(expected.tokens.len())));
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), expected.tokens.len() - usize::from(ended), "the token that ends a turn is none of its text");
    let bytes = tokens.iter().flat_map(|t| t["bytes"].as_array().unwrap()).map(|b| b.as_u64().unwrap() as u8).collect::<Vec<_>>();
    assert_eq!(String::from_utf8(bytes).unwrap().trim_start(), expected.text.trim_start());
    assert!(
        tokens
            .iter()
            .all(|token| token["top_logprobs"].as_array().unwrap().len() == 3 && token["top_logprobs"][0]["token"] == token["token"])
    );

    body["stream"] = json!(true);
    let events = server.post("/v1/chat/completions", &body).events();
    assert!(events.iter().all(|event| event.get("usage").is_none()), "not asked for");
    body["stream_options"] = json!({"include_usage": true});
    let counted = server.post("/v1/chat/completions", &body).events();
    let (last, pieces) = counted.split_last().unwrap();
    assert_eq!((&last["usage"], last["choices"].as_array().map(Vec::len)), (&whole["usage"], Some(0)));
    assert!(pieces.len() == events.len() && pieces.iter().all(|event| event.get("usage") == Some(&Value::Null)));
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
    let (text, reasons, logprobs) = joined(&events, 0);
    assert_eq!((json!(text), reasons, &logprobs), (choice["message"]["content"].clone(), vec![choice["finish_reason"].clone()], tokens));
}

#[test]
fn text_becomes_tokens_and_tokens_text() {
    let server = Running::start();
    let text = "Once upon a time. 春眠不觉晓";
    let reply = server.post("/v1/tokenize", &json!({"prompt": text, "return_token_strs": true})).json();
    assert_eq!(reply["tokens"], json!(ids(text)));
    assert_eq!((&reply["count"], &reply["max_model_len"]), (&json!(ids(text).len()), &json!(512)));
    assert_eq!(reply["token_strs"].as_array().unwrap().len(), ids(text).len());
    let back = server.post("/v1/detokenize", &json!({"tokens": reply["tokens"]})).json();
    assert_eq!(back["prompt"], nano::tokenizer().decode(&ids(text), false));
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let prompt = server.post("/v1/tokenize", &chat).json();
    let text = server.post("/v1/detokenize", &json!({"tokens": prompt["tokens"]})).json();
    assert!(text["prompt"].as_str().unwrap().trim_end().ends_with("Assistant:"), "{text}");
}

#[test]
fn embeddings_have_length_one_and_both_encodings() {
    use base64::Engine as _;
    let server = Running::start();
    let ask = |body: Value| server.post("/v1/embeddings", &body).json();
    let texts = ["The cat sat on the mat.", "A cat sits on a mat.", "Two coffees with milk, please."];
    let reply = ask(json!({"model": "nano", "input": texts}));
    let vectors: Vec<Vec<f64>> =
        (0..3).map(|i| reply["data"][i]["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    assert!(vectors.iter().all(|v| v.len() == 256 && (dot(v, v) - 1.0).abs() < 1e-5));
    assert!(dot(&vectors[0], &vectors[1]) > dot(&vectors[0], &vectors[2]), "what is alike is nearer");
    assert_eq!(reply["usage"]["prompt_tokens"], texts.iter().map(|text| ids(text).len()).sum::<usize>());
    // The client of OpenAI asks for base64; ids are as good as text, and a text alone is the same as among others.
    let encoded = ask(json!({"input": ids(texts[1]), "encoding_format": "base64"}));
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let decoded: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(decoded, vectors[1].iter().map(|x| *x as f32).collect::<Vec<_>>());
}
