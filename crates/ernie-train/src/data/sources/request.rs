//! Stories, poems and sayings as the answers to requests for them, so that a chat can ask for what the model knows best.
use super::dialogue::dialogue;
use super::{Body, Document, Format, Role, Turn};

/// Poems longer than this are not asked for by name.
const LONGEST_POEM: usize = 300;

/// The document as a dialogue, or `None` when its format or shape has no request. The split key is the
/// document's text: it falls on the same side of the split as the same document read as running text.
pub(super) fn request(format: Format, document: &Document) -> Option<Document> {
    let Body::Text(text) = &document.body else { return None };
    let turns = match format {
        Format::Separated => ask(story_request(text), text),
        Format::Storybook => {
            let (title, story) = text.split_once('\n')?;
            ask(format!("Tell me the story of \"{title}\"."), story)
        }
        Format::ChinesePoetry => {
            let (title, poem) = text.split_once('\n')?;
            if poem.chars().count() > LONGEST_POEM {
                return None;
            }
            ask(format!("请写一首《{title}》。"), poem)
        }
        Format::Xiehouyu => text
            .lines()
            .take(6)
            .filter_map(|line| line.split_once("——"))
            .flat_map(|(riddle, answer)| ask(format!("歇后语：{riddle}"), answer))
            .collect(),
        _ => return None,
    };
    Some(Document { split_key: Some(text.clone()), ..dialogue(turns) })
}

fn ask(request: String, answer: &str) -> Vec<Turn> {
    vec![Turn { role: Role::User, content: request }, Turn { role: Role::Assistant, content: answer.to_owned() }]
}

/// "Tell me a story about Lily." where the story introduces someone "named Lily", else "Tell me a story."
fn story_request(story: &str) -> String {
    let name = story.split_once(" named ").and_then(|(_, rest)| rest.split(|c: char| !c.is_alphanumeric()).next());
    match name.filter(|name| name.starts_with(char::is_uppercase)) {
        Some(name) => format!("Tell me a story about {name}."),
        None => "Tell me a story.".to_owned(),
    }
}
