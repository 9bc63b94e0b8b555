//! Stop strings: what streams out is the text before the first of them, however the text is cut.
use ernie_engine::StopMatcher;

/// The first end of a stop string in `text` by trying every end and start; what stands before it.
fn naive<'t>(text: &'t str, stops: &[String]) -> (&'t str, bool) {
    for end in 1..=text.len() {
        for start in 0..end {
            if stops.iter().any(|s| text.as_bytes()[start..end] == *s.as_bytes()) {
                return (&text[..start], true);
            }
        }
    }
    (text, false)
}

/// Streams `text` in the given pieces; also checks that nothing shown has to be taken back.
fn streamed(pieces: &[&str], stops: &[String]) -> (String, bool) {
    let mut matcher = StopMatcher::new(stops);
    let mut shown = String::new();
    for piece in pieces {
        shown.push_str(&matcher.push(piece));
        assert!(!stops.iter().any(|s| shown.contains(s)), "{shown:?} shows one of {stops:?}");
    }
    let found = matcher.found();
    if !found {
        shown.push_str(&matcher.finish());
    }
    (shown, found)
}

#[test]
fn any_cut_of_the_text_gives_what_a_search_of_the_whole_gives() {
    let mut state = 1u64;
    let mut below = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    // Few letters, so that overlaps and near misses are frequent; two of them of more than one byte.
    let letters = ["a", "b", "你", "é"];
    let mut hits = 0;
    for _ in 0..20_000 {
        let mut word = |longest| (0..1 + below(longest)).map(|_| letters[below(letters.len())]).collect::<String>();
        let text = word(12);
        let stops: Vec<String> = (0..3).map(|_| word(4)).collect();
        let stops = &stops[..below(4)];
        let mut pieces = Vec::new();
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let cuts: Vec<usize> = rest.char_indices().map(|(i, c)| i + c.len_utf8()).collect();
            let (piece, left) = rest.split_at(cuts[below(cuts.len().min(4))]);
            pieces.push(piece);
            if below(5) == 0 {
                pieces.push("");
            }
            rest = left;
        }
        let expected = naive(&text, stops);
        hits += usize::from(expected.1);
        assert_eq!(streamed(&pieces, stops), (expected.0.to_owned(), expected.1), "{text:?} in {pieces:?}, stops {stops:?}");
    }
    assert!(hits > 5_000, "only {hits} texts had a stop string");
}

#[test]
fn holds_back_no_more_than_may_become_a_stop_string() {
    let mut matcher = StopMatcher::new(&["\nUser:".to_owned()]);
    assert_eq!(matcher.push("Hello.\nUs"), "Hello.");
    assert_eq!(matcher.push("age"), "\nUsage");
    assert_eq!(matcher.push("\n"), "");
    assert_eq!(matcher.push("User: hi"), "");
    assert!(matcher.found());
    assert_eq!(matcher.push("more"), "");
}

#[test]
fn without_stop_strings_text_passes_through() {
    let mut matcher = StopMatcher::new(&[]);
    assert_eq!(matcher.push("anything"), "anything");
    assert!(!matcher.found());
    assert_eq!(matcher.finish(), "");
}
