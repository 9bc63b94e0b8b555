//! The tables themselves, in every kind of database.
use std::collections::HashMap;
use std::time::Duration;

use ernie_serve::accounts::calendar::Day;
use ernie_serve::accounts::create_key;
use ernie_serve::accounts::database::Database;
use ernie_serve::accounts::keys::{Grant, Limits, Scope};
use ernie_serve::accounts::store::Store;
use ernie_serve::accounts::usage::{Actor, Audit, GroupBy, Period, Totals, UsageKey};
use sqlx::ConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;

use crate::databases;

fn usage(day: &str, key_id: &str, model: &str, tokens: i64) -> (UsageKey, Totals) {
    let key = UsageKey { day: day.to_owned(), key_id: key_id.to_owned(), model: model.to_owned() };
    (key, Totals { requests: 1, prompt_tokens: tokens, completion_tokens: 2 * tokens, microseconds: 3, microjoules: 4, money: 5 })
}

async fn add(store: &Store, batch: &str, entries: Vec<(UsageKey, Totals)>) {
    let entries: HashMap<UsageKey, Totals> = entries.into_iter().collect();
    store.add_usage((batch, 10), entries.iter(), std::iter::empty()).await.unwrap();
}

#[tokio::test]
async fn what_is_written_is_read_back_after_opening_again() {
    for database in tokio::task::spawn_blocking(databases::all).await.unwrap() {
        let named = Database::named(Some(&database.name)).unwrap();
        let store = named.open().await.unwrap();
        assert!(!store.has_keys().await.unwrap() && store.keys().await.unwrap().is_empty());
        let limits = Limits {
            tokens_per_month: Some(0),
            money_per_month: Some(0.000_000_123),
            requests_per_minute: Some(1),
            tokens_per_minute: None,
        };
        let grant = Grant {
            scopes: vec![Scope::Chat, Scope::Admin],
            models: Some(vec!["a,b".into(), "\"c\"".into()]),
            expires: Some(1 << 40),
            limits,
            ..Grant::new("名, with 'quotes'; DROP TABLE api_keys; --")
        };
        let (made, presented) = create_key(&store, grant.clone(), Actor::Local).await.unwrap();
        assert_eq!(made.grant, grant);
        store.close().await;
        // The migrations run again and find nothing to do.
        let store = named.open().await.unwrap();
        let (read, hash) = store.key(&made.id).await.unwrap().unwrap();
        assert_eq!(read, made);
        assert!(!presented.contains(&hash) && store.key("' OR 1=1 --").await.unwrap().is_none());
        assert_eq!(store.keys().await.unwrap(), std::slice::from_ref(&made));
        let audit =
            Audit { at: 5, actor: Actor::Key("x".into()), action: "settings.change", target: "max_batch_size".into(), detail: "2".into() };
        store.log(&audit).await.unwrap();
        let log = store.audit(10, None).await.unwrap();
        assert_eq!(log.iter().map(|line| &*line.action).collect::<Vec<_>>(), ["settings.change", "keys.create"]);
        assert_eq!((&*log[0].actor, log[0].at), ("key:x", 5));
        assert!(store.revoke_key(&made.id, &audit).await.unwrap() && !store.revoke_key(&made.id, &audit).await.unwrap());
        store.close().await;
    }
}

#[tokio::test]
async fn sums_by_day_key_and_model_and_no_batch_twice() {
    for database in tokio::task::spawn_blocking(databases::all).await.unwrap() {
        let store = Database::named(Some(&database.name)).unwrap().open().await.unwrap();
        let (key, _) = create_key(&store, Grant::new("k"), Actor::Local).await.unwrap();
        let entries =
            || vec![usage("2024-01-31", &key.id, "m", 1), usage("2024-02-01", &key.id, "m", 10), usage("2024-02-01", "", "n", 100)];
        add(&store, "one", entries()).await;
        add(&store, "one", entries()).await;
        add(&store, "two", vec![usage("2024-02-01", &key.id, "m", 1000)]).await;
        let day = |text: &str| text.parse::<Day>().unwrap();
        assert_eq!(store.usage_since(&key.id, day("2024-02-01")).await.unwrap().tokens(), 3030);
        assert_eq!(store.usage_since(&key.id, day("2024-03-01")).await.unwrap(), Totals::default());
        let period = Period { from: day("2024-01-01"), to: day("2024-02-01") };
        let report = async |by: &str| {
            let rows = store.usage(period, by.parse::<GroupBy>().unwrap()).await.unwrap();
            let mut rows: Vec<_> =
                rows.into_iter().map(|row| (row.day, row.key_name, row.model, row.requests, row.prompt_tokens)).collect();
            rows.sort();
            rows
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(report("day").await, [(some("2024-01-31"), None, None, 1, 1), (some("2024-02-01"), None, None, 3, 1110)]);
        assert_eq!(report("key").await, [(None, None, None, 1, 100), (None, some("k"), None, 3, 1011)]);
        assert_eq!(report("model").await, [(None, None, some("m"), 3, 1011), (None, None, some("n"), 1, 100)]);
        assert_eq!(report("day,key,model").await.len(), 3);
        // Of batches from before a time nothing is known any more.
        store.forget_batches(11).await.unwrap();
        add(&store, "two", vec![usage("2024-02-01", &key.id, "m", 1)]).await;
        assert_eq!(store.usage_since(&key.id, day("2024-02-01")).await.unwrap().tokens(), 3033);
        store.close().await;
    }
}

/// Servers and command lines that start at the same time on a new database.
#[tokio::test]
async fn several_open_a_new_database_at_once() {
    for database in tokio::task::spawn_blocking(databases::all).await.unwrap() {
        let named = Database::named(Some(&database.name)).unwrap();
        let open = || {
            let named = named.clone();
            tokio::spawn(async move { named.open().await.unwrap().has_keys().await.unwrap() })
        };
        for opened in (0..6).map(|_| open()).collect::<Vec<_>>() {
            assert!(!opened.await.unwrap());
        }
    }
}

/// One that another is making has to be waited for, whether SQLite refuses it at once (it does not wait to set up its log while another is about to write) or
/// after two seconds.
#[tokio::test]
async fn a_new_database_that_another_is_making_is_waited_for() {
    for (begin, held) in [("BEGIN IMMEDIATE", Duration::from_millis(500)), ("BEGIN EXCLUSIVE", Duration::from_secs(3))] {
        let database = databases::file();
        let path = database.name.strip_prefix("sqlite:").unwrap();
        let mut other = SqliteConnectOptions::new().filename(path).create_if_missing(true).connect().await.unwrap();
        sqlx::query(begin).execute(&mut other).await.unwrap();
        let named = Database::named(Some(&database.name)).unwrap();
        let opening = tokio::spawn(async move { named.open().await });
        tokio::time::sleep(held).await;
        assert!(!opening.is_finished(), "opened or refused within {held:?} of {begin}");
        sqlx::query("COMMIT").execute(&mut other).await.unwrap();
        assert!(!opening.await.unwrap().unwrap().has_keys().await.unwrap());
    }
}

/// No page more than the file has: what SQLite says on a full disk.
#[tokio::test]
async fn a_full_disk_is_an_error_and_what_was_there_stays() {
    let database = databases::file();
    let store = Database::named(Some(&database.name)).unwrap().open().await.unwrap();
    add(&store, "one", vec![usage("2024-01-01", "k", "m", 1)]).await;
    let Store::Sqlite(pool, _) = &store else { panic!("a file was asked for") };
    let mut all = Vec::new();
    for _ in 0..4 {
        let mut connection = pool.acquire().await.unwrap();
        sqlx::query("PRAGMA max_page_count = 1").fetch_one(&mut *connection).await.unwrap();
        all.push(connection);
    }
    drop(all);
    let many = (0..500).map(|i| usage("2024-01-01", "k", &format!("{i}-{}", "m".repeat(90)), 1)).collect::<HashMap<_, _>>();
    let error = store.add_usage(("two", 10), many.iter(), std::iter::empty()).await.unwrap_err().to_string();
    assert!(error.contains("full"), "{error}");
    assert_eq!(store.usage_since("k", "2024-01-01".parse().unwrap()).await.unwrap().requests, 1);
    // There is room again, for new connections. Those that failed must not be taken for good ones: sqlx's count of their transactions is wrong.
    let mut tried = 0;
    while store.add_usage(("two", 10), many.iter(), std::iter::empty()).await.is_err() {
        tried += 1;
        assert!(tried < 10);
    }
    let other = Database::named(Some(&database.name)).unwrap().open().await.unwrap();
    assert_eq!(other.usage_since("k", "2024-01-01".parse().unwrap()).await.unwrap().requests, 501);
}

#[tokio::test]
async fn tables_of_a_newer_version_are_left_alone() {
    let database = databases::file();
    let named = Database::named(Some(&database.name)).unwrap();
    let store = named.open().await.unwrap();
    let Store::Sqlite(pool, _) = &store else { panic!("a file was asked for") };
    let newer = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (99, 'x', 1, x'00', 0)";
    sqlx::query(newer).execute(pool).await.unwrap();
    store.close().await;
    let error = named.open().await.unwrap_err().to_string();
    assert!(error.contains("newer version"), "{error}");
}

/// What would be written into a file that nobody finds any more is not taken, nor is another file in its place.
#[cfg(unix)]
#[tokio::test]
async fn a_file_that_is_gone_is_noticed_and_taken_again_when_it_is_back() {
    let database = databases::file();
    let store = Database::named(Some(&database.name)).unwrap().open().await.unwrap();
    add(&store, "one", vec![usage("2024-01-01", "k", "m", 1)]).await;
    let path = database.name.strip_prefix("sqlite:").unwrap().to_owned();
    let elsewhere = format!("{path}.moved");
    std::fs::rename(&path, &elsewhere).unwrap();
    assert!(store.has_keys().await.is_err());
    std::fs::write(&path, b"").unwrap();
    assert!(store.has_keys().await.is_err());
    std::fs::rename(&elsewhere, &path).unwrap();
    assert_eq!(store.usage_since("k", "2024-01-01".parse().unwrap()).await.unwrap().requests, 1);
}
