//! Byte-fallback BPE trained on a recipe's mixture, written as Hugging Face's tokenizer.json.
//!
//! Ids: `<unk>` (also padding), `<s>`, `</s>`, `<|begin_of_sentence|>`, `<|end_of_sentence|>`, the 256 byte tokens
//! `<0x00>`…`<0xFF>`, then characters by code point, then merged pieces in the order they were learned. Pieces
//! hold spaces as they are (` the`), so every string decodes to itself, `▁` (U+2581) included, which tokenizers that
//! write spaces as `▁` turn into a space.
//!
//! The trainer is ours because the `tokenizers` crate's depends on hash order when counts tie: here the result is
//! a function of the words and their counts alone.
use serde_json::{Value, json};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::path::Path;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior};

use crate::data::random::{key, permutation};
use crate::data::sources::Body;
use crate::data::{Documents, Error, body_bytes, write_atomically};
use crate::recipe::Recipe;

/// Changes when the same recipe and text would give another tokenizer.
pub const VERSION: u32 = 1;
/// The special tokens, by id.
pub const SPECIAL_TOKENS: [&str; 5] = ["<unk>", "<s>", "</s>", START_OF_DIALOGUE, END_OF_SENTENCE];
/// Opens a dialogue (the family's `cls_token`).
pub const START_OF_DIALOGUE: &str = "<|begin_of_sentence|>";
/// Ends an assistant's turn (the family's `sep_token`).
pub const END_OF_SENTENCE: &str = "<|end_of_sentence|>";
/// Id of `</s>`, which ends running text.
pub const END_OF_TEXT_ID: u32 = 2;
/// Ids taken by special tokens and bytes.
pub const RESERVED: usize = SPECIAL_TOKENS.len() + 256;

/// What BPE may merge within, in order of preference: a word of any script but Han with the space before it and an
/// English contraction after it; up to 16 Han characters; one digit; one line end; a run of punctuation with the
/// space before it; a run of other whitespace. Every character falls under one of them.
pub const WORD_PATTERN: &str =
    r" ?[\p{L}\p{M}&&[^\p{Han}]]+(?:['’](?:s|t|d|m|ll|ve|re))?|\p{Han}{1,16}|\p{N}|\n| ?[^\s\p{L}\p{M}\p{N}\p{Han}]+|[^\S\n]+";

/// The family's text template (PaddlePaddle/ERNIE-4.5-*-PT), as released in tokenizer_config.json.
const CHAT_TEMPLATE: &str = "{%- if not add_generation_prompt is defined -%}{%- set add_generation_prompt = true -%}{%- endif -%}{%- if not cls_token is defined -%}{%- set cls_token = \"<|begin_of_sentence|>\" -%}{%- endif -%}{%- if not sep_token is defined -%}{%- set sep_token = \"<|end_of_sentence|>\" -%}{%- endif -%}{{- cls_token -}}{%- for message in messages -%}{%- if message[\"role\"] == \"user\" -%}{{- \"User: \" + message[\"content\"] + \"\n\" -}}{%- elif message[\"role\"] == \"assistant\" -%}{{- \"Assistant: \" + message[\"content\"] + sep_token -}}{%- elif message[\"role\"] == \"system\" -%}{{- message[\"content\"] + \"\n\" -}}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- \"Assistant: \" -}}{%- endif -%}";

/// A trained tokenizer: the files' contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainedTokenizer {
    /// tokenizer.json
    pub tokenizer_json: Vec<u8>,
    /// tokenizer_config.json
    pub tokenizer_config_json: Vec<u8>,
}

impl TrainedTokenizer {
    /// Writes both files into a folder, each atomically, tokenizer.json last: where it is, both are.
    pub fn write(&self, dir: &Path) -> Result<(), Error> {
        write_atomically(&dir.join("tokenizer_config.json"), &self.tokenizer_config_json)?;
        write_atomically(&dir.join("tokenizer.json"), &self.tokenizer_json)
    }
}

/// Trains on a sample of the mixture: per source its weight's share of `tokenizer.train_bytes`, whole training
/// documents in an order that depends on `run.seed` alone. `documents` are the recipe's sources, in order.
pub fn train(recipe: &Recipe, documents: &[Documents]) -> Result<TrainedTokenizer, Error> {
    let settings = &recipe.tokenizer;
    let total: f64 = recipe.data.source.iter().map(|source| source.weight).sum();
    let mut words = WordCounter::new()?;
    for (source, read) in recipe.data.source.iter().zip(documents) {
        let quota = (settings.train_bytes as f64 * source.weight / total) as usize;
        let mut taken = 0;
        for index in permutation(key(recipe.run.seed, &format!("tokenizer/{}", source.name), 0), read.all.len()) {
            if taken >= quota {
                break;
            }
            let index = index as usize;
            if !read.validation[index] {
                taken += body_bytes(&read.all[index].body);
                words.add(&read.all[index].body)?;
            }
        }
    }
    train_on_words(words.counts, settings.vocab_size, settings.character_coverage, settings.max_piece_chars)
}

/// Counts the words of documents as the pre-tokenizer cuts them.
struct WordCounter {
    split: Split,
    counts: BTreeMap<String, u64>,
}

impl WordCounter {
    fn new() -> Result<Self, Error> {
        let split = Split::new(SplitPattern::Regex(WORD_PATTERN.into()), SplitDelimiterBehavior::Isolated, false);
        Ok(Self { split: split.map_err(tokenizer_error)?, counts: BTreeMap::new() })
    }

    fn add(&mut self, body: &Body) -> Result<(), Error> {
        match body {
            Body::Text(text) => self.add_text(text),
            Body::Dialogue(turns) => {
                for turn in turns {
                    self.add_text(&format!("User: {}\n", turn.content))?;
                }
                self.add_text("Assistant:")
            }
        }
    }

    fn add_text(&mut self, text: &str) -> Result<(), Error> {
        let mut cut = PreTokenizedString::from(text);
        self.split.pre_tokenize(&mut cut).map_err(tokenizer_error)?;
        for (word, _, _) in cut.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            match self.counts.get_mut(word) {
                Some(count) => *count += 1,
                None => {
                    self.counts.insert(word.to_owned(), 1);
                }
            }
        }
        Ok(())
    }
}

fn tokenizer_error(error: tokenizers::Error) -> Error {
    Error::Tokenizer { origin: "being trained".into(), problem: error.to_string() }
}

/// Trains on words and their counts. `coverage` is the share of all characters that must have their own piece.
pub fn train_on_words(
    words: BTreeMap<String, u64>,
    vocab_size: usize,
    coverage: f64,
    max_piece_chars: usize,
) -> Result<TrainedTokenizer, Error> {
    let characters = alphabet(&words, coverage);
    if RESERVED + characters.len() > vocab_size {
        let problem = format!(
            "{} characters and {RESERVED} reserved ids do not fit {vocab_size}; raise tokenizer.vocab_size or lower tokenizer.character_coverage",
            characters.len()
        );
        return Err(Error::Tokenizer { origin: "being trained".into(), problem });
    }
    let mut pieces: Vec<String> = SPECIAL_TOKENS.iter().map(|token| (*token).to_owned()).collect();
    pieces.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    pieces.extend(characters.iter().map(char::to_string));
    let merges = learn_merges(&words, &mut pieces, vocab_size, max_piece_chars);
    let vocab: serde_json::Map<String, Value> = pieces.iter().enumerate().map(|(id, piece)| (piece.clone(), json!(id))).collect();
    if vocab.len() != pieces.len() {
        return Err(Error::Tokenizer { origin: "being trained".into(), problem: "a learned piece has the name of a reserved one".into() });
    }
    let merges: Vec<Value> = merges.iter().map(|&(a, b)| json!([pieces[a as usize], pieces[b as usize]])).collect();
    let added: Vec<Value> = SPECIAL_TOKENS
        .iter()
        .enumerate()
        .map(|(id, content)| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}))
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": false},
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": merges
        }
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        "cls_token": START_OF_DIALOGUE, "sep_token": END_OF_SENTENCE,
        "add_bos_token": false, "add_eos_token": false, "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE
    });
    let write = |value: &Value| {
        serde_json::to_vec_pretty(value).map_err(|error| Error::Tokenizer { origin: "being trained".into(), problem: error.to_string() })
    };
    Ok(TrainedTokenizer { tokenizer_json: write(&tokenizer)?, tokenizer_config_json: write(&config)? })
}

/// The most frequent characters that together make up `coverage` of the text, by code point. Equal counts: the lower code point first.
fn alphabet(words: &BTreeMap<String, u64>, coverage: f64) -> Vec<char> {
    let mut counts: BTreeMap<char, u64> = BTreeMap::new();
    for (word, count) in words {
        for c in word.chars() {
            *counts.entry(c).or_default() += count;
        }
    }
    let total: u64 = counts.values().sum();
    let mut by_count: Vec<(char, u64)> = counts.into_iter().collect();
    by_count.sort_by_key(|&(c, count)| (Reverse(count), c));
    let mut covered = 0;
    let enough = |count: &(char, u64)| {
        let go_on = (covered as f64) < coverage * total as f64;
        covered += count.1;
        go_on
    };
    let mut kept: Vec<char> = by_count.into_iter().take_while(enough).map(|(c, _)| c).collect();
    kept.sort_unstable();
    kept
}

type Pair = (u32, u32);

/// BPE (Sennrich, Haddow, Birch 2016): the most frequent pair becomes a piece, until the vocabulary is full or no pair
/// occurs twice. Equal counts: the lower pair of ids. Words are cut at characters outside the alphabet.
fn learn_merges(words: &BTreeMap<String, u64>, pieces: &mut Vec<String>, vocab_size: usize, max_piece_chars: usize) -> Vec<Pair> {
    let mut id_of: HashMap<String, u32> = pieces.iter().enumerate().map(|(id, piece)| (piece.clone(), id as u32)).collect();
    let mut spelled: Vec<(Vec<u32>, u64)> = Vec::new();
    let mut buffer = [0; 4];
    for (word, &count) in words {
        let ids: Vec<Option<u32>> = word.chars().map(|c| id_of.get(&*c.encode_utf8(&mut buffer)).copied()).collect();
        spelled.extend(ids.split(Option::is_none).filter(|run| run.len() > 1).map(|run| (run.iter().flatten().copied().collect(), count)));
    }
    let mut counts: HashMap<Pair, i64> = HashMap::new();
    let mut occurs_in: HashMap<Pair, HashSet<u32>> = HashMap::new();
    for (index, (ids, count)) in spelled.iter().enumerate() {
        for pair in ids.windows(2).map(|pair| (pair[0], pair[1])) {
            *counts.entry(pair).or_default() += *count as i64;
            occurs_in.entry(pair).or_default().insert(index as u32);
        }
    }
    let mut queue: BinaryHeap<(i64, Reverse<Pair>)> = counts.iter().map(|(&pair, &count)| (count, Reverse(pair))).collect();
    let mut merges = Vec::new();
    while pieces.len() < vocab_size
        && let Some((count, Reverse(pair))) = queue.pop()
    {
        let current = counts.get(&pair).copied().unwrap_or(0);
        if count != current {
            continue; // stale: the pair was queued again with its new count
        }
        if count < 2 {
            break;
        }
        let merged = format!("{}{}", pieces[pair.0 as usize], pieces[pair.1 as usize]);
        if merged.chars().count() > max_piece_chars {
            continue;
        }
        let id = *id_of.entry(merged.clone()).or_insert_with(|| {
            pieces.push(merged);
            pieces.len() as u32 - 1
        });
        merges.push(pair);
        let mut changed: HashSet<Pair> = HashSet::new();
        for index in occurs_in.remove(&pair).unwrap_or_default() {
            let (ids, count) = &mut spelled[index as usize];
            for old in ids.windows(2).map(|pair| (pair[0], pair[1])) {
                *counts.entry(old).or_default() -= *count as i64;
                changed.insert(old);
            }
            merge_in(ids, pair, id);
            for new in ids.windows(2).map(|pair| (pair[0], pair[1])) {
                *counts.entry(new).or_default() += *count as i64;
                occurs_in.entry(new).or_default().insert(index);
                changed.insert(new);
            }
        }
        counts.remove(&pair);
        queue.extend(changed.into_iter().filter_map(|pair| Some((*counts.get(&pair)?, Reverse(pair)))).filter(|(count, _)| *count > 1));
    }
    merges
}

/// Replaces every occurrence of `pair`, from the left.
fn merge_in(ids: &mut Vec<u32>, pair: Pair, merged: u32) {
    let (mut read, mut write) = (0, 0);
    while read < ids.len() {
        if read + 1 < ids.len() && (ids[read], ids[read + 1]) == pair {
            ids[write] = merged;
            read += 2;
        } else {
            ids[write] = ids[read];
            read += 1;
        }
        write += 1;
    }
    ids.truncate(write);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::Tokenizer;

    /// A tokenizer trained on a few lines of English and Chinese, and its words.
    fn trained() -> (TrainedTokenizer, Tokenizer) {
        let mut words = WordCounter::new().unwrap();
        for line in [
            "Once upon a time there was a little girl. She didn't like the little dog.",
            "从前有一个小女孩，她喜欢小狗。小女孩说：“你好！”",
            "It is 1984.\n\nThe  end...",
        ] {
            for _ in 0..3 {
                words.add(&Body::Text(line.into())).unwrap();
            }
        }
        let trained = train_on_words(words.counts, 450, 1.0, 16).unwrap();
        let tokenizer = Tokenizer::from_bytes(&trained.tokenizer_json).unwrap();
        (trained, tokenizer)
    }

    #[test]
    fn every_string_decodes_to_itself() {
        let (_, tokenizer) = trained();
        let mut strings: Vec<String> = [
            "",
            " ",
            "  a  b ",
            "Once upon a time",
            "她喜欢小狗，你呢？",
            "emoji 😀👩‍👩‍👧‍👦🇨🇳 e\u{301}",
            "tabs\tand\r\nlines\n\n\n",
            "\u{0}\u{1}\u{7f}\u{85}\u{feff}",
            "▁ is not a space ▁▁",
            "«Zażółć» gęślą 𝕁𝕒 かな 한국어 العربية",
            "<0x41> <unk",
            "1234567890",
            "a's b're c'x ’ll",
            "\u{a0}\u{3000}\u{2028}",
        ]
        .map(str::to_owned)
        .to_vec();
        // Random text: pieces of several scripts, spaces and control characters in any order.
        let alphabet: Vec<char> = " \n\t.,'’!?a1Zé中文字小狗😀▁\u{301}\u{0}\u{200d}\u{10ffff}の<>x0".chars().collect();
        strings
            .extend((0..500u64).map(|n| {
                (0..n % 40).map(|i| alphabet[(crate::data::random::mix(n * 100 + i) % alphabet.len() as u64) as usize]).collect()
            }));
        for string in strings {
            let ids = tokenizer.encode(string.as_str(), false).unwrap();
            assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), string, "{:?}", ids.get_tokens());
        }
    }

    #[test]
    fn ids_are_in_their_places() {
        let (trained, tokenizer) = trained();
        for (id, token) in SPECIAL_TOKENS.iter().enumerate() {
            assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
        }
        assert_eq!((tokenizer.token_to_id("<0x00>"), tokenizer.token_to_id("<0xFF>")), (Some(5), Some(260)));
        assert!(tokenizer.get_vocab_size(true) <= 450);
        let pieces = tokenizer.encode("a little girl. 小女孩", false).unwrap();
        assert_eq!(pieces.get_tokens(), ["a", " little", " girl", ".", " ", "小女孩"]);
        let turn = tokenizer.encode("<|begin_of_sentence|>a<|end_of_sentence|></s>", false).unwrap();
        assert_eq!(turn.get_ids()[0], 3);
        assert_eq!(turn.get_ids()[2..], [4, END_OF_TEXT_ID]);
        let config: Value = serde_json::from_slice(&trained.tokenizer_config_json).unwrap();
        assert!(config["chat_template"].as_str().unwrap().contains("Assistant: "));
    }

    #[test]
    fn merges_follow_the_counts_and_ties_the_ids() {
        let words = [("abab", 3), ("ab", 2), ("cd", 5), ("x", 9)].map(|(word, count)| (word.to_owned(), count)).into();
        let mut pieces: Vec<String> = ["a", "b", "c", "d", "x"].map(str::to_owned).to_vec();
        let merges = learn_merges(&words, &mut pieces, 100, 16);
        // ab: 3·2 + 2 = 8, cd: 5, then abab: 3.
        assert_eq!(merges, [(0, 1), (2, 3), (5, 5)]);
        assert_eq!(pieces[5..], ["ab", "cd", "abab"]);
        let mut pieces: Vec<String> = ["a", "b", "c", "d"].map(str::to_owned).to_vec();
        assert_eq!(learn_merges(&words, &mut pieces, 5, 16), [(0, 1)], "the vocabulary is full");
        let mut pieces: Vec<String> = ["a", "b", "c", "d"].map(str::to_owned).to_vec();
        assert_eq!(learn_merges(&words, &mut pieces, 100, 2), [(0, 1), (2, 3)], "longer pieces are not made");
    }

    #[test]
    fn the_alphabet_keeps_the_most_frequent_characters() {
        let words = [("aaab", 10), ("中", 9), ("z", 1)].map(|(word, count)| (word.to_owned(), count)).into();
        assert_eq!(alphabet(&words, 0.9), ['a', 'b', '中']);
        assert_eq!(alphabet(&words, 1.0), ['a', 'b', 'z', '中']);
        let error = train_on_words(words, RESERVED + 2, 1.0, 16).unwrap_err().to_string();
        assert!(error.contains("4 characters") && error.contains("vocab_size"), "{error}");
    }

    #[test]
    fn every_character_is_in_one_word() {
        let counter = WordCounter::new().unwrap();
        let text = "He’ll say  \"No--never!\"\n\n中文abc123 \u{0}😀";
        let mut cut = PreTokenizedString::from(text);
        counter.split.pre_tokenize(&mut cut).unwrap();
        let words: Vec<String> =
            cut.get_splits(OffsetReferential::Original, OffsetType::Byte).into_iter().map(|(word, _, _)| word.to_owned()).collect();
        assert_eq!(words.concat(), text);
        assert_eq!(words, ["He’ll", " say", "  ", "\"", "No", "--", "never", "!\"", "\n", "\n", "中文", "abc", "1", "2", "3", " \u{0}😀"]);
    }
}
