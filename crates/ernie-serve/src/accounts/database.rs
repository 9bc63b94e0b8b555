//! Which database holds the accounts, and how it is opened.
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, SqlSafeStr};

use super::store::{Place, Store, StoreError};

/// How long a request waits for a connection, and a statement for another's lock, before the database counts as away.
const PATIENCE: Duration = Duration::from_secs(2);
/// Connections; more requests at once wait for one.
const CONNECTIONS: u32 = 4;
/// For how long a SQLite file is opened again that others who start at the same time are still making. Two find its log not yet set up, or
/// a migration missing; SQLite refuses the later one at once, without waiting, since it already reads what the first one writes.
const OPENING: Duration = Duration::from_secs(10);
/// Between two tries of that.
const OPENING_AGAIN: Duration = Duration::from_millis(50);

/// Where the accounts are kept.
#[derive(Clone, PartialEq)]
pub enum Database {
    /// A file.
    File(PathBuf),
    /// Nothing outlives the process.
    Memory,
    /// A server; the text is its URL.
    Postgres(String),
}

impl Database {
    /// What a configuration names; without one a file under the user's data directory.
    ///
    /// # Errors
    /// Not one of the known forms; or nothing is named and the user has no home.
    pub fn named(name: Option<&str>) -> Result<Self, StoreError> {
        let refuse = |reason: &str| StoreError::Name { reason: reason.to_owned() };
        let forms = "expected sqlite:PATH, sqlite::memory: or postgres://USER:PASSWORD@HOST/NAME";
        let Some(name) = name else {
            let path =
                data_directory().ok_or_else(|| refuse("the user has no data directory (HOME is not set); name a file: sqlite:PATH"))?;
            return Ok(Database::File(path.join("ernie").join("serve.db")));
        };
        if let Some(path) = name.strip_prefix("sqlite:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path {
                "" => Err(refuse(&format!("{forms}; the path is empty"))),
                ":memory:" => Ok(Database::Memory),
                _ if path.contains('\0') => Err(refuse("the path has a zero byte")),
                _ => Ok(Database::File(path.into())),
            };
        }
        if name.starts_with("postgres://") || name.starts_with("postgresql://") {
            // Not shown again: it may hold a password.
            PgConnectOptions::from_str(name).map_err(|error| refuse(&format!("the URL of PostgreSQL cannot be read: {error}")))?;
            return Ok(Database::Postgres(name.to_owned()));
        }
        Err(refuse(&format!("{forms}; got something else")))
    }

    /// Opens it, made or brought up to date where needed.
    ///
    /// # Errors
    /// It cannot be opened, or its tables are not those of this version.
    pub async fn open(&self) -> Result<Store, StoreError> {
        let failed = |error: sqlx::Error| StoreError::Open { database: self.to_string(), error };
        let until = Instant::now() + OPENING;
        let store = match self {
            Database::File(path) => {
                prepare(path).map_err(|error| failed(error.into()))?;
                // Made above: one that is missing later was taken away, and is not made again.
                let options = sqlite_options().filename(path);
                let pool = SqlitePoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(PATIENCE);
                // A full disk can make SQLite end a transaction by itself; sqlx then counts it as open for ever, takes the next for a part of it, and
                // what it says is committed never is. Such a connection is closed instead of used again.
                let pool = pool.before_acquire(|connection, _| Box::pin(async { Ok(!connection.is_in_transaction()) }));
                let connect = || pool.clone().connect_with(options.clone());
                Store::Sqlite(tried_again(until, connect, is_busy).await.map_err(failed)?, Some(Place::of(path)))
            }
            Database::Memory => {
                // One connection that never ends: each has a memory of its own.
                let pool = SqlitePoolOptions::new().max_connections(1).min_connections(1).idle_timeout(None).max_lifetime(None);
                let pool = pool.acquire_timeout(PATIENCE);
                Store::Sqlite(pool.connect_with(sqlite_options().in_memory(true)).await.map_err(failed)?, None)
            }
            Database::Postgres(url) => {
                let options = PgConnectOptions::from_str(url).map_err(failed)?.application_name("ernie serve");
                let pool = PgPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(PATIENCE);
                let connected = pool.connect_with(options.clone()).await;
                // The pool tries until its patience ends, and then says only that.
                if let Err(sqlx::Error::PoolTimedOut) = &connected
                    && let Ok(Err(error)) = tokio::time::timeout(PATIENCE, options.connect()).await
                {
                    return Err(failed(error));
                }
                Store::Postgres(connected.map_err(failed)?)
            }
        };
        let migrated = |error| StoreError::Migrate { database: self.to_string(), error };
        match &store {
            Store::Sqlite(pool, _) => {
                let migrator = migrations(include_str!("migrations/sqlite_1.sql"));
                let migrate = || tried_again(until, || migrator.run(pool), |error| sqlite_error(error).is_some_and(is_busy));
                let mut done = migrate().await;
                if done.is_err() {
                    // Tables that were missing a moment ago may be there now, made by another; looking again finds them made.
                    done = migrate().await;
                }
                done.map_err(migrated)?;
            }
            // Here they wait for each other by a lock of the server's.
            Store::Postgres(pool) => {
                let migrator = migrations(include_str!("migrations/postgres_1.sql"));
                migrator.run(pool).await.map_err(migrated)?;
            }
        }
        Ok(store)
    }
}

/// Without the password.
impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text with `***` for the passwords of the URLs of PostgreSQL in it.
pub fn without_passwords(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = ["postgres://", "postgresql://"].iter().filter_map(|scheme| Some(rest.find(scheme)? + scheme.len())).min() {
        let (before, url) = rest.split_at(at);
        let (url, behind) =
            url.split_at(url.find(|c: char| c.is_whitespace() || c.is_control() || "\"'`<>".contains(c)).unwrap_or(url.len()));
        shown.push_str(before);
        shown.push_str(&without_password(url));
        rest = behind;
    }
    shown + rest
}

/// What follows `://` of a URL, with `***` for its password, before the host or among the parameters.
fn without_password(url: &str) -> String {
    let (before, parameters) = url.split_once('?').map_or((url, None), |(before, parameters)| (before, Some(parameters)));
    let authority = before.split('/').next().unwrap_or_default();
    // A slash in a password makes it no URL, but still a password.
    let end = authority.rfind('@').or_else(|| before.rfind('@'));
    let mut shown = match end.map(|end| before.split_at(end)) {
        Some((user, server)) => user.split_once(':').map_or(user.to_owned(), |(name, _)| format!("{name}:***")) + server,
        None => before.to_owned(),
    };
    if let Some(parameters) = parameters {
        let parameter = |parameter: &str| match parameter.split_once('=') {
            Some((name, _)) if name.to_ascii_lowercase().contains("pass") => format!("{name}=***"),
            _ => parameter.to_owned(),
        };
        shown.push('?');
        shown.push_str(&parameters.split('&').map(parameter).collect::<Vec<_>>().join("&"));
    }
    shown
}

/// Without the password.
impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Database::File(path) => write!(f, "sqlite:{}", path.display()),
            Database::Memory => f.write_str("sqlite::memory:"),
            Database::Postgres(url) => {
                let server = url.split_once("://").map_or("", |(_, rest)| rest);
                let server = server.split('?').next().unwrap_or_default();
                write!(f, "postgres://{}", server.rsplit_once('@').map_or(server, |(_, server)| server))
            }
        }
    }
}

/// What `attempt` gives, called again, `until` then, while its error is one that `passes`.
async fn tried_again<T, E, F>(until: Instant, attempt: impl Fn() -> F, passes: impl Fn(&E) -> bool) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    loop {
        match attempt().await {
            Err(error) if passes(&error) && Instant::now() < until => tokio::time::sleep(OPENING_AGAIN).await,
            result => return result,
        }
    }
}

/// Another connection of SQLite's holds a lock (`SQLITE_BUSY`, 5, in the lowest byte of the extended code), or held it for longer than the pool has patience.
fn is_busy(error: &sqlx::Error) -> bool {
    if let sqlx::Error::PoolTimedOut = error {
        return true;
    }
    let code = error.as_database_error().and_then(|error| error.code()?.parse::<u32>().ok());
    code.is_some_and(|code| code & 0xff == 5)
}

/// What the database said to a migration, where it is not the migrations themselves that do not fit.
fn sqlite_error(error: &MigrateError) -> Option<&sqlx::Error> {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => Some(error),
        _ => None,
    }
}

fn sqlite_options() -> SqliteConnectOptions {
    // A commit is in the file's log before it returns, which outlives the process; NORMAL leaves flushing to the system, so only a power failure can take the last ones.
    SqliteConnectOptions::new().journal_mode(SqliteJournalMode::Wal).synchronous(SqliteSynchronous::Normal).busy_timeout(PATIENCE)
}

/// Makes the folder and the file, for this user alone.
fn prepare(path: &Path) -> std::io::Result<()> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent)?;
    }
    let mut options = std::fs::OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.create(true).append(true).open(path).map(drop)
}

/// `$XDG_DATA_HOME`, else `~/.local/share`.
fn data_directory() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local").join("share")))
}

/// A released file is never changed: databases remember its checksum. A change is a further one.
fn migrations(first: &'static str) -> Migrator {
    Migrator::with_migrations(vec![Migration::new(1, "accounts".into(), MigrationType::Simple, first.into_sql_str(), false)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_left_out() {
        for (text, shown) in [
            ("sqlite:///home/a:b@c.db", "sqlite:///home/a:b@c.db"),
            ("postgres://me:secret@there:5433/accounts", "postgres://me:***@there:5433/accounts"),
            ("postgresql://me:se:cr@et@there/a?sslmode=disable", "postgresql://me:***@there/a?sslmode=disable"),
            ("postgres://me@there/a", "postgres://me@there/a"),
            ("postgres://there/a?user=me&password=secret&x=1", "postgres://there/a?user=me&password=***&x=1"),
            ("postgres://me:sec/ret@there/a", "postgres://me:***@there/a"),
            ("postgres://me@there/a@b?options=c@d", "postgres://me@there/a@b?options=c@d"),
            ("x = 'postgres://a:b@c' and postgresql://d:e@f/g\n", "x = 'postgres://a:***@c' and postgresql://d:***@f/g\n"),
        ] {
            assert_eq!(without_passwords(text), shown);
        }
        let postgres = Database::named(Some("postgres://me:hidden@there/accounts")).unwrap();
        assert!(!format!("{postgres:?} {postgres}").contains("hidden"));
    }

    #[test]
    fn names_of_databases() {
        let named = |name| Database::named(Some(name));
        assert_eq!(named("sqlite:a/b.db").unwrap(), Database::File("a/b.db".into()));
        assert_eq!(named("sqlite:///a/b.db").unwrap(), Database::File("/a/b.db".into()));
        assert_eq!(named("sqlite::memory:").unwrap(), Database::Memory);
        let postgres = named("postgres://me:hidden@there:5433/accounts?sslmode=disable").unwrap();
        assert_eq!(postgres.to_string(), "postgres://there:5433/accounts");
        for wrong in ["", "accounts.db", "sqlite:", "mysql://there/x", "postgres://a b:c"] {
            let error = named(wrong).unwrap_err().to_string();
            assert!(error.contains("database"), "{wrong}: {error}");
        }
    }
}
