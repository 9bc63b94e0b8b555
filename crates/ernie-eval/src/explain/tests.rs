//! The pictures of one small made-up explanation, letter by letter where they are short.
use super::svg::escaped;
use super::terminal::Style;
use super::{Choice, Experts, Explanation, Heads, Layer, svg, terminal};

/// Four tokens, a layer with three heads and a layer with eleven experts.
fn explanation() -> Explanation {
    let active = vec![vec![true, true, true], vec![true, false, false], vec![false, true, false], vec![false, false, false]];
    let gates = active.iter().map(|row| row.iter().map(|&active| if active { 0.75 } else { 0.25 }).collect()).collect();
    let heads = Heads { density: vec![1.0, 0.5, 0.0, 0.24], gates, active, active_share: 5.0 / 12.0, correlation: Some(0.9) };
    let chosen = [(10, 0), (3, 10), (3, 0), (10, 3)];
    let choices = chosen.map(|(a, b)| vec![Choice { expert: a, weight: 0.8 }, Choice { expert: b, weight: 0.2 }]).to_vec();
    let experts = Experts { choices, tokens: vec![2, 0, 0, 3, 0, 0, 0, 0, 0, 0, 3] };
    Explanation {
        ids: vec![5, 6, 7, 8],
        losses: vec![None, Some(4.0), Some(0.1), Some(2.0)],
        layers: vec![Layer { layer: 0, heads: Some(heads), experts: None }, Layer { layer: 2, heads: None, experts: Some(experts) }],
    }
}

fn pieces() -> Vec<String> {
    ["Once", " <a>", "从前", "\n"].map(str::to_owned).to_vec()
}

#[test]
fn the_terminal_shows_each_choice_below_its_token() {
    let picture = terminal::draw(&explanation(), &pieces(), Style { width: 80, colour: false });
    let expected = "\
loss      ▁ 0 to █ 4.00 nats: how much a token surprises after those before it
density   ▁ 0 to █ 1.00: how much new a token brings, per layer
heads     ▀ upper, ▄ lower, █ both of two heads are active, · neither
experts   number and weight, ▁ 0 to █ 1; the first choice on top

token      Once ·<a> 从前 \\n
loss            ████ ▁▁▁▁ ▅▅▅
0 density  ████ ▅▅▅▅ ▁▁▁▁ ▂▂▂
0 head 0,1 ████ ▀▀▀▀ ▄▄▄▄ ···
0 head 2   ▀▀▀▀ ···· ···· ···
2 experts  10▇  3▇   3▇   10▇
           0▂   10▂  0▂   3▂

4 tokens, mean loss 2.0333 nats, perplexity 7.64
layer 0   heads active 41.7%, correlation with density +0.900
layer 2   tokens per expert 0:▆2 1:▁0 2:▁0 3:█3 4:▁0 5:▁0 6:▁0 7:▁0 8:▁0 9:▁0
          10:█3
";
    assert_eq!(picture, expected);
}

#[test]
fn a_narrow_terminal_gets_more_stripes_and_no_wider_lines() {
    let long = Explanation { ids: vec![1; 40], losses: vec![Some(1.5); 40], layers: Vec::new() };
    let draw = |width| terminal::draw(&long, &vec!["word".to_owned(); 40], Style { width, colour: false });
    // 8 words of 4 and a space in 40 columns; never less than 20 columns, which hold 4.
    for (width, stripes) in [(46, 5), (1, 10)] {
        let picture = draw(width);
        assert_eq!(picture.matches("\nloss  ████").count(), stripes, "{picture}");
        assert!(picture.lines().filter(|line| line.starts_with("token")).all(|line| line.chars().count() <= width.max(26)));
    }
}

#[test]
fn a_text_that_does_not_surprise_has_low_bars() {
    let calm = Explanation { ids: vec![1; 3], losses: vec![None, Some(0.1), Some(0.2)], layers: Vec::new() };
    let picture = terminal::draw(&calm, &["a", "b", "c"].map(str::to_owned), Style { width: 80, colour: false });
    assert!(picture.contains("█ 1.00 nats") && picture.contains("\nloss    ▁ ▂\n"), "{picture}");
}

#[test]
fn colours_are_those_of_terminals_and_leave_the_text_alone() {
    let style = |colour| Style { width: 80, colour };
    let coloured = terminal::draw(&explanation(), &pieces(), style(true));
    // The largest loss is red, an active head green.
    assert!(coloured.contains("\x1b[38;5;196m████\x1b[0m") && coloured.contains("\x1b[38;5;78m▀▀▀▀\x1b[0m"), "{coloured}");
    let mut stripped = String::new();
    for (index, part) in coloured.split('\x1b').enumerate() {
        stripped.push_str(if index == 0 { part } else { part.split_once('m').unwrap().1 });
    }
    let lines = |text: &str| text.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>();
    assert_eq!(lines(&stripped), lines(&terminal::draw(&explanation(), &pieces(), style(false))));
}

#[test]
fn the_drawing_has_a_mark_for_each_choice() {
    let svg = svg::draw(&explanation(), &pieces(), "a & b");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert!(svg.contains(">a &amp; b</text>") && svg.contains(">·&lt;a&gt;</text>") && !svg.contains("<a>"), "{svg}");
    // Three losses and eight choices of experts with their tooltips, five active heads in one path.
    assert_eq!(svg.matches("<title>").count(), 3 + 8);
    assert!(svg.contains("<title>从前: layer 2, expert 3, weight 0.800</title>"));
    let path = svg.split_once("<path d=\"").unwrap().1.split_once('"').unwrap().0;
    assert_eq!(path.matches('z').count(), 5);
    assert_eq!(svg.matches("<polyline points=\"").count(), 1);
}

#[test]
fn a_single_token_of_a_plain_model_can_be_drawn() {
    let one = Explanation { ids: vec![5], losses: vec![None], layers: Vec::new() };
    let picture = terminal::draw(&one, &["a".to_owned()], Style { width: 80, colour: false });
    assert!(picture.ends_with("\ntoken a\nloss\n\n1 token, which is given\n"), "{picture}");
    assert!(!picture.contains("heads") && !picture.contains("experts"));
    assert!(svg::draw(&one, &["a".to_owned()], "one").contains("1 token"));
}

#[test]
fn what_xml_forbids_is_replaced() {
    assert_eq!(escaped("a<b>\"c\" & \u{1}\u{ffff}d"), "a&lt;b&gt;&quot;c&quot; &amp; \u{fffd}\u{fffd}d");
}
