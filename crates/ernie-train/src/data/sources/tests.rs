//! Each reader on a small hand-written file of its format, and what it says about a broken one.
use super::*;
use std::fs;

fn fixture(format: Format, relative: &str, template: bool) -> Vec<Document> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/sources");
    let source = source(format, &[relative], template);
    let files = find_files(&source, &root).unwrap();
    files.iter().flat_map(|file| read_file(&source, file).unwrap()).collect()
}

fn source(format: Format, paths: &[&str], template: bool) -> Source {
    let paths = paths.iter().map(|path| (*path).to_owned()).collect();
    Source {
        name: "fixture".into(),
        format,
        paths,
        exclude: Vec::new(),
        weight: 1.0,
        epochs_max: None,
        licence: "own".into(),
        template,
        domain: None,
    }
}

fn texts(format: Format, relative: &str) -> Vec<String> {
    fixture(format, relative, false).iter().map(|document| crate::data::render(&document.body)).collect()
}

/// The error that reading `contents` gives.
fn problem(format: Format, name: &str, contents: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, contents).unwrap();
    let error = read_file(&source(format, &[name], false), &SourceFile { path, relative: name.into() }).unwrap_err();
    error.to_string()
}

const BEGIN: &str = "<|begin_of_sentence|>";
const END: &str = "<|end_of_sentence|>";

#[test]
fn plain_text_is_tidied() {
    assert_eq!(texts(Format::Text, "plain.txt"), ["A plain text.\n\nWith two spaces."]);
}

#[test]
fn a_book_is_cut_at_its_headings() {
    let chapters = texts(Format::MarkdownBook, "book.md");
    assert_eq!(chapters, ["Chapter 1 - The Cat\nThe cat sat on the mat.\nIt was snake_case warm.", "Chapter 2\nThe dog came."]);
}

#[test]
fn a_picture_book_loses_its_licence_page_and_must_have_one() {
    assert_eq!(texts(Format::Storybook, "storybook.md"), ["The Red Kite\nThe kite flew up.\nHigh It came down."]);
    let message = problem(Format::Storybook, "a.md", b"# A\n##\nText.\n");
    assert!(message.contains("a.md") && message.contains("License"), "{message}");
    let message = problem(Format::Storybook, "b.md", b"\nText.\n");
    assert!(message.contains("line 2") && message.contains("# Title"), "{message}");
}

#[test]
fn an_unfinished_last_story_is_left_out() {
    assert_eq!(texts(Format::Separated, "stories.txt"), ["Once there was a dog named Rex. He ran.", "The sun came up.\nIt was warm."]);
}

#[test]
fn medical_answers_stay_with_their_subject() {
    assert_eq!(texts(Format::Medquad, "medquad.jsonl"), ["Too little iron.", "Iron.\n\nAnd rest."]);
    let dialogues = fixture(Format::Medquad, "medquad.jsonl", true);
    assert!(dialogues.iter().all(|document| document.split_key.as_deref() == Some("anemia")));
    let Body::Dialogue(turns) = &dialogues[0].body else { panic!("{dialogues:?}") };
    assert_eq!((turns[0].content.as_str(), turns[1].content.as_str()), ("What causes Anemia?", "Too little iron."));
    let message = problem(Format::Medquad, "m.jsonl", b"{\"focus\": \"a\", \"question\": \"b\", \"answer\": \"c\"}\n{\"focus\": \"a\"}\n");
    assert!(message.contains("line 2") && message.contains("question"), "{message}");
}

#[test]
fn wikitext_reads_as_written() {
    let articles = texts(Format::Wikitext, "wiki.txt");
    assert_eq!(articles, ["A Bird\nIt weighs 1.5 g (0.05 oz) and is \"shy\".\nRange\nIt lives in well-known places.", "Next\nShort."]);
}

#[test]
fn a_play_keeps_its_speeches() {
    assert_eq!(texts(Format::Play, "play.txt"), ["First:\nSpeak.\n\nSecond:\nNo."]);
}

#[test]
fn reading_levels_of_an_article_share_a_side_of_the_split() {
    let documents =
        [fixture(Format::Onestopenglish, "Town-ele.txt", false), fixture(Format::Onestopenglish, "Town-adv.txt", false)].concat();
    assert_eq!(documents[0].body, Body::Text("The town is small.\nPeople like it.".into()));
    assert_eq!(documents[0].split_key.as_deref(), Some("town"));
    assert_eq!(documents[1].split_key, documents[0].split_key);
}

#[test]
fn a_tale_and_its_questions() {
    let tale = fixture(Format::Fairytaleqa, "fairytaleqa/section-stories", false);
    assert_eq!(tale[0].body, Body::Text("A hare ran fast. \"Stop!\" said the snail.\nThe end.".into()));
    let questions = fixture(Format::Fairytaleqa, "fairytaleqa/questions", true);
    let expected = format!("{BEGIN}User: Who ran?\nAssistant: A hare.{END}User: Who spoke?\nAssistant: The snail.{END}");
    assert_eq!(crate::data::render(&questions[0].body), expected);
    assert_eq!(questions[0].split_key, tale[0].split_key);
    assert!(fixture(Format::Fairytaleqa, "fairytaleqa/questions", false).is_empty());
    let message = problem(Format::Fairytaleqa, "x-story.csv", b"section,words\n1,a\n");
    assert!(message.contains("line 2") && message.contains("text"), "{message}");
}

#[test]
fn every_shape_of_chinese_poetry() {
    assert_eq!(texts(Format::ChinesePoetry, "poetry/ci.json"), ["小令\n甲\n春风。\n秋月。", "题\n乙\n山一程"]);
    assert_eq!(texts(Format::ChinesePoetry, "poetry/nested.json"), ["春晓\n丁\n处处闻啼鸟。", "其一\n一。"]);
    assert_eq!(texts(Format::ChinesePoetry, "poetry/quotes.json"), ["读经宜冬。\n评曰：是。", "周南·关雎\n关关雎鸠。"]);
    let message = problem(Format::ChinesePoetry, "p.json", "[{\"paragraphs\": [\"一\"]}, {\"titel\": \"x\"}]".as_bytes());
    assert!(message.contains("p.json") && message.contains("item 2") && message.contains("paragraphs"), "{message}");
    let message = problem(Format::ChinesePoetry, "p.json", b"[\n{]");
    assert!(message.contains("line 2"), "{message}");
}

#[test]
fn sayings_are_grouped() {
    assert_eq!(texts(Format::Xiehouyu, "sayings.json"), ["做贼的说梦话——想偷\n下雨天打伞——应该"]);
    let message = problem(Format::Xiehouyu, "s.json", b"[\n{\"riddle\": \"a\"}]");
    assert!(message.contains("line 2") && message.contains("answer"), "{message}");
}

#[test]
fn dialogues_alternate_and_end_with_the_assistant() {
    assert_eq!(texts(Format::Kdconv, "kdconv.json"), [format!("{BEGIN}User: 你好？\nAssistant: 你好。{END}")]);
    let merged = format!("{BEGIN}User: one tea\nplease\nAssistant: Here you are.{END}");
    assert_eq!(texts(Format::TurnsJsonl, "turns.jsonl"), [merged, format!("{BEGIN}User: Hi\nAssistant: Hello{END}")]);
    assert_eq!(texts(Format::MessagesJsonl, "messages.jsonl"), [format!("{BEGIN}Be kind.\nUser: Hi\nAssistant: Hello{END}")]);
    let message = problem(Format::TurnsJsonl, "t.jsonl", b"{\"turns\": []}\n\n{\"turns\": [[\"bot\", \"x\"]]}\n");
    assert!(message.contains("line 3") && message.contains("`bot`"), "{message}");
    let message = problem(Format::MessagesJsonl, "m.jsonl", b"{\"messages\": 3}\n");
    assert!(message.contains("line 1"), "{message}");
}

#[test]
fn json_lines_of_text() {
    assert_eq!(texts(Format::TextJsonl, "text.jsonl"), ["line one", "line two"]);
    let message = problem(Format::TextJsonl, "t.jsonl", b"{\"text\": \"a\"}\n{\"txt\": \"b\"}\n");
    assert!(message.contains("line 2") && message.contains("text"), "{message}");
}

#[test]
fn chatterbot_scalars_of_every_style() {
    let conversations = fixture(Format::Chatterbot, "chatterbot", false);
    let said = |index: usize| match &conversations[index].body {
        Body::Dialogue(turns) => turns.iter().map(|turn| turn.content.clone()).collect::<Vec<_>>(),
        Body::Text(text) => vec![text.clone()],
    };
    assert_eq!(said(0), ["Good morning, how are you?", "I'm well: thank you."]);
    assert_eq!(said(1), ["Say \"hi\"", "hi there my friend", "Here is code:\n\n```\n    x = 1\n```", "1984"]);
    assert_eq!(said(2), ["In bingo, what is 22?", "Two ducks"]);
    for (contents, line) in [("conversations:\n- - a\n  - 'b\n", "line 3"), ("conversations:\nwrong\n", "line 2"), ("other:\n", "line 1")] {
        let message = problem(Format::Chatterbot, "c.yml", contents.as_bytes());
        assert!(message.contains(line), "{message}");
    }
}

#[test]
fn requests_share_the_split_of_their_text() {
    let asked = |format, path| -> Vec<String> { fixture(format, path, true).iter().map(|d| crate::data::render(&d.body)).collect() };
    let stories = asked(Format::Separated, "stories.txt");
    assert_eq!(stories[0], format!("{BEGIN}User: Tell me a story about Rex.\nAssistant: Once there was a dog named Rex. He ran.{END}"));
    assert!(stories[1].starts_with(&format!("{BEGIN}User: Tell me a story.\nAssistant: The sun")));
    assert!(asked(Format::Storybook, "storybook.md")[0].contains("Tell me the story of \"The Red Kite\".\nAssistant: The kite"));
    assert!(asked(Format::ChinesePoetry, "poetry/ci.json")[0].contains("请写一首《小令》。\nAssistant: 甲\n春风。"));
    assert!(asked(Format::Xiehouyu, "sayings.json")[0].contains("User: 歇后语：下雨天打伞\nAssistant: 应该"));
    let plain = texts(Format::Separated, "stories.txt");
    let keys: Vec<_> = fixture(Format::Separated, "stories.txt", true).into_iter().filter_map(|document| document.split_key).collect();
    assert_eq!(keys, plain);
}

#[test]
fn files_gzipped_marked_broken_and_missing() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all("\u{feff}one\r\ntwo\rthree".as_bytes()).unwrap();
    fs::write(dir.path().join("a.txt.gz"), packed.finish().unwrap()).unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("sub/b.txt"), "b").unwrap();
    fs::write(dir.path().join(".hidden.txt"), [0xff]).unwrap();
    assert_eq!(read_text(&dir.path().join("a.txt.gz")).unwrap(), "one\ntwo\nthree");
    let names =
        |source: &Source| -> Vec<String> { find_files(source, dir.path()).unwrap().into_iter().map(|file| file.relative).collect() };
    assert_eq!(names(&source(Format::Text, &[""], false)), ["a.txt.gz", "sub/b.txt"]);
    assert_eq!(names(&source(Format::Text, &["**/*.txt"], false)), ["sub/b.txt"]);
    let excluded = Source { exclude: vec!["sub/**".into()], ..source(Format::Text, &[""], false) };
    assert_eq!(names(&excluded), ["a.txt.gz"]);
    let error = find_files(&source(Format::Text, &["missing/*.txt"], false), dir.path()).unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
    let error = find_files(&source(Format::Text, &["missing.txt"], false), dir.path()).unwrap_err().to_string();
    assert!(error.contains("missing.txt") && error.contains("--data"), "{error}");
    assert!(problem(Format::Text, "x.txt", b"ab\xffc").contains("byte 2"));
    assert!(problem(Format::Text, "x.gz", b"\x1f\x8bnot gzip").contains("x.gz"));
}

#[test]
fn patterns() {
    for (pattern, path, fits) in [
        ("a/*.txt", "a/b.txt", true),
        ("a/*.txt", "a/c/b.txt", false),
        ("**/b.txt", "b.txt", true),
        ("**/b.txt", "a/c/b.txt", true),
        ("a/**", "a/b/c", true),
        ("**/全唐诗/**", "zh/全唐诗/p.json", true),
        ("a*c*e", "abcde", true),
        ("a*c", "abcd", false),
    ] {
        assert_eq!(matches_pattern(pattern, path), fits, "{pattern} {path}");
    }
}
