//! Made-up collections in each layout.
use std::io::Write;
use std::path::Path;

use ernie_eval::{Example, ExampleFormat, ExamplesError, read_examples};

const MEETING: &str = r#"{"topic_list": [{"topic": "Colours", "relevant_text_span": [["0", "1"]]}], "general_query_list": [{"query": "Summarize the meeting", "answer": "They chose red."}], "specific_query_list": [{"query": "What did Ann say ?", "answer": "She likes red.", "relevant_text_span": [["0", "0"]]}], "meeting_transcripts": [{"speaker": "Ann", "content": "I {disfmarker} I like  red . {vocalsound}"}, {"speaker": "Bob", "content": "{pause}"}, {"speaker": "Bob", "content": "Red {not a mark} it is ."}], "meeting_id": "M1"}"#;

const PAPER: &str = r#"{"source": ["We count words. ", "It works.\n"], "source_labels": [0, 1], "rouge_scores": [0.1, 0.2], "paper_id": "P1", "target": ["Words are counted.", "Counting works."], "title": "On words"}"#;

const ARTICLE: &str = r#"{"pmc_file": "A-1.nxml", "title": "On mice", "abstract": "Mice are small.", "body": "Introduction\nMice are animals.", "copyright": "", "license": "CC BY"}"#;

fn write(dir: &Path, name: &str, text: &str) {
    let bytes = if name.ends_with(".gz") {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(text.as_bytes()).unwrap();
        gzip.finish().unwrap()
    } else {
        text.as_bytes().to_vec()
    };
    std::fs::write(dir.join(name), bytes).unwrap();
}

/// The examples of a file of this name and text, and that the folder gives the same.
fn read(name: &str, text: &str, format: ExampleFormat) -> Vec<Example> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), name, text);
    let examples = read_examples(&dir.path().join(name), format, usize::MAX).unwrap();
    assert_eq!(read_examples(dir.path(), format, usize::MAX).unwrap(), examples);
    assert_eq!(read_examples(dir.path(), format, 1).unwrap(), examples[..1]);
    examples
}

fn example(id: &str, document: &str, query: Option<&str>, references: &[&str]) -> Example {
    let references = references.iter().map(|&text| text.to_owned()).collect();
    Example { id: id.to_owned(), document: document.into(), query: query.map(str::to_owned), references }
}

#[test]
fn each_question_about_a_meeting_is_an_example() {
    let document = "Ann: I I like red .\nBob: Red {not a mark} it is .\n";
    let expected = [
        example("M1/1", document, Some("Summarize the meeting"), &["They chose red."]),
        example("M1/2", document, Some("What did Ann say ?"), &["She likes red."]),
    ];
    assert_eq!(read("test.jsonl.gz", MEETING, ExampleFormat::Qmsum), expected);
    // As the authors give it out a meeting has no name.
    let nameless = format!("\n{}\n", MEETING.replace(r#", "meeting_id": "M1""#, ""));
    assert_eq!(read("test.jsonl", &nameless, ExampleFormat::Qmsum)[1].id, "2/2");
}

#[test]
fn sentences_of_a_paper_are_its_document() {
    let expected = example("P1", "We count words. It works.", None, &["Words are counted.", "Counting works."]);
    assert_eq!(read("test.jsonl", &format!("{PAPER}\n{PAPER}\n"), ExampleFormat::Scitldr), [expected.clone(), expected]);
}

#[test]
fn the_abstract_of_an_article_is_its_summary() {
    let expected = example("A-1.nxml", "On mice\n\nIntroduction\nMice are animals.", None, &["Mice are small."]);
    assert_eq!(read("craft_articles.jsonl.gz", ARTICLE, ExampleFormat::Craft), [expected]);
}

#[test]
fn plain_lines_have_one_summary_or_several() {
    let text =
        "{\"document\": \"长文\", \"summary\": \"短\"}\n\n{\"id\": \"b\", \"document\": \"d\", \"summary\": [\"s\", \"t\"], \"more\": 1}";
    let expected = [example("1", "长文", None, &["短"]), example("b", "d", None, &["s", "t"])];
    assert_eq!(read("test.jsonl", text, ExampleFormat::Jsonl), expected);
}

#[test]
fn what_is_wrong_is_named_with_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let error = |name: &str, format| read_examples(&dir.path().join(name), format, usize::MAX).unwrap_err().to_string();
    let good = r#"{"document": "d", "summary": "s"}"#;
    for (bad, reason) in [
        (PAPER, "missing field `document`"),
        (r#"{"document": "d", "summary": []}"#, "empty"),
        (r#"{"document": "d", "summary": ["s", " "]}"#, "empty"),
        (r#"{"document": "", "summary": "s"}"#, "empty"),
        (r#"{"document": "d""#, "EOF"),
    ] {
        write(dir.path(), "a.jsonl", &format!("{good}\n{bad}\n"));
        let error = error("a.jsonl", ExampleFormat::Jsonl);
        assert!(error.contains("a.jsonl, line 2: ") && error.contains(reason) && error.contains("`jsonl`"), "{error}");
        assert!(!error.contains("at line 1"), "{error}");
    }
    write(dir.path(), "titles.jsonl", &ARTICLE.replace(r"Introduction\nMice are animals.", ""));
    assert!(error("titles.jsonl", ExampleFormat::Craft).contains("A-1.nxml: the document"));
    write(dir.path(), "empty.jsonl", "\n");
    assert!(error("empty.jsonl", ExampleFormat::Jsonl).contains("no examples"));
    std::fs::write(dir.path().join("latin.jsonl"), b"{\"document\": \"\xe9\"}").unwrap();
    assert!(error("latin.jsonl", ExampleFormat::Jsonl).contains("UTF-8"));
    write(dir.path(), "plain.gz", "");
    std::fs::write(dir.path().join("plain.gz"), good).unwrap();
    assert!(error("plain.gz", ExampleFormat::Jsonl).contains("plain.gz"));
    assert!(error("missing.jsonl", ExampleFormat::Jsonl).contains("missing.jsonl"));
    let folder = read_examples(dir.path(), ExampleFormat::Craft, usize::MAX).unwrap_err();
    assert!(matches!(folder, ExamplesError::NoFile { expected: "craft_articles.jsonl", .. }), "{folder}");
}
