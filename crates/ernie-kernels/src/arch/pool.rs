//! The threads of the inference engine: a decoding step is a hundred short parallel loops, so threads wait for the next one awake for a while
//! before they sleep, and starting a loop costs less than a microsecond.
//!
//! A loop is a number of tasks that threads claim one by one; the caller works too and returns when all are done. A thread that is late (the
//! processor may be busy with something else) claims nothing and delays nobody.
#![allow(unsafe_code)] // Handing a borrowed closure to other threads; disjoint parts of one matrix.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::matrix::MatMut;

/// How long an idle thread looks for work before it sleeps: longer than what lies between two loops of a step.
const AWAKE: Duration = Duration::from_micros(300);

/// Threads that share loops with whoever calls [`Pool::run`].
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One loop at a time: callers from several threads wait for each other.
    caller: Mutex<()>,
}

/// A loop's body, whose real lifetime the type has forgotten.
type Body = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Number of the loop in the upper half, tasks not yet claimed in the lower.
    open: AtomicU64,
    /// Tasks not yet finished.
    unfinished: AtomicUsize,
    /// Valid while a claim of the loop it belongs to is held.
    body: UnsafeCell<Option<Body>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `body` is written only by the caller while no task is open or unfinished, and read only by a thread that holds a claim; the claim's
// compare-and-swap acquires what the store that opened the loop released. The closure behind it is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

thread_local! {
    /// Whether this thread is inside a task: a loop started there runs on this thread alone.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool that computes with `threads` threads (at least one): the caller's and `threads − 1` of its own.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            open: AtomicU64::new(0),
            unfinished: AtomicUsize::new(0),
            body: UnsafeCell::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads).map(|index| {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("ernie-{index}")).spawn(move || shared.work());
            thread.expect("the system starts a thread")
        });
        Pool { workers: workers.collect(), shared, caller: Mutex::new(()) }
    }

    /// Threads that share a loop, the caller's among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body` with 0..`tasks`, in any order and on any thread of the pool, and returns when all calls have returned. Inside a task it runs
    /// them one after the other.
    ///
    /// # Panics
    /// If a call panics, after all others have returned.
    pub fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() || IN_TASK.get() {
            return (0..tasks).for_each(body);
        }
        let count = u32::try_from(tasks).expect("fewer than 2³² tasks");
        let _one_loop = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. No thread reads the pointer without a claim, no claim outlives its task, and this function does
        // not return before `unfinished` is zero.
        let forgotten = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Body>(body) };
        // SAFETY: the last loop is finished and nothing is open, so nobody reads `body` now; the lock keeps other callers away.
        unsafe { *shared.body.get() = Some(forgotten) };
        shared.unfinished.store(tasks, Ordering::Relaxed);
        let number = (shared.open.load(Ordering::Relaxed) >> 32) + 1;
        shared.open.store(number << 32 | u64::from(count), Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _sleep = shared.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        IN_TASK.set(true);
        while shared.claim() {}
        IN_TASK.set(false);
        let mut spins = 0u32;
        while shared.unfinished.load(Ordering::Acquire) > 0 {
            spins += 1;
            // The last task may be on a thread that the system has put aside for another process.
            if spins.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Cuts `data` into pieces of `size` elements, the last perhaps shorter, and calls `body` with the number of each piece and the piece.
    ///
    /// # Panics
    /// As [`Pool::run`]; if `size` is 0.
    pub fn for_each_piece<T: Send>(&self, data: &mut [T], size: usize, body: impl Fn(usize, &mut [T]) + Sync) {
        assert!(size > 0);
        let (start, len) = (Start(data.as_mut_ptr()), data.len());
        self.run(len.div_ceil(size), &|index| {
            let start = &start;
            // SAFETY: pieces of different tasks do not overlap and lie inside `data`, which is borrowed for the whole loop.
            body(index, unsafe { start.piece(index, size, len) });
        });
    }

    /// [`Pool::for_each_piece`] over three slices together, cut into equally many pieces, each slice with the size of its own. The second and the third may be
    /// empty: their pieces then are too.
    ///
    /// # Panics
    /// As [`Pool::run`]; if a size is 0 or a slice that is not empty gives another number of pieces.
    pub fn for_each_pieces<A: Send, B: Send, C: Send>(
        &self,
        first: &mut [A],
        size: usize,
        second: (&mut [B], usize),
        third: (&mut [C], usize),
        body: impl Fn(usize, &mut [A], &mut [B], &mut [C]) + Sync,
    ) {
        let ((second, second_size), (third, third_size)) = (second, third);
        assert!(size > 0 && second_size > 0 && third_size > 0);
        let (count, lens) = (first.len().div_ceil(size), (first.len(), second.len(), third.len()));
        let alike = |len: usize, size: usize| len == 0 || len.div_ceil(size) == count;
        assert!(alike(lens.1, second_size) && alike(lens.2, third_size), "slices of unlike numbers of pieces");
        let starts = (Start(first.as_mut_ptr()), Start(second.as_mut_ptr()), Start(third.as_mut_ptr()));
        self.run(count, &|index| {
            let (a, b, c) = (&starts.0, &starts.1, &starts.2);
            // SAFETY: pieces of different tasks do not overlap and lie inside slices that are borrowed for the whole loop.
            unsafe { body(index, a.piece(index, size, lens.0), b.piece(index, second_size, lens.1), c.piece(index, third_size, lens.2)) };
        });
    }

    /// Pieces of `size` elements of `data`, of which only the `chosen` ones go to `body`, each with its place in that list.
    ///
    /// # Panics
    /// As [`Pool::run`]; if `size` is 0, or the chosen pieces are not in ascending order, each once and whole.
    pub fn for_each_chosen<T: Send>(&self, data: &mut [T], size: usize, chosen: &[u32], body: impl Fn(usize, &mut [T]) + Sync) {
        assert!(size > 0 && chosen.windows(2).all(|pair| pair[0] < pair[1]), "pieces in ascending order, each once");
        assert!(chosen.last().is_none_or(|&last| (last as usize) < data.len() / size), "pieces that are there");
        let (start, len) = (Start(data.as_mut_ptr()), data.len());
        self.run(chosen.len(), &|place| {
            let start = &start;
            // SAFETY: the chosen pieces are different ones, do not overlap and lie inside `data`, which is borrowed for the whole loop.
            body(place, unsafe { start.piece(chosen[place] as usize, size, len) });
        });
    }

    /// Cuts each group of rows of `c` into blocks of `width` columns, the last perhaps narrower, and calls `body` with the number of the group,
    /// the block's first column, and the block. `groups` are ranges of rows, in ascending order and disjoint.
    ///
    /// # Panics
    /// As [`Pool::run`]; if `width` is 0 or the groups are not as described.
    pub fn for_each_block(&self, mut c: MatMut<'_>, groups: &[Range<usize>], width: usize, body: impl Fn(usize, usize, MatMut<'_>) + Sync) {
        let (rows, cols, _) = c.layout();
        let ordered = groups.windows(2).all(|pair| pair[0].end <= pair[1].start) && groups.iter().all(|group| group.start <= group.end);
        assert!(width > 0 && ordered && groups.last().is_none_or(|last| last.end <= rows), "groups of rows that overlap or do not exist");
        let blocks = cols.div_ceil(width);
        let whole = Whole(c.block(0..rows, 0..cols));
        self.run(groups.len() * blocks, &|index| {
            let (group, col) = (index / blocks, index % blocks * width);
            // SAFETY: groups are disjoint and so are their blocks of columns; each task makes one block, of a matrix borrowed for the whole loop.
            let block = unsafe { whole.block(groups[group].clone(), col..(col + width).min(cols)) };
            body(group, col, block);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _sleep = self.shared.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join(); // Its panics went to the callers.
        }
    }
}

impl Shared {
    /// Claims a task and runs it; `false` if there is none.
    fn claim(&self) -> bool {
        let mut open = self.open.load(Ordering::Acquire);
        loop {
            let left = open as u32;
            if left == 0 {
                return false;
            }
            match self.open.compare_exchange_weak(open, open - 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    // Tasks are handed out from the last to the first.
                    // SAFETY: this thread holds a claim, so the loop is not over and its closure still borrowed.
                    let body = unsafe { (*self.body.get()).map(|body| &*body) };
                    let result = catch_unwind(AssertUnwindSafe(|| body.expect("an open loop has a body")(left as usize - 1)));
                    if let Err(panic) = result {
                        *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                    }
                    self.unfinished.fetch_sub(1, Ordering::Release);
                    return true;
                }
                Err(now) => open = now,
            }
        }
    }

    /// What the pool's own threads do.
    fn work(&self) {
        IN_TASK.set(true);
        while !self.stop.load(Ordering::Relaxed) {
            if self.claim() {
                continue;
            }
            let idle_since = Instant::now();
            loop {
                if self.open.load(Ordering::Relaxed) as u32 > 0 || self.stop.load(Ordering::Relaxed) {
                    break;
                }
                if idle_since.elapsed() > AWAKE {
                    self.doze();
                    break;
                }
                for _ in 0..32 {
                    std::hint::spin_loop();
                }
            }
        }
    }

    /// Sleeps until a loop opens or the pool ends.
    fn doze(&self) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        // Either the caller sees this thread among the sleepers, or this thread sees the caller's loop: both are sequentially consistent.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.open.load(Ordering::SeqCst) as u32 == 0 && !self.stop.load(Ordering::SeqCst) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Start of a slice whose disjoint pieces go to several threads.
struct Start<T>(*mut T);

// SAFETY: the pieces are disjoint, and T may be sent.
unsafe impl<T: Send> Sync for Start<T> {}

impl<T> Start<T> {
    /// # Safety
    /// `len` elements from the start on are there, and no other piece with this index exists.
    #[allow(clippy::mut_from_ref)] // Each index stands for elements of its own.
    unsafe fn piece(&self, index: usize, size: usize, len: usize) -> &mut [T] {
        let from = (index * size).min(len);
        // SAFETY: by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), size.min(len - from)) }
    }
}

/// A matrix whose disjoint blocks go to several threads.
struct Whole<'a>(MatMut<'a>);

// SAFETY: `block` is the only access, and its caller vouches for disjointness.
unsafe impl Sync for Whole<'_> {}

impl Whole<'_> {
    /// # Safety
    /// Blocks that exist at the same time must not overlap.
    unsafe fn block(&self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_> {
        // SAFETY: by the caller.
        unsafe { self.0.alias(rows, cols) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                pool.run(tasks, &|index| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn loops_follow_each_other_after_pauses_long_enough_to_sleep() {
        let pool = Pool::new(2);
        let rounds = if cfg!(miri) { 3 } else { 200 };
        let sum = AtomicUsize::new(0);
        for round in 0..rounds {
            pool.run(5, &|index| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            if round % 20 == 0 {
                std::thread::sleep(2 * AWAKE);
            }
        }
        assert_eq!(sum.into_inner(), rounds * 10);
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        let caught = catch_unwind(AssertUnwindSafe(|| pool.run(9, &|index| assert_ne!(index, 4, "task four"))));
        assert!(caught.is_err());
        let count = AtomicUsize::new(0);
        pool.run(9, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 9);
    }

    #[test]
    fn several_callers_and_loops_inside_tasks() {
        let pool = Pool::new(2);
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        pool.run(4, &|_| {
                            pool.run(3, &|_| {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 3 * 20 * 12);
    }

    #[test]
    fn pieces_and_blocks_cover_everything_once() {
        let pool = Pool::new(2);
        let mut data = vec![0; 103];
        pool.for_each_piece(&mut data, 10, |index, piece| piece.iter_mut().for_each(|x| *x += index + 1));
        assert!(data.iter().enumerate().all(|(i, &x)| x == i / 10 + 1));
        let mut c = vec![0.0; 7 * 11];
        pool.for_each_block(MatMut::new(&mut c, 7, 11), &[0..2, 2..3, 5..7], 4, |group, col, mut block| {
            for row in 0..block.rows() {
                block.row_mut(row).iter_mut().enumerate().for_each(|(j, x)| *x += (group * 100 + col + j) as f32 + 1.0);
            }
        });
        for (i, row) in c.chunks_exact(11).enumerate() {
            let group = [Some(0), Some(0), Some(1), None, None, Some(2), Some(2)][i];
            for (j, &x) in row.iter().enumerate() {
                assert_eq!(x, group.map_or(0.0, |group| (group * 100 + j) as f32 + 1.0), "({i}, {j})");
            }
        }
    }

    #[test]
    fn chosen_pieces_are_met_once_and_the_others_never() {
        let mut data = vec![0u32; 50];
        Pool::new(3).for_each_chosen(&mut data, 5, &[1, 4, 9], |place, piece| piece.iter_mut().for_each(|x| *x += place as u32 + 1));
        let expected: Vec<u32> = (0..10)
            .flat_map(|piece| {
                [match piece {
                    1 => 1,
                    4 => 2,
                    9 => 3,
                    _ => 0,
                }; 5]
            })
            .collect();
        assert_eq!(data, expected);
        for bad in [&[3, 3][..], &[4, 2], &[0, 10]] {
            let run = || Pool::new(1).for_each_chosen(&mut [0u8; 50], 5, bad, |_, _| {});
            assert!(std::panic::catch_unwind(run).is_err(), "{bad:?}");
        }
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn groups_that_overlap_are_refused() {
        Pool::new(1).for_each_block(MatMut::new(&mut [0.0; 4], 4, 1), &[0..2, 1..4], 1, |_, _, _| {});
    }
}
