-- Times are Unix seconds, days are UTC as YYYY-MM-DD, money is in billionths of the currency: whole numbers add up exactly.
CREATE TABLE api_keys (
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    -- SHA-256 of the secret, in hexadecimal.
    hash TEXT NOT NULL,
    -- Names with a comma between them.
    scopes TEXT NOT NULL,
    -- A list as JSON; NULL for all models.
    models TEXT,
    created BIGINT NOT NULL,
    expires BIGINT,
    revoked BIGINT,
    last_used BIGINT,
    requests_per_minute BIGINT,
    tokens_per_minute BIGINT,
    tokens_per_month BIGINT,
    money_per_month BIGINT
);
-- key_id is empty for requests without a key.
CREATE TABLE usage (
    day TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    requests BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    microseconds BIGINT NOT NULL,
    microjoules BIGINT NOT NULL,
    money BIGINT NOT NULL,
    PRIMARY KEY (key_id, day, model)
);
CREATE INDEX usage_by_day ON usage (day);
-- Which batches of usage are in: one whose commit got lost on the way is not added twice.
CREATE TABLE usage_batches (
    id TEXT NOT NULL PRIMARY KEY,
    at BIGINT NOT NULL
);
CREATE TABLE audit_log (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at BIGINT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    target TEXT NOT NULL,
    detail TEXT NOT NULL
);
