//! Programs that nobody here wrote: through lanes, through QUIC and the direct way they do what they do
//! without a mesh.

mod postgres;
mod redis;
mod streams;
mod web;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use harness::{Builder, Carrier, Mesh, Pod, ServiceSpec, wait};

/// A mesh, or the same nodes and pods without one. The client is the pod a1.
struct World {
    name: &'static str,
    mesh: Mesh,
    /// The pod that serves, behind the service `server`.
    server: &'static str,
}

impl World {
    /// Runs `run` in one world without a mesh, and in one for each way through it. What it returns must
    /// not differ.
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
            let seen = run(&world).with_context(|| format!("in the world {name}"))?;
            world.was_carried()?;
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

    /// Runs a program of one connection, in the direct world until that connection is direct: the agent
    /// carries the first one, and decides meanwhile.
    fn by_its_way<T>(&self, mut run: impl FnMut() -> Result<T>) -> Result<T> {
        let direct = || -> Result<f64> {
            self.mesh.agent("a").metric("mesh_capture_total", &[("event", "direct_taken")])
        };
        loop {
            let seen = run()?;
            if self.name != "direct" || direct()? > 0.0 {
                return Ok(seen);
            }
        }
    }

    /// That what was seen here went the way that this world is for.
    fn was_carried(&self) -> Result<()> {
        let agent = match self.name {
            "plain" => return Ok(()),
            _ => self.mesh.agent("a"),
        };
        if self.name == "direct" {
            return agent.wait_for_metric("mesh_capture_total", &[("event", "direct_taken")], 1.0);
        }
        let carried = |record: &harness::Record| record.text("carrier") == self.name;
        wait::until(wait::SOON, "a record of it", || agent.access_log().iter().any(carried))
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
