//! A hop in user space on the link between two nodes: it loses, keeps back and refuses packets, which
//! this kernel has nothing for.
//!
//! ```text
//! node a ── nft: mark ──► ip rule ──► TUN ──► this ──► TUN ──► node a forwards ──► to-1 ──► node b
//! ```
//!
//! What the node itself sends to the other one is marked and routed into a TUN device; what is written
//! back there is forwarded as ever. Packets are cut to the link's size before they get here, so that each
//! is judged for itself. IPv4 only, over which agents talk.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::mesh::Node;
use crate::netns::{Netns, feed, sysctl};
use crate::sys;

const DEVICE: &str = "hop";
/// How often waiting packets are looked at when none comes.
const PAUSE: Duration = Duration::from_micros(200);

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Pass,
    /// It is lost, and nobody is told.
    Lose,
    /// It goes on later, behind others.
    Keep(Duration),
}

/// A hop; the link is as before when it is dropped.
#[derive(Debug)]
pub struct Hop {
    netns: Arc<Netns>,
    judged: Arc<[AtomicU64; 3]>,
    stop: Arc<AtomicBool>,
    hopping: Option<JoinHandle<()>>,
}

impl Hop {
    /// Puts one behind `node`, on its link to the node that was described `index`th. `judge` is shown
    /// every packet.
    ///
    /// # Errors
    ///
    /// Fails if the device or the rules cannot be made.
    pub fn behind(
        node: &Node,
        index: usize,
        judge: impl FnMut(&[u8]) -> Fate + Send + 'static,
    ) -> Result<Self> {
        let (netns, link) = (node.shared_netns(), node.link_to(index));
        let tun = netns.run(|| {
            let tun = sys::tun(DEVICE).context("make a TUN device")?;
            // What comes back has this node's own address.
            sysctl(&format!("net/ipv4/conf/{DEVICE}/accept_local"), "1")?;
            sysctl("net/ipv4/conf/all/rp_filter", "0")?;
            sysctl(&format!("net/ipv4/conf/{DEVICE}/rp_filter"), "0")?;
            Ok(tun)
        })?;
        netns.ip(&format!(
            "link set {DEVICE} mtu {} up\n\
             rule add fwmark 77 lookup 77 pref 77\n\
             route add default dev {DEVICE} table 77\n",
            node.mtu()
        ))?;
        // This kind of chain routes again what it has marked.
        let chain = format!(
            "table ip hop {{ chain out {{ type route hook output priority mangle; \
             oifname {link} meta mark set 77; }}; }}\n"
        );
        netns.run(|| feed(Command::new("nft").args(["-f", "-"]), &chain))?;
        let (stop, judged) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let hopping = thread::Builder::new()
            .name("hop".into())
            .spawn({
                let (stop, judged) = (Arc::clone(&stop), Arc::clone(&judged));
                move || hop(tun, judge, &stop, &judged)
            })
            .context("start a hop's thread")?;
        Ok(Self { netns, judged, stop, hopping: Some(hopping) })
    }

    /// How many packets have passed, were lost, and were kept back.
    pub fn judged(&self) -> [u64; 3] {
        [0, 1, 2].map(|fate: usize| self.judged[fate].load(Ordering::Relaxed))
    }
}

impl Drop for Hop {
    fn drop(&mut self) {
        // The rules first: what is on its way takes the link again.
        let delete = || feed(Command::new("nft").args(["-f", "-"]), "delete table ip hop\n");
        self.netns.run(delete).ok();
        self.netns.ip("rule del pref 77\n").ok();
        self.stop.store(true, Ordering::Release);
        if let Some(hopping) = self.hopping.take() {
            hopping.join().ok();
        }
    }
}

fn hop(
    mut tun: File,
    mut judge: impl FnMut(&[u8]) -> Fate,
    stop: &AtomicBool,
    judged: &[AtomicU64; 3],
) {
    let mut kept: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut packet = vec![0; 65_536];
    while !stop.load(Ordering::Acquire) {
        let read = tun.read(&mut packet);
        let now = Instant::now();
        while kept.front().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, packet)) = kept.pop_front() {
                // A packet that the kernel does not take is a lost one.
                drop(tun.write(&packet));
            }
        }
        match read {
            Ok(n) => {
                let fate = judge(&packet[..n]);
                match fate {
                    Fate::Pass => drop(tun.write(&packet[..n])),
                    Fate::Lose => {}
                    Fate::Keep(time) => {
                        let at = now + time;
                        let place = kept.partition_point(|(other, _)| *other <= at);
                        kept.insert(place, (at, packet[..n].to_vec()));
                    }
                }
                let fate = match fate {
                    Fate::Pass => 0,
                    Fate::Lose => 1,
                    Fate::Keep(_) => 2,
                };
                judged[fate].fetch_add(1, Ordering::Relaxed);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(PAUSE),
            Err(_) => return,
        }
    }
}
