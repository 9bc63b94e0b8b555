//! `GET /openapi.json`: what is taken and answered, out of the types that are read and written.
//!
//! Each route says what it answers if all is well. Refusals come from what all routes have in common (who may use them, a body, a name in the path), so they
//! are described here once, by the same table that lets requests in.
use std::sync::LazyLock;

use axum::Json;
use axum::extract::State as Extract;
use serde_json::{Map, Value, json};
use utoipa::OpenApi;

use crate::accounts::access::{Access, ROUTES};
use crate::accounts::keys::Scope;
use crate::api_error::ErrorBody;
use crate::fields::PASSED_OVER;
use crate::state::Shared;
use crate::{admin, chat, completions, embeddings, live, request_id, routes, settings, tokens};

/// What utoipa knows.
#[derive(Debug, OpenApi)]
#[openapi(
    info(
        title = "ernie serve",
        description = "An OpenAI-compatible server for ERNIE-4.5 models. Keys are needed once there is one. Other methods than those described are answered \
            with 405 and the header `Allow`."
    ),
    paths(
        routes::list_models,
        routes::one_model,
        completions::completions,
        chat::chat_completions,
        embeddings::embeddings,
        tokens::tokenize,
        tokens::detokenize,
        routes::live,
        routes::ready,
        routes::metrics,
        live::events,
        settings::settings,
        settings::change_settings,
        openapi,
        admin::session::session,
        admin::keys::list,
        admin::keys::create,
        admin::keys::change,
        admin::keys::revoke,
        admin::reports::usage,
        admin::reports::audit
    ),
    components(schemas(ErrorBody, live::Live))
)]
struct Routes;

/// Every refusal: its status, its name, when it comes.
const REFUSALS: [(&str, &str, &str); 12] = [
    ("400", "BadRequest", "What was sent is at fault; `param` names the field"),
    ("401", "Unauthorized", "No key that is taken was sent"),
    ("402", "PaymentRequired", "The key's money of the month is spent"),
    ("403", "Forbidden", "The key was not made for this; or, without keys, another site may have sent this"),
    ("404", "NotFound", "There is nothing of that name"),
    ("408", "RequestTimeout", "The body did not come in time"),
    ("413", "ContentTooLarge", "The body is larger than the configuration allows"),
    ("415", "UnsupportedMediaType", "The body does not say that it is JSON"),
    ("429", "TooManyRequests", "The key's minute or its tokens of the month are used up, or the server has as much to do as it can"),
    ("500", "InternalServerError", "The server is at fault"),
    ("503", "ServiceUnavailable", "The server is shutting down, or its database does not answer"),
    ("504", "GatewayTimeout", "The answer took longer than the configuration allows"),
];

/// Streams, with the schema of what their events hold.
const EVENTS: [(&str, &str); 3] =
    [("/v1/chat/completions", "ChatResponse"), ("/v1/completions", "CompletionResponse"), ("/v1/live", "Live")];

/// An event of a stream: JSON, or the mark of the end.
fn stream(schema: &str) -> Value {
    let of = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    let data = json!({"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [of(schema), of("ErrorBody")]}});
    json!({
        "type": "object",
        "description": "A server-sent event. A stream of answers ends with the data `[DONE]`.",
        "required": ["data"],
        "properties": {"data": {"anyOf": [data, {"const": "[DONE]"}]}},
    })
}

/// The whole of it.
pub static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    let mut document = serde_json::to_value(Routes::openapi()).unwrap_or_default();
    let components = &mut document["components"];
    components["securitySchemes"] =
        json!({ "key": {"type": "http", "scheme": "bearer", "description": "An API key, as `ernie keys create` makes it"} });
    let header = |description: &str, kind: &str| json!({"description": description, "required": true, "schema": {"type": kind}});
    components["headers"] = json!({
        "RequestId": header("What the server's log calls the request: the client's own if it sent one", "string"),
        "RetryAfter": header("Seconds after which to come again", "integer"),
        "WwwAuthenticate": header("`Bearer`", "string"),
    });
    for (status, name, description) in REFUSALS {
        let mut headers = json!({ (request_id::HEADER): {"$ref": "#/components/headers/RequestId"} });
        if let "429" | "503" = status {
            headers["retry-after"] = json!({"$ref": "#/components/headers/RetryAfter"});
        }
        if status == "401" {
            headers["www-authenticate"] = json!({"$ref": "#/components/headers/WwwAuthenticate"});
        }
        let content = json!({"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}});
        components["responses"][name] = json!({"description": description, "headers": headers, "content": content});
    }
    let schemas = &mut components["schemas"];
    for name in ["ChatRequest", "CompletionRequest", "EmbeddingRequest"] {
        schemas[name] = whole(schemas, name);
    }
    if let Some(schemas) = schemas.as_object_mut() {
        // Their fields are in those of the requests now.
        schemas.retain(|name, _| !["Chat", "Completion", "Sampling", "Structured", "Tools"].contains(&name.as_str()));
    }
    let one_of = |this: &str, kind: &str, other: &str| json!({"required": [this], "properties": {(this): {"type": kind}, (other): {"type": "null"}}});
    schemas["TokenizeRequest"]["anyOf"] = json!([one_of("prompt", "string", "messages"), one_of("messages", "array", "prompt")]);
    bound(&mut document);
    for (path, methods) in document["paths"].as_object_mut().into_iter().flatten() {
        let access = ROUTES.iter().find(|(route, _)| route == path).map(|(_, access)| *access);
        for operation in methods.as_object_mut().into_iter().flatten().map(|(_, operation)| operation) {
            for response in operation["responses"].as_object_mut().into_iter().flatten().map(|(_, response)| response) {
                response["headers"] = json!({ (request_id::HEADER): {"$ref": "#/components/headers/RequestId"} });
            }
            let event = EVENTS.iter().find(|(route, _)| route == path).map(|(_, schema)| schema);
            if let Some(schema) = event {
                operation["responses"]["200"]["content"]["text/event-stream"]["schema"] = stream(schema);
            }
            for status in refusals(path, operation, access) {
                let name = REFUSALS.iter().find(|refusal| refusal.0 == status).map_or("", |refusal| refusal.1);
                operation["responses"][status] = json!({ "$ref": format!("#/components/responses/{name}") });
            }
            if let Some(Access::Scope(scope)) = access {
                operation["security"] = json!([{ "key": [] }]);
                operation["description"] = json!(format!("Needs a key with the scope `{scope}`, if there are keys."));
            }
        }
    }
    document
});

/// The statuses of what may be refused.
fn refusals(path: &str, operation: &Value, access: Option<Access>) -> Vec<&'static str> {
    // Without keys any route refuses names of other machines.
    let mut statuses = vec!["403"];
    if let Some(Access::Scope(scope)) = access {
        statuses.extend(["401", "429", "503"]);
        if matches!(scope, Scope::Chat | Scope::Completions | Scope::Embeddings | Scope::Tokenize) {
            statuses.extend(["402", "404", "500", "504"]);
        }
    }
    if !operation["requestBody"].is_null() {
        statuses.extend(["400", "408", "413", "415"]);
    }
    if !operation["parameters"].is_null() {
        statuses.push("400");
    }
    if path.contains('{') {
        statuses.push("404");
    }
    if path == "/health/ready" {
        statuses.push("503");
    }
    statuses.sort_unstable();
    statuses
}

/// A request's schema as one object: the fields of its parts, those that are passed over, and nothing else but nulls, which are as good as absent.
fn whole(schemas: &Value, name: &str) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    let mut open = vec![&schemas[name]];
    while let Some(schema) = open.pop() {
        properties.extend(schema["properties"].as_object().cloned().into_iter().flatten());
        required.extend(schema["required"].as_array().cloned().into_iter().flatten());
        open.extend(schema["allOf"].as_array().into_iter().flatten());
        open.extend(schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()).map(|name| &schemas[name]));
    }
    let mut object = json!({"type": "object", "description": schemas[name]["description"], "required": required, "properties": properties});
    for name in PASSED_OVER {
        object["properties"][name] = json!({"description": "Passed over: it changes no answer."});
    }
    object["additionalProperties"] = json!({"type": "null"});
    object
}

/// Numbers end where their types do, whose names utoipa hyphenates.
fn bound(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            for (hyphenated, format, most) in [("u-int32", "uint32", u32::MAX.into()), ("u-int64", "uint64", u64::MAX)] {
                if fields.get("format").is_some_and(|format| format == hyphenated) {
                    fields.insert("format".to_owned(), format.into());
                    fields.entry("maximum").or_insert(most.into());
                }
            }
            fields.values_mut().for_each(bound);
        }
        Value::Array(schemas) => schemas.iter_mut().for_each(bound),
        _ => {}
    }
}

/// The same as long as there are no keys: none is needed, and one that is sent is no harm.
static WITHOUT_KEYS: LazyLock<Value> = LazyLock::new(|| {
    let mut document = DOCUMENT.clone();
    for methods in document["paths"].as_object_mut().into_iter().flat_map(Map::values_mut) {
        for operation in methods.as_object_mut().into_iter().flat_map(Map::values_mut) {
            if let Some(schemes) = operation.get_mut("security").and_then(Value::as_array_mut) {
                schemes.insert(0, json!({}));
            }
        }
    }
    document
});

/// This description
#[utoipa::path(get, path = "/openapi.json", tag = "operation", responses((status = 200, description = "OpenAPI", body = Object)))]
pub async fn openapi(Extract(state): Extract<Shared>) -> Json<&'static Value> {
    Json(if state.accounts.is_open().await { &WITHOUT_KEYS } else { &DOCUMENT })
}
