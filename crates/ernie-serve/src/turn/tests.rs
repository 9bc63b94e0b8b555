use super::*;

fn reading(thoughts: Option<bool>, functions: &[&str]) -> Reading {
    let functions = (!functions.is_empty()).then(|| functions.iter().map(|name| (*name).to_owned()).collect());
    Reading { thoughts, functions, only_calls: false }
}

fn read<'a>(reading: &Reading, parts: impl IntoIterator<Item = &'a str>) -> Vec<Piece> {
    let mut reader = TurnReader::new(reading);
    let mut pieces: Vec<Piece> = Vec::new();
    for part in parts {
        pieces.extend(reader.push(part));
    }
    pieces.extend(reader.finish());
    joined(pieces)
}

/// What becomes of a text, which must be the same wherever it is cut.
fn taken_apart(reading: &Reading, text: &str) -> Vec<Piece> {
    let whole = read(reading, [text]);
    let at = |index: usize| text.is_char_boundary(index);
    for first in (0..=text.len()).filter(|index| at(*index)) {
        for second in (first..=text.len()).filter(|index| at(*index)) {
            let parts = [&text[..first], &text[first..second], &text[second..]];
            assert_eq!(read(reading, parts), whole, "{parts:?}");
        }
    }
    let characters: Vec<String> = text.chars().map(String::from).collect();
    assert_eq!(read(reading, characters.iter().map(String::as_str)), whole, "character by character");
    whole
}

fn content(text: &str) -> Piece {
    Piece::Content(text.to_owned())
}

fn reasoning(text: &str) -> Piece {
    Piece::Reasoning(text.to_owned())
}

fn call(index: usize, name: &str, arguments: &str) -> [Piece; 2] {
    [Piece::Call { index, name: name.to_owned() }, Piece::Arguments { index, text: arguments.to_owned() }]
}

#[test]
fn thoughts_and_text() {
    let (open, closed) = (reading(Some(true), &[]), reading(Some(false), &[]));
    let plain = [reasoning("Hm,\nwell."), content("Yes.\n")];
    assert_eq!(taken_apart(&open, "Hm,\nwell.\n</think>\n\nYes.\n"), plain);
    assert_eq!(taken_apart(&open, "<think>\nHm,\nwell.</think>Yes.\n"), plain);
    assert_eq!(taken_apart(&closed, "<think>Hm,\nwell.\n\n</think>\nYes.\n"), plain);
    let wrapped = [reasoning("春眠"), content("A\n\nB")];
    assert_eq!(taken_apart(&open, "春眠\n</think>\n\n<response>\nA\n\nB\n</response>\n"), wrapped);
    assert_eq!(taken_apart(&closed, "\n<think>\n春眠\n</think><response>A\n\nB</response>"), wrapped);
    // Without thoughts everything is text; with them and no end everything is thought.
    assert_eq!(taken_apart(&closed, "No <think>thoughts</think>\n"), [content("No <think>thoughts</think>\n")]);
    assert_eq!(taken_apart(&closed, " <thin"), [content(" <thin")]);
    assert_eq!(taken_apart(&open, "\nOn and on </thin"), [reasoning("On and on </thin")]);
    assert_eq!(taken_apart(&open, "a\n</think>\n\n<respo"), [reasoning("a"), content("<respo")]);
    assert_eq!(taken_apart(&open, "a</think><response>\nb\n</resp"), [reasoning("a"), content("b\n</resp")]);
    assert_eq!(taken_apart(&open, "</think>\nb"), [content("b")]);
    assert_eq!(taken_apart(&open, ""), []);
    // A reader that looks for nothing changes nothing.
    let text = "<think>a</think>\n<tool_call>{}</tool_call> ";
    assert_eq!(taken_apart(&reading(None, &[]), text), [content(text)]);
}

#[test]
fn calls_and_text() {
    let tools = reading(None, &["add", "now"]);
    let one = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": [1, {\"b\": \"}</tool_call>\\\"\"}]}}\n</tool_call>";
    let arguments = "{\"a\": [1, {\"b\": \"}</tool_call>\\\"\"}]}";
    assert_eq!(taken_apart(&tools, one), call(0, "add", arguments));
    assert_eq!(
        taken_apart(&tools, &format!("Let me see. \n{one}\n")),
        [&[content("Let me see.")][..], &call(0, "add", arguments)].concat()
    );
    let two = "<tool_call>{\"arguments\":{},\"name\":\"now\"}</tool_call>\n\n<tool_call>{\"name\":\"add\",\"id\":-1,\"parameters\":{\"a\":1}}</tool_call>";
    assert_eq!(taken_apart(&tools, two), [call(0, "now", "{}"), call(1, "add", "{\"a\":1}")].concat());
    let without = "<tool_call>{\"name\": \"now\"}</tool_call> Done. ";
    assert_eq!(taken_apart(&tools, without), [&call(0, "now", "{}")[..], &[content("Done. ")]].concat());
    // The mark is forgotten, or was a stop string.
    assert_eq!(taken_apart(&tools, "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n"), call(0, "now", "{}"));
    let next = "<tool_call>{\"name\": \"now\"}<tool_call>{\"name\": \"now\"}";
    assert_eq!(taken_apart(&tools, next), [call(0, "now", "{}"), call(1, "now", "{}")].concat());
    // Cut off: what has come of the arguments stays.
    assert_eq!(taken_apart(&tools, "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 春"), call(0, "add", "{\"a\": 春"));
    // Told already, then broken.
    let broken = "<tool_call>{\"name\": \"add\", \"arguments\": {}, oops}</tool_call>x";
    assert_eq!(taken_apart(&tools, broken), [&call(0, "add", "{}")[..], &[content("x")]].concat());
}

#[test]
fn what_is_no_call_is_text() {
    let tools = reading(None, &["add"]);
    for text in [
        "a < b, <tool> and <tool_call",
        "x\n <tool_call>nothing</tool_call>",
        "<tool_call>{\"name\": \"other\", \"arguments\": {}}</tool_call>\n",
        "<tool_call>{\"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"add\", \"arguments\": \"{}\"}</tool_call>",
        "<tool_call>{\"name\": 5}</tool_call>",
        "<tool_call>{\"name\"",
        "<tool_call>{\"arguments\": {\"a\": 1}",
        "<tool_call>[1]",
        "<tool_call> <tool_call> ",
        "  ",
    ] {
        assert_eq!(taken_apart(&tools, text), [content(text)], "{text}");
    }
    let after = "<tool_call>{}</tool_call><tool_call>{\"name\": \"add\"}</tool_call>";
    assert_eq!(taken_apart(&tools, after), [&[content("<tool_call>{}</tool_call>")][..], &call(0, "add", "{}")].concat());
}

#[test]
fn thoughts_then_calls() {
    let both = reading(Some(true), &["add"]);
    let text = "Add them.\n</think>\n\n\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>\n";
    assert_eq!(taken_apart(&both, text), [&[reasoning("Add them.")][..], &call(0, "add", "{\"a\": 1}")].concat());
    // Thinking of a call is not calling.
    let text = "<tool_call>{\"name\": \"add\"}</tool_call></think>No.";
    assert_eq!(taken_apart(&both, text), [reasoning("<tool_call>{\"name\": \"add\"}</tool_call>"), content("No.")]);
}

#[test]
fn a_mark_that_is_cut_off_is_no_text_where_only_calls_can_come() {
    let only_calls = Reading { only_calls: true, ..reading(None, &["f"]) };
    for cut in ["<tool_call", "<tool_call>\n", "<tool_call>\n{\"na"] {
        assert_eq!(taken_apart(&only_calls, cut), []);
        assert_eq!(taken_apart(&reading(None, &["f"]), cut), [content(cut)]);
    }
}
