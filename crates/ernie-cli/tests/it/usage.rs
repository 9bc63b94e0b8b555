//! Help, and command lines that are wrong.
use crate::program::ernie;

const COMMANDS: [&str; 12] =
    ["chat", "generate", "logits", "inspect", "tokenize", "quantize", "bench", "explain", "serve", "keys", "usage", "train"];

#[test]
fn help_explains_every_command_with_examples() {
    let help = ernie(["--help"]).ok();
    for command in COMMANDS {
        assert!(help.contains(&format!("  {command} ")), "{help}");
        let own = ernie([command, "--help"]).ok();
        assert!(own.contains("Examples:") && own.contains(&format!("ernie {command}")), "{own}");
        assert_eq!(own, ernie(["help", command]).ok());
    }
    for code in ["0 ", "1 ", "2 ", "130 "] {
        assert!(help.contains(&format!("\n  {code}")), "no exit code {code} in {help}");
    }
}

#[test]
fn wrong_command_lines_exit_with_2_and_name_what_is_wrong() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "Usage"),
        (&["fly"], "fly"),
        (&["chat", "--wings"], "--wings"),
        (&["generate"], "PROMPT"),
        (&["generate", "--wings"], "--wings"),
        (&["generate", "x", "--ids", "3"], "--ids"),
        (&["generate", "--ids", "3,x"], "x"),
        (&["generate", "x", "--temperature", "-1"], "--temperature"),
        (&["generate", "x", "--top-p", "0"], "--top-p"),
        (&["generate", "x", "--max-tokens", "0"], "--max-tokens"),
        (&["generate", "x", "--threads", "0"], "--threads"),
        (&["generate", "x", "--system", "y"], "--chat"),
        (&["logits", "--ids", "3", "--last", "2"], "--last 2"),
        (&["logits"], "--ids"),
        (&["tokenize"], "TEXT"),
        (&["quantize", "only-one"], "OUT"),
        (&["bench", "--batch", "0"], "--batch"),
        (&["serve", "--host", "0.0.0.0"], "0.0.0.0"),
        (&["serve", "--weights", "int9"], "int9"),
        (&["serve", "--database", "mysql://x"], "sqlite:PATH"),
        (&["keys"], "create"),
        (&["keys", "create"], "NAME"),
        (&["keys", "create", "a\nb"], "name"),
        (&["keys", "create", "a", "--scopes", "fly"], "fly"),
        (&["keys", "create", "a", "--expires", "soon"], "soon"),
        (&["usage", "--by", "week"], "week"),
        (&["usage", "--from", "2024-02-30"], "2024-02-30"),
        (&["serve", "--config", "nowhere.toml"], "nowhere.toml"),
        (&["bench", "--pp", "100000"], "--pp 100000"),
        (&["explain"], "TEXT"),
        (&["explain", "x", "--file", "y"], "--file"),
        (&["explain", "--ids", "3", "--width", "0"], "--width"),
        (&["train"], "RECIPE"),
    ];
    for (arguments, part) in cases {
        ernie(*arguments).fails(2, &[part]);
    }
}
