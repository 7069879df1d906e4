//! What applications that do not read cost, and whom.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use mesh_core::wire::ResetReason;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::world::*;
use crate::relay::{Outcome, RelayEnd};
use crate::tunnel::*;

const MIB: u64 = 1 << 20;

/// Flows whose clients send for ever and whose applications read nothing.
struct Stalled {
    apps: Vec<TcpStream>,
    relays: Vec<JoinHandle<Result<RelayEnd, OpenError>>>,
    _writers: JoinSet<()>,
}

impl Stalled {
    async fn new(client: &Client, flows: usize) -> Self {
        let (address, mut apps) = application().await;
        let mut this = Self { apps: Vec::new(), relays: Vec::new(), _writers: JoinSet::new() };
        for _ in 0..flows {
            let (mut user, relay) = client.connect(address).await;
            this.apps.push(apps.recv().await.unwrap());
            this.relays.push(relay);
            this._writers.spawn(async move {
                let chunk = vec![7; 1 << 16];
                while user.write_all(&chunk).await.is_ok() {}
            });
        }
        this
    }
}

/// A flow of somebody else, through the same connection.
async fn another_passes(client: &Client) {
    let exchange = async {
        let (address, mut apps) = application().await;
        let (mut user, relay) = client.connect(address).await;
        let mut app = apps.recv().await.unwrap();
        let sent = vec![1; 200_000];
        let mut received = vec![0; sent.len()];
        let (written, read) = tokio::join!(user.write_all(&sent), app.read_exact(&mut received));
        written.unwrap();
        read.unwrap();
        drop((user, app));
        relay.await.unwrap().unwrap();
    };
    timeout(Duration::from_secs(10), exchange).await.expect("held up by readers that stall");
}

#[tokio::test]
async fn readers_that_stall_hold_up_nobody_else_and_are_left_alone_while_there_is_room() {
    const FLOWS: usize = 20;
    let config = config(CarrierChoice::Quic);
    let credit = config.quic_credit.clone();
    let (agent, client) = world_with(&Ca::new(), config).await;
    let stalled = Stalled::new(&client, FLOWS).await;
    until("what they hold is lent", || credit.lent() > FLOWS as u64 * MIB).await;
    for _ in 0..3 {
        another_passes(&client).await;
    }
    assert!(stalled.relays.iter().all(|relay| !relay.is_finished()));
    assert_eq!(agent.stats.flows_given_up.load(Relaxed), 0);
    assert_eq!(client.stats.dials.load(Relaxed), 1);
    assert!(credit.lent() < 64 * MIB, "{}", credit.lent());
}

#[tokio::test]
async fn readers_that_stall_are_reset_when_there_is_no_room_for_the_others() {
    const FLOWS: usize = 24;
    // Half of it is one connection's, and a quarter of that for who reads.
    let credit = Credit::new(32 * MIB);
    let config = TunnelConfig { quic_credit: credit.clone(), ..config(CarrierChoice::Quic) };
    let (agent, client) = world_with(&Ca::new(), config).await;
    let stalled = Stalled::new(&client, FLOWS).await;
    until("some are given up", || agent.stats.flows_given_up.load(Relaxed) > 0).await;
    another_passes(&client).await;
    assert!(credit.lent() <= 32 * MIB);
    let mut reset = [false; FLOWS];
    until("both applications of those see a reset", || {
        let given_up = agent.stats.flows_given_up.load(Relaxed);
        for (reset, app) in reset.iter_mut().zip(&stalled.apps) {
            *reset |= app.take_error().unwrap().is_some();
        }
        stalled.relays.iter().filter(|relay| relay.is_finished()).count() as u64 == given_up
            && reset.iter().filter(|reset| **reset).count() as u64 == given_up
    })
    .await;
    for relay in stalled.relays.into_iter().filter(JoinHandle::is_finished) {
        let outcome = relay.await.unwrap().unwrap().outcome;
        assert_eq!(outcome, Outcome::PeerReset(ResetReason::Internal));
    }
}

#[tokio::test]
async fn connections_for_which_nothing_is_left_are_refused() {
    // One end's window, and none for the other end.
    let config = TunnelConfig { quic_credit: Credit::new(MIB), ..config(CarrierChoice::Quic) };
    let (agent, client) = world_with(&Ca::new(), config).await;
    let (_user, app) = pair().await;
    let to = "10.0.0.2:80".parse().unwrap();
    let error = client.open(&app, to, &mut Held::default()).await.unwrap_err();
    assert!(error.may_retry(), "{error:?}");
    assert_eq!(agent.stats.refusals_for(Side::Server, "overloaded"), 1);
}
