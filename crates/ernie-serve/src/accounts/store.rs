//! The tables: keys, usage, audit log. One text of SQL serves both databases, so there is an enum over two pools and no trait; what differs
//! between them is in the migrations. (`sqlx`'s own `Any` would lose the options of SQLite and the types of NULLs.)
use std::path::{Path, PathBuf};

use sqlx::{PgPool, SqlitePool};

use super::calendar::Day;
use super::keys::{Grant, Key, Limits, NANOS, Scope};
use super::usage::{Audit, AuditEntry, GroupBy, Period, Totals, UsageKey, UsageRow};

/// What goes wrong with the database.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// What the configuration names is none.
    #[error("database: {reason}")]
    Name {
        /// What was expected.
        reason: String,
    },
    /// It cannot be opened.
    #[error("cannot open the database {database}: {error}; name another with --database, or see that it runs and may be written")]
    Open {
        /// Which.
        database: String,
        /// What it said.
        error: sqlx::Error,
    },
    /// Its tables are not those of this version.
    #[error("the tables of {database} cannot be brought up to date: {error}; a database of a newer version needs that version")]
    Migrate {
        /// Which.
        database: String,
        /// What it said.
        error: sqlx::migrate::MigrateError,
    },
    /// A statement failed: it is away, locked or full.
    #[error("the database: {0}")]
    Statement(#[from] sqlx::Error),
    /// The file is not where it was opened, or is another.
    #[error("the database {} was moved, deleted or replaced while it was open; put it back, or restart to begin with what is there", path.display())]
    Gone {
        /// Where it was.
        path: PathBuf,
    },
    /// A row is not what this program writes.
    #[error("the database: key {id}: {reason}")]
    Row {
        /// Whose row.
        id: String,
        /// What is wrong.
        reason: String,
    },
    /// The system gives no random numbers.
    #[error("no random numbers: {0}")]
    Random(std::io::Error),
}

/// Shorthand.
pub type Result<T> = std::result::Result<T, StoreError>;

/// An open database. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Store {
    /// In a file, of that place, or in memory.
    Sqlite(SqlitePool, Option<Place>),
    /// A server.
    Postgres(PgPool),
}

/// Where an open file is. What is written into one that was deleted or moved away nobody would find again.
#[derive(Clone, Debug)]
pub struct Place {
    path: PathBuf,
    #[cfg(unix)]
    identity: Option<(u64, u64)>,
}

impl Place {
    /// Of a file that is there.
    pub(super) fn of(path: &Path) -> Self {
        Place {
            path: path.to_owned(),
            #[cfg(unix)]
            identity: Self::identity(path),
        }
    }

    #[cfg(unix)]
    fn identity(path: &Path) -> Option<(u64, u64)> {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
    }

    /// Whether the same file is still there.
    fn check(&self) -> Result<()> {
        #[cfg(unix)]
        let same = self.identity == Self::identity(&self.path);
        #[cfg(not(unix))]
        let same = self.path.exists();
        if same { Ok(()) } else { Err(StoreError::Gone { path: self.path.clone() }) }
    }
}

/// The same for either pool.
macro_rules! on {
    ($store:expr, $pool:ident => $body:expr) => {
        match $store {
            Store::Sqlite($pool, place) => {
                place.as_ref().map_or(Ok(()), Place::check)?;
                $body
            }
            Store::Postgres($pool) => $body,
        }
    };
}

/// Columns of a key, its hash first.
type KeyRow = (
    String,
    String,
    String,
    String,
    Option<String>,
    i64,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<i64>,
);

macro_rules! key_columns {
    () => {
        "SELECT hash, id, name, scopes, models, created, expires, revoked, last_used, \
         requests_per_minute, tokens_per_minute, tokens_per_month, money_per_month FROM api_keys "
    };
}

/// Sums as columns.
type Sums = (i64, i64, i64, i64, i64, i64);

fn totals((requests, prompt_tokens, completion_tokens, microseconds, microjoules, money): Sums) -> Totals {
    Totals { requests, prompt_tokens, completion_tokens, microseconds, microjoules, money }
}

fn unsigned(value: i64) -> u64 {
    value.max(0) as u64
}

/// A time or a limit; what is larger than the database can hold was refused before.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn key(row: KeyRow) -> Result<(Key, String)> {
    let (hash, id, name, scopes, models, created, expires, revoked, last_used, per_minute, tokens, month_tokens, month_money) = row;
    let refuse = |reason: String| StoreError::Row { id: id.clone(), reason };
    let scopes = scopes.split(',').filter(|name| !name.is_empty()).map(str::parse).collect::<std::result::Result<Vec<Scope>, _>>();
    let models = models.map(|models| serde_json::from_str::<Vec<String>>(&models)).transpose();
    let limits = Limits {
        requests_per_minute: per_minute.map(unsigned),
        tokens_per_minute: tokens.map(unsigned),
        tokens_per_month: month_tokens.map(unsigned),
        money_per_month: month_money.map(|money| money as f64 / NANOS),
    };
    let grant = Grant {
        name,
        scopes: scopes.map_err(&refuse)?,
        models: models.map_err(|error| refuse(error.to_string()))?,
        expires: expires.map(unsigned),
        limits,
    };
    Ok((Key { id, grant, created: unsigned(created), revoked: revoked.map(unsigned), last_used: last_used.map(unsigned) }, hash))
}

/// A grant's columns.
struct GrantColumns {
    scopes: String,
    models: Option<String>,
    expires: Option<i64>,
    money: Option<i64>,
}

impl GrantColumns {
    fn of(grant: &Grant) -> Self {
        GrantColumns {
            scopes: grant.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(","),
            models: grant.models.as_ref().map(|models| serde_json::json!(models).to_string()),
            expires: grant.expires.map(signed),
            money: grant.limits.money_per_month.map(|money| (money * NANOS).round() as i64),
        }
    }
}

const INSERT_AUDIT: &str = "INSERT INTO audit_log (at, actor, action, target, detail) VALUES ($1, $2, $3, $4, $5)";

/// A line of the log, in the transaction of what it tells of.
macro_rules! log {
    ($audit:expr, $transaction:expr) => {
        sqlx::query(INSERT_AUDIT)
            .bind(signed($audit.at))
            .bind($audit.actor.to_string())
            .bind($audit.action)
            .bind(&*$audit.target)
            .bind(&*$audit.detail)
            .execute(&mut *$transaction)
            .await?
    };
}

impl Store {
    /// Whether there is any key, valid or not.
    ///
    /// # Errors
    /// The database is away, as with all that follow.
    pub async fn has_keys(&self) -> Result<bool> {
        let sql = "SELECT CAST(COUNT(*) AS BIGINT) FROM (SELECT 1 AS one FROM api_keys LIMIT 1) AS first_one";
        let (count,): (i64,) = on!(self, pool => sqlx::query_as(sql).fetch_one(pool).await?);
        Ok(count > 0)
    }

    /// A key and the hash of its secret.
    pub async fn key(&self, id: &str) -> Result<Option<(Key, String)>> {
        let sql = concat!(key_columns!(), "WHERE id = $1");
        let row: Option<KeyRow> = on!(self, pool => sqlx::query_as(sql).bind(id).fetch_optional(pool).await?);
        row.map(key).transpose()
    }

    /// All keys, the oldest first.
    pub async fn keys(&self) -> Result<Vec<Key>> {
        let sql = concat!(key_columns!(), "ORDER BY created, id");
        let rows: Vec<KeyRow> = on!(self, pool => sqlx::query_as(sql).fetch_all(pool).await?);
        rows.into_iter().map(|row| Ok(key(row)?.0)).collect()
    }

    /// Adds a key.
    pub async fn insert_key(&self, key: &Key, hash: &str, audit: &Audit) -> Result<()> {
        let sql = "INSERT INTO api_keys (id, name, hash, scopes, models, created, expires, \
                   requests_per_minute, tokens_per_minute, tokens_per_month, money_per_month) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)";
        let Grant { name, limits, .. } = &key.grant;
        let GrantColumns { scopes, models, expires, money } = GrantColumns::of(&key.grant);
        on!(self, pool => {
            let mut transaction = pool.begin().await?;
            sqlx::query(sql)
                .bind(&*key.id)
                .bind(&**name)
                .bind(hash)
                .bind(scopes)
                .bind(models)
                .bind(signed(key.created))
                .bind(expires)
                .bind(limits.requests_per_minute.map(signed))
                .bind(limits.tokens_per_minute.map(signed))
                .bind(limits.tokens_per_month.map(signed))
                .bind(money)
                .execute(&mut *transaction)
                .await?;
            log!(audit, transaction);
            Ok(transaction.commit().await?)
        })
    }

    /// Changes what was decided about a key. Whether it is revoked and when it was used stay as they are.
    pub async fn update_key(&self, id: &str, grant: &Grant, audit: &Audit) -> Result<()> {
        let sql = "UPDATE api_keys SET name = $2, scopes = $3, models = $4, expires = $5, requests_per_minute = $6, \
                   tokens_per_minute = $7, tokens_per_month = $8, money_per_month = $9 WHERE id = $1";
        let GrantColumns { scopes, models, expires, money } = GrantColumns::of(grant);
        let limits = &grant.limits;
        on!(self, pool => {
            let mut transaction = pool.begin().await?;
            sqlx::query(sql)
                .bind(id)
                .bind(&*grant.name)
                .bind(scopes)
                .bind(models)
                .bind(expires)
                .bind(limits.requests_per_minute.map(signed))
                .bind(limits.tokens_per_minute.map(signed))
                .bind(limits.tokens_per_month.map(signed))
                .bind(money)
                .execute(&mut *transaction)
                .await?;
            log!(audit, transaction);
            Ok(transaction.commit().await?)
        })
    }

    /// Refuses a key from now on. Whether that was news; only news is logged.
    pub async fn revoke_key(&self, id: &str, audit: &Audit) -> Result<bool> {
        let sql = "UPDATE api_keys SET revoked = $2 WHERE id = $1 AND revoked IS NULL";
        on!(self, pool => {
            let mut transaction = pool.begin().await?;
            let changed = sqlx::query(sql).bind(id).bind(signed(audit.at)).execute(&mut *transaction).await?.rows_affected() > 0;
            if changed {
                log!(audit, transaction);
            }
            transaction.commit().await?;
            Ok(changed)
        })
    }

    /// Adds sums to the usage and notes uses of keys, all or nothing. A batch that is in already changes nothing.
    pub async fn add_usage<'a>(
        &self,
        batch: (&str, u64),
        usage: impl Iterator<Item = (&'a UsageKey, &'a Totals)> + Send,
        used: impl Iterator<Item = (&'a String, &'a u64)> + Send,
    ) -> Result<()> {
        let once = "INSERT INTO usage_batches (id, at) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING";
        let add = "INSERT INTO usage (day, key_id, model, requests, prompt_tokens, completion_tokens, microseconds, microjoules, money) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (key_id, day, model) DO UPDATE SET \
                   requests = usage.requests + excluded.requests, prompt_tokens = usage.prompt_tokens + excluded.prompt_tokens, \
                   completion_tokens = usage.completion_tokens + excluded.completion_tokens, \
                   microseconds = usage.microseconds + excluded.microseconds, microjoules = usage.microjoules + excluded.microjoules, \
                   money = usage.money + excluded.money";
        let touch = "UPDATE api_keys SET last_used = $2 WHERE id = $1 AND (last_used IS NULL OR last_used < $2)";
        on!(self, pool => {
            // It begins with a write, so with SQLite it waits for the lock at once instead of finding later that what it read is old.
            let mut transaction = pool.begin().await?;
            if sqlx::query(once).bind(batch.0).bind(signed(batch.1)).execute(&mut *transaction).await?.rows_affected() > 0 {
                for (key, totals) in usage {
                    sqlx::query(add)
                        .bind(&*key.day)
                        .bind(&*key.key_id)
                        .bind(&*key.model)
                        .bind(totals.requests)
                        .bind(totals.prompt_tokens)
                        .bind(totals.completion_tokens)
                        .bind(totals.microseconds)
                        .bind(totals.microjoules)
                        .bind(totals.money)
                        .execute(&mut *transaction)
                        .await?;
                }
                for (id, at) in used {
                    sqlx::query(touch).bind(&**id).bind(signed(*at)).execute(&mut *transaction).await?;
                }
            }
            Ok(transaction.commit().await?)
        })
    }

    /// Forgets batches from before a time.
    pub async fn forget_batches(&self, before: u64) -> Result<()> {
        let sql = "DELETE FROM usage_batches WHERE at < $1";
        on!(self, pool => sqlx::query(sql).bind(signed(before)).execute(pool).await.map(drop)?);
        Ok(())
    }

    /// What a key used up from a day on.
    pub async fn usage_since(&self, key_id: &str, from: Day) -> Result<Totals> {
        let sql = "SELECT CAST(COALESCE(SUM(requests), 0) AS BIGINT), CAST(COALESCE(SUM(prompt_tokens), 0) AS BIGINT), \
                   CAST(COALESCE(SUM(completion_tokens), 0) AS BIGINT), CAST(COALESCE(SUM(microseconds), 0) AS BIGINT), \
                   CAST(COALESCE(SUM(microjoules), 0) AS BIGINT), CAST(COALESCE(SUM(money), 0) AS BIGINT) \
                   FROM usage WHERE key_id = $1 AND day >= $2";
        let sums: Sums = on!(self, pool => sqlx::query_as(sql).bind(key_id).bind(from.to_string()).fetch_one(pool).await?);
        Ok(totals(sums))
    }

    /// A report, the earliest day first, then by key and model.
    pub async fn usage(&self, period: Period, by: GroupBy) -> Result<Vec<UsageRow>> {
        let sql = "SELECT CASE WHEN CAST($3 AS BIGINT) = 1 THEN day END, CASE WHEN CAST($4 AS BIGINT) = 1 THEN key_id END, \
                   CASE WHEN CAST($5 AS BIGINT) = 1 THEN model END, \
                   CAST(SUM(requests) AS BIGINT), CAST(SUM(prompt_tokens) AS BIGINT), CAST(SUM(completion_tokens) AS BIGINT), \
                   CAST(SUM(microseconds) AS BIGINT), CAST(SUM(microjoules) AS BIGINT), CAST(SUM(money) AS BIGINT) \
                   FROM usage WHERE day >= $1 AND day <= $2 GROUP BY 1, 2, 3 ORDER BY 1, 2, 3";
        type Row = (Option<String>, Option<String>, Option<String>, i64, i64, i64, i64, i64, i64);
        let rows: Vec<Row> = on!(self, pool => sqlx::query_as(sql)
            .bind(period.from.to_string())
            .bind(period.to.to_string())
            .bind(i64::from(by.day))
            .bind(i64::from(by.key))
            .bind(i64::from(by.model))
            .fetch_all(pool)
            .await?);
        let names: Vec<(String, String)> =
            if by.key { on!(self, pool => sqlx::query_as("SELECT id, name FROM api_keys").fetch_all(pool).await?) } else { Vec::new() };
        let names: std::collections::HashMap<String, String> = names.into_iter().collect();
        let row = |(day, key, model, a, b, c, d, e, f): Row| {
            let name = key.as_ref().and_then(|key| names.get(key).cloned());
            UsageRow::new(day, (key, name), model, totals((a, b, c, d, e, f)))
        };
        Ok(rows.into_iter().map(row).collect())
    }

    /// The audit log, the latest first, from before an id.
    pub async fn audit(&self, limit: u32, before: Option<i64>) -> Result<Vec<AuditEntry>> {
        let sql = "SELECT id, at, actor, action, target, detail FROM audit_log WHERE id < $1 ORDER BY id DESC LIMIT $2";
        type Row = (i64, i64, String, String, String, String);
        let rows: Vec<Row> =
            on!(self, pool => sqlx::query_as(sql).bind(before.unwrap_or(i64::MAX)).bind(i64::from(limit)).fetch_all(pool).await?);
        let entry = |(id, at, actor, action, target, detail)| AuditEntry { id, at: unsigned(at), actor, action, target, detail };
        Ok(rows.into_iter().map(entry).collect())
    }

    /// Writes a line of the audit log about something that is not in the database.
    pub async fn log(&self, audit: &Audit) -> Result<()> {
        on!(self, pool => {
            let mut transaction = pool.begin().await?;
            log!(audit, transaction);
            Ok(transaction.commit().await?)
        })
    }

    /// Ends all connections; with SQLite the log is written into the file.
    pub async fn close(&self) {
        match self {
            Store::Sqlite(pool, _) => pool.close().await,
            Store::Postgres(pool) => pool.close().await,
        }
    }
}
