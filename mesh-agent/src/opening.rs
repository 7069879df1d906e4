//! What has been accepted and is not established yet: an agent that ends lets it come to something first.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Counts them.
#[derive(Debug, Default)]
pub struct Opening {
    count: AtomicUsize,
    none: Notify,
}

/// One of them, for as long as this is not dropped.
#[derive(Debug)]
pub struct Opens(Arc<Opening>);

impl Opening {
    /// One more.
    pub fn begin(self: &Arc<Self>) -> Opens {
        self.count.fetch_add(1, Ordering::Relaxed);
        Opens(Arc::clone(self))
    }

    /// Waits until there is none. Cancel-safe.
    pub async fn none(&self) {
        loop {
            // Before the look, or the last one could go between the two unseen.
            let mut gone = std::pin::pin!(self.none.notified());
            gone.as_mut().enable();
            if self.count.load(Ordering::Acquire) == 0 {
                return;
            }
            gone.await;
        }
    }
}

impl Drop for Opens {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::Release) == 1 {
            self.0.none.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_waits_waits_for_the_last_one() {
        let opening = Arc::new(Opening::default());
        opening.none().await;
        let [first, second] = [opening.begin(), opening.begin()];
        drop(first);
        let waited = timeout(Duration::from_secs(1), opening.none()).await;
        assert!(waited.is_err(), "the second one is there still");
        let (all, waiting) =
            (Arc::clone(&opening), tokio::spawn(async move { opening.none().await }));
        tokio::task::yield_now().await;
        let third = all.begin();
        drop(second);
        drop(third);
        waiting.await.unwrap();
    }
}
