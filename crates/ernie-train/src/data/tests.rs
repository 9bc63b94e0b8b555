//! The pipeline from a recipe to batches, on stories made here.
use super::packing::{Batch, Cursor, IGNORE, Packer};
use super::*;
use std::fs;

/// A recipe over two prose sources of unequal lengths and one of dialogues, in a folder of its own.
fn world(dir: &Path) -> Recipe {
    let word = |n: u64| ["cat", "dog", "sun", "river", "little", "house", "春", "月", "runs", "sees"][(random::mix(n) % 10) as usize];
    let story = |source: u64, index: u64| -> String {
        let length = 5 + random::mix(source * 1000 + index) % 60;
        let words: Vec<&str> = (0..length).map(|position| word(source * 1_000_000 + index * 1000 + position)).collect();
        format!("Story {source} {index}: {}.", words.join(" "))
    };
    let file = |source: u64, count: u64| (0..count).map(|index| story(source, index) + "\n<|endoftext|>\n").collect::<String>();
    fs::write(dir.join("short.txt"), file(1, 60)).unwrap();
    fs::write(
        dir.join("long.txt"),
        (0..4).map(|part| file(2 + part, 20).replace("<|endoftext|>", "") + "<|endoftext|>\n").collect::<String>(),
    )
    .unwrap();
    let turns: String = (0..30)
        .map(|i| {
            format!(
                "{{\"messages\": [{{\"role\": \"user\", \"content\": \"Say {i}\"}}, {{\"role\": \"assistant\", \"content\": \"{i}!\"}}]}}\n"
            )
        })
        .collect();
    fs::write(dir.join("talk.jsonl"), turns).unwrap();
    let text = format!(
        r#"
        [run]
        name = "test"
        seed = 7
        out = "{0}/out"
        steps = 50
        [model]
        [tokenizer]
        vocab_size = 340
        [data]
        sequence_length = 48
        batch_size = 3
        validation_fraction = 0.2
        [[data.source]]
        name = "short"
        format = "separated"
        paths = ["short.txt"]
        weight = 3
        licence = "own"
        [[data.source]]
        name = "long"
        format = "separated"
        paths = ["long.txt"]
        weight = 1
        licence = "own"
        [[data.source]]
        name = "talk"
        format = "messages_jsonl"
        paths = ["talk.jsonl"]
        weight = 0.5
        licence = "own"
        [schedule]
        kind = "constant"
        warmup_steps = 5
        "#,
        dir.display()
    );
    Recipe::from_toml(&text, Path::new("test.toml")).unwrap()
}

pub(super) fn prepared(dir: &Path) -> (Recipe, Prepared) {
    let recipe = world(dir);
    let prepared = prepare(&recipe, dir, &mut |_| {}).unwrap();
    (recipe, prepared)
}

/// Documents of a shard as tokens.
fn tokens(corpus: &Corpus, source: usize, document: u32) -> Vec<u32> {
    let shard = &corpus.sources[source].shard;
    let mut out = Vec::new();
    shard.read(document, 0, shard.document_len(document), &mut out);
    out
}

/// Every segment is a piece of one document, and every target is the next token of that document.
fn assert_segments_are_pieces_of_documents(corpus: &Corpus, batch: &Batch, validation: bool) {
    let total = batch.rows * batch.sequence_length;
    assert_eq!((batch.ids.len(), batch.targets.len()), (total, total));
    assert_eq!((batch.cu_seqlens[0], batch.cu_seqlens[batch.cu_seqlens.len() - 1]), (0, total as u32));
    for row in 0..=batch.rows {
        assert!(batch.cu_seqlens.contains(&((row * batch.sequence_length) as u32)), "row {row} begins inside a segment");
    }
    let documents: Vec<Vec<u32>> = (0..corpus.sources.len())
        .flat_map(|source| {
            let shard = &corpus.sources[source].shard;
            let side = if validation { shard.validation() } else { shard.train() };
            side.iter().map(move |&document| tokens(corpus, source, document))
        })
        .collect();
    for bounds in batch.cu_seqlens.windows(2) {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        assert!(start < end, "segment {start}..{end}");
        let (ids, targets) = (&batch.ids[start..end], &batch.targets[start..end]);
        if targets.iter().all(|&target| target == IGNORE) && ids.iter().all(|&id| id == 0) {
            assert_eq!(end, total, "padding is only at the end");
            continue;
        }
        let fits = |document: &Vec<u32>| {
            document.windows(ids.len()).enumerate().any(|(at, window)| {
                let after = document.get(at + ids.len()).map_or(IGNORE, |&id| id as i32);
                window == ids
                    && targets[..ids.len() - 1].iter().zip(&ids[1..]).all(|(&target, &id)| target == id as i32)
                    && targets[ids.len() - 1] == after
            })
        };
        assert!(documents.iter().any(fits), "segment {start}..{end} is no piece of a document: {ids:?} {targets:?}");
    }
}

#[test]
fn batches_hold_pieces_of_documents_and_resume_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let (_, prepared) = prepared(dir.path());
    let corpus = prepared.corpus;
    let mut straight = Packer::new(corpus.clone(), 7, 3, 48);
    let all: Vec<Batch> = (0..120).map(|_| straight.next_batch().unwrap()).collect();
    for batch in &all[..40] {
        assert_segments_are_pieces_of_documents(&corpus, batch, false);
    }
    assert!(straight.state().cursors.iter().all(|cursor| cursor.epoch >= 1), "the test must cross epochs: {:?}", straight.state());
    for stop in [0, 1, 7, 63] {
        let mut first = Packer::new(corpus.clone(), 7, 3, 48);
        for batch in &all[..stop] {
            assert_eq!(&first.next_batch().unwrap(), batch);
        }
        let saved = serde_json::to_string(first.state()).unwrap();
        let mut resumed = Packer::resume(corpus.clone(), serde_json::from_str(&saved).unwrap(), 3, 48).unwrap();
        for batch in &all[stop..] {
            assert_eq!(&resumed.next_batch().unwrap(), batch);
        }
        assert_eq!(resumed.state(), straight.state());
    }
    let mut other_seed = Packer::new(corpus, 8, 3, 48);
    assert_ne!(other_seed.next_batch().unwrap(), all[0]);
}

#[test]
fn shares_follow_the_weights_and_no_document_repeats_in_an_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let (_, prepared) = prepared(dir.path());
    let corpus = prepared.corpus;
    let mut packer = Packer::new(corpus.clone(), 1, 3, 48);
    for _ in 0..60 {
        packer.next_batch().unwrap();
        let given: Vec<f64> = packer.state().cursors.iter().map(|cursor| cursor.tokens as f64).collect();
        let total: f64 = given.iter().sum();
        for (given, weight) in given.iter().zip([3.0, 1.0, 0.5]) {
            let due = total * weight / 4.5;
            assert!((given - due).abs() <= 2.0 * 48.0, "{given} tokens given, {due} due");
        }
    }
    // One row as long as the rest of the epoch: its segments are whole documents.
    let shard = &corpus.sources[0].shard;
    let only = Corpus {
        sources: vec![TokenSource {
            name: "short".into(),
            weight: 1.0,
            epochs_max: Some(1.0),
            domain: 0,
            shard: Shard::open(&shard_path(dir.path(), "short"), &shard.key()).unwrap(),
        }],
        domains: vec!["short".into()],
        fingerprint: "one".into(),
    };
    let length = shard.train_tokens() as usize;
    let batch = Packer::new(Arc::new(only), 1, 1, length).next_batch().unwrap();
    let mut seen: Vec<Vec<u32>> = batch.cu_seqlens.windows(2).map(|b| batch.ids[b[0] as usize..b[1] as usize].to_vec()).collect();
    let mut expected: Vec<Vec<u32>> = shard.train().iter().map(|&document| tokens(&corpus, 0, document)).collect();
    assert_ne!(seen, expected, "the order is a permutation");
    seen.sort();
    expected.sort();
    assert_eq!(seen, expected);
}

fn shard_path(dir: &Path, name: &str) -> PathBuf {
    let cache = dir.join("out/cache");
    let find = fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path());
    find.into_iter().find(|path| path.file_name().unwrap().to_string_lossy().starts_with(&format!("{name}-"))).unwrap()
}

#[test]
fn sources_end_at_their_limit() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = world(dir.path());
    recipe.data.source.iter_mut().for_each(|source| source.epochs_max = Some(1.0));
    let corpus = prepare(&recipe, dir.path(), &mut |_| {}).unwrap().corpus;
    let available: u64 = corpus.sources.iter().map(|source| source.shard.train_tokens()).sum();
    let mut packer = Packer::new(corpus, 1, 1, 48);
    let mut batches = 0;
    let error = loop {
        match packer.next_batch() {
            Ok(_) => batches += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(batches, available / 48);
    assert_eq!(packer.state().batches, batches);
    assert!(matches!(error, Error::Exhausted { .. }), "{error}");
    assert!(error.to_string().contains("epochs_max"));
}

#[test]
fn positions_of_other_data_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, prepared) = prepared(dir.path());
    let good = Packer::new(prepared.corpus.clone(), 1, 2, 48).state().clone();
    let refused = |change: &dyn Fn(&mut packing::DataState)| {
        let mut state = good.clone();
        change(&mut state);
        matches!(Packer::resume(prepared.corpus.clone(), state, 2, 48), Err(Error::State { .. }))
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|state| state.fingerprint.push('x')));
    assert!(refused(&|state| state.cursors.push(Cursor::default())));
    assert!(refused(&|state| state.cursors[0].finished = u64::MAX));
    assert!(refused(&|state| state.cursors[1].offset = u64::MAX));
}

#[test]
fn validation_is_fixed_and_apart_from_training() {
    let dir = tempfile::tempdir().unwrap();
    let (_, prepared) = prepared(dir.path());
    let corpus = prepared.corpus;
    for (index, source) in corpus.sources.iter().enumerate() {
        let batches = corpus.validation_batches(index, 2, 48, 100_000);
        assert_eq!(batches, corpus.validation_batches(index, 2, 48, 100_000));
        let tokens: usize = batches.iter().flat_map(|batch| &batch.ids).count();
        assert!(tokens as u64 >= source.shard.validation_tokens() && (tokens as u64) < source.shard.validation_tokens() + 48);
        for batch in &batches {
            assert_segments_are_pieces_of_documents(&corpus, batch, true);
        }
        assert!(source.shard.train().iter().all(|document| !source.shard.validation().contains(document)));
    }
    let few = corpus.validation_batches(0, 2, 48, 48 * 3);
    assert_eq!(few.iter().map(|batch| batch.rows).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn cached_files_are_used_verified_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, first) = prepared(dir.path());
    let mut doing = Vec::new();
    let second = prepare(&recipe, dir.path(), &mut |message| doing.push(message.to_owned())).unwrap();
    assert_eq!((doing.len(), &second.corpus.fingerprint), (0, &first.corpus.fingerprint));
    let path = shard_path(dir.path(), "short");
    let good = fs::read(&path).unwrap();
    let key = first.corpus.sources[0].shard.key();
    let damage: Vec<Vec<u8>> = (0..good.len())
        .step_by(17)
        .map(|at| {
            let mut bytes = good.clone();
            bytes[at] ^= 0x41;
            bytes
        })
        .collect();
    let lengths = [0, 7, 63, 95, good.len() - 1].map(|length| good[..length].to_vec());
    let mut lying = good.clone();
    lying[48..56].copy_from_slice(&u64::MAX.to_le_bytes());
    for bytes in damage.into_iter().chain(lengths).chain([lying]) {
        // Written beside and renamed: a mapped file is never written in place.
        write_atomically(&path, &bytes).unwrap();
        assert!(matches!(Shard::open(&path, &key), Err(Error::Shard { .. })), "damage was not seen");
    }
    let error = Shard::open(&path, &blake3::hash(b"other"));
    assert!(error.is_err());
    let third = prepare(&recipe, dir.path(), &mut |message| doing.push(message.to_owned())).unwrap();
    assert_eq!(doing, ["tokenising short"]);
    assert_eq!(fs::read(&path).unwrap(), good);
    assert_eq!(third.corpus.fingerprint, first.corpus.fingerprint);
    // Another text is another shard, and another position in the data.
    fs::write(dir.path().join("talk.jsonl"), "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n{\"messages\": [{\"role\": \"user\", \"content\": \"c\"}, {\"role\": \"assistant\", \"content\": \"d\"}]}\n").unwrap();
    assert_ne!(prepare(&recipe, dir.path(), &mut |_| {}).unwrap().corpus.fingerprint, first.corpus.fingerprint);
}

#[test]
fn two_trainings_give_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = world(dir.path());
    let read = || -> Vec<Documents> { recipe.data.source.iter().map(|source| read_documents(source, dir.path(), 0.2).unwrap()).collect() };
    let first = tokenizer_training::train(&recipe, &read()).unwrap();
    assert_eq!(first, tokenizer_training::train(&recipe, &read()).unwrap());
}

#[test]
fn special_tokens_inside_text_stay_text() {
    let dir = tempfile::tempdir().unwrap();
    let (_, prepared) = prepared(dir.path());
    let encoder = Encoder::from_dir(&prepared.tokenizer_dir).unwrap();
    let text = "a</s>b<|end_of_sentence|><unk><s>";
    let ids = encoder.encode(&Body::Text(text.into())).unwrap();
    assert!(ids[..ids.len() - 1].iter().all(|&id| id >= 5), "{ids:?}");
    assert_eq!(ids[ids.len() - 1], 2);
    let tokenizer = tokenizers::Tokenizer::from_file(prepared.tokenizer_dir.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.decode(&ids[..ids.len() - 1], false).unwrap(), text);
    let turn = |role, content: &str| sources::Turn { role, content: content.into() };
    let body = Body::Dialogue(vec![turn(sources::Role::User, "x<|end_of_sentence|>"), turn(sources::Role::Assistant, "y")]);
    let ids = encoder.encode(&body).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id < 5).copied().collect::<Vec<_>>(), [3, 4]);
}

#[test]
fn a_dialogue_has_the_tokens_of_a_prompt_and_its_answer() {
    let dir = tempfile::tempdir().unwrap();
    let (_, prepared) = prepared(dir.path());
    let encoder = Encoder::from_dir(&prepared.tokenizer_dir).unwrap();
    let turn = |role, content: &str| sources::Turn { role, content: content.into() };
    let turns = [
        (sources::Role::User, "cat"),
        (sources::Role::Assistant, "dog"),
        (sources::Role::User, "sun"),
        (sources::Role::Assistant, "river"),
    ];
    let ids = encoder.encode(&Body::Dialogue(turns.map(|(role, content)| turn(role, content)).to_vec())).unwrap();
    let tokenizer = ernie_checkpoint::Tokenizer::from_dir(&prepared.tokenizer_dir).unwrap();
    let parts = ["<|begin_of_sentence|>User: cat\nAssistant: ", "dog<|end_of_sentence|>User: sun\nAssistant: ", "river<|end_of_sentence|>"];
    let expected: Vec<u32> = parts.iter().flat_map(|part| tokenizer.encode(part, false).unwrap()).collect();
    assert_eq!(ids, expected);
    assert_ne!(ids, tokenizer.encode(&parts.concat(), false).unwrap(), "cut or not must differ for this test to say anything");
}

#[test]
fn the_family_template_renders_what_is_trained_on() {
    use ernie_checkpoint::{ChatTemplate, ChatTemplateOptions, Message};
    let dir = tempfile::tempdir().unwrap();
    let (_, prepared) = prepared(dir.path());
    let turn = |role, content: &str| sources::Turn { role, content: content.into() };
    let turns = vec![
        turn(sources::Role::System, "Be kind."),
        turn(sources::Role::User, "Hi\nyou"),
        turn(sources::Role::Assistant, "你好 "),
        turn(sources::Role::User, " again"),
        turn(sources::Role::Assistant, "{{ yes }}"),
    ];
    let name = |role| match role {
        sources::Role::System => "system",
        sources::Role::User => "user",
        sources::Role::Assistant => "assistant",
    };
    let messages: Vec<Message> = turns.iter().map(|turn| Message::new(name(turn.role), turn.content.clone())).collect();
    let options = ChatTemplateOptions::default();
    for template in [ChatTemplate::builtin(), ChatTemplate::from_dir(&prepared.tokenizer_dir).unwrap().unwrap()] {
        assert_eq!(template.render(&messages, false, &options).unwrap(), render(&Body::Dialogue(turns.clone())));
    }
}

#[test]
fn duplicates_are_left_out_and_empty_sources_refused() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = world(dir.path());
    let mut source = recipe.data.source[0].clone();
    fs::write(dir.path().join("short.txt"), "One.\n<|endoftext|>\nTwo.\n<|endoftext|>\nOne.\n<|endoftext|>\n").unwrap();
    let documents = read_documents(&source, dir.path(), 0.0).unwrap();
    assert_eq!((documents.all.len(), documents.duplicates), (2, 1));
    fs::write(dir.path().join("short.txt"), "\n<|endoftext|>\n").unwrap();
    let error = prepare(&recipe, dir.path(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("`short` is empty"), "{error}");
    source.paths = vec!["gone.txt".into()];
    assert!(matches!(read_documents(&source, dir.path(), 0.0), Err(Error::NoFiles { .. })));
}

#[test]
fn a_report_of_every_source() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, prepared) = prepared(dir.path());
    let rows = describe(&recipe, &prepared.corpus);
    assert_eq!(rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), ["short", "long", "talk"]);
    assert_eq!(rows[1].train_tokens, prepared.corpus.sources[1].shard.train_tokens());
    assert!((rows.iter().map(|row| row.share).sum::<f64>() - 1.0).abs() < 1e-12);
    let table = report_table(&rows);
    assert_eq!(table.lines().count(), 5);
    assert!(table.contains("talk") && table.contains("own"));
}

/// Over the public corpora, where ERNIE_DATA names them: every source of the nano recipe reads without an error.
#[test]
fn the_nano_recipe_on_real_data() {
    let Some(root) = std::env::var_os("ERNIE_DATA").map(PathBuf::from) else {
        eprintln!("skipped: ERNIE_DATA is not set");
        return;
    };
    let recipe = Recipe::from_file(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/nano.toml")).unwrap();
    for source in &recipe.data.source {
        let documents = read_documents(source, &root, recipe.data.validation_fraction).unwrap();
        let validation = documents.validation.iter().filter(|&&side| side).count() as f64 / documents.all.len() as f64;
        assert!(documents.all.len() >= 100, "{}: {} documents", source.name, documents.all.len());
        assert!((0.002..0.06).contains(&validation), "{}: {validation} on the validation side", source.name);
        for document in &documents.all {
            let text = render(&document.body);
            assert!(!text.contains("* License:") && !text.contains("<|endoftext|>"), "{}: {text}", source.name);
        }
    }
}
