//! `ernie chat`: a conversation, line by line.
use anyhow::Context;
use ernie_checkpoint::{ChatTemplate, ChatTemplateOptions, Tokenizer};
use ernie_engine::{FinishReason, SamplingParams, Session};
use rustyline::error::ReadlineError;
use std::io::{self, BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::compute::{ComputeArguments, DraftArguments};
use crate::conversation::Conversation;
use crate::encoding::{self, StreamDecoder};
use crate::interrupt::Interrupt;
use crate::model::ModelArgument;
use crate::outcome;
use crate::sampling::SamplingArguments;

const COMMANDS: &str = "\
/help           this list
/system TEXT    tell the model how to behave; without TEXT shows it; /system - removes it
/clear          forget the conversation, keep the system message
/save FILE      write the conversation to FILE as JSON
/quit           leave (or Ctrl-D)
//text          a message that begins with a slash
Ctrl-C stops the answer.";

/// Talk to a model
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Talk to a model. Answers appear as they are generated; Ctrl-C stops an answer, Ctrl-D leaves. Lines can be edited, and the \
        arrow keys bring back earlier ones.\n\n\
        When standard input is not a terminal, each line is one message (or a /command) and only the answers are printed; the first line \
        that cannot be answered ends the program.\n\n\
        A conversation that no longer fits the model's context loses its oldest turns.",
    after_long_help = "Within the chat:\n\
        /help, /system TEXT, /clear, /save FILE, /quit\n\n\
        Examples:\n  \
        ernie chat\n  \
        ernie chat --system \"Answer in Chinese.\" --temperature 0.5\n  \
        ernie chat --model path/to/model\n  \
        echo \"What do birds eat?\" | ernie chat --temperature 0"
)]
pub struct ChatArguments {
    #[command(flatten)]
    model: ModelArgument,
    /// System message: how the model is to behave
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of conversation the model sees [default: all that it was made for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16..))]
    context: Option<u32>,
    #[command(flatten)]
    compute: ComputeArguments,
    #[command(flatten)]
    drafts: DraftArguments,
    #[command(flatten)]
    sampling: SamplingArguments,
}

/// Runs the command.
pub fn run(arguments: &ChatArguments) -> anyhow::Result<()> {
    let mut params = arguments.sampling.params()?;
    let interrupt = Interrupt::install()?;
    let tokenizer = arguments.model.tokenizer()?;
    let template = arguments.model.chat_template()?;
    let model_name = arguments.model.name();
    let model = arguments.compute.load(&arguments.model)?;
    let most = model.config().max_position_embeddings;
    let context = arguments.context.map_or(most, |context| context as usize);
    if context > most {
        return Err(outcome::usage(format!("--context {context}: {model_name} was made for at most {most} tokens")));
    }
    params.stop_ids.extend(ernie_checkpoint::end_of_turn_ids(&tokenizer));
    let mut chat = Chat {
        session: Session::new(&model, context)?.with_drafts(arguments.drafts.options()),
        tokenizer: &tokenizer,
        template: &template,
        conversation: Conversation::new(arguments.system.clone()),
        params,
        interrupt: &interrupt,
        model_name: &model_name,
        told_of_dropping: false,
    };
    if io::stdin().is_terminal() { chat.interactive() } else { chat.piped() }
}

struct Chat<'a> {
    session: Session<'a>,
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    conversation: Conversation,
    params: SamplingParams,
    interrupt: &'a Interrupt,
    model_name: &'a str,
    told_of_dropping: bool,
}

impl Chat<'_> {
    /// Every line of standard input is a turn; what goes wrong ends the program.
    fn piped(&mut self) -> anyhow::Result<()> {
        for line in io::stdin().lock().lines() {
            let line = line.context("cannot read standard input as UTF-8 text")?;
            if self.line(&line)?.is_break() {
                break;
            }
            // There is nobody to go on with the conversation: what Ctrl-C stops is the program.
            if self.interrupt.stopped() {
                return Err(outcome::Outcome::Interrupted.into());
            }
        }
        Ok(())
    }

    /// Lines are edited and remembered; what goes wrong is told and the conversation goes on.
    fn interactive(&mut self) -> anyhow::Result<()> {
        let mut editor = rustyline::DefaultEditor::new().context("cannot use this terminal")?;
        let history = History::open(&mut editor);
        eprintln!("Talking to {}. /help lists the commands; Ctrl-D leaves.", self.model_name);
        loop {
            let line = match editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => {
                    eprintln!("(Ctrl-D or /quit leaves)");
                    continue;
                }
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(error).context("cannot read from the terminal"),
            };
            if !line.trim().is_empty() {
                history.add(&mut editor, &line);
            }
            match self.line(&line) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return Ok(()),
                Err(error) if outcome::is_broken_pipe(&error) => return Err(error),
                Err(error) => eprint!("{}", outcome::message(&error)),
            }
        }
    }

    /// One line: a command or a message. Breaks when the user leaves.
    fn line(&mut self, line: &str) -> anyhow::Result<ControlFlow<()>> {
        let line = line.trim();
        match line.strip_prefix('/') {
            None if line.is_empty() => {}
            None => self.answer(line)?,
            Some(message) if message.starts_with('/') => self.answer(message)?,
            Some(command) => return self.command(command),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn command(&mut self, command: &str) -> anyhow::Result<ControlFlow<()>> {
        let (name, argument) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match (name, argument.trim()) {
            ("help", _) => eprintln!("{COMMANDS}"),
            ("quit" | "exit", _) => return Ok(ControlFlow::Break(())),
            ("clear", _) => self.conversation.clear(),
            ("system", "") => eprintln!("{}", self.conversation.system().unwrap_or("(no system message)")),
            ("system", "-") => self.conversation.set_system(""),
            ("system", text) => self.conversation.set_system(text),
            ("save", "") => anyhow::bail!("/save needs the name of a file: /save talk.json"),
            ("save", file) => {
                let messages = self.conversation.save(Path::new(file), self.model_name)?;
                eprintln!("saved {messages} messages to {file}");
            }
            _ => anyhow::bail!("there is no command /{name}; /help lists the commands"),
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Answers a message; one that cannot be answered leaves the conversation as it was.
    fn answer(&mut self, message: &str) -> anyhow::Result<()> {
        self.conversation.push_user(message);
        match self.generate() {
            Ok(answer) => {
                self.conversation.push_assistant(&answer);
                Ok(())
            }
            Err(error) => {
                self.conversation.pop();
                Err(error)
            }
        }
    }

    /// Streams the next answer to standard output and returns it.
    fn generate(&mut self) -> anyhow::Result<String> {
        let context = self.session.max_len();
        // An answer may use what the prompt leaves, at least a quarter of the context.
        let room = context - self.params.max_tokens.min(context / 4);
        let options = ChatTemplateOptions::default();
        let prompt =
            self.conversation.prompt(room, |messages| encoding::encode_conversation(self.tokenizer, self.template, messages, &options))?;
        if prompt.newly_dropped > 0 && !self.told_of_dropping {
            eprintln!("(the conversation is longer than the {context} tokens the model sees; its oldest turns are left out from here on)");
            self.told_of_dropping = true;
        }
        let mut out = io::stdout().lock();
        let mut failure = None;
        let working = self.interrupt.begin();
        let decoder = StreamDecoder::new(Some(self.tokenizer));
        let generation = ernie_engine::generate_in(&mut self.session, &prompt.ids, &self.params, decoder, |event| {
            if let Err(error) = out.write_all(event.text.as_bytes()).and_then(|()| out.flush()) {
                failure = Some(error);
                return ControlFlow::Break(());
            }
            if self.interrupt.stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        drop(working);
        if let Some(error) = failure {
            return Err(error.into());
        }
        writeln!(out)?;
        if generation.finish_reason == FinishReason::Cancelled {
            eprintln!("(stopped)");
        }
        // Another draw for the next answer, the same one when the conversation is repeated with the same seed.
        self.params.seed = self.params.seed.wrapping_add(1);
        Ok(generation.text)
    }
}

/// The file of earlier lines; a folder that cannot be written only means that lines are not remembered.
struct History {
    file: Option<PathBuf>,
}

impl History {
    fn open(editor: &mut rustyline::DefaultEditor) -> Self {
        let file = history_file().filter(|file| file.parent().is_some_and(|dir| std::fs::create_dir_all(dir).is_ok()));
        if let Some(file) = &file {
            // The first time there is no file yet.
            let _ = editor.load_history(file);
        }
        Self { file }
    }

    fn add(&self, editor: &mut rustyline::DefaultEditor, line: &str) {
        // Neither failure loses more than the line's place in the history.
        let _ = editor.add_history_entry(line);
        if let Some(file) = &self.file {
            let _ = editor.append_history(file);
        }
    }
}

/// `$XDG_STATE_HOME/ernie/history`, in `~/.local/state` by default; under `%LOCALAPPDATA%` on Windows.
fn history_file() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = variable("XDG_STATE_HOME")
        .or_else(|| variable("LOCALAPPDATA"))
        .or_else(|| variable("HOME").map(|home| home.join(".local").join("state")))?;
    Some(state.join("ernie").join("history"))
}
