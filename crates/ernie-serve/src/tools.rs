//! Functions that a model may call: how a request names them, how the prompt tells the model of them, what a turn that calls them looks like.
use ernie_checkpoint::{ChatTemplate, Message};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::api_error::ApiError;
use crate::grammar::Calls;
use crate::numbers::whole;
use crate::structured::no_schema;

/// Most functions of a request, as OpenAI has it.
const MAX_TOOLS: usize = 128;

/// What the model may call.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct Tools {
    /// The functions there are.
    #[schema(max_items = 128)]
    pub tools: Option<Vec<Tool>>,
    /// `none`, `auto` (if absent), `required`, or the function to call, once. Calls that must come are held to the functions' schemas token by token; those
    /// that may come are read from the model's text.
    pub tool_choice: Option<ToolChoice>,
    /// Whether a turn may have more than one call; true if absent.
    pub parallel_tool_calls: Option<bool>,
    /// Not supported; `tools` is its later form.
    #[schema(value_type = Option<Vec<Object>>, max_items = 0)]
    pub functions: Option<Vec<Value>>,
}

/// Something to call.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct Tool {
    /// `function`.
    #[serde(rename = "type")]
    #[schema(pattern = "^function$")]
    pub kind: String,
    /// The function.
    #[serde(default)]
    #[schema(required = true, value_type = Function)]
    pub function: Option<Function>,
}

/// A function.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct Function {
    /// Letters, digits, `_`, `-` and `.`, at most 64.
    #[schema(pattern = "^[A-Za-z0-9_.-]{1,64}$")]
    pub name: String,
    /// What it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The JSON schema of its arguments, an object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<Value>,
    /// Calls that must come obey the schema either way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// Whether to call, and what.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged, expecting = "expected none, auto, required, or an object that names a function")]
pub enum ToolChoice {
    /// In general.
    Mode(ChoiceMode),
    /// One function.
    Named {
        /// `function`.
        #[serde(rename = "type")]
        #[schema(pattern = "^function$")]
        kind: String,
        /// Which.
        function: Name,
    },
}

/// Whether to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ChoiceMode {
    /// No.
    None,
    /// As the model sees fit.
    Auto,
    /// Yes.
    Required,
}

/// A function's name.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct Name {
    /// The name.
    pub name: String,
}

/// A call in a turn: of the answer, or of the conversation so far.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct ToolCall {
    /// Its number in the turn; in a stream only.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "whole")]
    pub index: Option<usize>,
    /// What its result is known by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// What is called.
    pub function: Called,
}

/// A function with its arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct Called {
    /// Its name; in a stream in the call's first event only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its arguments as JSON, or the next piece of them.
    #[serde(default)]
    pub arguments: String,
}

/// Whether calls may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Auto,
    Must,
}

/// The functions of a request, checked.
#[derive(Clone, Debug)]
pub struct Toolbox {
    functions: Vec<Function>,
    mode: Mode,
    /// The one to call.
    chosen: Option<String>,
    several: bool,
}

impl Tools {
    /// The functions, if any may be called.
    ///
    /// # Errors
    /// 400 that names the field: a name or a schema that is none, a choice of what is not there.
    pub fn check(self) -> Result<Option<Toolbox>, ApiError> {
        if self.functions.is_some_and(|functions| !functions.is_empty()) {
            return Err(ApiError::unsupported("functions", "is not supported; use `tools`"));
        }
        let tools = self.tools.unwrap_or_default();
        if tools.len() > MAX_TOOLS {
            return Err(ApiError::field("tools", format!("`tools`: expected at most {MAX_TOOLS}, got {}", tools.len())));
        }
        let functions = tools.into_iter().enumerate().map(|(index, tool)| tool.check(index)).collect::<Result<Vec<_>, _>>()?;
        if let Some(twice) = functions.iter().enumerate().find_map(|(i, f)| functions[..i].iter().any(|g| g.name == f.name).then_some(i)) {
            let field = format!("tools[{twice}].function.name");
            return Err(ApiError::field(&field, format!("`{field}`: another function is called {:?} too", functions[twice].name)));
        }
        let several = self.parallel_tool_calls.unwrap_or(true);
        let toolbox = |mode, chosen| Some(Toolbox { functions: functions.clone(), mode, chosen, several });
        match self.tool_choice {
            Some(ToolChoice::Mode(ChoiceMode::None)) => Ok(None),
            Some(ToolChoice::Mode(ChoiceMode::Auto)) => Ok(if functions.is_empty() { None } else { toolbox(Mode::Auto, None) }),
            Some(ToolChoice::Mode(ChoiceMode::Required)) => match functions.is_empty() {
                true => Err(ApiError::field("tool_choice", "`tool_choice`: required needs `tools`")),
                false => Ok(toolbox(Mode::Must, None)),
            },
            Some(ToolChoice::Named { kind, .. }) if kind != "function" => {
                Err(ApiError::field("tool_choice.type", format!("`tool_choice.type`: expected function, got {kind:?}")))
            }
            Some(ToolChoice::Named { function: Name { name }, .. }) => match functions.iter().any(|function| function.name == name) {
                // The one call that was asked for, and no second.
                true => Ok(toolbox(Mode::Must, Some(name)).map(|toolbox| Toolbox { several: false, ..toolbox })),
                false => {
                    let message = format!("`tool_choice.function.name`: none of the `tools` is called {name:?}");
                    Err(ApiError::field("tool_choice.function.name", message))
                }
            },
            None if functions.is_empty() => Ok(None),
            None => Ok(toolbox(Mode::Auto, None)),
        }
    }
}

impl Tool {
    fn check(self, index: usize) -> Result<Function, ApiError> {
        let refuse = |field: &str, what: String| {
            let field = format!("tools[{index}].{field}");
            Err(ApiError::field(&field, format!("`{field}`: {what}")))
        };
        let function = match self.function {
            Some(function) if self.kind == "function" => function,
            Some(_) => return refuse("type", format!("expected function, got {:?}", self.kind)),
            None => return refuse("function", "expected a function with a `name`".to_owned()),
        };
        let name = &function.name;
        if !(1..=64).contains(&name.len()) || !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.')) {
            return refuse("function.name", format!("expected 1 to 64 letters, digits, _, - and ., got {name:?}"));
        }
        match &function.parameters {
            None | Some(Value::Object(_)) => Ok(function),
            Some(other) => refuse("function.parameters", format!("expected a JSON schema, an object, got {other}")),
        }
    }
}

impl Toolbox {
    /// What may be called.
    fn open(&self) -> impl Iterator<Item = &Function> {
        self.functions.iter().filter(|function| self.chosen.as_ref().is_none_or(|name| *name == function.name))
    }

    /// Names of what may be called.
    pub fn names(&self) -> Vec<String> {
        self.open().map(|function| function.name.clone()).collect()
    }

    /// What the answer is held to. `formed`: its text has a form of its own, so calls must be kept apart from it.
    pub fn calls(&self, formed: bool) -> Option<Calls> {
        let functions =
            self.open().map(|function| (function.name.clone(), function.parameters.clone().unwrap_or_else(no_schema))).collect();
        (self.must() || formed).then_some(Calls { functions, several: self.several })
    }

    /// Whether there must be a call.
    pub fn must(&self) -> bool {
        self.mode == Mode::Must
    }

    /// A string at which a turn that is not held to a grammar ends, so that it has one call only.
    pub fn stop(&self) -> Option<String> {
        (!self.several && !self.must()).then(|| "</tool_call>".to_owned())
    }

    /// As templates read them.
    pub fn for_template(&self) -> Value {
        self.functions.iter().map(|function| json!({"type": "function", "function": function})).collect()
    }

    /// What the system says to a model whose template does not know of functions.
    fn instructions(&self) -> String {
        let described = |function: &Function| json!(Function { strict: None, ..function.clone() }).to_string();
        let functions: Vec<String> = self.functions.iter().map(described).collect();
        format!(
            "You can call these functions:\n<tools>\n{}\n</tools>\nTo call one, write:\n\
            <tool_call>\n{{\"name\": \"...\", \"arguments\": {{...}}}}\n</tool_call>\n\
            The result comes as <tool_response>.",
            functions.join("\n")
        )
    }
}

/// The conversation for a template. One that reads `tools` gets turns with calls and results as they are, the calls' arguments as objects; for another
/// everything is written out in words: the functions at the end of the system's text, calls as the model writes them, results as a turn of the user's.
pub fn write_out(template: &ChatTemplate, toolbox: Option<&Toolbox>, messages: Vec<Message>) -> Vec<Message> {
    if template.uses("tools") {
        return messages;
    }
    let mut written: Vec<Message> = Vec::new();
    let mut after_result = false;
    for mut message in messages {
        let result = message.role == "tool";
        for (name, calls) in &message.fields {
            for call in calls.as_array().into_iter().flatten().filter(|_| name == "tool_calls") {
                let function = &call["function"];
                let call = json!({"name": function["name"], "arguments": function["arguments"]});
                let gap = if message.content.is_empty() { "" } else { "\n" };
                message.content += &format!("{gap}<tool_call>\n{call}\n</tool_call>");
            }
        }
        message.fields.retain(|(name, _)| !matches!(name.as_str(), "tool_calls" | "tool_call_id"));
        if result {
            message.role = "user".to_owned();
            message.content = format!("<tool_response>\n{}\n</tool_response>", message.content);
        }
        match written.last_mut().filter(|_| result && after_result) {
            // Results of one turn's calls are one turn.
            Some(last) => last.content += &format!("\n{}", message.content),
            None => written.push(message),
        }
        after_result = result;
    }
    if let Some(toolbox) = toolbox {
        match written.first_mut().filter(|first| first.role == "system") {
            Some(system) => system.content += &format!("\n\n{}", toolbox.instructions()),
            None => written.insert(0, Message::new("system", toolbox.instructions())),
        }
    }
    written
}

/// A turn's calls as templates read them: the arguments as an object.
///
/// # Errors
/// 400 for arguments that are none. `at`: where the turn stands in the request.
pub fn past_calls(calls: Vec<ToolCall>, at: &str) -> Result<Value, ApiError> {
    let call = |(index, call): (usize, ToolCall)| {
        let field = format!("{at}.tool_calls[{index}].function");
        let Called { name, arguments } = call.function;
        let Some(name) = name else {
            return Err(ApiError::field(format!("{field}.name"), format!("`{field}.name`: expected the name of what was called")));
        };
        let arguments: Map<String, Value> = match arguments.trim() {
            "" => Map::new(),
            text => serde_json::from_str(text).map_err(|error| {
                ApiError::field(format!("{field}.arguments"), format!("`{field}.arguments`: expected a JSON object as text: {error}"))
            })?,
        };
        let mut past = json!({"type": "function", "function": {"name": name, "arguments": arguments}});
        if let (Some(id), Some(fields)) = (call.id, past.as_object_mut()) {
            fields.insert("id".to_owned(), Value::String(id));
        }
        Ok(past)
    };
    calls.into_iter().enumerate().map(call).collect()
}
