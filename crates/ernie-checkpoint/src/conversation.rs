//! Conversations as token ids, the way the model was trained to see them.
use crate::chat_template::{ChatTemplate, ChatTemplateError, ChatTemplateOptions, Message};
use crate::tokenizer::Tokenizer;

/// The ids of a conversation; with `add_generation_prompt` up to where the assistant speaks next.
///
/// The text is tokenised in parts, cut where each answer began: an answer was generated after the ids of the text before it, and a tokenizer that
/// saw both at once might merge the space between them into the answer's first word. So the ids of earlier turns stay those that the model saw, and
/// what a cache knows of them stays of use.
///
/// # Errors
/// The template refuses the conversation or fails on it; the tokenizer fails.
pub fn encode_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    add_generation_prompt: bool,
    options: &ChatTemplateOptions,
) -> Result<Vec<u32>, ChatTemplateError> {
    let whole = template.render(messages, add_generation_prompt, options)?;
    let mut cuts = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        if message.role == "assistant" {
            let before = template.render(&messages[..index], true, options)?;
            // A template may write past turns in another way (without their reasoning, say); then there is no place to cut.
            if whole.starts_with(&before) {
                cuts.push(before.len());
            }
        }
    }
    cuts.push(whole.len());
    let mut ids = Vec::new();
    let mut start = 0;
    for cut in cuts {
        ids.extend(tokenizer.encode(&whole[start..cut], false)?);
        start = cut;
    }
    Ok(ids)
}

/// Tokens at which an assistant's turn ends, besides those of config.json: the family closes a turn with `<|end_of_sentence|>`.
pub fn end_of_turn_ids(tokenizer: &Tokenizer) -> Vec<u32> {
    tokenizer.piece_to_id("<|end_of_sentence|>").into_iter().chain(tokenizer.eos_id()).collect()
}
