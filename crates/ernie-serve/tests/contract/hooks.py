"""What schemathesis cannot know of the server: which requests would lock it out, and what a description cannot say of a right one."""
import os

import schemathesis
from schemathesis.openapi.checks import RejectedPositiveData

OWN_KEY = os.environ.get("CONTRACT_KEY_ID", "")
MODEL = "contract"

# What a JSON schema does not say, so that a request that obeys it may still be refused by the field named here.
BEYOND_SCHEMAS = (
    "prompt", "input", "tokens",  # ids of the model's vocabulary, at least one token, a length that the context holds
    "messages",  # roles in an order that the chat template takes; a user's turn has content
    "max_tokens", "max_completion_tokens",  # what the prompt leaves of the context
    "logit_bias",  # ids of the vocabulary
    "stop", "best_of", "suffix", "stream", "stream_options", "top_logprobs", "ignore_eos",  # only with, or only without, other fields
    "tools", "tool_choice", "response_format", "structured_outputs",  # JSON schemas, names that are used once and are known
    "guided_json", "guided_regex", "guided_choice", "guided_grammar",  # one at a time, and each in a language of its own
    "dimensions",  # the model's own number
    "from", "to",  # a period that begins before it ends, of days since 1970
)


@schemathesis.hook
def filter_path_parameters(context, path_parameters):
    """The key that asks stays as it is: without it the rest of the run would only be refused."""
    return (path_parameters or {}).get("id") != OWN_KEY or not OWN_KEY


FORMS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")


def tokens(value):
    """A prompt of at least one token, each of the vocabulary."""
    if isinstance(value, (int, float)):
        return int(value) % 1000
    if isinstance(value, list):
        return [tokens(one) for one in value] or [7]
    return value or "Hi"


def repair(body):
    """Most of what lies beyond schemas put right, so that not only refusals are seen."""
    if isinstance(body.get("model"), str):
        body["model"] = MODEL
    for field, most in (("n", 3), ("max_tokens", 8), ("max_completion_tokens", 8)):
        if isinstance(body.get(field), (int, float)):
            body[field] = min(body[field], most)
    if not body.get("stream"):
        body.pop("stream_options", None)
    if "best_of" in body:
        body["best_of"] = body.get("n")
    if body.get("top_logprobs"):
        body["logprobs"] = True
    given = [form for form in FORMS if body.get(form) is not None]
    for form in given[1:]:
        del body[form]
    if given:
        body.pop("ignore_eos", None)
    forms = body.get("structured_outputs")
    if isinstance(forms, dict) and not any(forms.values()):
        del body["structured_outputs"]
    if not body.get("tools"):
        body.pop("tool_choice", None)
    for message in body.get("messages") or []:
        if message["role"] not in ("system", "user", "assistant"):
            message["role"] = "user"
        if not message.get("content"):
            message["content"] = "Hi"
        for call in message.get("tool_calls") or []:
            call["function"].update(name="f", arguments="{}")
    for field in {"prompt", "input", "tokens"} & body.keys():
        body[field] = tokens(body[field])
    body.pop("dimensions", None)


@schemathesis.hook
def before_call(context, case, kwargs):
    """Right requests mean the model that is there, and are answered soon."""
    body = case.body
    if case.meta is None or not case.meta.generation.mode.is_positive or not isinstance(body, dict) or not case.operation.path.startswith("/v1/"):
        return
    repair(body)
    if case.operation.path in ("/v1/completions", "/v1/chat/completions") and not body.get("max_completion_tokens"):
        body["max_tokens"] = body.get("max_tokens") or 8


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """Whether a failure counts."""
    if not isinstance(failure, RejectedPositiveData) or response.status_code != 400:
        return True
    param = response.json()["error"]["param"] or ""
    return not param.replace("[", ".").split(".")[0] in BEYOND_SCHEMAS
