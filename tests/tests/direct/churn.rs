//! Pods that come and go at one address, while others talk to it.

use std::collections::{HashMap, HashSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, Pod, PodSpec, Record, Serve, wait};

use super::kernel;

/// How long clients wait for anything: what hangs would miss the moment of the change.
const PATIENCE: Duration = Duration::from_millis(100);

/// What a client heard: who it was, and who answered.
type Heard = (SocketAddr, String);

/// Answers every byte with the name of the pod.
fn tell(name: &'static str) -> Serve {
    Serve::custom(move |mut stream| {
        let mut question = [0];
        while stream.read(&mut question)? > 0 {
            stream.write_all(name.as_bytes())?;
        }
        Ok(())
    })
}

/// Asks whoever is there, again and again; a connection may end at any time, but the one who answers it
/// stays the same.
fn ask(client: &Pod, to: SocketAddr, end: &AtomicBool) -> Result<Vec<Heard>> {
    let mut heard = Vec::new();
    while !end.load(Ordering::Acquire) {
        let connected = client.run(|| Ok(TcpStream::connect_timeout(&to, PATIENCE)?));
        let Ok(mut stream) = connected else { continue };
        stream.set_read_timeout(Some(PATIENCE))?;
        let local = stream.local_addr()?;
        let mut first = None;
        for _ in 0..50 {
            let mut answer = [0; 2];
            let asked = stream.write_all(b"?").and_then(|()| stream.read_exact(&mut answer));
            if asked.is_err() || end.load(Ordering::Acquire) {
                break;
            }
            let name = String::from_utf8(answer.into())?;
            let before = first.get_or_insert_with(|| name.clone());
            ensure!(*before == name, "{local}: {before} answered, and then {name}");
        }
        heard.extend(first.map(|name| (local, name)));
    }
    Ok(heard)
}

#[test]
fn address_that_pods_take_over_under_load_never_answers_for_another() -> Result<()> {
    harness::require!();
    const ROUNDS: usize = 6;
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a3", "a"))
        .pod(PodSpec::new("a4", "a"))
        .start()?;
    let mut server = Some(mesh.pod("a2").serve(8080, tell("a2"))?);
    let end = AtomicBool::new(false);
    let clients = [Family::V4, Family::V6, Family::V4, Family::V6];
    let (heard, directs) = thread::scope(|scope| -> Result<_> {
        let asking = clients.map(|family| {
            let (client, to) = (mesh.pod("a1"), mesh.pod("a2").addr(family, 8080));
            let end = &end;
            scope.spawn(move || ask(client, to, end))
        });
        let replaced = (|| -> Result<usize> {
            let (mut holder, mut directs) = ("a2", 0);
            for round in 0..=ROUNDS {
                let taken = kernel(&mesh, "direct_taken")?;
                let more = wait::until(wait::SOON, "direct connections", || {
                    kernel(&mesh, "direct_taken").is_ok_and(|now| now >= taken + 3.0)
                });
                more.with_context(|| format!("round {round}, {holder}"))?;
                directs += 1;
                if round < ROUNDS {
                    let next = if holder == "a3" { "a4" } else { "a3" };
                    // A pod's processes are gone before its address is given away.
                    drop(server.take());
                    server = Some(mesh.pod(next).serve(8080, tell(next))?);
                    mesh.succeed_pod("a2", holder, next)?;
                    holder = next;
                }
            }
            Ok(directs)
        })();
        end.store(true, Ordering::Release);
        let joined = asking.map(|one| one.join().unwrap_or_else(|panic| resume_unwind(panic)));
        let heard = joined.into_iter().collect::<Result<Vec<_>>>();
        Ok((heard?.concat(), replaced?))
    })?;
    assert_eq!(directs, ROUNDS + 1, "everybody was reached directly");
    let names: HashSet<_> = heard.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names.len(), 3, "{names:?}");

    // Whoever answered is who the records say.
    let records = mesh.agent("a").access_log();
    let mut by_client: HashMap<&str, Vec<&Record>> = HashMap::new();
    for record in records.iter().filter(|record| record.text("direction") == "outbound") {
        if record.number("bytes_recv") == 0 {
            continue; // Nobody has answered it: another connection from that port.
        }
        by_client.entry(record.text("src.addr")).or_default().push(record);
    }
    let (mut known, mut direct) = (0, 0);
    for (client, name) in &heard {
        // A port that was used twice is left out, as is what was still open.
        let Some([record]) = by_client.get(&*client.to_string()).map(Vec::as_slice) else {
            continue;
        };
        let identity = record.text("dst.identity");
        if identity.is_empty() {
            continue; // Of a pod that was gone when it was told.
        }
        known += 1;
        direct += usize::from(record.text("way") == "direct");
        ensure!(identity.ends_with(&format!("/sa/{name}")), "{name} answered: {record:?}");
    }
    ensure!(known > heard.len() / 2 && direct > ROUNDS, "{known} and {direct} of {}", heard.len());
    Ok(())
}
