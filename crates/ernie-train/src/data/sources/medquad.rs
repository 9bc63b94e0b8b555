//! MedQuAD: questions about diseases, drugs and tests, with the answers of health authorities.
use serde::Deserialize;
use std::path::Path;

use super::dialogue::{dialogue, rows};
use super::text::tidy_lines;
use super::{Document, Role, Turn};
use crate::data::Error;

#[derive(Deserialize)]
struct Row {
    focus: String,
    question: String,
    answer: String,
}

/// JSON lines of {focus, question, answer}: the answers as running text, or (with `template`) question and answer as a dialogue. All that is said of one
/// focus is on one side of the split.
pub(super) fn read(text: &str, path: &Path, template: bool) -> Result<Vec<Document>, Error> {
    let document = |(_, row): (usize, Row)| {
        let answer = tidy_lines(&row.answer);
        if answer.is_empty() {
            return None;
        }
        // As the set has it: "What causes Anemia ?".
        let question = tidy_lines(&row.question).replace(" ?", "?");
        let turns = || vec![Turn { role: Role::User, content: question }, Turn { role: Role::Assistant, content: answer.clone() }];
        let document = if template { dialogue(turns()) } else { Document::text(answer.clone()) };
        Some(Document { split_key: Some(row.focus.trim().to_lowercase()), ..document })
    };
    Ok(rows(text, path)?.into_iter().filter_map(document).collect())
}
