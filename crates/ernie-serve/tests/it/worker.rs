//! The engine's thread: bounded on all sides, and nobody waits for a reader.
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ernie_checkpoint::Tokenizer;
use ernie_engine::{Engine, EngineOptions, FinishReason, Request, SamplingParams};
use ernie_serve::{Event, Job, Metrics, Refused, Settings, Task, Worker};
use tokio::sync::mpsc;

use crate::nano;

fn start(max_batch_size: usize, places: usize) -> (Worker, JoinHandle<()>, Arc<Metrics>) {
    let options = EngineOptions { max_batch_size, cache_bytes: 64 << 20, ..EngineOptions::default() };
    let engine = Engine::new(nano::model(), options).unwrap();
    let metrics = Arc::new(Metrics::new());
    let settings = Settings { dynamic_batching: true, max_batch_size };
    let (worker, thread) = Worker::start(engine, settings, nano::tokenizer(), Arc::clone(&metrics), places).unwrap();
    (worker, thread, metrics)
}

fn prompt() -> Vec<u32> {
    nano::tokenizer().encode("Once upon a time", true).unwrap()
}

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::greedy() }
}

fn submit(worker: &Worker, params: SamplingParams, room: usize) -> mpsc::Receiver<(usize, Event)> {
    let (events, receiver) = mpsc::channel(room);
    let task = Task::Generate(Request { prompt: prompt(), params, logprobs: None });
    worker.reserve(1).unwrap().send(Job { task, index: 7, events, charge: None });
    receiver
}

/// Everything up to the end: tokens, text, reason.
fn read(mut receiver: mpsc::Receiver<(usize, Event)>) -> (Vec<u32>, String, Option<FinishReason>) {
    let (mut ids, mut all) = (Vec::new(), String::new());
    while let Some((index, event)) = receiver.blocking_recv() {
        assert_eq!(index, 7);
        match event {
            Event::Token(token) => {
                ids.extend(token.id);
                all.push_str(&token.text);
            }
            Event::Finished { text, reason, .. } => return (ids, all + &text, Some(reason)),
            other => panic!("{other:?}"),
        }
    }
    (ids, all, None)
}

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn ended(metrics: &Metrics, reason: &str) -> u64 {
    let line = format!("ernie_requests_finished_total{{reason=\"{reason}\"}} ");
    metrics.page(0).lines().find_map(|l| l.strip_prefix(&line)?.parse().ok()).unwrap_or(0)
}

#[test]
fn answers_are_those_of_generate_and_a_stop_string_ends_them() {
    let (worker, thread, metrics) = start(4, 8);
    let expected = nano::generate(&prompt(), &greedy(60));
    let receivers: Vec<_> = (0..6).map(|_| submit(&worker, greedy(60), 100)).collect();
    for receiver in receivers {
        assert_eq!(read(receiver), (expected.tokens.clone(), expected.text.clone(), Some(FinishReason::Length)));
    }
    // Across the borders of tokens: from the middle of one word into the next.
    let at = expected.text.char_indices().nth(20).unwrap().0;
    let stop = expected.text[at..].chars().take(7).collect::<String>();
    let params = SamplingParams { stop: vec![stop.clone()], ..greedy(60) };
    let (expected, got) = (nano::generate(&prompt(), &params), read(submit(&worker, params, 100)));
    assert_eq!(got, (expected.tokens, expected.text.clone(), Some(FinishReason::StopString)));
    assert!(!expected.text.contains(&stop));
    worker.close();
    thread.join().unwrap();
    assert_eq!((ended(&metrics, "length"), ended(&metrics, "stop_string")), (6, 1));
}

#[test]
fn slow_and_gone_readers_are_cancelled_and_the_others_go_on() {
    let (worker, thread, metrics) = start(4, 8);
    let slow = submit(&worker, greedy(400), 3);
    let gone = submit(&worker, greedy(400), 500);
    let good = submit(&worker, greedy(100), 200);
    drop(gone);
    assert_eq!(read(good).0, nano::generate(&prompt(), &greedy(100)).tokens);
    wait("the end of both", || ended(&metrics, "cancelled") == 2);
    // What it was sent before stands in its channel; then there is no more, and no end.
    let (ids, _, reason) = read(slow);
    assert!((1..=3).contains(&ids.len()) && reason.is_none(), "{} tokens, {reason:?}", ids.len());
    worker.close();
    thread.join().unwrap();
    let page = metrics.page(0);
    assert!(page.contains("\nernie_requests_running 0\n") && page.contains("\nernie_kv_cache_used_bytes 0\n"), "{page}");
}

#[test]
fn a_full_queue_refuses_and_a_closed_one_finishes_what_it_has() {
    let (worker, thread, _) = start(1, 2);
    let first = submit(&worker, greedy(300), 500);
    wait("the first is computed", || worker.waiting() == 0);
    let others = [submit(&worker, greedy(5), 10), submit(&worker, greedy(5), 10)];
    assert_eq!(worker.waiting(), 2);
    assert_eq!(worker.reserve(1).unwrap_err(), Refused::Full);
    assert_eq!(worker.reserve(3).unwrap_err(), Refused::TooMany { places: 2 });
    worker.close();
    assert_eq!(worker.reserve(1).unwrap_err(), Refused::Closed);
    assert_eq!(read(first).0.len(), 300);
    for other in others {
        assert_eq!(read(other).0.len(), 5);
    }
    thread.join().unwrap();
}

#[test]
fn stopping_waits_for_nobody() {
    let (worker, thread, _) = start(1, 2);
    let receiver = submit(&worker, greedy(450), 500);
    worker.stop();
    thread.join().unwrap();
    assert_eq!(read(receiver).2, None);
}

#[test]
fn marks_of_turns_are_text_even_as_special_tokens() {
    // The embedded model's tokenizer with a mark in the place of a byte that no text has.
    let text = std::fs::read_to_string(nano::folder().join("tokenizer.json")).unwrap().replace("\"<0x00>\"", "\"<think>\"");
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let id = json["model"]["vocab"]["<think>"].as_u64().unwrap() as u32;
    let mut token = json["added_tokens"][0].clone();
    (token["id"], token["content"]) = (id.into(), "<think>".into());
    json["added_tokens"].as_array_mut().unwrap().push(token);
    let tokenizer = Arc::new(Tokenizer::from_tokenizer_json(json.to_string().as_bytes(), "marked.json").unwrap());
    assert!(tokenizer.is_special(id) && tokenizer.decode(&[id], true).is_empty());
    let engine = Engine::new(nano::model(), EngineOptions { cache_bytes: 64 << 20, ..EngineOptions::default() }).unwrap();
    let settings = Settings { dynamic_batching: true, max_batch_size: 2 };
    let (worker, thread) = Worker::start(engine, settings, tokenizer, Arc::new(Metrics::new()), 2).unwrap();
    let params = SamplingParams { logit_bias: vec![(id, 100.0)], ..greedy(2) };
    assert_eq!(read(submit(&worker, params, 10)), (vec![id; 2], "<think><think>".to_owned(), Some(FinishReason::Length)));
    worker.close();
    thread.join().unwrap();
}

#[test]
fn scores_are_the_models_and_embeddings_have_length_one() {
    let (worker, thread, _) = start(2, 8);
    // Longer than a piece.
    let text: Vec<u32> = (0..150).map(|i| 10 + i * 37 % 8000).collect();
    let (events, mut receiver) = mpsc::channel(8);
    let mut places = worker.reserve(3).unwrap();
    places.send(Job { task: Task::Score { prompt: text.clone(), top: 2 }, index: 0, events: events.clone(), charge: None });
    places.send(Job { task: Task::Embed { prompt: text.clone() }, index: 1, events: events.clone(), charge: None });
    places.send(Job { task: Task::Embed { prompt: text[..5].to_vec() }, index: 2, events, charge: None });
    let model = nano::model();
    let logits = ernie_engine::Session::new(&model, 200).unwrap().logits_for(&text, text.len()).unwrap();
    let (mut embeddings, mut scored) = (Vec::new(), false);
    while let Some((index, event)) = receiver.blocking_recv() {
        match event {
            Event::Scores(scores) => {
                assert_eq!((index, scores.len(), scores[0].logprob), (0, text.len(), None));
                for ((row, score), next) in logits.chunks_exact(8192).zip(&scores[1..]).zip(&text[1..]) {
                    let row = ernie_engine::LogProbs::of(row);
                    assert_eq!((score.logprob, &score.top), (Some(row.of_token(*next)), &row.top(2)));
                }
                scored = true;
            }
            Event::Embedding(embedding) => {
                let length: f64 = embedding.iter().map(|x| f64::from(*x).powi(2)).sum();
                assert!(embedding.len() == 256 && (length - 1.0).abs() < 1e-5);
                embeddings.push(embedding);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(scored && embeddings.len() == 2 && embeddings[0] != embeddings[1]);
    worker.close();
    thread.join().unwrap();
}
