//! The listeners of a pod that is enrolled, and which worker accepts at which.

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::error;

use super::Pods;
use crate::capture::Listeners;
use crate::node::LocalPod;
use crate::{inbound, outbound, serve};

/// What the kernel's configuration of a pod has room for.
const MAX_LISTENERS: usize = 16;
/// So many that the source ports of one address (28,000 by default) are not the limit of a busy pod.
const MIN_OUTBOUND_LISTENERS: usize = 4;

/// The same number for every worker, since connections take turns over them.
pub(super) fn outbound_per_address(workers: usize) -> usize {
    let each = MIN_OUTBOUND_LISTENERS.div_ceil(workers);
    (workers * each).min(MAX_LISTENERS)
}

/// One for every worker.
pub(super) fn inbound_per_address(workers: usize) -> usize {
    workers.min(MAX_LISTENERS)
}

impl Pods {
    /// Spreads the pod's listeners over the workers.
    pub(super) fn serve(
        &mut self,
        pod: &Arc<LocalPod>,
        listeners: Listeners,
        addresses: usize,
    ) -> watch::Sender<bool> {
        let (stop, stopped) = watch::channel(false);
        // The list has all addresses with their first listener, then all with their second.
        let workers = self.contexts.len();
        let worker_of = |index: usize| (index / addresses) % workers;
        for (index, listener) in listeners.outbound.into_iter().enumerate() {
            let worker = worker_of(index);
            let (context, pod) = (Arc::clone(&self.contexts[worker]), Arc::clone(pod));
            // A socket that is bound has an address; at port 0 nothing was captured.
            let port = listener.local_addr().map_or(0, |own| own.port());
            self.listen(worker, listener, &stopped, move |app, from| {
                outbound::carry(Arc::clone(&context), Arc::clone(&pod), app, from, port)
            });
        }
        for (index, listener) in listeners.inbound.into_iter().enumerate() {
            let worker = worker_of(index);
            let (context, pod) = (Arc::clone(&self.contexts[worker]), Arc::clone(pod));
            self.listen(worker, listener, &stopped, move |peer, from| {
                let (context, pod) = (Arc::clone(&context), Arc::clone(&pod));
                let opens = context.node.opening.begin();
                async move { inbound::serve_plain(&context, &pod, peer, from, opens).await }
            });
        }
        stop
    }

    fn listen<H, F>(
        &mut self,
        worker: usize,
        listener: std::net::TcpListener,
        stopped: &watch::Receiver<bool>,
        handle: H,
    ) where
        H: Fn(tokio::net::TcpStream, std::net::SocketAddr) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let permits = Arc::clone(&self.contexts[worker].node.connections);
        let stopped = stopped.clone();
        // What waits to be accepted is on its way too.
        let opens = self.contexts[worker].node.opening.begin();
        // Registered with the worker's own runtime, whose thread alone then wakes for it.
        let serving = self.workers.spawn(worker, async move {
            match TcpListener::from_std(listener) {
                Ok(listener) => serve::serve(listener, permits, stopped, opens, handle).await,
                Err(error) => error!(%error, stage = "capture", "a pod's listener is lost"),
            }
        });
        self.serving.spawn(async move {
            if let Err(error) = serving.await {
                error!(%error, "a pod's listener ended early");
            }
        });
    }
}
