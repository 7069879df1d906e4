//! Lets a worker look for work a little longer before it sleeps, as [`mesh_core::polling`] decides.

use std::cell::RefCell;
use std::future::poll_fn;
use std::mem;
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use mesh_core::polling::Polling;
use tokio::task;

thread_local! {
    static WORKER: RefCell<Option<Worker>> = const { RefCell::new(None) };
}

struct Worker {
    polling: Polling,
    /// Whose work it was last.
    task: Option<task::Id>,
    /// Of [`look_for_work`] while it rests.
    resting: Option<Waker>,
}

/// Tells that this worker has done something for a connection, and may soon have to again. Does
/// nothing on other threads.
pub fn worked() {
    WORKER.with_borrow_mut(|worker| {
        let Some(Worker { polling, task, resting }) = worker else {
            return;
        };
        let last = mem::replace(task, task::try_id());
        if polling.worked(Instant::now(), last != *task)
            && let Some(resting) = resting.take()
        {
            resting.wake();
        }
    });
}

/// Tells that this worker has nothing left to do, and is going to sleep.
pub fn ran_out() {
    WORKER.with_borrow_mut(|worker| {
        if let Some(worker) = worker {
            worker.polling.ran_out();
        }
    });
}

/// Runs on a worker for as long as it lives: while it is worthwhile the runtime finds this task ready
/// and asks the sockets instead of sleeping.
pub async fn look_for_work(most: Duration) {
    let polling = Polling::new(most, Instant::now());
    WORKER.set(Some(Worker { polling, task: None, resting: None }));
    loop {
        rest().await;
        while look_again() {
            // Whoever else wants this core has it first.
            thread::yield_now();
            task::yield_now().await;
        }
    }
}

fn look_again() -> bool {
    WORKER.with_borrow_mut(|worker| {
        worker.as_mut().is_some_and(|worker| worker.polling.looked(Instant::now()))
    })
}

/// Until [`worked`] finds that it is worthwhile.
async fn rest() {
    let mut rested = false;
    poll_fn(|cx| {
        if rested {
            return Poll::Ready(());
        }
        rested = true;
        WORKER.with_borrow_mut(|worker| {
            if let Some(worker) = worker {
                worker.resting = Some(cx.waker().clone());
            }
        });
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::runtime::Builder;
    use tokio::time::sleep;

    use super::*;

    /// How often a worker sleeps within a millisecond in which nothing happens.
    fn sleeps(most: Duration) -> u32 {
        let slept = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&slept);
        let runtime = Builder::new_current_thread()
            .enable_all()
            .on_thread_park(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            })
            .build()
            .unwrap();
        runtime.block_on(async {
            let polling = tokio::spawn(look_for_work(most));
            for _ in 0..u8::MAX {
                worked();
                ran_out();
                task::yield_now().await;
            }
            let before = slept.load(Ordering::Relaxed);
            sleep(Duration::from_millis(1)).await;
            polling.abort();
            slept.load(Ordering::Relaxed) - before
        })
    }

    #[test]
    fn worker_with_steady_work_does_not_sleep() {
        // Where this thread loses its core to another it does sleep, as it should.
        assert!((0..100).any(|_| sleeps(Duration::from_secs(60)) == 0));
    }

    #[test]
    fn worker_that_may_not_look_sleeps() {
        assert!(sleeps(Duration::ZERO) > 0);
    }
}
