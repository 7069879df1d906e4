//! Redis, asked by its own command line and benchmark.

use anyhow::{Result, ensure};
use harness::Family;

use crate::World;

const PORT: u16 = 6379;

#[test]
fn redis_answers_as_without_a_mesh() -> Result<()> {
    harness::require!("redis-server", "redis-cli", "redis-benchmark", "nft");
    World::all(&[PORT], |world| {
        let args =
            ["--port", "6379", "--bind", "*", "-::*", "--protected-mode", "no", "--save", ""];
        let _redis = world.server().spawn("redis-server", &args)?;
        world.server().wait_for_port(PORT)?;
        let client = world.client();
        for family in Family::BOTH {
            let host = world.mesh.service("server").addr(family, PORT).ip().to_string();
            let cli = |args: &[&str]| client.succeed("redis-cli", &[&["-h", &host], args].concat());
            assert_eq!(cli(&["set", "key", "value"])?.trim(), "OK");
            assert_eq!(cli(&["get", "key"])?.trim(), "value");
            assert_eq!(cli(&["setrange", "big", "4000000", "x"])?.trim(), "4000001");
            assert_eq!(cli(&["get", "big"])?.len(), 4_000_002);
        }
        for (clients, pipeline) in [("1", "1"), ("20", "1"), ("20", "16")] {
            let host = world.host();
            let args = ["-h", &host, "-n", "3000", "-c", clients, "-P", pipeline];
            let args = [&args[..], &["-t", "set,get,lpush", "--csv"]].concat();
            let csv = client.succeed("redis-benchmark", &args)?;
            let rates = csv
                .lines()
                .filter_map(|line| line.split(',').nth(1)?.trim_matches('"').parse::<f64>().ok());
            let rates: Vec<f64> = rates.collect();
            ensure!(rates.len() == 3 && rates.iter().all(|rate| *rate > 0.0), "{csv}");
        }
        if world.name != "plain" {
            let labels = [("source_workload", "a1"), ("connection_security_policy", "mutual_tls")];
            let opened = "istio_tcp_connections_opened_total";
            world.mesh.agent("a").wait_for_metric(opened, &labels, 40.0)?;
        }
        Ok(())
    })
}
