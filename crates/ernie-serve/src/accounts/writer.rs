//! Usage on its way into the database: one task writes it, many requests in one transaction.
//!
//! An answer's last bytes are sent after its usage is committed, so that what was answered is in the books whatever happens to this process next. While
//! the database does not take it, usage is kept here, added up by day, key and model (which bounds it), and tried again.
use std::collections::HashMap;
use std::mem::take;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::keys::random_hex;
use super::limits::Reservation;
use super::store::Store;
use super::usage::{Totals, UsageKey};
use crate::state::unix_seconds;

/// Between two tries of a database that refuses.
const PAUSE: Duration = Duration::from_millis(250);
/// Requests of one transaction.
const MAX_BATCH: usize = 256;
/// How long batches are remembered: far longer than one is tried again after its commit got lost.
const REMEMBERED: u64 = 7 * 86_400;

/// What one request used up.
#[derive(Debug)]
pub struct Record {
    /// Where it is added.
    pub usage: UsageKey,
    /// How much.
    pub totals: Totals,
    /// What was set aside for it.
    pub reservation: Option<Reservation>,
    /// Told when it is committed.
    pub committed: Option<oneshot::Sender<()>>,
}

/// What the writer is told.
#[derive(Debug)]
pub enum Message {
    /// Usage to be added.
    Used(Record),
    /// A key was used, without anything to add up.
    Touched {
        /// Which.
        key_id: String,
        /// Unix seconds.
        at: u64,
    },
    /// Tell when all before this is committed.
    Flush(oneshot::Sender<()>),
}

/// What is not committed yet.
#[derive(Debug, Default)]
struct Batch {
    /// The same each time it is tried.
    id: String,
    usage: HashMap<UsageKey, Totals>,
    used: HashMap<String, u64>,
    waiting: Vec<oneshot::Sender<()>>,
    reservations: Vec<Reservation>,
}

impl Batch {
    fn take(&mut self, message: Message) {
        match message {
            Message::Used(Record { usage, totals, reservation, committed }) => {
                self.reservations.extend(reservation);
                self.waiting.extend(committed);
                self.usage.entry(usage).or_default().add(&totals);
            }
            Message::Touched { key_id, at } => drop(self.used.insert(key_id, at)),
            Message::Flush(done) => self.waiting.push(done),
        }
    }

    fn is_empty(&self) -> bool {
        self.usage.is_empty() && self.used.is_empty() && self.waiting.is_empty()
    }
}

/// Writes until nobody can send any more and all is written, or the runtime ends. `healthy` tells whether the last try went well.
pub async fn write(store: Store, healthy: Arc<AtomicBool>, mut messages: mpsc::UnboundedReceiver<Message>) {
    let mut next = Batch::default();
    let mut buffer = Vec::new();
    // Old ones only take room.
    let _ = store.forget_batches(unix_seconds().saturating_sub(REMEMBERED)).await;
    while messages.recv_many(&mut buffer, MAX_BATCH).await > 0 {
        buffer.drain(..).for_each(|message| next.take(message));
        while !next.is_empty() {
            let mut batch = take(&mut next);
            batch.id = match random_hex::<16>() {
                Ok(id) => id,
                // Without one the batch cannot be told from others; the system recovers or nothing works.
                Err(error) => {
                    tracing::error!(%error, "no random numbers");
                    tokio::time::sleep(PAUSE).await;
                    next = batch;
                    continue;
                }
            };
            let at = unix_seconds();
            while let Err(error) = store.add_usage((&batch.id, at), batch.usage.iter(), batch.used.iter()).await {
                if healthy.swap(false, Ordering::SeqCst) {
                    tracing::error!(%error, "usage cannot be written; it is kept and tried again");
                }
                // Meanwhile more comes; it makes the next batch, for this one may be in without our knowing.
                tokio::time::sleep(PAUSE).await;
                while let Ok(message) = messages.try_recv() {
                    next.take(message);
                }
            }
            if !healthy.swap(true, Ordering::SeqCst) {
                tracing::info!("usage is written again");
            }
            // Only now: what is neither in the database nor set aside would be free.
            drop(batch.reservations);
            // Who no longer waits need not know.
            batch.waiting.into_iter().for_each(|committed| {
                let _ = committed.send(());
            });
        }
    }
}
