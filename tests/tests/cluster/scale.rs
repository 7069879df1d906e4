//! What an agent keeps of a cluster that is large: what Services and their endpoints say, while nobody talks to them.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, long, wait};
use serde_json::{Value, json};

/// Of each service.
const ENDPOINTS: usize = 10;
/// What a service with its endpoints may take of an agent, in bytes. The names and addresses themselves are a tenth.
const A_SERVICE: u64 = 12 * 1024;
/// What an agent may take beside, in bytes: memory comes in pages, and the allocator keeps some.
const BESIDE: u64 = 2 << 20;
/// Objects in one request of `kubectl`'s.
const CHUNK: usize = 500;

/// A service and its endpoints, which are pods that nobody has asked for. No kube-proxy follows them: what it
/// would do with thousands is not what is tested.
fn service(nth: usize) -> [Value; 2] {
    let name = format!("service-{nth}");
    let others = json!({"service.kubernetes.io/service-proxy-name": "none"});
    let mut labels = others.clone();
    labels["kubernetes.io/service-name"] = json!(name);
    labels["endpointslice.kubernetes.io/managed-by"] = json!("test");
    let endpoint = |at: usize| {
        let [high, low] = u16::try_from(nth * ENDPOINTS + at).unwrap_or(u16::MAX).to_be_bytes();
        json!({
            // A network for benchmarks (RFC 2544), which no pod has.
            "addresses": [format!("198.18.{high}.{low}")],
            "conditions": {"ready": true},
            "targetRef": {"kind": "Pod", "name": format!("{name}-{at}"), "uid": format!("{nth}-{at}")},
        })
    };
    [
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": others},
            "spec": {"ports": [{"name": "http", "port": 80}]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": labels},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}],
            "endpoints": (0..ENDPOINTS).map(endpoint).collect::<Vec<_>>(),
        }),
    ]
}

#[test]
fn memory_grows_with_services_by_little() -> Result<()> {
    require_cluster!();
    if !Cluster::is_ours() {
        harness::skip!("looks at agents as processes of this machine");
    }
    let many = long::either(100, 5000);
    let agents = Agents::alone()?;
    let cluster = Cluster::namespace()?;
    let [node, _] = cluster.two_nodes()?;
    let agent = agents.process(&node)?;
    // Of this namespace: those of tests that have just ended go meanwhile.
    let ours = || -> Result<usize> {
        let services = agent.ask(&["services"])?;
        let all = services.as_array().context("no list of services")?;
        let whole = |service: &&Value| service["endpoints"] == ENDPOINTS;
        Ok(all.iter().filter(|one| one["namespace"] == cluster.name()).filter(whole).count())
    };
    let before = agent.resident()?;
    let busy_s = || Ok::<_, anyhow::Error>(agent.metrics()?.sum("process_cpu_seconds_total", &[]));
    let (began, busy_before_s) = (Instant::now(), busy_s()?);

    let objects: Vec<_> = (0..many).flat_map(service).collect();
    for chunk in objects.chunks(CHUNK) {
        cluster.create_all(chunk)?;
    }
    wait::until(wait::SOON, "all to be known", || ours().is_ok_and(|count| count == many))?;
    let (took_s, busy_s) = (began.elapsed().as_secs_f64(), busy_s()? - busy_before_s);
    long::report(&format!("made in {took_s:.0} s: {:.2} of a core for the agent", busy_s / took_s));
    // With what it took to list them.
    let grown = agent.resident()?.saturating_sub(before);
    long::report(&format!(
        "{many} services of {ENDPOINTS} endpoints: {:.1} MB more than {:.1}, {:.1} KB each",
        grown as f64 / 1e6,
        before as f64 / 1e6,
        grown as f64 / 1e3 / many as f64,
    ));
    ensure!(grown < BESIDE + A_SERVICE * u64::try_from(many)?, "{grown} bytes for {many} services");
    Ok(())
}
