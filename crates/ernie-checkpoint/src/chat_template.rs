//! Conversations to prompt text: the model directory's Jinja `chat_template`, or the ERNIE family's own.
//!
//! Templates are other people's programs, so they run without file access and under limits on work and output.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, UndefinedBehavior};
use serde_json::Value as Json;

use crate::files;
use crate::tokenizer::{SpecialTokens, TokenizerError};

/// The text template of the released ERNIE-4.5 models. Stop at `sep_token`, which is also the end-of-text token.
const FAMILY_TEMPLATE: &str = r#"{{- cls_token -}}
{%- for message in messages -%}
    {%- if message.role == "system" -%}
        {{- message.content + "\n" -}}
    {%- elif message.role == "user" -%}
        {{- "User: " + message.content + "\n" -}}
    {%- elif message.role == "assistant" -%}
        {{- "Assistant: " + message.content + sep_token -}}
    {%- else -%}
        {{- raise_exception("role '" + message.role + "' is not one of system, user, assistant") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant: " -}}
{%- endif -%}
"#;

/// Instructions (and 64-byte blocks of intermediate results) that a rendering may use: thousands of messages need less.
const FUEL: u64 = 20_000_000;
/// Bytes that a rendering may produce.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// Bytes of template source that are accepted.
const MAX_SOURCE_BYTES: usize = 4 << 20;
const TEMPLATE_NAME: &str = "chat_template";

/// Why a chat template cannot be loaded or rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    /// The file that holds the template, or one that declares special tokens, is unusable.
    #[error(transparent)]
    File(#[from] TokenizerError),
    /// `chat_template` in `tokenizer_config.json` is neither a string nor a list of named templates.
    #[error("{}: chat_template: {reason}", path.display())]
    Field {
        /// `tokenizer_config.json`.
        path: PathBuf,
        /// What was expected and found.
        reason: String,
    },
    /// The template is longer than 4 MiB.
    #[error("{origin}: the chat template has {bytes} bytes, at most {MAX_SOURCE_BYTES} are accepted")]
    TooLarge {
        /// Where the template came from.
        origin: String,
        /// Its size.
        bytes: usize,
    },
    /// Not a Jinja template.
    #[error("{origin}, line {line}: {reason}")]
    Syntax {
        /// Where the template came from.
        origin: String,
        /// Line in the template, from 1.
        line: usize,
        /// What the parser said.
        reason: String,
    },
    /// The template itself refused the conversation, with `raise_exception`.
    #[error("{origin}, line {line}: the chat template refuses the conversation: {message}")]
    Refused {
        /// Where the template came from.
        origin: String,
        /// Line in the template, from 1.
        line: usize,
        /// The template's message.
        message: String,
    },
    /// The template failed on this conversation.
    #[error("{origin}, line {line}: {reason}")]
    Render {
        /// Where the template came from.
        origin: String,
        /// Line in the template, from 1.
        line: usize,
        /// What went wrong.
        reason: String,
    },
    /// The rendering takes more work than any real conversation needs: the template loops, or the conversation is huge.
    #[error("{origin}, line {line}: the chat template used up its {FUEL} steps; it may not end")]
    TooMuchWork {
        /// Where the template came from.
        origin: String,
        /// Line in the template, from 1.
        line: usize,
    },
    /// The rendering is longer than 64 MiB.
    #[error("{origin}: the rendered conversation is longer than {MAX_OUTPUT_BYTES} bytes")]
    TooLong {
        /// Where the template came from.
        origin: String,
    },
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what the template knows besides.
    pub role: String,
    /// The text of the turn.
    pub content: String,
    /// What else the template may read of it, by name: `tool_calls`, `tool_call_id`, `reasoning_content`.
    pub fields: Vec<(String, Json)>,
}

impl Message {
    /// A turn of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), fields: Vec::new() }
    }
}

/// What a template can be told besides the messages.
#[derive(Clone, Debug, Default)]
pub struct ChatTemplateOptions {
    /// `enable_thinking`; undefined in the template when `None`, so that its own default holds.
    pub enable_thinking: Option<bool>,
    /// Further variables, by name.
    pub variables: Vec<(String, Json)>,
}

/// A compiled chat template with the special tokens it uses.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    origin: String,
    special: SpecialTokens,
}

impl ChatTemplate {
    /// The template of a model directory, `None` if it has none: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json` (a string, or a list of named templates, of which `default` or the only one is taken).
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Option<Self>, ChatTemplateError> {
        let dir = dir.as_ref();
        let Some((source, path)) = find_source(dir)? else { return Ok(None) };
        let special = SpecialTokens::from_dir(dir)?;
        Self::compile(&source, path.display().to_string(), special).map(Some)
    }

    /// The ERNIE-4.5 family's text template: `<|begin_of_sentence|>`, the system text and a newline, `User: …` and a newline,
    /// `Assistant: …<|end_of_sentence|>`, and so on.
    pub fn builtin() -> Self {
        let special = SpecialTokens {
            cls: Some("<|begin_of_sentence|>".into()),
            sep: Some("<|end_of_sentence|>".into()),
            ..SpecialTokens::default()
        };
        match Self::compile(FAMILY_TEMPLATE, "built-in chat template".into(), special) {
            Ok(template) => template,
            Err(error) => unreachable!("the built-in template is valid: {error}"),
        }
    }

    /// A template from its source, without special tokens.
    pub fn from_source(source: &str) -> Result<Self, ChatTemplateError> {
        Self::compile(source, "chat template".into(), SpecialTokens::default())
    }

    /// The same template with other special tokens (`bos_token`, `eos_token`, `cls_token`, `sep_token`, … in the template).
    pub fn with_special_tokens(mut self, special: SpecialTokens) -> Self {
        self.special = special;
        self
    }

    /// The special tokens that the template can use.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    fn compile(source: &str, origin: String, special: SpecialTokens) -> Result<Self, ChatTemplateError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(ChatTemplateError::TooLarge { origin, bytes: source.len() });
        }
        let mut environment = Environment::new();
        // As transformers sets up Jinja. No loader: `include` and `import` find nothing.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| describe(&origin, &error))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(format_like_python);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(100);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(TEMPLATE_NAME, without_generation_tags(source)).map_err(|error| describe(&origin, &error))?;
        Ok(Self { environment, origin, special })
    }

    /// Whether the template looks at a variable: `tools`, say.
    pub fn uses(&self, variable: &str) -> bool {
        self.environment.get_template(TEMPLATE_NAME).is_ok_and(|template| template.undeclared_variables(false).contains(variable))
    }

    /// The prompt text of a conversation. With `add_generation_prompt` it ends where the assistant is to go on.
    ///
    /// Defined in the template: `messages`, `add_generation_prompt`, `tools` (none), `enable_thinking` if set, the declared
    /// special tokens under their names (`cls_token`, …), and `options.variables`.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        options: &ChatTemplateOptions,
    ) -> Result<String, ChatTemplateError> {
        let message = |message: &Message| {
            let text = [("role".to_owned(), Value::from(&*message.role)), ("content".to_owned(), Value::from(&*message.content))];
            let fields = message.fields.iter().map(|(name, value)| (name.clone(), from_json(value)));
            Value::from_pairs(text.into_iter().chain(fields))
        };
        let mut context = vec![
            ("messages".to_owned(), messages.iter().map(message).collect::<Vec<_>>().into()),
            ("add_generation_prompt".to_owned(), add_generation_prompt.into()),
            ("tools".to_owned(), ().into()),
        ];
        let special = &self.special;
        let tokens = [
            ("bos_token", &special.bos),
            ("eos_token", &special.eos),
            ("unk_token", &special.unk),
            ("pad_token", &special.pad),
            ("cls_token", &special.cls),
            ("sep_token", &special.sep),
            ("mask_token", &special.mask),
        ];
        context.extend(tokens.into_iter().filter_map(|(name, token)| Some((name.into(), token.as_deref()?.into()))));
        context.extend(options.enable_thinking.map(|flag| ("enable_thinking".into(), flag.into())));
        context.extend(options.variables.iter().map(|(name, value)| (name.clone(), from_json(value))));

        let template = self.environment.get_template(TEMPLATE_NAME).map_err(|error| describe(&self.origin, &error))?;
        let mut output = BoundedOutput::default();
        let rendered = template.render_captured_to(Value::from_pairs(context), &mut output).map(drop);
        match rendered {
            _ if output.overflowed => Err(ChatTemplateError::TooLong { origin: self.origin.clone() }),
            Err(error) => Err(describe(&self.origin, &error)),
            // Jinja writes text only.
            Ok(()) => Ok(String::from_utf8_lossy(&output.bytes).into_owned()),
        }
    }
}

/// `{% generation %}` and `{% endgeneration %}` mark the assistant's text for training masks (an extension of transformers);
/// a rendering is the same without them. The replacement keeps each tag's whitespace control.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // Behind the whole of `{%`: the two share a character in `{%}`.
        let Some(end) = rest[start + 2..].find("%}").map(|length| start + 2 + length) else { break };
        let tag = &rest[start + 2..end];
        let name = tag.trim_matches(['-', '+', ' ', '\t', '\n', '\r']);
        let replacement = match name {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => name,
        };
        out.push_str(&rest[..start + 2]);
        if replacement == name {
            out.push_str(tag);
        } else {
            out.push_str(&tag.replacen(name, replacement, 1));
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

fn find_source(dir: &Path) -> Result<Option<(String, PathBuf)>, ChatTemplateError> {
    let read = |path: &Path| TokenizerError::if_there(path, files::read_text(path, files::MAX_TEXT_BYTES));
    let path = dir.join("chat_template.jinja");
    if let Some(source) = read(&path)? {
        return Ok(Some((source, path)));
    }
    let path = dir.join("tokenizer_config.json");
    let Some(config) = read(&path)? else { return Ok(None) };
    let config: Json =
        serde_json::from_str(&config).map_err(|error| TokenizerError::Json { path: path.clone(), reason: error.to_string() })?;
    let refuse = |reason: String| ChatTemplateError::Field { path: path.clone(), reason };
    let source = match config.get("chat_template") {
        None | Some(Json::Null) => return Ok(None),
        Some(Json::String(source)) => source.clone(),
        Some(Json::Array(named)) => {
            let mut templates = Vec::new();
            for entry in named {
                match (entry.get("name").and_then(Json::as_str), entry.get("template").and_then(Json::as_str)) {
                    (Some(name), Some(source)) => templates.push((name, source)),
                    _ => return Err(refuse(format!("expected entries with `name` and `template`, found {entry}"))),
                }
            }
            let default = templates.iter().find(|(name, _)| *name == "default");
            match (default, templates.as_slice()) {
                (Some((_, source)), _) | (None, [(_, source)]) => (*source).to_owned(),
                (None, []) => return Ok(None),
                (None, _) => {
                    let names: Vec<_> = templates.iter().map(|(name, _)| *name).collect();
                    return Err(refuse(format!("expected one of the templates to be named default, found {}", names.join(", "))));
                }
            }
        }
        Some(other) => return Err(refuse(format!("expected a string or a list of named templates, found {other}"))),
    };
    Ok(Some((source, path)))
}

/// Collects output up to [`MAX_OUTPUT_BYTES`].
#[derive(Default)]
struct BoundedOutput {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl Write for BoundedOutput {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if more.len() > MAX_OUTPUT_BYTES - self.bytes.len() {
            self.overflowed = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Marks errors that `raise_exception` made; cannot occur in template text by accident.
const RAISED: &str = "\u{0}raised\u{0}";

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

fn describe(origin: &str, error: &Error) -> ChatTemplateError {
    let origin = origin.to_owned();
    let line = error.line().unwrap_or(1);
    // The innermost error says what happened; the outer ones only where it was called from.
    let mut innermost: &(dyn std::error::Error + 'static) = error;
    let mut reason = error.to_string();
    loop {
        if let Some(error) = innermost.downcast_ref::<Error>() {
            if error.kind() == ErrorKind::OutOfFuel {
                return ChatTemplateError::TooMuchWork { origin, line };
            }
            if let Some(message) = error.detail().and_then(|detail| detail.strip_prefix(RAISED)) {
                return ChatTemplateError::Refused { origin, line, message: message.into() };
            }
            reason = match error.detail() {
                Some(detail) => format!("{}: {detail}", error.kind()),
                None => error.kind().to_string(),
            };
        }
        match innermost.source() {
            Some(source) => innermost = source,
            None => break,
        }
    }
    match error.kind() {
        ErrorKind::SyntaxError => ChatTemplateError::Syntax { origin, line, reason },
        _ => ChatTemplateError::Render { origin, line, reason },
    }
}

/// Writes booleans and none as Jinja in Python does.
fn format_like_python(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        ValueKind::None => "None",
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(text).map_err(Error::from)
}

fn from_json(json: &Json) -> Value {
    match json {
        Json::Null => ().into(),
        Json::Bool(flag) => (*flag).into(),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => integer.into(),
            (None, Some(integer)) => integer.into(),
            (None, None) => number.as_f64().unwrap_or(f64::NAN).into(),
        },
        Json::String(text) => text.as_str().into(),
        Json::Array(list) => list.iter().map(from_json).collect::<Vec<_>>().into(),
        Json::Object(fields) => Value::from_pairs(fields.iter().map(|(name, value)| (name.clone(), from_json(value)))),
    }
}

/// `tojson` as transformers defines it: Python's `json.dumps(…, ensure_ascii=False)`, with `indent` and `sort_keys`.
fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let _ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut writer = JsonWriter { state, out: String::new(), indent, sort_keys: sort_keys.unwrap_or(false) };
    writer.write(value, 0)?;
    Ok(writer.out)
}

struct JsonWriter<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    out: String,
    indent: Option<usize>,
    sort_keys: bool,
}

impl JsonWriter<'_, '_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        const MAX_DEPTH: usize = 128;
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::BadSerialization, format!("nested deeper than {MAX_DEPTH}")));
        }
        self.state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_items('[', ']', depth, &items, |writer, item| writer.write(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((key.to_string(), value.get_item(&key)?));
                }
                if self.sort_keys {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.write_items('{', '}', depth, &entries, |writer, (key, item)| {
                    writer.write_text(key);
                    writer.out.push_str(": ");
                    writer.write(item, depth + 1)
                })?;
            }
            other => return Err(Error::new(ErrorKind::BadSerialization, format!("a value of type {other} has no JSON form"))),
        }
        Ok(())
    }

    fn write_text(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..='\u{1f}' => self.out.push_str(&format!("\\u{:04x}", character as u32)),
                other => self.out.push(other),
            }
        }
        self.out.push('"');
    }

    fn write_items<T>(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: &[T],
        mut write: impl FnMut(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            match (i, self.indent) {
                (_, Some(_)) => {
                    self.out.push_str(if i == 0 { "" } else { "," });
                    self.new_line(depth + 1);
                }
                (0, None) => {}
                (_, None) => self.out.push_str(", "),
            }
            write(self, item)?;
        }
        if !items.is_empty() && self.indent.is_some() {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        let width = self.indent.unwrap_or(0).min(16) * depth;
        self.out.push('\n');
        self.out.extend(std::iter::repeat_n(' ', width));
    }
}
