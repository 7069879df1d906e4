//! Programs that nobody here wrote: through lanes, through QUIC and the direct way they do what they do
//! without a mesh.

mod postgres;
mod redis;
mod streams;
mod web;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use harness::{Builder, Carrier, Family, Mesh, Pod, Serve, ServiceSpec, exchange, wait};

/// A mesh, or the same nodes and pods without one. The client is the pod a1.
struct World {
    name: &'static str,
    mesh: Mesh,
    /// The pod that serves, behind the service `server`.
    server: &'static str,
}

/// Where the kernel has sent the connections of node `a`'s pods.
#[derive(Clone, Copy, Debug)]
struct Ways {
    /// How many to the agent.
    carried: f64,
    /// How many from pod to pod.
    direct: f64,
}

impl World {
    /// Runs `run` in one world without a mesh, and in one for each way through it. What it returns must
    /// not differ. The programs connect to `ports`.
    fn all<T: PartialEq + std::fmt::Debug>(
        ports: &[u16],
        mut run: impl FnMut(&Self) -> Result<T>,
    ) -> Result<()> {
        let builder = |server: &str| -> Builder {
            let service = ServiceSpec::new("server").pods(&[server]);
            let service = ports.iter().fold(service, |service, port| service.port(*port, *port));
            Mesh::two_nodes_builder().service(service)
        };
        let [lane, quic] = Carrier::BOTH.map(|carrier| builder("b1").carrier(carrier));
        let mut plain = None;
        for (name, server, builder) in [
            ("plain", "b1", builder("b1").plain()),
            ("lane", "b1", lane),
            ("quic", "b1", quic),
            ("direct", "a2", builder("a2")),
        ] {
            let world = Self { name, mesh: builder.start()?, server };
            let before = if name == "direct" { Some(world.until_decided(ports)?) } else { None };
            let seen = run(&world).with_context(|| format!("in the world {name}"))?;
            match before {
                Some(before) => world.was_direct(before)?,
                None => world.was_carried()?,
            }
            match &plain {
                None => plain = Some(seen),
                Some(plain) => assert_eq!(&seen, plain, "{name} differs from plain"),
            }
        }
        Ok(())
    }

    fn client(&self) -> &Pod {
        self.mesh.pod("a1")
    }

    fn server(&self) -> &Pod {
        self.mesh.pod(self.server)
    }

    /// The service's address, as programs write it.
    fn host(&self) -> String {
        self.mesh.service("server").v4_ip().to_string()
    }

    /// A directory of this world, removed with it.
    fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.mesh.state_dir().join(name);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(dir)
    }

    /// Connects to each of these ports until that is direct: the agent carries the first connection to a
    /// destination, and decides meanwhile. None of those that follow needs it.
    fn until_decided(&self, ports: &[u16]) -> Result<Ways> {
        for port in ports {
            let _server = self.server().serve(*port, Serve::Echo)?;
            for family in Family::BOTH {
                let to = self.mesh.service("server").addr(family, *port);
                let before = self.ways()?;
                wait::until(wait::SOON, "a direct connection", || {
                    let asked =
                        self.client().connect(to).and_then(|mut one| exchange(&mut one, b"hello"));
                    asked.is_ok() && self.ways().is_ok_and(|now| now.direct > before.direct)
                })?;
            }
        }
        self.ways()
    }

    fn ways(&self) -> Result<Ways> {
        let metrics = self.mesh.agent("a").metrics()?;
        let of = |event| metrics.sum("mesh_capture_total", &[("event", event)]);
        Ok(Ways { carried: of("captured"), direct: of("direct_taken") })
    }

    /// That every connection since `before` went from pod to pod.
    fn was_direct(&self, before: Ways) -> Result<()> {
        let now = self.ways()?;
        let is_so = now.carried == before.carried && now.direct > before.direct;
        ensure!(is_so, "not all went directly: {before:?} and then {now:?}");
        Ok(())
    }

    /// That what was seen here went the way that this world is for.
    fn was_carried(&self) -> Result<()> {
        if self.name == "plain" {
            return Ok(());
        }
        let agent = self.mesh.agent("a");
        let carried = |record: &harness::Record| record.text("carrier") == self.name;
        wait::until(wait::SOON, "a record of it", || agent.access_log().iter().any(carried))
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
