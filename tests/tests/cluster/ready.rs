//! How long a pod takes to become ready, with the mesh and without, in turns.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::{Agents, Cluster, long};
use serde_json::{Value, json};

/// More than this in the middle is not the machine's noise: a pod that is held back in vain takes five.
const TOLERABLE: Duration = Duration::from_secs(2);

/// Whose pods are started.
struct Side {
    name: &'static str,
    cluster: Cluster,
    /// Whether every pod has a service account of its own, and so needs a certificate of its own.
    is_new: bool,
    took: Vec<Duration>,
}

impl Side {
    fn new(name: &'static str, annotations: &Value, is_new: bool) -> Result<Self> {
        let cluster = Cluster::namespace()?;
        cluster.annotate(annotations)?;
        Ok(Self { name, cluster, is_new, took: Vec::new() })
    }

    /// Starts a pod, waits until it is ready, and removes it again.
    fn start(&mut self, agents: &Agents, node: &str, image: &str, nth: usize) -> Result<()> {
        let name = format!("pod-{nth}");
        let account = if self.is_new { name.as_str() } else { "default" };
        if self.is_new {
            self.cluster.kubectl(&["create", "serviceaccount", account])?;
        }
        // As people have it: asked by the kubelet, which an enrolled pod has to recognise.
        let probe = json!({"httpGet": {"port": 80, "path": "/"}, "periodSeconds": 1});
        let spec = json!({
            "serviceAccountName": account,
            "containers": [{"image": image, "readinessProbe": probe}],
        });
        let began = Instant::now();
        self.cluster.start(&name, node, spec)?;
        self.cluster.ready(&name)?;
        self.took.push(began.elapsed());
        let is_enrolled = agents.workload(node, self.cluster.name(), &name)?["enrolled"] == true;
        ensure!(is_enrolled == (self.name != PLAIN), "{name} of {}: {is_enrolled}", self.name);
        // Pods that go at the same time as the next one comes would make it wait.
        self.cluster.kubectl(&["delete", "pod", &name])?;
        Ok(())
    }

    fn median(&mut self) -> Duration {
        self.took.sort();
        self.took[self.took.len() / 2]
    }
}

const PLAIN: &str = "without";

#[test]
fn pod_of_the_mesh_is_ready_as_soon_as_one_without() -> Result<()> {
    require_cluster!();
    // Whoever starts pods beside these takes their time.
    let agents = Agents::alone()?;
    let mesh = json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"});
    let mut sides = [
        Side::new(PLAIN, &json!({}), false)?,
        Side::new("mesh", &mesh, false)?,
        Side::new("mesh, new service account", &mesh, true)?,
    ];
    let node = sides[0].cluster.nodes()?.remove(0);
    let image = Cluster::load("nginx")?;
    // The first one unpacks the image.
    sides[0].start(&agents, &node, &image, 0)?;
    sides[0].took.clear();
    for nth in 1..=long::either(1, 10) {
        for side in &mut sides {
            side.start(&agents, &node, &image, nth)?;
        }
        // Nobody is always the first.
        sides.rotate_left(1);
    }
    sides.sort_by_key(|side| side.name != PLAIN);
    let plain = sides[0].median();
    for side in &mut sides {
        let middle = side.median();
        let (least, most) = (side.took[0], side.took[side.took.len() - 1]);
        long::report(&format!(
            "ready after {:.2} s ({:.2}..{:.2}), {} pods, {}",
            middle.as_secs_f32(),
            least.as_secs_f32(),
            most.as_secs_f32(),
            side.took.len(),
            side.name,
        ));
        ensure!(middle < plain + TOLERABLE, "{}: {middle:?}, and without {plain:?}", side.name);
    }
    Ok(())
}
