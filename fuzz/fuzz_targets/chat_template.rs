//! A chat template: an error, or a template that ends, with text or an error, on every conversation.
#![no_main]

use ernie_checkpoint::{ChatTemplate, ChatTemplateOptions, Message, SpecialTokens};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::from_source(source) else { return };
    let special = SpecialTokens { bos: Some("<s>".into()), eos: Some("</s>".into()), ..SpecialTokens::default() };
    let template = template.with_special_tokens(special);
    let messages =
        [Message::new("system", "Be kind."), Message::new("user", "你好 {{ x }}"), Message::new("assistant", "<think>a</think>b")];
    let thinking = ChatTemplateOptions { enable_thinking: Some(true), ..ChatTemplateOptions::default() };
    // Two renderings, no more: a template may use up its steps or write its 64 MiB, seconds of work that are allowed.
    for (messages, options) in [(&messages[..0], &ChatTemplateOptions::default()), (&messages[..], &thinking)] {
        if let Err(error) = template.render(messages, messages.is_empty(), options) {
            assert!(!error.to_string().is_empty());
        }
    }
});
