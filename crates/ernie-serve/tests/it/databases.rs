//! Databases for tests: SQLite always, PostgreSQL where `ERNIE_TEST_POSTGRES` names a server's URL.
use sqlx::Executor;

/// A database that nobody else uses.
pub struct TestDatabase {
    /// As a configuration has it.
    pub name: String,
    _folder: Option<tempfile::TempDir>,
}

/// A file in a folder of its own.
pub fn file() -> TestDatabase {
    let folder = tempfile::tempdir().unwrap();
    TestDatabase { name: format!("sqlite:{}", folder.path().join("accounts.db").display()), _folder: Some(folder) }
}

/// PostgreSQL's where there is one, else a file: the same tests are run for either.
pub fn either() -> TestDatabase {
    postgres().unwrap_or_else(file)
}

/// Of each kind that there is.
pub fn all() -> Vec<TestDatabase> {
    [Some(file()), postgres()].into_iter().flatten().collect()
}

/// A schema of its own in the server that the environment names.
pub fn postgres() -> Option<TestDatabase> {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let url = std::env::var("ERNIE_TEST_POSTGRES").ok()?;
    let schema = format!("test_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let pool = sqlx::PgPool::connect(&url).await.unwrap();
        pool.execute(sqlx::AssertSqlSafe(format!("CREATE SCHEMA {schema}"))).await.unwrap();
        pool.close().await;
    });
    let joint = if url.contains('?') { '&' } else { '?' };
    Some(TestDatabase { name: format!("{url}{joint}options=-c%20search_path%3D{schema}"), _folder: None })
}
